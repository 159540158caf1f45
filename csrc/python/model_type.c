/* model_type.c - Model: life, files, and the table of its methods (params.c, run.c, train.c). */
#include <string.h>

#include "binding.h"

static const char handle_name[] = "gendistiller_ext._core.handle";

/* ---- Handle ---------------------------------------------------------------------------------- */

static void handle_free(struct model_handle *handle)
{
    for (int i = 0; i < 2; i++)
        gd_workspace_free(handle->workspaces[i]);
    gd_model_free(handle->model);
    session_close(&handle->session);
    PyMem_RawFree(handle);
}

static void capsule_free(PyObject *capsule)
{
    handle_free(PyCapsule_GetPointer(capsule, handle_name));
}

/* A model of `config`, initialised from `seed`; or, where path is not NULL, read from there. Has no
 * need of the GIL. */
static struct model_handle *handle_create(const char *device, const gd_config *config,
                                          uint64_t seed, const char *path, struct failure *failure)
{
    struct model_handle *handle = PyMem_RawCalloc(1, sizeof *handle);
    if (!handle) {
        failure_set(failure, GD_ENOMEM, "out of memory for a model");
        return NULL;
    }
    if (!session_open(&handle->session, device, failure)) {
        PyMem_RawFree(handle);
        return NULL;
    }
    gd_context *context = handle->session.context;
    gd_status status = path ? gd_model_load(context, path, &handle->model)
                            : gd_model_create(context, config, &handle->model);
    if (!failure_note(failure, status, context)) {
        handle_free(handle);
        return NULL;
    }
    if (!path)
        gd_model_init(handle->model, seed);
    return handle;
}

static const char *take_device(PyObject *device)
{
    if (!PyUnicode_Check(device)) {
        PyErr_Format(PyExc_TypeError, "device: expected a string, got %.100s",
                     Py_TYPE(device)->tp_name);
        return NULL;
    }
    Py_ssize_t length;
    const char *text = PyUnicode_AsUTF8AndSize(device, &length);
    if (text && strlen(text) != (size_t)length) {
        PyErr_Format(PyExc_ValueError, "device: expected 'cpu', 'cuda' or 'cuda:N', got %.100R",
                     device);
        return NULL;
    }
    return text;
}

/* The file system's bytes of a path; a new bytes object. */
static PyObject *take_path(PyObject *path)
{
    PyObject *bytes = NULL;
    if (PyUnicode_FSConverter(path, &bytes))
        return bytes;
    if (PyErr_ExceptionMatches(PyExc_TypeError))
        PyErr_Format(PyExc_TypeError, "path: expected str, bytes or os.PathLike, got %.100s",
                     Py_TYPE(path)->tp_name);
    return NULL;
}

static PyObject *model_make(PyTypeObject *type, PyObject *device, const gd_config *config,
                            uint64_t seed, PyObject *path)
{
    struct module_state *state = module_state_of(type);
    const char *device_text = state ? take_device(device) : NULL;
    PyObject *path_bytes = device_text && path ? take_path(path) : NULL;
    if (!device_text || (path && !path_bytes))
        return NULL;

    struct failure failure;
    struct model_handle *handle;
    const char *path_text = path ? PyBytes_AS_STRING(path_bytes) : NULL;
    Py_BEGIN_ALLOW_THREADS
    handle = handle_create(device_text, config, seed, path_text, &failure);
    Py_END_ALLOW_THREADS
    Py_XDECREF(path_bytes);
    if (!handle)
        return failure_raise(&failure, state->device_error, path);

    PyObject *capsule = PyCapsule_New(handle, handle_name, capsule_free);
    if (!capsule) {
        handle_free(handle);
        return NULL;
    }
    ModelObject *self = (ModelObject *)type->tp_alloc(type, 0);
    if (!self) {
        Py_DECREF(capsule);
        return NULL;
    }
    Py_INCREF(device);
    self->device = device;
    self->handle = handle;
    self->owner = capsule;
    return (PyObject *)self;
}

