/* audio.c - a batch of audio, (B, N) with lengths or a list of (N,), read where it lies. */
#include <stdio.h>
#include <string.h>

#include "binding.h"

static const char array_expected[] = "float32 (batch, samples)";
static const char row_expected[] = "float32 (samples,)";

void wavs_free(struct wavs *wavs)
{
    PyMem_Free(wavs->rows);
    PyMem_Free(wavs->lengths);
    PyMem_Free(wavs->statistics);
    Py_CLEAR(wavs->keep);
    Py_CLEAR(wavs->keep_statistics);
    wavs->rows = NULL;
    wavs->lengths = NULL;
    wavs->statistics = NULL;
}

static int allocate_rows(struct wavs *wavs, Py_ssize_t count)
{
    wavs->rows = PyMem_New(const float *, count);
    wavs->lengths = PyMem_New(int64_t, count);
    if (!wavs->rows || !wavs->lengths) {
        PyErr_NoMemory();
        return 0;
    }
    wavs->batch.batch = count;
    wavs->batch.wavs = wavs->rows;
    wavs->batch.lengths = wavs->lengths;
    return 1;
}

static int take_list(struct wavs *wavs, PyObject *list)
{
    /* A tuple of our own: converting an item may run code that changes the list. */
    PyObject *items = PySequence_Tuple(list);
    if (!items)
        return 0;
    Py_ssize_t count = PyTuple_GET_SIZE(items);
    int good = 0;
    wavs->keep = PyTuple_New(count);
    if (count == 0)
        PyErr_SetString(PyExc_ValueError,
                        "wavs: expected at least one utterance, got an empty list");
    else
        good = wavs->keep && allocate_rows(wavs, count);
    for (Py_ssize_t i = 0; good && i < count; i++) {
        char name[40];
        snprintf(name, sizeof name, "wavs[%zd]", i);
        PyArrayObject *row = take_floats(PyTuple_GET_ITEM(items, i), name, 1, row_expected);
        good = row != NULL;
        if (good) {
            PyTuple_SET_ITEM(wavs->keep, i, (PyObject *)row);
            wavs->rows[i] = PyArray_DATA(row);
            wavs->lengths[i] = PyArray_DIM(row, 0);
        }
    }
    Py_DECREF(items);
    return good;
}

static int raise_short(Py_ssize_t row, int64_t min_samples, int64_t samples)
{
    PyErr_Format(PyExc_ValueError, "wavs[%zd]: expected at least %lld samples, got %lld", row,
                 (long long)min_samples, (long long)samples);
    return 0;
}

static int take_matrix(struct wavs *wavs, PyObject *object, int64_t min_samples)
{
    PyArrayObject *array = take_array(object, "wavs", array_expected);
    if (!array)
        return 0;
    int typed = PyArray_TYPE(array) == NPY_FLOAT32 && PyArray_NDIM(array) == 2;
    /* Rows are read where they lie, whatever their distance. */
    if (typed && PyArray_ISBEHAVED_RO(array) &&
        (PyArray_STRIDE(array, 1) == sizeof(float) || PyArray_DIM(array, 1) < 2)) {
        wavs->keep = (PyObject *)array;
    } else {
        wavs->keep = (PyObject *)take_floats((PyObject *)array, "wavs", 2, array_expected);
        Py_DECREF(array);
        if (!wavs->keep)
            return 0;
        array = (PyArrayObject *)wavs->keep;
    }
    Py_ssize_t count = PyArray_DIM(array, 0);
    if (count == 0) {
        PyErr_Format(PyExc_ValueError,
                     "wavs: expected at least one utterance, got float32 (0, %zd)",
                     (Py_ssize_t)PyArray_DIM(array, 1));
        return 0;
    }
    if (PyArray_DIM(array, 1) <
        min_samples) /* before a row costs memory that the array itself may not take */
        return raise_short(0, min_samples, PyArray_DIM(array, 1));
    if (!allocate_rows(wavs, count))
        return 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        wavs->rows[i] = (const float *)(PyArray_BYTES(array) + i * PyArray_STRIDE(array, 0));
        wavs->lengths[i] = PyArray_DIM(array, 1);
    }
    return 1;
}

static int check_lengths(struct wavs *wavs, PyObject *lengths, int64_t min_samples)
{
    for (Py_ssize_t i = 0; i < wavs->batch.batch; i++)
        if (wavs->lengths[i] < min_samples)
            return raise_short(i, min_samples, wavs->lengths[i]);
    if (lengths == Py_None)
        return 1;
    PyArrayObject *array = take_int64s(lengths, "lengths", (npy_intp)wavs->batch.batch);
    if (!array)
        return 0;
    int good = 1;
    const int64_t *values = PyArray_DATA(array);
    for (Py_ssize_t i = 0; good && i < wavs->batch.batch; i++) {
        good = values[i] >= min_samples && values[i] <= wavs->lengths[i];
        if (good)
            wavs->lengths[i] = values[i];
        else
            PyErr_Format(PyExc_ValueError, "lengths[%zd]: expected %lld to %lld samples, got %lld",
                         i, (long long)min_samples, (long long)wavs->lengths[i],
                         (long long)values[i]);
    }
    Py_DECREF(array);
    return good;
}

int wavs_take(struct wavs *wavs, PyObject *object, PyObject *lengths, int64_t min_samples)
{
    memset(wavs, 0, sizeof *wavs);
    int is_list = PyList_Check(object) || PyTuple_Check(object);
    return (is_list ? take_list(wavs, object) : take_matrix(wavs, object, min_samples)) &&
           check_lengths(wavs, lengths, min_samples);
}

int wavs_take_statistics(struct wavs *wavs, PyObject *object, const gd_config *config)
{
    if (object == Py_None)
        return 1;
    const npy_intp count = (npy_intp)wavs->batch.batch;
    const npy_intp shape[2] = {count, (npy_intp)gd_statistics_size(config)};
    wavs->keep_statistics = take_doubles(object, "statistics", 2, shape);
    wavs->statistics = wavs->keep_statistics ? PyMem_New(const double *, count) : NULL;
    if (!wavs->statistics) {
        if (wavs->keep_statistics)
            PyErr_NoMemory();
        return 0;
    }
    for (npy_intp i = 0; i < count; i++)
        wavs->statistics[i] = (const double *)PyArray_DATA(wavs->keep_statistics) + i * shape[1];
    wavs->batch.statistics = wavs->statistics;
    return 1;
}

int wavs_check_finite(const struct wavs *wavs, struct failure *failure)
{
    for (int64_t i = 0; i < wavs->batch.batch; i++) {
        int64_t place = first_nonfinite(wavs->rows[i], wavs->lengths[i]);
        if (place >= 0)
            return failure_set(
                failure, GD_EINVAL, "wavs[%lld]: expected finite samples, got %s at sample %lld",
                (long long)i, wavs->rows[i][place] != wavs->rows[i][place] ? "NaN" : "infinity",
                (long long)place);
    }
    return 1;
}
