/* What the parts of the module share. */
#ifndef CODECLLM_MODULE_H
#define CODECLLM_MODULE_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include "core.h"

/* A view of a bytes-like argument; None gives a NULL buffer where it is allowed. */
static inline int view_of(PyObject *object, Py_buffer *view, int writable)
{
    memset(view, 0, sizeof *view);
    if (object == Py_None)
        return 0;
    return PyObject_GetBuffer(object, view, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE);
}

static inline void release(Py_buffer *view)
{
    if (view->obj)
        PyBuffer_Release(view);
}

static inline PyObject *refuse(const char *text)
{
    PyErr_SetString(PyExc_ValueError, text);
    return NULL;
}

static inline int is_aligned(const Py_buffer *view, int itemsize)
{
    return itemsize > 0 && (uintptr_t)view->buf % (uintptr_t)itemsize == 0 &&
           view->len % itemsize == 0;
}

PyObject *py_split_tiles(PyObject *self, PyObject *args);
PyObject *py_quantize_rows(PyObject *self, PyObject *args);
PyObject *py_pack_chunks(PyObject *self, PyObject *args);
PyObject *py_row_largest(PyObject *self, PyObject *args);
PyObject *py_quantize(PyObject *self, PyObject *args);
PyObject *py_decode_run(PyObject *self, PyObject *args);
PyObject *py_scratch_bytes(PyObject *self, PyObject *args);

#endif
