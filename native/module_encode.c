/* The functions of the module that the converter calls. */
#include "module.h"

PyObject *py_split_planes(PyObject *self, PyObject *args)
{
    Py_buffer elements, planes;
    int itemsize, rotate, fits;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*iiw*", &elements, &itemsize, &rotate, &planes))
        return NULL;
    fits = (itemsize == 1 || itemsize == 2 || itemsize == 4 || itemsize == 8) &&
           is_aligned(&elements, itemsize) && elements.len == planes.len;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS size_t count = (size_t)elements.len / (size_t)itemsize;
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

PyObject *py_row_largest(PyObject *self, PyObject *args)
{
    Py_buffer words, out;
    int itemsize, fits;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*iw*", &words, &itemsize, &out))
        return NULL;
    fits = (itemsize == 2 || itemsize == 4) && is_aligned(&words, itemsize) &&
           is_aligned(&out, itemsize) && out.len;
    size_t rows = fits ? (size_t)(out.len / itemsize) : 1,
           count = fits ? (size_t)(words.len / itemsize) : 0;
    fits = fits && count % rows == 0;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS const uint8_t *at = words.buf;
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

static float largest_error(const void *words, int itemsize, size_t rows, size_t cols,
                           const float *scales, int by_column, int8_t *codes)
{
    float worst = 0;
    for (size_t row = 0; row < rows; row++) {
        const void *at = (const uint8_t *)words + row * cols * (size_t)itemsize;
        float scale = by_column ? 1.0f : scales[row];
        uint32_t bits = kernels()->quantize(at, itemsize, cols, scale, by_column ? scales : NULL,
                                            codes + row * cols);
        float error;
        memcpy(&error, &bits, sizeof error);
        error *= scale;
        worst = error > worst ? error : worst;
    }
    return worst;
}

PyObject *py_quantize(PyObject *self, PyObject *args)
{
    Py_buffer words, scales, codes;
    int itemsize, by_column, fits;
    float worst = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*iy*pw*", &words, &itemsize, &scales, &by_column, &codes))
        return NULL;
    fits = (itemsize == 2 || itemsize == 4) && is_aligned(&words, itemsize) &&
           is_aligned(&scales, 4) && codes.len == words.len / itemsize && scales.len > 0;
    size_t given = fits ? (size_t)scales.len / 4 : 1, count = fits ? (size_t)codes.len : 0;
    fits = fits && count % given == 0;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS size_t rows = by_column ? count / given : given;
        worst = largest_error(words.buf, itemsize, rows, count / (rows ? rows : 1), scales.buf,
                              by_column, codes.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&words);
    PyBuffer_Release(&scales);
    PyBuffer_Release(&codes);
    return fits ? PyFloat_FromDouble(worst) : refuse("codes or scales do not fit the words");
}
