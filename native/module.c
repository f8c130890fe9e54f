/* codecllm._native: the native core as a module of Python. It checks types and sizes; the interpreter's lock is
 * released while the core works. codecllm/formats/native.py says what each function means.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <stdlib.h>

#include "core.h"

/* A view of a bytes-like argument; None gives a NULL buffer where it is allowed. */
static int view_of(PyObject *object, Py_buffer *view, int writable)
{
    memset(view, 0, sizeof *view);
    if (object == Py_None)
        return 0;
    return PyObject_GetBuffer(object, view, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE);
}

static void release(Py_buffer *view)
{
    if (view->obj)
        PyBuffer_Release(view);
}

static PyObject *refuse(const char *text)
{
    PyErr_SetString(PyExc_ValueError, text);
    return NULL;
}

static PyObject *py_xxh3(PyObject *self, PyObject *data)
{
    Py_buffer view;
    (void)self;
    if (PyObject_GetBuffer(data, &view, PyBUF_SIMPLE))
        return NULL;
    if (view.len == 0 || view.len % SLOT_ALIGNMENT) {
        PyBuffer_Release(&view);
        return refuse("size is not a multiple of 16");
    }
    uint64_t hash;
    Py_BEGIN_ALLOW_THREADS
    hash = xxh3_of_slot(view.buf, (size_t)view.len);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    return PyLong_FromUnsignedLongLong(hash);
}

static PyObject *py_check_slots(PyObject *self, PyObject *args)
{
    Py_buffer slots, records, raw_bytes;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*y*", &slots, &records, &raw_bytes))
        return NULL;
    int64_t wrong = -2;
    if (records.len % RECORD_BYTES == 0 && raw_bytes.len == records.len / RECORD_BYTES * 8 &&
        (uintptr_t)raw_bytes.buf % 8 == 0) {
        Py_BEGIN_ALLOW_THREADS
        wrong = check_slots(slots.buf, (size_t)slots.len, records.buf, raw_bytes.buf,
                            (size_t)records.len / RECORD_BYTES);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&slots);
    PyBuffer_Release(&records);
    PyBuffer_Release(&raw_bytes);
    return wrong == -2 ? refuse("slots and records do not fit each other") : PyLong_FromLongLong(wrong);
}

static int frequencies_of(const Py_buffer *view, uint16_t frequency[256])
{
    if (view->len != 512)
        return -1;
    memcpy(frequency, view->buf, 512);
    return 0;
}

static PyObject *py_rans_decode(PyObject *self, PyObject *args)
{
    Py_buffer stored, frequencies, symbols;
    uint16_t frequency[256];
    int precision, wrong = -2;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*iw*", &stored, &frequencies, &precision, &symbols))
        return NULL;
    rans_table *table = PyMem_Malloc(sizeof *table);
    if (table && !frequencies_of(&frequencies, frequency) && !rans_build_table(frequency, precision, table)) {
        Py_BEGIN_ALLOW_THREADS
        wrong = rans_decode(stored.buf, (size_t)stored.len, table, symbols.buf, (size_t)symbols.len);
        Py_END_ALLOW_THREADS
    }
    int no_memory = !table;
    PyMem_Free(table);
    PyBuffer_Release(&stored);
    PyBuffer_Release(&frequencies);
    PyBuffer_Release(&symbols);
    if (no_memory)
        return PyErr_NoMemory();
    return wrong == -2 ? refuse("not the frequencies of a table") : PyBool_FromLong(wrong == 0);
}

