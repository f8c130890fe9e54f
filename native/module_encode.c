/* The functions of the module that the converter calls. */
#include "module.h"

#include <sys/types.h>
#include <unistd.h>

PyObject *py_split_tiles(PyObject *self, PyObject *args)
{
    Py_buffer elements, symbols;
    Py_ssize_t tile;
    int itemsize, rotate, fits;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*iinw*", &elements, &itemsize, &rotate, &tile, &symbols))
        return NULL;
    fits = (itemsize == 1 || itemsize == 2 || itemsize == 4 || itemsize == 8) &&
           is_aligned(&elements, itemsize) && elements.len == symbols.len && tile > 0;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS split_tiles(elements.buf, itemsize, rotate,
                                           (size_t)(elements.len / itemsize), (size_t)tile,
                                           symbols.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&elements);
    PyBuffer_Release(&symbols);
    if (!fits)
        return refuse("planes do not fit the elements");
    Py_RETURN_NONE;
}

/* Reads `size` bytes at an offset; 0 where the file ends before or cannot be read: the caller reads
 * again in Python, which says why. */
static int read_exactly(int descriptor, uint8_t *to, size_t size, off_t offset)
{
    while (size > 0) {
        ssize_t count = pread(descriptor, to, size, offset);
        if (count <= 0)
            return 0;
        to += count;
        offset += count;
        size -= (size_t)count;
    }
    return 1;
}

/* Reads and quantizes rows, as many at a time as the scratch memory holds: they stay in the cache.
 */
static int quantize_file(int descriptor, off_t offset, int type, size_t rows, size_t cols,
                         float *absmax, int8_t *codes, const Py_buffer *scratch, float *worst)
{
    size_t row_bytes = cols * (type == TO_F32 ? 4 : 2), step = (size_t)scratch->len / row_bytes;
    int state = ROWS_FINE;
    *worst = 0;
    for (size_t row = 0, count; row < rows; row += count) {
        float error;
        count = rows - row < step ? rows - row : step;
        if (!read_exactly(descriptor, scratch->buf, count * row_bytes, offset))
            return ROWS_NOT_READ;
        offset += (off_t)(count * row_bytes);
        int found = quantize_rows(scratch->buf, type, count, cols, absmax + row, codes + row * cols,
                                  &error);
        if (found == ROWS_NOT_FINITE)
            return found;
        state = found == ROWS_TINY ? found : state;
        *worst = error > *worst ? error : *worst;
    }
    return state;
}

PyObject *py_quantize_rows(PyObject *self, PyObject *args)
{
    Py_buffer absmax, codes, scratch;
    long long offset;
    int descriptor, type, fits, state = 0;
    float worst = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "iLiw*w*w*", &descriptor, &offset, &type, &absmax, &codes,
                          &scratch))
        return NULL;
    size_t itemsize = type == TO_F32 ? 4 : 2;
    fits = (type == TO_BF16 || type == TO_F16 || type == TO_F32) && offset >= 0 &&
           is_aligned(&absmax, 4) && (uintptr_t)scratch.buf % 4 == 0 && absmax.len > 0;
    size_t rows = fits ? (size_t)absmax.len / 4 : 1, count = fits ? (size_t)codes.len : 0;
    fits = fits && count && count % rows == 0 && count / rows <= (size_t)scratch.len / itemsize &&
           count <= (size_t)(INT64_MAX - offset) / itemsize;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS state =
            quantize_file(descriptor, (off_t)offset, type, rows, count / rows, absmax.buf,
                          codes.buf, &scratch, &worst);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&absmax);
    PyBuffer_Release(&codes);
    PyBuffer_Release(&scratch);
    return fits ? Py_BuildValue("if", state, worst) : refuse("codes or rows do not fit the memory");
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
