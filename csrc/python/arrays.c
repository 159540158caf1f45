/* arrays.c - NumPy arrays as C memory: conversions that copy only where they must, and views. */
#include <stdint.h>
#include <string.h>

#include "binding.h"

PyObject *describe(PyObject *value, PyArrayObject *array)
{
    if (!array || (PyArray_TYPE(array) == NPY_OBJECT && !PyArray_Check(value)))
        return PyUnicode_FromFormat("%.100s", Py_TYPE(value)->tp_name);
    PyObject *shape = PyArray_IntTupleFromIntp(PyArray_NDIM(array), PyArray_DIMS(array));
    if (!shape)
        return NULL;
    PyObject *text = PyUnicode_FromFormat("%S %R", (PyObject *)PyArray_DESCR(array), shape);
    Py_DECREF(shape);
    return text;
}

static void raise_got(PyObject *type, const char *name, const char *expected, PyObject *value,
                      PyArrayObject *array)
{
    PyObject *got = describe(value, array);
    if (got)
        PyErr_Format(type, "%s: expected %s, got %U", name, expected, got);
    Py_XDECREF(got);
}

PyArrayObject *take_array(PyObject *value, const char *name, const char *expected)
{
    PyArrayObject *array = (PyArrayObject *)PyArray_FromAny(value, NULL, 0, 0,
                                                            NPY_ARRAY_ENSUREARRAY, NULL);
    if (array && PyArray_TYPE(array) == NPY_OBJECT && !PyArray_Check(value)) {
        raise_got(PyExc_TypeError, name, expected, value, array);
        Py_CLEAR(array);
    }
    return array;
}

/* The array itself, or a contiguous copy of it; takes over the reference. */
static PyArrayObject *contiguous(PyArrayObject *array, int type)
{
    PyArrayObject *result = (PyArrayObject *)PyArray_FROMANY((PyObject *)array, type, 0, 0,
                                                             NPY_ARRAY_IN_ARRAY);
    Py_DECREF(array);
    return result;
}

PyArrayObject *take_floats(PyObject *value, const char *name, int ndim, const char *expected)
{
    PyArrayObject *array = take_array(value, name, expected);
    if (!array)
        return NULL;
    if (PyArray_TYPE(array) != NPY_FLOAT32 || PyArray_NDIM(array) != ndim) {
        raise_got(PyExc_ValueError, name, expected, value, array);
        Py_DECREF(array);
        return NULL;
    }
    return contiguous(array, NPY_FLOAT32);
}

int has_shape(PyArrayObject *array, int ndim, const npy_intp *shape)
{
    return PyArray_NDIM(array) == ndim && PyArray_CompareLists(PyArray_DIMS(array), shape, ndim);
}

static void raise_typed_shape(const char *name, const char *type, int ndim, const npy_intp *shape,
                              PyArrayObject *array)
{
    PyObject *sizes = PyArray_IntTupleFromIntp(ndim, shape);
    PyObject *got = sizes ? describe((PyObject *)array, array) : NULL;
    if (got)
        PyErr_Format(PyExc_ValueError, "%s: expected %s %R, got %U", name, type, sizes, got);
    Py_XDECREF(got);
    Py_XDECREF(sizes);
}

void raise_shape(const char *name, int ndim, const npy_intp *shape, PyArrayObject *array)
{
    raise_typed_shape(name, "float32", ndim, shape, array);
}

PyArrayObject *take_floats_shaped(PyObject *value, const char *name, int ndim,
                                  const npy_intp *shape)
{
    PyArrayObject *array = take_array(value, name, "a float32 array");
    if (!array)
        return NULL;
    if (PyArray_TYPE(array) != NPY_FLOAT32 || !has_shape(array, ndim, shape)) {
        raise_shape(name, ndim, shape, array);
        Py_DECREF(array);
        return NULL;
    }
    return contiguous(array, NPY_FLOAT32);
}

PyArrayObject *take_doubles(PyObject *value, const char *name, int ndim, const npy_intp *shape)
{
    PyArrayObject *array = take_array(value, name, "a float64 array");
    if (!array)
        return NULL;
    if (PyArray_TYPE(array) != NPY_FLOAT64 || !has_shape(array, ndim, shape)) {
        raise_typed_shape(name, "float64", ndim, shape, array);
        Py_DECREF(array);
        return NULL;
    }
    return contiguous(array, NPY_FLOAT64);
}

