/* adamw_type.c - gendistiller_ext.AdamW: moments as NumPy arrays, a gd_adamw_step() a step. */
#include <math.h>
#include <string.h>

#include "binding.h"

typedef struct {
    PyObject_HEAD
    PyObject *model; /* ModelObject */
    PyArrayObject *m, *v;
    gd_adamw adamw; /* used under the model's lock */
} AdamWObject;

static const char *const variants[] = {"adamw", "adamw_s3prl", NULL};

static struct model_handle *handle_of(AdamWObject *self)
{
    return ((ModelObject *)self->model)->handle;
}

static npy_intp num_params(AdamWObject *self)
{
    return (npy_intp)gd_model_num_params(handle_of(self)->model);
}

/* ---- Life ------------------------------------------------------------------------------------ */

static int take_betas(PyObject *betas, gd_adamw *adamw)
{
    if (!PyTuple_Check(betas) && !PyList_Check(betas)) {
        PyErr_Format(PyExc_TypeError, "betas: expected a pair of numbers, got %.100s",
                     Py_TYPE(betas)->tp_name);
        return 0;
    }
    PyObject *items = PySequence_Tuple(betas);
    if (!items)
        return 0;
    int good = PyTuple_GET_SIZE(items) == 2;
    if (good)
        good = take_number(PyTuple_GET_ITEM(items, 0), "betas[0]", 0, 1, 1, &adamw->beta1) &&
               take_number(PyTuple_GET_ITEM(items, 1), "betas[1]", 0, 1, 1, &adamw->beta2);
    else
        PyErr_Format(PyExc_ValueError, "betas: expected a pair of numbers, got %zd items",
                     PyTuple_GET_SIZE(items));
    Py_DECREF(items);
    return good;
}

static PyObject *adamw_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    char *names[] = {"model", "lr", "betas", "eps", "weight_decay", "clip", "variant", NULL};
    PyObject *model, *lr = NULL, *betas = NULL, *eps = NULL, *decay = NULL, *clip = NULL,
                     *variant = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OOOOOO:AdamW", names, &model, &lr, &betas,
                                     &eps, &decay, &clip, &variant))
        return NULL;
    struct module_state *state = module_state_of(type);
    if (!state)
        return NULL;
    if (!PyObject_TypeCheck(model, state->model_type)) {
        PyErr_Format(PyExc_TypeError, "model: expected a gendistiller_ext.Model, got %.100s",
                     Py_TYPE(model)->tp_name);
        return NULL;
    }
    gd_adamw adamw = {
        .lr = 2e-4, .beta1 = 0.9, .beta2 = 0.98, .eps = 1e-6, .weight_decay = 1e-6, .clip = 5};
    if ((lr && !take_number(lr, "lr", 0, INFINITY, 0, &adamw.lr)) ||
        (betas && !take_betas(betas, &adamw)) ||
        (eps && !take_number(eps, "eps", 0, INFINITY, 0, &adamw.eps)) ||
        (decay && !take_number(decay, "weight_decay", 0, INFINITY, 0, &adamw.weight_decay)) ||
        (clip && !take_number(clip, "clip", 0, INFINITY, 0, &adamw.clip)) ||
        (variant && !take_choice(variant, "variant", variants, &adamw.s3prl)))
        return NULL;

    npy_intp count = (npy_intp)gd_model_num_params(((ModelObject *)model)->handle->model);
    PyObject *m = PyArray_ZEROS(1, &count, NPY_FLOAT32, 0),
             *v = PyArray_ZEROS(1, &count, NPY_FLOAT32, 0);
    AdamWObject *self = m && v ? (AdamWObject *)type->tp_alloc(type, 0) : NULL;
    if (!self) {
        Py_XDECREF(m);
        Py_XDECREF(v);
        return NULL;
    }
    self->model = Py_NewRef(model);
    self->m = (PyArrayObject *)m;
    self->v = (PyArrayObject *)v;
    self->adamw = adamw;
    return (PyObject *)self;
}