static PyObject *py_rans_encode(PyObject *self, PyObject *args)
{
    Py_buffer symbols, frequencies;
    uint16_t frequency[256];
    rans_coder coder;
    int precision;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*i", &symbols, &frequencies, &precision))
        return NULL;
    PyObject *stored = NULL;
    size_t bound = rans_encode_bound((size_t)symbols.len), size = 0;
    uint8_t *buffer = NULL;
    if (frequencies_of(&frequencies, frequency) || rans_build_coder(frequency, precision, &coder)) {
        refuse("not the frequencies of a table");
    } else if (!(buffer = malloc(bound))) {
        PyErr_NoMemory();
    } else {
        Py_BEGIN_ALLOW_THREADS
        size = rans_encode(symbols.buf, (size_t)symbols.len, &coder, buffer);
        Py_END_ALLOW_THREADS
        if (size)
            stored = PyBytes_FromStringAndSize((const char *)buffer + bound - size, (Py_ssize_t)size);
        else
            refuse("a symbol has no frequency in the table");
    }
    free(buffer);
    PyBuffer_Release(&symbols);
    PyBuffer_Release(&frequencies);
    return stored;
}

static PyObject *py_rans_fit(PyObject *self, PyObject *args)
{
    Py_buffer counts, log2_table;
    uint16_t frequency[256];
    int precision = -1;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*", &counts, &log2_table))
        return NULL;
    if (counts.len == 256 * 8 && log2_table.len == ((1 << MAX_PRECISION) + 2) * 8 &&
        (uintptr_t)counts.buf % 8 == 0 && (uintptr_t)log2_table.buf % 8 == 0) {
        Py_BEGIN_ALLOW_THREADS
        precision = rans_fit(counts.buf, log2_table.buf, frequency);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&counts);
    PyBuffer_Release(&log2_table);
    if (precision < MIN_PRECISION)
        return refuse("not the counts of symbols");
    return Py_BuildValue("iy#", precision, (const char *)frequency, (Py_ssize_t)sizeof frequency);
}

static PyObject *py_histogram(PyObject *self, PyObject *args)
{
    Py_buffer data;
    Py_ssize_t stride = 1;
    int64_t counts[256] = {0};
    (void)self;
    if (!PyArg_ParseTuple(args, "y*|n", &data, &stride))
        return NULL;
    if (stride < 1 || stride > 1 << 20) {
        PyBuffer_Release(&data);
        return refuse("stride is out of range");
    }
    Py_BEGIN_ALLOW_THREADS
    /* Four counters a symbol: equal neighbours would wait for each other's addition. */
    static const int WAYS = 4;
    uint32_t part[4][256];
    const uint8_t *symbols = data.buf;
    Py_ssize_t at = 0, most = (Py_ssize_t)1 << 30;
    while (at < data.len) {
        Py_ssize_t end = data.len - at > most ? at + most : data.len;
        memset(part, 0, sizeof part);
        for (; end - at > (WAYS - 1) * stride; at += WAYS * stride)
            for (int way = 0; way < WAYS; way++)
                part[way][symbols[at + way * stride]]++;
        for (; at < end; at += stride)
            part[0][symbols[at]]++;
        for (int symbol = 0; symbol < 256; symbol++)
            for (int way = 0; way < WAYS; way++)
                counts[symbol] += part[way][symbol];
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&data);
    return PyBytes_FromStringAndSize((const char *)counts, sizeof counts);
}

/* ---- converter ------------------------------------------------------------------------------------------------------ */

static int is_aligned(const Py_buffer *view, int itemsize)
{
    return itemsize > 0 && (uintptr_t)view->buf % (uintptr_t)itemsize == 0 && view->len % itemsize == 0;
}

static PyObject *py_split_planes(PyObject *self, PyObject *args)
{
    Py_buffer elements, planes;
    int itemsize, rotate, fits;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*iiw*", &elements, &itemsize, &rotate, &planes))
        return NULL;
    fits = (itemsize == 1 || itemsize == 2 || itemsize == 4 || itemsize == 8) && is_aligned(&elements, itemsize) &&
           elements.len == planes.len;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        size_t count = (size_t)elements.len / (size_t)itemsize;
        uint8_t *plane[MAX_PLANES];
        for (int number = 0; number < itemsize; number++)
            plane[number] = (uint8_t *)planes.buf + (size_t)number * count;
        kernels()->split(elements.buf, itemsize, rotate, count, plane);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&elements);
    PyBuffer_Release(&planes);
    if (!fits)
        return refuse("planes do not fit the elements");
    Py_RETURN_NONE;
}