PyArrayObject *take_int64s(PyObject *value, const char *name, npy_intp count)
{
    PyArrayObject *array = take_array(value, name, "int64 (batch,)");
    if (!array)
        return NULL;
    if (!PyArray_ISINTEGER(array) || !has_shape(array, 1, &count)) {
        PyObject *got = describe(value, array);
        if (got)
            PyErr_Format(PyExc_ValueError, "%s: expected int64 (%zd,), got %U", name,
                         (Py_ssize_t)count, got);
        Py_XDECREF(got);
        Py_DECREF(array);
        return NULL;
    }
    /* A uint64 beyond int64 turns negative here, and is refused as such. */
    PyArrayObject *result = (PyArrayObject *)PyArray_FROMANY(
        (PyObject *)array, NPY_INT64, 1, 1, NPY_ARRAY_IN_ARRAY | NPY_ARRAY_FORCECAST);
    Py_DECREF(array);
    return result;
}

PyArrayObject *take_into(PyObject *value, npy_intp count)
{
    if (value == Py_None)
        return (PyArrayObject *)PyArray_ZEROS(1, &count, NPY_FLOAT32, 0);
    if (!PyArray_Check(value)) {
        raise_got(PyExc_TypeError, "into", "a float32 array", value, NULL);
        return NULL;
    }
    PyArrayObject *array = (PyArrayObject *)value;
    if (PyArray_TYPE(array) != NPY_FLOAT32 || !has_shape(array, 1, &count)) {
        raise_shape("into", 1, &count, array);
        return NULL;
    }
    if (!PyArray_ISWRITEABLE(array) || !PyArray_ISCARRAY(array)) {
        PyErr_Format(PyExc_ValueError,
                     "into: expected a contiguous, writable array, got one that is %s",
                     !PyArray_ISWRITEABLE(array)       ? "read-only"
                     : PyArray_ISBYTESWAPPED(array)    ? "byte-swapped"
                     : !PyArray_IS_C_CONTIGUOUS(array) ? "not contiguous"
                                                       : "not aligned");
        return NULL;
    }
    Py_INCREF(array);
    return array;
}

int overlaps(const void *a, size_t a_bytes, const void *b, size_t b_bytes)
{
    uintptr_t first = (uintptr_t)a, second = (uintptr_t)b;
    return first < second + b_bytes && second < first + a_bytes;
}

int check_apart(PyArrayObject *into, const char *name, const void *data, size_t bytes)
{
    if (!overlaps(PyArray_DATA(into), (size_t)PyArray_NBYTES(into), data, bytes))
        return 1;
    PyErr_Format(PyExc_ValueError, "into: expected memory of its own, got memory shared with %s",
                 name);
    return 0;
}

int64_t first_nonfinite(const float *x, int64_t count)
{
    enum { BLOCK = 4096 };
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t end = count - start < BLOCK ? count : start + BLOCK;
        /* A float is finite where its exponent's bits are not all ones. As integers, without a
         * branch, the test is one that compilers vectorise. */
        int32_t most = 0;
        for (int64_t i = start; i < end; i++) {
            int32_t bits;
            memcpy(&bits, &x[i], sizeof bits);
            bits &= 0x7fffffff;
            most = bits > most ? bits : most;
        }
        if (most < 0x7f800000)
            continue;
        for (int64_t i = start; i < end; i++) {
            int32_t bits;
            memcpy(&bits, &x[i], sizeof bits);
            if ((bits & 0x7f800000) == 0x7f800000)
                return i;
        }
    }
    return -1;
}

PyObject *view_floats(PyObject *owner, float *data, int ndim, const npy_intp *shape, int writable)
{
    PyObject *view = PyArray_New(&PyArray_Type, ndim, shape, NPY_FLOAT32, NULL, data, 0,
                                 writable ? NPY_ARRAY_CARRAY : NPY_ARRAY_CARRAY_RO, NULL);
    if (!view)
        return NULL;
    Py_INCREF(owner);
    if (PyArray_SetBaseObject((PyArrayObject *)view, owner) <
        0) /* takes the reference over, also when it fails */
        Py_CLEAR(view);
    return view;
}