static int adamw_traverse(PyObject *object, visitproc visit, void *arg)
{
    AdamWObject *self = (AdamWObject *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->model);
    return 0;
}

static void adamw_dealloc(PyObject *object)
{
    AdamWObject *self = (AdamWObject *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    Py_CLEAR(self->model);
    Py_CLEAR(self->m);
    Py_CLEAR(self->v);
    type->tp_free(object);
    Py_DECREF(type);
}

/* ---- step ------------------------------------------------------------------------------------ */

static const char step_doc[] =
    "step($self, grads, lr=None, *, num_threads=None)\n--\n\n"
    "One update of the model's parameters. Returns the gradient's global norm before clipping.\n\n"
    "grads: float32 (num_params,), not changed.\n"
    "lr: this step's rate, schedule applied; None: the optimiser's.\n\n"
    "Raises ValueError for a gradient that holds NaN or infinity; nothing is changed then.";

static PyObject *adamw_step(PyObject *object, PyObject *args, PyObject *kwargs)
{
    AdamWObject *self = (AdamWObject *)object;
    char *names[] = {"grads", "lr", "num_threads", NULL};
    PyObject *grads_object, *lr_object = Py_None, *threads_object = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O$O:step", names, &grads_object, &lr_object,
                                     &threads_object))
        return NULL;
    struct module_state *state = module_state_of(Py_TYPE(object));
    double lr = self->adamw.lr, norm = 0;
    int num_threads;
    if (!state || (lr_object != Py_None && !take_number(lr_object, "lr", 0, INFINITY, 0, &lr)) ||
        !take_count(threads_object, "num_threads", &num_threads))
        return NULL;
    npy_intp count = num_params(self);
    PyArrayObject *grads = take_floats_shaped(grads_object, "grads", 1, &count);
    if (!grads)
        return NULL;
    struct model_handle *handle = handle_of(self);
    struct failure failure;
    int good;
    session_refresh(&handle->session);
    Py_BEGIN_ALLOW_THREADS
    good = session_lock(&handle->session, num_threads, &failure);
    if (good) {
        gd_status status = gd_adamw_step(handle->model, &self->adamw, lr, PyArray_DATA(grads),
                                         PyArray_DATA(self->m), PyArray_DATA(self->v), &norm);
        good = failure_note(&failure, status, handle->session.context);
        session_unlock(&handle->session);
    }
    Py_END_ALLOW_THREADS
    Py_DECREF(grads);
    if (!good)
        return failure_raise(&failure, state->device_error, NULL);
    return PyFloat_FromDouble(norm);
}

/* ---- State ----------------------------------------------------------------------------------- */

static const char state_doc[] =
    "state($self, /)\n--\n\n"
    "What an exact resume needs, as copies: {'variant': str, 'step': int, updates so far, 'm'\n"
    "and 'v': float32 (num_params,)}.";

/* Copies moments and counter one way or the other, under the model's lock. */
static int exchange(AdamWObject *self, float *m, float *v, int64_t *step, int load)
{
    struct session *session = &handle_of(self)->session;
    const size_t bytes = (size_t)num_params(self) * sizeof(float);
    float *own[] = {PyArray_DATA(self->m), PyArray_DATA(self->v)}, *other[] = {m, v};
    struct failure failure;
    int good;
    session_refresh(session);
    Py_BEGIN_ALLOW_THREADS
    good = session_lock(session, 0, &failure);
    if (good) {
        for (int i = 0; i < 2; i++)
            memcpy(load ? own[i] : other[i], load ? other[i] : own[i], bytes);
        if (load)
            self->adamw.step = *step;
        else
            *step = self->adamw.step;
        session_unlock(session);
    }
    Py_END_ALLOW_THREADS
    if (!good)
        failure_raise(&failure, PyExc_RuntimeError, NULL);
    return good;
}

