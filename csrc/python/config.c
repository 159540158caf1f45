/* config.c - what follows from a config, given as a checkpoint's JSON: the one place where Python asks for it. */
#include "binding.h"

static int take_config(PyObject *module, PyObject *json, gd_config *config)
{
    Py_ssize_t length;
    const char *text = PyUnicode_AsUTF8AndSize(json, &length);
    if (!text)
        return 0;
    struct failure failure = {0};
    failure.status = gd_config_from_json(text, (size_t)length, config, failure.message, sizeof failure.message);
    if (failure.status == GD_OK)
        return 1;
    struct module_state *state = PyModule_GetState(module);
    failure_raise(&failure, state->device_error, NULL);
    return 0;
}

const char module_config_facts_doc[] =
    "config_facts($module, config, /)\n--\n\n"
    "Check a checkpoint's JSON and tell what follows from it: (min_samples, hop, num_states,\n"
    "num_params). ValueError names the field.";

PyObject *module_config_facts(PyObject *module, PyObject *json)
{
    gd_config config;
    if (!take_config(module, json, &config))
        return NULL;
    struct module_state *state = PyModule_GetState(module);
    PyObject *facts = PyStructSequence_New(state->facts_type);
    if (!facts)
        return NULL;
    const long long values[] = {gd_min_samples(&config), gd_hop(&config), gd_num_states(&config, 0),
                                gd_config_num_params(&config)};
    for (int i = 0; facts && i < 4; i++) {
        PyObject *value = PyLong_FromLongLong(values[i]);
        if (value)
            PyStructSequence_SetItem(facts, i, value);
        else
            Py_CLEAR(facts);
    }
    return facts;
}

const char module_config_tensors_doc[] =
    "config_tensors($module, config, /)\n--\n\n"
    "Tensor name -> shape of the model of a checkpoint's JSON, in the checkpoint's order.";

static void add_shape(void *argument, const gd_tensor *tensor)
{
    PyObject **shapes = argument;
    PyObject *shape = *shapes ? PyTuple_New(tensor->ndim) : NULL;
    for (int i = 0; shape && i < tensor->ndim; i++) {
        PyObject *size = PyLong_FromLongLong(tensor->shape[i]);
        if (size)
            PyTuple_SET_ITEM(shape, i, size);
        else
            Py_CLEAR(shape);
    }
    if (!shape || PyDict_SetItemString(*shapes, tensor->name, shape) < 0)
        Py_CLEAR(*shapes);
    Py_XDECREF(shape);
}

PyObject *module_config_tensors(PyObject *module, PyObject *json)
{
    gd_config config;
    if (!take_config(module, json, &config))
        return NULL;
    PyObject *shapes = PyDict_New();
    gd_config_tensors(&config, add_shape, &shapes);
    return shapes;
}

const char module_num_frames_doc[] =
    "num_frames($module, config, num_samples, /)\n--\n\n"
    "config: a checkpoint's JSON. See gendistiller_ext.num_frames.";

PyObject *module_num_frames(PyObject *module, PyObject *args)
{
    PyObject *json, *object;
    gd_config config;
    if (!PyArg_ParseTuple(args, "OO:num_frames", &json, &object) || !take_config(module, json, &config))
        return NULL;
    if (!PyArray_Check(object)) {
        int64_t samples;
        if (!take_integer(object, "num_samples", 0, INT64_MAX, &samples))
            return NULL;
        return PyLong_FromLongLong(gd_num_frames(&config, samples));
    }
    PyArrayObject *given = (PyArrayObject *)object;
    if (!PyArray_ISINTEGER(given)) {
        PyObject *got = describe(object, given);
        if (got)
            PyErr_Format(PyExc_ValueError, "num_samples: expected integers, got %U", got);
        Py_XDECREF(got);
        return NULL;
    }
    PyArrayObject *frames = (PyArrayObject *)PyArray_FROMANY(
        object, NPY_INT64, 0, 0,
        NPY_ARRAY_CARRAY | NPY_ARRAY_FORCECAST | NPY_ARRAY_ENSURECOPY | NPY_ARRAY_ENSUREARRAY);
    if (!frames)
        return NULL;
    int64_t *values = PyArray_DATA(frames);
    for (npy_intp i = 0; i < PyArray_SIZE(frames); i++) {
        if (values[i] < 0) {
            PyErr_Format(PyExc_ValueError, "num_samples: expected 0 or more, got %lld",
                         (long long)values[i]);
            Py_DECREF(frames);
            return NULL;
        }
        values[i] = gd_num_frames(&config, values[i]);
    }
    return (PyObject *)frames;
}
