/* The function of the module that packs a block. */
#include "module.h"

enum { SYMBOLS, RAW_BYTES, LOW_BITS, LOG2, SLOTS, RECORDS, COUNTS, SCRATCH, VIEWS };

static const char WRITABLE[VIEWS] = {[SLOTS] = 1, [RECORDS] = 1, [COUNTS] = 1, [SCRATCH] = 1};

static int sides_of(packing *job, const Py_buffer views[VIEWS])
{
    if (!is_aligned(&views[RAW_BYTES], 8) || !is_aligned(&views[LOG2], 8) ||
        !is_aligned(&views[COUNTS], 4))
        return -1;
    job->symbols = views[SYMBOLS].buf;
    job->symbols_bytes = (size_t)views[SYMBOLS].len;
    job->raw_bytes = views[RAW_BYTES].buf;
    job->chunks = (size_t)views[RAW_BYTES].len / 8;
    job->low_bits = views[LOW_BITS].obj ? views[LOW_BITS].buf : NULL;
    job->log2_table = views[LOG2].buf;
    job->slots = views[SLOTS].buf;
    job->slots_bytes = (size_t)views[SLOTS].len;
    job->records = views[RECORDS].buf;
    job->counts = views[COUNTS].buf;
    job->scratch = views[SCRATCH].buf;
    job->scratch_bytes = (size_t)views[SCRATCH].len;
    if (job->low_bits && (size_t)views[LOW_BITS].len != job->chunks)
        return -1;
    if (job->codec == CODEC_RANS && views[LOG2].len != ((1 << MAX_PRECISION) + 2) * 8)
        return -1;
    return (size_t)views[RECORDS].len == job->chunks * RECORD_BYTES &&
                   (size_t)views[COUNTS].len == job->chunks * 256 * 4
               ? 0
               : -1;
}

static PyObject *list_tables(const packing *job, size_t count)
{
    PyObject *tables = PyList_New((Py_ssize_t)count);
    for (size_t number = 0; tables && number < count; number++) {
        PyObject *table = PyBytes_FromStringAndSize(
            (const char *)job->tables + RANS_MOST_TABLE_BYTES * number, job->table_bytes[number]);
        if (!table || PyList_SetItem(tables, (Py_ssize_t)number, table)) {
            Py_DECREF(tables);
            return NULL;
        }
    }
    return tables;
}

/* The memory whose size follows from the numbers of chunks and places. */
typedef struct {
    Py_buffer *views;
    const uint8_t **frames;
    size_t *frame_bytes;
    size_t taken;
} frame_views;

static int take_frames(PyObject *list, packing *job, frame_views *memory)
{
    if (!PyList_Check(list) || PyList_Size(list) != (Py_ssize_t)job->chunks) {
        refuse("there is not one frame for each chunk");
        return -1;
    }
    memory->views = PyMem_Calloc(job->chunks + 1, sizeof *memory->views);
    memory->frames = PyMem_Calloc(job->chunks + 1, sizeof *memory->frames);
    memory->frame_bytes = PyMem_Calloc(job->chunks + 1, sizeof *memory->frame_bytes);
    if (!memory->views || !memory->frames || !memory->frame_bytes) {
        PyErr_NoMemory();
        return -1;
    }
    for (; memory->taken < job->chunks; memory->taken++) {
        PyObject *item = PyList_GetItem(list, (Py_ssize_t)memory->taken);
        Py_buffer *view = &memory->views[memory->taken];
        if (!item || view_of(item, view, 0))
            return -1;
        memory->frames[memory->taken] = view->obj ? view->buf : NULL;
        memory->frame_bytes[memory->taken] = (size_t)view->len;
    }
    job->frames = memory->frames;
    job->frame_bytes = memory->frame_bytes;
    return 0;
}

static PyObject *pack_with(packing *job, PyObject *list)
{
    frame_views memory = {0};
    size_t count = job->codec == CODEC_RANS ? tables_of(job) : 0;
    int64_t size = -2;
    PyObject *tables = NULL;
    job->fitted = PyMem_Calloc(count + 1, sizeof *job->fitted);
    job->tables = PyMem_Calloc(count + 1, RANS_MOST_TABLE_BYTES);
    job->table_bytes = PyMem_Calloc(count + 1, sizeof *job->table_bytes);
    if (!job->fitted || !job->tables || !job->table_bytes) {
        PyErr_NoMemory();
    } else if (job->codec != CODEC_ZSTD || !take_frames(list, job, &memory)) {
        Py_BEGIN_ALLOW_THREADS size = pack_chunks(job);
        Py_END_ALLOW_THREADS if (size == -1)
            refuse("the sizes of a block of chunks do not fit each other");
        else tables = list_tables(job, count);
    }
    while (memory.taken > 0)
        release(&memory.views[--memory.taken]);
    PyMem_Free(memory.views);
    PyMem_Free(memory.frames);
    PyMem_Free(memory.frame_bytes);
    PyMem_Free(job->fitted);
    PyMem_Free(job->tables);
    PyMem_Free(job->table_bytes);
    return tables ? Py_BuildValue("LN", (long long)size, tables) : NULL;
}

PyObject *py_pack_chunks(PyObject *self, PyObject *args)
{
    PyObject *objects[VIEWS], *list, *result = NULL;
    Py_buffer views[VIEWS];
    packing job;
    Py_ssize_t places, group;
    int taken = 0;
    (void)self;
    memset(&job, 0, sizeof job);
    if (!PyArg_ParseTuple(args, "OO(nn)iOOO(OOO)O", &objects[SYMBOLS], &objects[RAW_BYTES], &places,
                          &group, &job.codec, &objects[LOW_BITS], &list, &objects[LOG2],
                          &objects[SLOTS], &objects[RECORDS], &objects[COUNTS], &objects[SCRATCH]))
        return NULL;
    for (taken = 0; taken < VIEWS; taken++)
        if (view_of(objects[taken], &views[taken], WRITABLE[taken]))
            break;
    if (taken == VIEWS) {
        size_t chunks = (size_t)views[RAW_BYTES].len / 8;
        job.places = places > 0 && (size_t)places <= chunks ? (size_t)places : 0;
        job.group = group > 0 && (size_t)group <= chunks ? (size_t)group : chunks;
        if (!job.places || group < 1 || group % places || sides_of(&job, views))
            refuse("the sizes of a block of chunks do not fit each other");
        else
            result = pack_with(&job, list);
    }
    for (int number = 0; number < taken; number++)
        release(&views[number]);
    return result;
}
