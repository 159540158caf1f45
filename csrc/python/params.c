/* params.c - a Model's parameters: views of its flat buffer, and values copied into it. */
#include <stdio.h>
#include <string.h>

#include "binding.h"

const char model_load_params_doc[] =
    "load_params($self, params, /)\n--\n\n"
    "Copy values into the parameters: all of them, or none where one is wrong.\n\n"
    "params: dict of tensor name -> array of that tensor's shape, of a dtype that casts to\n"
    "float32. Names that are left out keep their values.\n\n"
    "Raises ValueError for an unknown name or a wrong shape or dtype.";
const char model_flat_params_doc[] =
    "flat_params($self, /)\n--\n\n"
    "All parameters as one writable float32 (num_params,) view, tensor after tensor: see\n"
    "`tensors`.\n\n"
    "Whoever writes to it calls touch() afterwards. Not for use while another thread runs the\n"
    "model.";
const char model_touch_doc[] =
    "touch($self, /)\n--\n\n"
    "Tell that flat_params() was written to: packed weights are rebuilt at next use.";

static void tensor_shape(const gd_tensor *tensor, npy_intp shape[4])
{
    for (int i = 0; i < tensor->ndim; i++)
        shape[i] = (npy_intp)tensor->shape[i];
}

PyObject *model_get_params(PyObject *object, void *closure)
{
    (void)closure;
    ModelObject *self = (ModelObject *)object;
    int count;
    const gd_tensor *tensors = gd_model_tensors(self->handle->model, &count);
    float *values = gd_model_params(self->handle->model);
    PyObject *params = PyDict_New();
    for (int i = 0; params && i < count; i++) {
        npy_intp shape[4];
        tensor_shape(&tensors[i], shape);
        PyObject *view = view_floats(self->owner, values + tensors[i].offset, tensors[i].ndim,
                                     shape, 0);
        if (!view || PyDict_SetItemString(params, tensors[i].name, view) < 0)
            Py_CLEAR(params);
        Py_XDECREF(view);
    }
    return params;
}

PyObject *model_flat_params(PyObject *object, PyObject *unused)
{
    (void)unused;
    ModelObject *self = (ModelObject *)object;
    npy_intp count = (npy_intp)gd_model_num_params(self->handle->model);
    return view_floats(self->owner, gd_model_params(self->handle->model), 1, &count, 1);
}

PyObject *model_touch(PyObject *object, PyObject *unused)
{
    (void)unused;
    struct session *session = &((ModelObject *)object)->handle->session;
    struct failure failure;
    int good;
    session_refresh(session);
    Py_BEGIN_ALLOW_THREADS
    good = session_lock(session, 0, &failure);
    if (good) {
        gd_model_touch(((ModelObject *)object)->handle->model);
        session_unlock(session);
    }
    Py_END_ALLOW_THREADS
    if (!good)
        return failure_raise(&failure, PyExc_RuntimeError, NULL);
    Py_RETURN_NONE;
}

PyObject *model_get_tensors(PyObject *object, void *closure)
{
    (void)closure;
    struct module_state *state = module_state_of(Py_TYPE(object));
    int count;
    const gd_tensor *tensors = gd_model_tensors(((ModelObject *)object)->handle->model, &count);
    PyObject *list = state ? PyTuple_New(count) : NULL;
    for (int i = 0; list && i < count; i++) {
        npy_intp shape[4];
        tensor_shape(&tensors[i], shape);
        PyObject *tensor = PyStructSequence_New(state->tensor_type);
        if (!tensor) {
            Py_CLEAR(list);
            break;
        }
        PyTuple_SET_ITEM(list, i, tensor);
        PyObject *fields[] = {
            PyUnicode_FromString(tensors[i].name), PyArray_IntTupleFromIntp(tensors[i].ndim, shape),
            PyLong_FromSize_t(tensors[i].offset), PyLong_FromSize_t(tensors[i].size),
            PyBool_FromLong(tensors[i].decay)};
        for (int f = 0; f < 5; f++) {
            if (!fields[f])
                Py_CLEAR(list);
            if (list)
                PyStructSequence_SetItem(tensor, f, fields[f]);
            else
                Py_XDECREF(fields[f]);
        }
    }
    return list;
}

