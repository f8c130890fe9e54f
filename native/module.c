/* codecllm._native: the native core as a module of Python. It checks types and sizes; the
 * interpreter's lock is released while the core works. codecllm/formats/native.py says what each
 * function means.
 */
#include "module.h"

#include <stdlib.h>

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
    Py_BEGIN_ALLOW_THREADS hash = xxh3_of_slot(view.buf, (size_t)view.len);
    Py_END_ALLOW_THREADS PyBuffer_Release(&view);
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
        Py_BEGIN_ALLOW_THREADS wrong =
            check_slots(slots.buf, (size_t)slots.len, records.buf, raw_bytes.buf,
                        (size_t)records.len / RECORD_BYTES);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&slots);
    PyBuffer_Release(&records);
    PyBuffer_Release(&raw_bytes);
    return wrong == -2 ? refuse("slots and records do not fit each other")
                       : PyLong_FromLongLong(wrong);
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
    if (table && !frequencies_of(&frequencies, frequency) &&
        !rans_build_table(frequency, precision, table)) {
        Py_BEGIN_ALLOW_THREADS wrong =
            rans_decode(stored.buf, (size_t)stored.len, table, symbols.buf, (size_t)symbols.len);
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
        Py_BEGIN_ALLOW_THREADS size = rans_encode(symbols.buf, (size_t)symbols.len, &coder, buffer);
        Py_END_ALLOW_THREADS if (size) stored =
            PyBytes_FromStringAndSize((const char *)buffer + bound - size, (Py_ssize_t)size);
        else refuse("a symbol has no frequency in the table");
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
        Py_BEGIN_ALLOW_THREADS precision = rans_fit(counts.buf, log2_table.buf, frequency);
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
    Py_BEGIN_ALLOW_THREADS size_t size = (size_t)data.len, most = (size_t)stride << 30;
    for (size_t at = 0; at < size; at += most) {
        uint32_t part[256];
        count_symbols((const uint8_t *)data.buf + at, size - at < most ? size - at : most,
                      (size_t)stride, part);
        for (int symbol = 0; symbol < 256; symbol++)
            counts[symbol] += part[symbol];
    }
    Py_END_ALLOW_THREADS PyBuffer_Release(&data);
    return PyBytes_FromStringAndSize((const char *)counts, sizeof counts);
}

/* ---- module
 *
 */

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

/* Changes with the functions below and what they take; formats/codecs/native.py has it too. */
#define INTERFACE 3

static PyObject *py_interface(PyObject *self, PyObject *args)
{
    (void)self;
    (void)args;
    return PyLong_FromLong(INTERFACE);
}

static PyMethodDef methods[] = {
    {"interface", py_interface, METH_NOARGS, "interface() -> number of this set of functions"},
    {"xxh3", py_xxh3, METH_O, "xxh3(data) -> int: XXH3-64 of data whose size is a multiple of 16"},
    {"check_slots", py_check_slots, METH_VARARGS,
     "check_slots(slots, records, raw_bytes) -> int: first wrong chunk, or -1"},
    {"rans_decode", py_rans_decode, METH_VARARGS,
     "rans_decode(stored, frequencies, precision, symbols) -> bool"},
    {"rans_encode", py_rans_encode, METH_VARARGS,
     "rans_encode(symbols, frequencies, precision) -> bytes"},
    {"rans_fit", py_rans_fit, METH_VARARGS,
     "rans_fit(counts, log2_table) -> (precision, frequencies)"},
    {"histogram", py_histogram, METH_VARARGS,
     "histogram(symbols, stride=1) -> bytes of int64 [256]"},
    {"row_largest", py_row_largest, METH_VARARGS, "row_largest(words, itemsize, out)"},
    {"quantize", py_quantize, METH_VARARGS,
     "quantize(words, itemsize, scales, by_column, codes) -> float"},
    {"quantize_rows", py_quantize_rows, METH_VARARGS,
     "quantize_rows(descriptor, offset, type, absmax, codes, scratch) -> (state, worst error)"},
    {"split_tiles", py_split_tiles, METH_VARARGS,
     "split_tiles(elements, itemsize, rotate, tile, symbols)"},
    {"pack_chunks", py_pack_chunks, METH_VARARGS,
     "pack_chunks(...) -> (bytes of the slots, tables)"},
    {"decode_run", py_decode_run, METH_VARARGS,
     "decode_run(...) -> int: first wrong chunk of the run, or -1"},
    {"scratch_bytes", py_scratch_bytes, METH_VARARGS, "scratch_bytes(grid, planes) -> int"},
    {"kernels", py_kernels, METH_NOARGS,
     "kernels() -> names of the kernels that this machine can run, the best first"},
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