static PyObject *adamw_state(PyObject *object, PyObject *unused)
{
    (void)unused;
    AdamWObject *self = (AdamWObject *)object;
    npy_intp count = num_params(self);
    int64_t step = 0;
    PyArrayObject *m = (PyArrayObject *)PyArray_SimpleNew(1, &count, NPY_FLOAT32);
    PyArrayObject *v = (PyArrayObject *)PyArray_SimpleNew(1, &count, NPY_FLOAT32);
    PyObject *state = NULL;
    if (m && v && exchange(self, PyArray_DATA(m), PyArray_DATA(v), &step, 0))
        state = Py_BuildValue("{sssLsOsO}", "variant", variants[self->adamw.s3prl], "step",
                              (long long)step, "m", m, "v", v);
    Py_XDECREF(m);
    Py_XDECREF(v);
    return state;
}

static const char load_state_doc[] =
    "load_state($self, state, /)\n--\n\n"
    "Take over what state() gave: 'step', 'm', 'v', and 'variant', which may be absent. All of\n"
    "it, or nothing where an entry is wrong (ValueError).";

/* float32 (num_params,) moments: finite, and 0 or more unless `negative`. */
static PyArrayObject *take_moments(PyObject *value, const char *name, npy_intp count, int negative)
{
    PyArrayObject *array = take_floats_shaped(value, name, 1, &count);
    if (!array)
        return NULL;
    const float *x = PyArray_DATA(array);
    int good = first_nonfinite(x, count) < 0;
    for (npy_intp i = 0; good && !negative && i < count; i++)
        good = x[i] >= 0;
    if (good)
        return array;
    PyErr_Format(PyExc_ValueError, "%s: expected finite values%s", name,
                 negative ? "" : " of 0 or more");
    Py_DECREF(array);
    return NULL;
}

/* The entry `key` of a private dict, taken out of it; NULL without an exception if absent. */
static PyObject *pop(PyObject *dict, const char *key)
{
    PyObject *value = PyDict_GetItemString(dict, key);
    Py_XINCREF(value);
    if (value && PyDict_DelItemString(dict, key) < 0)
        Py_CLEAR(value);
    return value;
}

static int check_keys(PyObject *rest, PyObject *step, PyObject *m, PyObject *v)
{
    const char *missing = !step ? "step" : !m ? "m" : !v ? "v" : NULL;
    if (missing) {
        PyErr_Format(PyExc_ValueError, "state: expected 'step', 'm' and 'v', got none under '%s'",
                     missing);
        return 0;
    }
    PyObject *key, *value;
    Py_ssize_t position = 0;
    if (!PyDict_Next(rest, &position, &key, &value))
        return 1;
    PyErr_Format(PyExc_ValueError, "state: unknown entry %.100R", key);
    return 0;
}

static PyObject *adamw_load_state(PyObject *object, PyObject *given)
{
    AdamWObject *self = (AdamWObject *)object;
    if (!PyDict_Check(given)) {
        PyErr_Format(PyExc_TypeError, "state: expected a dict, got %.100s",
                     Py_TYPE(given)->tp_name);
        return NULL;
    }
    PyObject *rest = PyDict_Copy(given);
    if (!rest)
        return NULL;
    PyObject *variant = pop(rest, "variant"), *step_object = pop(rest, "step"), *m = pop(rest, "m"),
             *v = pop(rest, "v");
    int other = self->adamw.s3prl,
        good = !PyErr_Occurred() && check_keys(rest, step_object, m, v) &&
               (!variant || take_choice(variant, "state['variant']", variants, &other));
    if (good && other != self->adamw.s3prl) {
        PyErr_Format(PyExc_ValueError,
                     "state['variant']: expected '%s', as this optimiser is, got '%s'",
                     variants[self->adamw.s3prl], variants[other]);
        good = 0;
    }
    int64_t step = 0;
    npy_intp count = num_params(self);
    PyArrayObject *moments[2] = {NULL, NULL};
    good = good && take_integer(step_object, "state['step']", 0, (int64_t)1 << 53, &step) &&
           (moments[0] = take_moments(m, "state['m']", count, 1)) != NULL &&
           (moments[1] = take_moments(v, "state['v']", count, 0)) != NULL &&
           exchange(self, PyArray_DATA(moments[0]), PyArray_DATA(moments[1]), &step, 1);
    Py_XDECREF(moments[0]);
    Py_XDECREF(moments[1]);
    Py_XDECREF(variant);
    Py_XDECREF(step_object);
    Py_XDECREF(m);
    Py_XDECREF(v);
    Py_DECREF(rest);
    if (!good)
        return NULL;
    Py_RETURN_NONE;
}