static PyObject *model_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    char *names[] = {"config", "seed", "device", NULL};
    const char *json;
    Py_ssize_t length;
    PyObject *seed_object = NULL, *device_object = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "s#|OO:Model", names, &json, &length,
                                     &seed_object, &device_object))
        return NULL;
    uint64_t seed = 0;
    if (seed_object && !take_unsigned(seed_object, "seed", &seed))
        return NULL;
    gd_config config;
    struct failure failure = {0};
    failure.status = gd_config_from_json(json, (size_t)length, &config, failure.message,
                                         sizeof failure.message);
    if (failure.status != GD_OK)
        return failure_raise(&failure, PyExc_RuntimeError, NULL);
    PyObject *device = device_object ? Py_NewRef(device_object) : PyUnicode_FromString("cpu");
    PyObject *self = device ? model_make(type, device, &config, seed, NULL) : NULL;
    Py_XDECREF(device);
    return self;
}

static PyObject *model_load(PyObject *type, PyObject *args, PyObject *kwargs)
{
    char *names[] = {"path", "device", NULL};
    PyObject *path, *device_object = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O:_load", names, &path, &device_object))
        return NULL;
    PyObject *device = device_object ? Py_NewRef(device_object) : PyUnicode_FromString("cpu");
    PyObject *self = device ? model_make((PyTypeObject *)type, device, NULL, 0, path) : NULL;
    Py_XDECREF(device);
    return self;
}

static void model_dealloc(PyObject *object)
{
    ModelObject *self = (ModelObject *)object;
    PyTypeObject *type = Py_TYPE(object);
    Py_CLEAR(self->owner);
    Py_CLEAR(self->device);
    type->tp_free(object);
    Py_DECREF(type);
}

/* ---- Files ----------------------------------------------------------------------------------- */

static PyObject *model_save(PyObject *object, PyObject *args, PyObject *kwargs)
{
    ModelObject *self = (ModelObject *)object;
    char *names[] = {"path", "dtype", NULL};
    PyObject *path;
    const char *dtype = "float32";
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|s:save", names, &path, &dtype))
        return NULL;
    struct module_state *state = module_state_of(Py_TYPE(object));
    PyObject *bytes = state ? take_path(path) : NULL;
    if (!bytes)
        return NULL;
    struct session *session = &self->handle->session;
    struct failure failure;
    const char *text = PyBytes_AS_STRING(bytes);
    int good;
    session_refresh(session);
    Py_BEGIN_ALLOW_THREADS
    good = session_lock(session, 0, &failure);
    if (good) {
        good = failure_note(&failure, gd_model_save(self->handle->model, text, dtype),
                            session->context);
        session_unlock(session);
    }
    Py_END_ALLOW_THREADS
    Py_DECREF(bytes);
    if (!good)
        return failure_raise(&failure, state->device_error, path);
    Py_RETURN_NONE;
}

/* ---- Attributes ------------------------------------------------------------------------------ */

static PyObject *model_get_num_params(PyObject *object, void *closure)
{
    (void)closure;
    return PyLong_FromSize_t(gd_model_num_params(((ModelObject *)object)->handle->model));
}

static PyObject *model_get_config_json(PyObject *object, void *closure)
{
    (void)closure;
    const gd_config *config = gd_model_config(((ModelObject *)object)->handle->model);
    size_t length = gd_config_to_json(config, NULL, 0);
    char *text = PyMem_Malloc(length + 1);
    if (!text)
        return PyErr_NoMemory();
    gd_config_to_json(config, text, length + 1);
    PyObject *json = PyUnicode_FromStringAndSize(text, (Py_ssize_t)length);
    PyMem_Free(text);
    return json;
}

static PyObject *model_get_precision(PyObject *object, void *closure)
{
    (void)closure;
    return PyUnicode_FromString(
        gd_precision_name(gd_model_precision(((ModelObject *)object)->handle->model)));
}

