/* The functions of the module that decode runs of tiles. */
#include "module.h"

enum { SLOTS, RECORDS, TABLES, OFFSETS, SCALES, COL_SCALES, ORDER, OUT, SCRATCH, VIEWS };

/* Takes the symbols of chunks that the caller decoded: a list with a bytes-like object or None for
 * each. */
static int take_given(PyObject *list, size_t chunks, Py_buffer *views, const uint8_t **given,
                      size_t *given_bytes)
{
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        PyObject *item = PyList_GetItem(list, (Py_ssize_t)chunk);
        if (!item || view_of(item, &views[chunk], 0))
            return -1;
        given[chunk] = views[chunk].obj ? views[chunk].buf : NULL;
        given_bytes[chunk] = (size_t)views[chunk].len;
    }
    return 0;
}

static int sides_of(tile_run *run, const Py_buffer views[VIEWS])
{
    if (!is_aligned(&views[OFFSETS], 8) || !is_aligned(&views[SCALES], 4) ||
        !is_aligned(&views[COL_SCALES], 4) || !is_aligned(&views[ORDER], 4) ||
        views[RECORDS].len % RECORD_BYTES)
        return -1;
    if (views[TABLES].obj && views[OFFSETS].len < 8)
        return -1;
    run->slots = views[SLOTS].buf;
    run->slots_bytes = (size_t)views[SLOTS].len;
    run->records = views[RECORDS].buf;
    run->tables = views[TABLES].obj ? views[TABLES].buf : NULL;
    run->tables_bytes = (size_t)views[TABLES].len;
    run->table_offsets = views[OFFSETS].buf;
    run->table_count = views[OFFSETS].len ? (size_t)views[OFFSETS].len / 8 - 1 : 0;
    run->scales = views[SCALES].buf;
    run->scale_count = (size_t)views[SCALES].len / 4;
    run->col_scales = views[COL_SCALES].obj ? views[COL_SCALES].buf : NULL;
    run->col_scale_count = (size_t)views[COL_SCALES].len / 4;
    run->order = views[ORDER].obj ? views[ORDER].buf : NULL;
    run->order_count = (size_t)views[ORDER].len / 4;
    run->out = views[OUT].buf;
    run->out_bytes = (size_t)views[OUT].len;
    run->scratch = views[SCRATCH].buf;
    run->scratch_bytes = (size_t)views[SCRATCH].len;
    uint64_t tiles = run->last_tile - run->first_tile;
    return decode_run_scratch(run) &&
                   (uint64_t)views[RECORDS].len / RECORD_BYTES == tiles * (uint64_t)run->planes
               ? 0
               : -1;
}

static int64_t run_with(tile_run *run, PyObject *list)
{
    size_t chunks = (size_t)(run->last_tile - run->first_tile) * (size_t)run->planes;
    Py_buffer *views = NULL;
    const uint8_t **given = NULL;
    size_t *given_bytes = NULL;
    int64_t wrong = -3;
    if (list != Py_None) {
        if (!PyList_Check(list) || PyList_Size(list) != (Py_ssize_t)chunks)
            return -2;
        views = PyMem_Calloc(chunks + 1, sizeof *views);
        given = PyMem_Calloc(chunks + 1, sizeof *given);
        given_bytes = PyMem_Calloc(chunks + 1, sizeof *given_bytes);
        if (!views || !given || !given_bytes) {
            PyErr_NoMemory();
            goto done;
        }
        if (take_given(list, chunks, views, given, given_bytes))
            goto done;
        run->given = given;
        run->given_bytes = given_bytes;
    }
    Py_BEGIN_ALLOW_THREADS wrong = decode_run(run);
    Py_END_ALLOW_THREADS done : for (size_t chunk = 0; views && chunk < chunks; chunk++)
                                    release(&views[chunk]);
    PyMem_Free(views);
    PyMem_Free(given);
    PyMem_Free(given_bytes);
    return wrong;
}

PyObject *py_decode_run(PyObject *self, PyObject *args)
{
    PyObject *objects[VIEWS], *list;
    Py_buffer views[VIEWS];
    tile_run run;
    unsigned long long rows, cols, tile_rows, tile_cols, first_tile, last_tile, group_rows,
        group_cols;
    int64_t wrong = -3;
    int taken = 0;
    (void)self;
    memset(&run, 0, sizeof run);
    if (!PyArg_ParseTuple(
            args, "OOOp(KKKK)(KK)i(OO)(KK)iippi(OpOO)OO", &objects[SLOTS], &objects[RECORDS], &list,
            &run.checked, &rows, &cols, &tile_rows, &tile_cols, &first_tile, &last_tile,
            &run.planes, &objects[TABLES], &objects[OFFSETS], &group_rows, &group_cols, &run.finish,
            &run.target, &run.rotate, &run.boolean, &run.itemsize, &objects[SCALES], &run.by_column,
            &objects[COL_SCALES], &objects[ORDER], &objects[OUT], &objects[SCRATCH]))
        return NULL;
    run.rows = rows;
    run.cols = cols;
    run.tile_rows = tile_rows;
    run.tile_cols = tile_cols;
    run.first_tile = first_tile;
    run.last_tile = last_tile;
    run.group_rows = group_rows;
    run.group_cols = group_cols;
    for (taken = 0; taken < VIEWS; taken++)
        if (view_of(objects[taken], &views[taken], taken == OUT || taken == SCRATCH))
            break;
    if (taken == VIEWS) {
        wrong = sides_of(&run, views) ? -2 : run_with(&run, list);
    }
    for (int number = 0; number < taken; number++)
        release(&views[number]);
    if (wrong == -3)
        return NULL;
    return wrong == -2 ? refuse("the sizes of a run of tiles do not fit each other")
                       : PyLong_FromLongLong(wrong);
}

PyObject *py_scratch_bytes(PyObject *self, PyObject *args)
{
    tile_run run;
    unsigned long long rows, cols, tile_rows, tile_cols;
    (void)self;
    memset(&run, 0, sizeof run);
    if (!PyArg_ParseTuple(args, "(KKKK)i", &rows, &cols, &tile_rows, &tile_cols, &run.planes))
        return NULL;
    run.rows = rows;
    run.cols = cols;
    run.tile_rows = tile_rows;
    run.tile_cols = tile_cols;
    size_t size = decode_run_scratch(&run);
    return size ? PyLong_FromSize_t(size) : refuse("tiles are impossible");
}