/* ---- Type ------------------------------------------------------------------------------------ */

static PyObject *get_number(PyObject *object, void *offset)
{
    return PyFloat_FromDouble(
        *(double *)((char *)&((AdamWObject *)object)->adamw + (size_t)offset));
}

static PyObject *get_betas(PyObject *object, void *closure)
{
    (void)closure;
    AdamWObject *self = (AdamWObject *)object;
    return Py_BuildValue("dd", self->adamw.beta1, self->adamw.beta2);
}

static PyObject *get_variant(PyObject *object, void *closure)
{
    (void)closure;
    return PyUnicode_FromString(variants[((AdamWObject *)object)->adamw.s3prl]);
}

static PyObject *get_model(PyObject *object, void *closure)
{
    (void)closure;
    return Py_NewRef(((AdamWObject *)object)->model);
}

static const char adamw_doc[] =
    "AdamW(model, lr=2e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=1e-6, clip=5.0, "
    "variant='adamw')\n--\n\n"
    "AdamW on a model's flat parameters, with the gradient clipped by its global norm.\n\n"
    "clip: largest norm, g min(1, clip / (norm + 1e-6)); 0: none.\n"
    "variant: 'adamw', torch.optim.AdamW's update with decay on matrices and convolutions only;\n"
    "'adamw_s3prl', the update of S3PRL's BertAdam-like optimiser.";

static PyMethodDef adamw_methods[] = {
    {"step", (PyCFunction)(void (*)(void))adamw_step, METH_VARARGS | METH_KEYWORDS, step_doc},
    {"state", adamw_state, METH_NOARGS, state_doc},
    {"load_state", adamw_load_state, METH_O, load_state_doc},
    {0},
};

static PyGetSetDef adamw_getset[] = {
    {"model", get_model, NULL, "The Model that it updates.", NULL},
    {"lr", get_number, NULL, "Learning rate of a step() without one.",
     (void *)offsetof(gd_adamw, lr)},
    {"betas", get_betas, NULL, "Decay rates of the two moments.", NULL},
    {"eps", get_number, NULL, "Added to the root of the second moment.",
     (void *)offsetof(gd_adamw, eps)},
    {"weight_decay", get_number, NULL, "Decoupled weight decay.",
     (void *)offsetof(gd_adamw, weight_decay)},
    {"clip", get_number, NULL, "Largest global norm of the gradient; 0: not clipped.",
     (void *)offsetof(gd_adamw, clip)},
    {"variant", get_variant, NULL, "'adamw' or 'adamw_s3prl'.", NULL},
    {0},
};

static PyType_Slot adamw_slots[] = {
    {Py_tp_doc, (void *)adamw_doc},
    {Py_tp_new, adamw_new},
    {Py_tp_dealloc, adamw_dealloc},
    {Py_tp_traverse, adamw_traverse},
    {Py_tp_methods, adamw_methods},
    {Py_tp_getset, adamw_getset},
    {0, NULL},
};

PyType_Spec gd_adamw_spec = {
    .name = "gendistiller_ext.AdamW",
    .basicsize = sizeof(AdamWObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = adamw_slots,
};
