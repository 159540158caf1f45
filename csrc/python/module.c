/* module.c - gendistiller_ext._core: its functions, its state, its initialisation. */
#include <stdio.h>

#define GD_IMPORTS_NUMPY
#include "binding.h"

/* ---- Functions ------------------------------------------------------------------------------- */

static const char cpu_features_doc[] =
    "cpu_features($module, /)\n--\n\n"
    "Instruction sets that this process found and may use, best last, such as ('generic',\n"
    "'avx2', 'avx512').\n\n"
    "The environment variable GENDISTILLER_DISABLE_CPU=avx512,avx2 masks some, before the\n"
    "import.";

static PyObject *cpu_features(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    PyObject *names = PyUnicode_FromString(gd_cpu_features());
    PyObject *list = names ? PyUnicode_Split(names, NULL, -1) : NULL;
    PyObject *tuple = list ? PyList_AsTuple(list) : NULL;
    Py_XDECREF(names);
    Py_XDECREF(list);
    return tuple;
}

static const char usable_cores_doc[] =
    "usable_cores($module, /)\n--\n\n"
    "Cores that this process may keep busy, which is how many threads a model has at first: the\n"
    "processors that it may run on (affinity), or what its cgroups' quotas leave of them, in\n"
    "whole cores, rounded up. Of torchrun's LOCAL_WORLD_SIZE processes each gets its share,\n"
    "unless they are bound to different processors.";

static PyObject *usable_cores(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyLong_FromLong(gd_usable_cores());
}

static const char devices_doc[] = "devices($module, /)\n--\n\n"
                                  "Devices that a Model can be made for: ['cpu', 'cuda:0', ...].";

static PyObject *devices(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    PyObject *names = PyList_New(0);
    for (int index = -1; names; index++) {
        char name[20] = "cpu";
        if (index >= 0)
            snprintf(name, sizeof name, "cuda:%d", index);
        gd_context *context;
        gd_status status;
        Py_BEGIN_ALLOW_THREADS
        status = gd_context_create(name, 1, &context, NULL, 0);
        if (status == GD_OK)
            gd_context_free(context);
        Py_END_ALLOW_THREADS
        if (status != GD_OK)
            break;
        PyObject *text = PyUnicode_FromString(name);
        if (!text || PyList_Append(names, text) < 0)
            Py_CLEAR(names);
        Py_XDECREF(text);
    }
    return names;
}

static PyMethodDef functions[] = {
    {"config_facts", module_config_facts, METH_O, module_config_facts_doc},
    {"config_tensors", module_config_tensors, METH_O, module_config_tensors_doc},
    {"num_frames", module_num_frames, METH_VARARGS, module_num_frames_doc},
    {"cpu_features", cpu_features, METH_NOARGS, cpu_features_doc},
    {"usable_cores", usable_cores, METH_NOARGS, usable_cores_doc},
    {"devices", devices, METH_NOARGS, devices_doc},
    {"distill_loss", (PyCFunction)(void (*)(void))module_distill_loss, METH_VARARGS | METH_KEYWORDS,
     module_distill_loss_doc},
    {0},
};

/* ---- Module ---------------------------------------------------------------------------------- */

static PyStructSequence_Field tensor_fields[] = {
    {"name", "checkpoint name"},
    {"shape", "sizes"},
    {"offset", "of its first element in the flat buffer"},
    {"size", "number of elements"},
    {"decay", "whether weight decay applies: a matrix or a convolution"},
    {NULL, NULL},
};

/* As a tuple it is (name, shape, offset); the rest are attributes. */
static PyStructSequence_Desc tensor_desc = {
    .name = "gendistiller_ext._core.Tensor",
    .doc = "A parameter tensor's place in a model's flat buffer.",
    .fields = tensor_fields,
    .n_in_sequence = 3,
};

static PyStructSequence_Field facts_fields[] = {
    {"min_samples", "of the shortest utterance that has a frame"},
    {"hop", "samples from frame to frame"},
    {"num_states", "hidden states, where num_layers is None"},
    {"num_params", "number of parameters"},
    {NULL, NULL},
};

static PyStructSequence_Desc facts_desc = {
    .name = "gendistiller_ext._core.ConfigFacts",
    .doc = "What follows from a config.",
    .fields = facts_fields,
    .n_in_sequence = 4,
};

static int add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **type)
{
    *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return *type ? PyModule_AddType(module, *type) : -1;
}

static int module_exec(PyObject *module)
{
    struct module_state *state = PyModule_GetState(module);
    if (PyArray_ImportNumPyAPI() < 0)
        return -1;
    state->device_error = PyErr_NewExceptionWithDoc(
        "gendistiller_ext.DeviceError",
        "There is no such device, or it failed; the message says why.", PyExc_RuntimeError, NULL);
    state->tensor_type = PyStructSequence_NewType(&tensor_desc);
    state->facts_type = PyStructSequence_NewType(&facts_desc);
    if (!state->device_error || !state->tensor_type || !state->facts_type ||
        PyModule_AddType(module, state->tensor_type) < 0 ||
        PyModule_AddType(module, state->facts_type) < 0 ||
        PyModule_AddObjectRef(module, "DeviceError", state->device_error) < 0 ||
        add_type(module, &gd_model_spec, &state->model_type) < 0 ||
        add_type(module, &gd_adamw_spec, &state->adamw_type) < 0)
        return -1;
    if (PyModule_AddIntMacro(module, GD_MAX_CONV_LAYERS) < 0 || PyModule_AddIntMacro(module, GD_MAX_TARGETS) < 0)
        return -1;
    return PyModule_AddStringConstant(module, "__version__", GD_VERSION);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    struct module_state *state = PyModule_GetState(module);
    Py_VISIT(state->model_type);
    Py_VISIT(state->adamw_type);
    Py_VISIT(state->tensor_type);
    Py_VISIT(state->facts_type);
    Py_VISIT(state->device_error);
    return 0;
}

static int module_clear(PyObject *module)
{
    struct module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->model_type);
    Py_CLEAR(state->adamw_type);
    Py_CLEAR(state->tensor_type);
    Py_CLEAR(state->facts_type);
    Py_CLEAR(state->device_error);
    return 0;
}

static void module_free(void *module)
{
    struct module_state *state = PyModule_GetState(module);
    module_clear(module);
    session_close(&state->session);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, module_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED}, /* as NumPy */
#endif
#ifdef Py_mod_gil
    /* What lies before and behind a session's lock counts on the GIL (opening the module's own session,
     * session_refresh(), an optimiser's attributes): a free-threaded Python turns it on at the import. */
    {Py_mod_gil, Py_MOD_GIL_USED},
#endif
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "gendistiller_ext._core",
    .m_doc = "The C library of gendistiller_ext.",
    .m_size = sizeof(struct module_state),
    .m_methods = functions,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

struct module_state *module_state_of(PyTypeObject *type)
{
    /* A subclass made in Python has no module of its own: the base that this module made does. */
    for (; type; type = type->tp_base) {
        PyObject *module = PyType_HasFeature(type, Py_TPFLAGS_HEAPTYPE)
                               ? ((PyHeapTypeObject *)type)->ht_module
                               : NULL;
        if (module && PyModule_GetDef(module) == &definition)
            return PyModule_GetState(module);
    }
    PyErr_SetString(PyExc_TypeError, "expected a type of gendistiller_ext._core");
    return NULL;
}

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