/* An item of load_params(): float32 values of the tensor's shape, not in the model's memory. */
static PyArrayObject *take_param(PyObject *value, const gd_tensor *tensor, const float *own,
                                 size_t own_bytes)
{
    char name[180];
    snprintf(name, sizeof name, "params['%s']", tensor->name);
    npy_intp shape[4];
    tensor_shape(tensor, shape);
    PyArrayObject *array = take_array(value, name, "a float32 array");
    if (!array)
        return NULL;
    PyArray_Descr *float32 = PyArray_DescrFromType(NPY_FLOAT32);
    int good = has_shape(array, tensor->ndim, shape) &&
               PyArray_CanCastArrayTo(array, float32, NPY_SAME_KIND_CASTING);
    Py_DECREF(float32);
    if (!good) {
        raise_shape(name, tensor->ndim, shape, array);
        Py_DECREF(array);
        return NULL;
    }
    PyArrayObject *values = (PyArrayObject *)PyArray_FROMANY(
        (PyObject *)array, NPY_FLOAT32, 0, 0, NPY_ARRAY_IN_ARRAY | NPY_ARRAY_FORCECAST);
    Py_DECREF(array);
    if (values && overlaps(PyArray_DATA(values), (size_t)PyArray_NBYTES(values), own, own_bytes))
        Py_SETREF(values, (PyArrayObject *)PyArray_NewCopy(values, NPY_CORDER));
    return values;
}

static const gd_tensor *find_tensor(const gd_tensor *tensors, int count, PyObject *name)
{
    for (int i = 0; i < count; i++)
        if (PyUnicode_CompareWithASCIIString(name, tensors[i].name) == 0)
            return &tensors[i];
    return NULL;
}

PyObject *model_load_params(PyObject *object, PyObject *params)
{
    struct model_handle *handle = ((ModelObject *)object)->handle;
    int count;
    const gd_tensor *tensors = gd_model_tensors(handle->model, &count);
    float *values = gd_model_params(handle->model);
    const size_t bytes = gd_model_num_params(handle->model) * sizeof(float);

    PyObject *items = PyDict_Check(params)      ? PyDict_Items(params)
                      : PyMapping_Check(params) ? PyMapping_Items(params)
                                                : NULL;
    if (!items) {
        if (!PyErr_Occurred() || PyErr_ExceptionMatches(PyExc_AttributeError))
            PyErr_Format(PyExc_TypeError, "params: expected a dict of arrays, got %.100s",
                         Py_TYPE(params)->tp_name);
        return NULL;
    }
    /* What PyMapping_Items() gives is a list of whatever items() held. */
    Py_ssize_t given = PyList_GET_SIZE(items);
    PyObject *arrays = PyTuple_New(given);
    const gd_tensor **places = PyMem_New(const gd_tensor *, given + 1);
    int good = arrays && places;
    if (arrays && !places)
        PyErr_NoMemory();
    for (Py_ssize_t i = 0; good && i < given; i++) {
        PyObject *item = PyList_GET_ITEM(items, i);
        good = PyTuple_Check(item) && PyTuple_GET_SIZE(item) == 2 &&
               PyUnicode_Check(PyTuple_GET_ITEM(item, 0));
        if (!good) {
            PyErr_SetString(PyExc_TypeError,
                            "params: expected names and arrays, got a key that is no string");
            break;
        }
        PyObject *name = PyTuple_GET_ITEM(item, 0);
        places[i] = find_tensor(tensors, count, name);
        if (!places[i])
            PyErr_Format(PyExc_ValueError, "params: unknown tensor %.200R", name);
        PyArrayObject *array = places[i]
                                   ? take_param(PyTuple_GET_ITEM(item, 1), places[i], values, bytes)
                                   : NULL;
        good = array != NULL;
        if (good)
            PyTuple_SET_ITEM(arrays, i, (PyObject *)array);
    }
    struct failure failure = {0};
    if (good) {
        session_refresh(&handle->session);
        Py_BEGIN_ALLOW_THREADS
        good = session_lock(&handle->session, 0, &failure);
        if (good) {
            for (Py_ssize_t i = 0; i < given; i++)
                memcpy(values + places[i]->offset,
                       PyArray_DATA((PyArrayObject *)PyTuple_GET_ITEM(arrays, i)),
                       places[i]->size * sizeof(float));
            gd_model_touch(handle->model);
            session_unlock(&handle->session);
        }
        Py_END_ALLOW_THREADS
        if (!good)
            failure_raise(&failure, PyExc_RuntimeError, NULL);
    }
    PyMem_Free(places);
    Py_XDECREF(arrays);
    Py_DECREF(items);
    if (!good)
        return NULL;
    Py_RETURN_NONE;
}