static int model_set_precision(PyObject *object, PyObject *value, void *closure)
{
    enum gd_precision precision = GD_FLOAT32;
    (void)closure;
    if (!value) {
        PyErr_SetString(PyExc_AttributeError, "precision: cannot be deleted");
        return -1;
    }
    if (!take_precision(value, &precision))
        return -1;
    gd_model_set_precision(((ModelObject *)object)->handle->model, precision);
    return 0;
}

static PyObject *model_get_device(PyObject *object, void *closure)
{
    (void)closure;
    return Py_NewRef(((ModelObject *)object)->device);
}

/* ---- Type ------------------------------------------------------------------------------------ */

static const char save_doc[] =
    "save($self, path, dtype='float32')\n--\n\n"
    "Write the checkpoint, a .safetensors file, atomically.\n\n"
    "dtype: 'float32', 'bfloat16', or 'int8' for matrices and convolutions with a float32 scale for\n"
    "each output channel, the rest float32. The attribute precision is kept beside them.\n\n"
    "Raises OSError where the system refuses; an existing file is then left as it was.";
static const char load_doc[] = "_load($type, path, device='cpu')\n--\n\n"
                               "Read a checkpoint that save() wrote.";
static const char model_doc[] = "Model(config, seed=0, device='cpu')\n--\n\n"
                                "config: a checkpoint's JSON.";

static PyMethodDef model_methods[] = {
    {"forward", (PyCFunction)(void (*)(void))model_forward, METH_VARARGS | METH_KEYWORDS,
     model_forward_doc},
    {"backward", (PyCFunction)(void (*)(void))model_backward, METH_VARARGS | METH_KEYWORDS,
     model_backward_doc},
    {"_distill_step", (PyCFunction)(void (*)(void))model_distill_step, METH_VARARGS | METH_KEYWORDS,
     model_distill_step_doc},
    {"_add_statistics", (PyCFunction)(void (*)(void))model_add_statistics,
     METH_VARARGS | METH_KEYWORDS, model_add_statistics_doc},
    {"load_params", model_load_params, METH_O, model_load_params_doc},
    {"flat_params", model_flat_params, METH_NOARGS, model_flat_params_doc},
    {"touch", model_touch, METH_NOARGS, model_touch_doc},
    {"save", (PyCFunction)(void (*)(void))model_save, METH_VARARGS | METH_KEYWORDS, save_doc},
    {"_load", (PyCFunction)(void (*)(void))model_load, METH_VARARGS | METH_KEYWORDS | METH_CLASS,
     load_doc},
    {0},
};

static PyGetSetDef model_getset[] = {
    {"params", model_get_params, NULL,
     "dict of tensor name -> float32 array, read-only views of one flat buffer.", NULL},
    {"tensors", model_get_tensors, NULL,
     "Tensor (name, shape, offset) of each parameter, in the flat buffer's order.", NULL},
    {"num_params", model_get_num_params, NULL, "Number of parameters.", NULL},
    {"config_json", model_get_config_json, NULL, "The config as JSON, as a checkpoint holds it.",
     NULL},
    {"precision", model_get_precision, model_set_precision,
     "What forward() computes its products in unless told: 'float32', 'bfloat16' or 'int8'. A\n"
     "checkpoint keeps it. None sets 'float32'.",
     NULL},
    {"statistics", model_get_statistics, model_set_statistics,
     "Statistics for streams, saved with the model: float64 (n,) or None; see\n"
     "gendistiller_ext.stream.statistics.",
     NULL},
    {"device", model_get_device, NULL, "The device that the model was made for.", NULL},
    {0},
};

static PyType_Slot model_slots[] = {
    {Py_tp_doc, (void *)model_doc}, {Py_tp_new, model_new},       {Py_tp_dealloc, model_dealloc},
    {Py_tp_methods, model_methods}, {Py_tp_getset, model_getset}, {0, NULL},
};

PyType_Spec gd_model_spec = {
    .name = "gendistiller_ext._core.Model",
    .basicsize = sizeof(ModelObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = model_slots,
};