static PyObject *py_row_largest(PyObject *self, PyObject *args)
{
    Py_buffer words, out;
    int itemsize, fits;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*iw*", &words, &itemsize, &out))
        return NULL;
    fits = (itemsize == 2 || itemsize == 4) && is_aligned(&words, itemsize) && is_aligned(&out, itemsize) && out.len;
    size_t rows = fits ? (size_t)(out.len / itemsize) : 1, count = fits ? (size_t)(words.len / itemsize) : 0;
    fits = fits && count % rows == 0;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        const uint8_t *at = words.buf;
        for (size_t row = 0; row < rows; row++, at += count / rows * (size_t)itemsize) {
            uint32_t most = kernels()->largest(at, itemsize, count / rows);
            if (itemsize == 2)
                ((uint16_t *)out.buf)[row] = (uint16_t)most;
            else
                ((uint32_t *)out.buf)[row] = most;
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&words);
    PyBuffer_Release(&out);
    if (!fits)
        return refuse("rows do not fit the words");
    Py_RETURN_NONE;
}

static float largest_error(const void *words, int itemsize, size_t rows, size_t cols, const float *scales, int by_column,
                           int8_t *codes)
{
    float worst = 0;
    for (size_t row = 0; row < rows; row++) {
        const void *at = (const uint8_t *)words + row * cols * (size_t)itemsize;
        float scale = by_column ? 1.0f : scales[row];
        uint32_t bits = kernels()->quantize(at, itemsize, cols, scale, by_column ? scales : NULL, codes + row * cols);
        float error;
        memcpy(&error, &bits, sizeof error);
        error *= scale;
        worst = error > worst ? error : worst;
    }
    return worst;
}

static PyObject *py_quantize(PyObject *self, PyObject *args)
{
    Py_buffer words, scales, codes;
    int itemsize, by_column, fits;
    float worst = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*iy*pw*", &words, &itemsize, &scales, &by_column, &codes))
        return NULL;
    fits = (itemsize == 2 || itemsize == 4) && is_aligned(&words, itemsize) && is_aligned(&scales, 4) &&
           codes.len == words.len / itemsize && scales.len > 0;
    size_t given = fits ? (size_t)scales.len / 4 : 1, count = fits ? (size_t)codes.len : 0;
    fits = fits && count % given == 0;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        size_t rows = by_column ? count / given : given;
        worst = largest_error(words.buf, itemsize, rows, count / (rows ? rows : 1), scales.buf, by_column, codes.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&words);
    PyBuffer_Release(&scales);
    PyBuffer_Release(&codes);
    return fits ? PyFloat_FromDouble(worst) : refuse("codes or scales do not fit the words");
}

/* ---- loader ----------------------------------------------------------------------------------------------------------- */

enum { SLOTS, RECORDS, TABLES, OFFSETS, SCALES, COL_SCALES, ORDER, OUT, SCRATCH, VIEWS };

/* Takes the symbols of chunks that the caller decoded: a list with a bytes-like object or None for each. */
static int take_given(PyObject *list, size_t chunks, Py_buffer *views, const uint8_t **given, size_t *given_bytes)
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
    if (!is_aligned(&views[OFFSETS], 8) || !is_aligned(&views[SCALES], 4) || !is_aligned(&views[COL_SCALES], 4) ||
        !is_aligned(&views[ORDER], 4) || views[RECORDS].len % RECORD_BYTES)
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
    return decode_run_scratch(run) && (uint64_t)views[RECORDS].len / RECORD_BYTES == tiles * (uint64_t)run->planes
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
    Py_BEGIN_ALLOW_THREADS
    wrong = decode_run(run);
    Py_END_ALLOW_THREADS
done:
    for (size_t chunk = 0; views && chunk < chunks; chunk++)
        release(&views[chunk]);
    PyMem_Free(views);
    PyMem_Free(given);
    PyMem_Free(given_bytes);
    return wrong;
}

