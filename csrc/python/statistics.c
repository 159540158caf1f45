/* statistics.c - statistics of whole utterances, gathered piece by piece, and those that a Model keeps. */
#include <string.h>

#include "binding.h"

const char model_add_statistics_doc[] =
    "_add_statistics($self, statistics, audio, before)\n--\n\n"
    "float64 (n,): statistics (None: of nothing yet) with audio[before:] added.\n\n"
    "audio: float32 (samples,); the first `before` were added last: all, or a conv 0 kernel's.";

/* Without the GIL, in the locked session. */
static int add(struct model_handle *handle, PyArrayObject *audio, int64_t before, double *statistics,
               struct failure *failure)
{
    const float *samples = PyArray_DATA(audio);
    const int64_t place = first_nonfinite(samples, PyArray_DIM(audio, 0));
    if (place >= 0)
        return failure_set(failure, GD_EINVAL, "audio: expected finite samples, got %s at sample %lld",
                           samples[place] != samples[place] ? "NaN" : "infinity", (long long)place);
    return failure_note(failure,
                        gd_statistics_add(handle->model, samples + before,
                                          PyArray_DIM(audio, 0) - before, statistics),
                        handle->session.context);
}

PyObject *model_add_statistics(PyObject *self, PyObject *args, PyObject *kwargs)
{
    char *names[] = {"statistics", "audio", "before", NULL};
    PyObject *given, *audio_object, *before_object;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO:_add_statistics", names, &given,
                                     &audio_object, &before_object))
        return NULL;
    struct model_handle *handle = ((ModelObject *)self)->handle;
    struct module_state *state = module_state_of(Py_TYPE(self));
    const gd_config *config = gd_model_config(handle->model);
    const npy_intp size = (npy_intp)gd_statistics_size(config);
    const int64_t lookback = config->conv_feature_layers[0].kernel - 1;
    PyArrayObject *audio = take_floats(audio_object, "audio", 1, "float32 (samples,)");
    PyArrayObject *old = NULL, *result = NULL;
    int64_t before = 0;
    int good = state && audio;
    if (good && given != Py_None)
        good = (old = take_doubles(given, "statistics", 1, &size)) != NULL;
    /* As many as there were, a kernel's at least. */
    const double heard = old ? *(const double *)PyArray_DATA(old) : 0;
    const int64_t least = heard >= 0 && heard < (double)lookback ? (int64_t)heard : old ? lookback : 0;
    good = good && take_integer(before_object, "before", least, PyArray_DIM(audio, 0), &before) &&
           (result = (PyArrayObject *)PyArray_ZEROS(1, &size, NPY_FLOAT64, 0)) != NULL;
    struct failure failure = {0};
    if (good) {
        if (old)
            memcpy(PyArray_DATA(result), PyArray_DATA(old), (size_t)size * sizeof(double));
        session_refresh(&handle->session);
        Py_BEGIN_ALLOW_THREADS
        good = session_lock(&handle->session, 0, &failure);
        if (good) {
            good = add(handle, audio, before, PyArray_DATA(result), &failure);
            session_unlock(&handle->session);
        }
        Py_END_ALLOW_THREADS
        if (!good)
            failure_raise(&failure, state->device_error, NULL);
    }
    Py_XDECREF(audio);
    Py_XDECREF(old);
    if (!good)
        Py_CLEAR(result);
    return (PyObject *)result;
}

PyObject *model_get_statistics(PyObject *self, void *closure)
{
    (void)closure;
    struct model_handle *handle = ((ModelObject *)self)->handle;
    struct module_state *state = module_state_of(Py_TYPE(self));
    const npy_intp size = (npy_intp)gd_statistics_size(gd_model_config(handle->model));
    PyArrayObject *copy = state ? (PyArrayObject *)PyArray_SimpleNew(1, &size, NPY_FLOAT64) : NULL;
    if (!copy)
        return NULL;
    struct failure failure = {0};
    const double *statistics = NULL;
    int good;
    session_refresh(&handle->session);
    Py_BEGIN_ALLOW_THREADS
    good = session_lock(&handle->session, 0, &failure);
    if (good) {
        statistics = gd_model_statistics(handle->model);
        if (statistics)
            memcpy(PyArray_DATA(copy), statistics, (size_t)size * sizeof(double));
        session_unlock(&handle->session);
    }
    Py_END_ALLOW_THREADS
    if (!statistics)
        Py_CLEAR(copy);
    if (!good)
        return failure_raise(&failure, state->device_error, NULL);
    return copy ? (PyObject *)copy : Py_NewRef(Py_None);
}

int model_set_statistics(PyObject *self, PyObject *value, void *closure)
{
    (void)closure;
    struct model_handle *handle = ((ModelObject *)self)->handle;
    struct module_state *state = module_state_of(Py_TYPE(self));
    const npy_intp size = (npy_intp)gd_statistics_size(gd_model_config(handle->model));
    PyArrayObject *array = NULL;
    if (!state)
        return -1;
    if (value && value != Py_None && !(array = take_doubles(value, "statistics", 1, &size)))
        return -1;
    struct failure failure = {0};
    int good;
    session_refresh(&handle->session);
    Py_BEGIN_ALLOW_THREADS
    good = session_lock(&handle->session, 0, &failure);
    if (good) {
        good = failure_note(&failure,
                            gd_model_set_statistics(handle->model, array ? PyArray_DATA(array) : NULL),
                            handle->session.context);
        session_unlock(&handle->session);
    }
    Py_END_ALLOW_THREADS
    Py_XDECREF(array);
    if (!good)
        failure_raise(&failure, state->device_error, NULL);
    return good ? 0 : -1;
}