static PyObject *py_decode_run(PyObject *self, PyObject *args)
{
    PyObject *objects[VIEWS], *list;
    Py_buffer views[VIEWS];
    tile_run run;
    unsigned long long rows, cols, tile_rows, tile_cols, first_tile, last_tile, group_rows, group_cols;
    int64_t wrong = -3;
    int taken = 0;
    (void)self;
    memset(&run, 0, sizeof run);
    if (!PyArg_ParseTuple(args, "OOOp(KKKK)(KK)i(OO)(KK)iippi(OpOO)OO", &objects[SLOTS], &objects[RECORDS], &list,
                          &run.checked, &rows, &cols, &tile_rows, &tile_cols, &first_tile, &last_tile, &run.planes,
                          &objects[TABLES], &objects[OFFSETS], &group_rows, &group_cols, &run.finish, &run.target,
                          &run.rotate, &run.boolean, &run.itemsize, &objects[SCALES], &run.by_column,
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
    return wrong == -2 ? refuse("the sizes of a run of tiles do not fit each other") : PyLong_FromLongLong(wrong);
}

static PyObject *py_scratch_bytes(PyObject *self, PyObject *args)
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

/* ---- module ------------------------------------------------------------------------------------------------------------ */

static PyObject *py_kernels(PyObject *self, PyObject *args)
{
    const kernel_set *sets[3];
    size_t count = kernels_supported(sets);
    (void)self;
    (void)args;
    PyObject *names = PyTuple_New((Py_ssize_t)count);
    for (size_t number = 0; names && number < count; number++) {
        PyObject *name = PyUnicode_FromString(sets[number]->name);
        if (!name || PyTuple_SetItem(names, (Py_ssize_t)number, name)) {
            Py_DECREF(names);
            return NULL;
        }
    }
    return names;
}

static PyObject *py_in_use(PyObject *self, PyObject *args)
{
    (void)self;
    (void)args;
    return PyUnicode_FromString(kernels()->name);
}

static PyObject *py_use(PyObject *self, PyObject *args)
{
    const char *name;
    (void)self;
    if (!PyArg_ParseTuple(args, "s", &name))
        return NULL;
    if (kernels_use(name))
        return refuse("this machine cannot run these kernels");
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"xxh3", py_xxh3, METH_O, "xxh3(data) -> int: XXH3-64 of data whose size is a multiple of 16"},
    {"check_slots", py_check_slots, METH_VARARGS, "check_slots(slots, records, raw_bytes) -> int: first wrong chunk, or -1"},
    {"rans_decode", py_rans_decode, METH_VARARGS, "rans_decode(stored, frequencies, precision, symbols) -> bool"},
    {"rans_encode", py_rans_encode, METH_VARARGS, "rans_encode(symbols, frequencies, precision) -> bytes"},
    {"rans_fit", py_rans_fit, METH_VARARGS, "rans_fit(counts, log2_table) -> (precision, frequencies)"},
    {"histogram", py_histogram, METH_VARARGS, "histogram(symbols, stride=1) -> bytes of int64 [256]"},
    {"split_planes", py_split_planes, METH_VARARGS, "split_planes(elements, itemsize, rotate, planes)"},
    {"row_largest", py_row_largest, METH_VARARGS, "row_largest(words, itemsize, out)"},
    {"quantize", py_quantize, METH_VARARGS, "quantize(words, itemsize, scales, by_column, codes) -> float"},
    {"decode_run", py_decode_run, METH_VARARGS, "decode_run(...) -> int: first wrong chunk of the run, or -1"},
    {"scratch_bytes", py_scratch_bytes, METH_VARARGS, "scratch_bytes(grid, planes) -> int"},
    {"kernels", py_kernels, METH_NOARGS, "kernels() -> names of the kernels that this machine can run, the best first"},
    {"in_use", py_in_use, METH_NOARGS, "in_use() -> name of the kernels in use"},
    {"use", py_use, METH_VARARGS, "use(name): takes other kernels, for tests"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot module_slots[] = {{0, NULL}};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "codecllm._native",
    .m_doc = "The native core of codecllm; codecllm.formats.native says what each function means.",
    .m_methods = methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&module);
}
