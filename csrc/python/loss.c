/* loss.c - distill_loss, and the options that it shares with Model.distill_step. */
#include <math.h>
#include <string.h>

#include "binding.h"

int take_loss_options(PyObject *lam, PyObject *loss_type, PyObject *feat_pen_loss, PyObject *reduction,
                      int mask_padding, PyObject *history, int detach, gd_loss_options *options)
{
    static const char *const types[] = {"l1", "l2", NULL};
    static const char *const reductions[] = {"mean", "sum", NULL};
    static const char *const histories[] = {"free", "teacher", NULL};
    memset(options, 0, sizeof *options);
    options->lam = 1;
    options->count_padding = !mask_padding;
    options->detach_history = detach;
    return (lam == Py_None || take_number(lam, "lam", 0, INFINITY, 0, &options->lam)) &&
           (loss_type == Py_None ||
            take_choice(loss_type, "loss_type", types, &options->squared)) &&
           (feat_pen_loss == Py_None ||
            take_number(feat_pen_loss, "feat_pen_loss", 0, INFINITY, 0, &options->feat_pen_loss)) &&
           (reduction == Py_None ||
            take_choice(reduction, "reduction", reductions, &options->reduction_sum)) &&
           (history == Py_None ||
            take_choice(history, "history", histories, &options->teacher_history));
}

PyObject *loss_terms(const double *terms, int layers)
{
    npy_intp count = layers;
    PyObject *array = PyArray_SimpleNew(1, &count, NPY_FLOAT64);
    if (array)
        memcpy(PyArray_DATA((PyArrayObject *)array), terms, (size_t)layers * sizeof *terms);
    return array;
}

const char module_distill_loss_doc[] =
    "distill_loss($module, pred, target, frames=None, *, lam=1.0, loss_type='l1', "
    "reduction='mean', mask_padding=True, num_threads=None)\n--\n\n"
    "The distillation loss and its gradient: (loss, l1, cos, grad).\n\n"
    "pred, target: float32 (L, B, T, D).\n"
    "frames: int64 (B,), valid frames of each utterance; None: all T.\n\n"
    "Per layer and frame l1 = |p - t|_1 / D (loss_type 'l2': |p - t|_2^2 / D) and\n"
    "cos = -log sigmoid(cosine similarity); the loss is the mean over layers of l1 + lam cos, as\n"
    "mean over all valid frames ('mean') or summed over utterances and frames ('sum', the paper's\n"
    "equation 2). mask_padding False counts the padded frames too, as S3PRL does.\n\n"
    "Returns loss (float), l1 and cos (float64 (L,), reduced alike), and grad = d loss / d\n"
    "pred, float32 (L, B, T, D).";

/* frames as int64 (B,), each 1 .. T. */
static PyArrayObject *take_frames(PyObject *object, const npy_intp shape[4])
{
    PyArrayObject *frames = take_int64s(object, "frames", shape[1]);
    const int64_t *values = frames ? PyArray_DATA(frames) : NULL;
    for (npy_intp b = 0; frames && b < shape[1]; b++) {
        if (values[b] < 1 || values[b] > shape[2]) {
            PyErr_Format(PyExc_ValueError, "frames[%zd]: expected 1 to %zd, got %lld",
                         (Py_ssize_t)b, (Py_ssize_t)shape[2], (long long)values[b]);
            Py_CLEAR(frames);
        }
    }
    return frames;
}

static int check_sizes(PyArrayObject *pred)
{
    const npy_intp *shape = PyArray_DIMS(pred);
    if (PyArray_SIZE(pred) > 0 && shape[0] <= GD_MAX_TARGETS)
        return 1;
    PyObject *got = describe((PyObject *)pred, pred);
    if (got)
        PyErr_Format(PyExc_ValueError,
                     "pred: expected 1 to %d layers and no empty dimension, got %U", GD_MAX_TARGETS,
                     got);
    Py_XDECREF(got);
    return 0;
}

/* Opens the session of the functions that have no model. The GIL is its lock meanwhile. */
static int open_session(struct module_state *state)
{
    struct failure failure;
    if (state->session.context || session_open(&state->session, "cpu", &failure))
        return 1;
    failure_raise(&failure, state->device_error, NULL);
    return 0;
}

PyObject *module_distill_loss(PyObject *module, PyObject *args, PyObject *kwargs)
{
    char *names[] = {"pred",      "target",    "frames",       "lam",
                     "loss_type", "reduction", "mask_padding", "num_threads",
                     NULL};
    PyObject *pred_object, *target_object, *frames_object = Py_None, *lam = Py_None,
                                           *loss_type = Py_None, *reduction = Py_None;
    PyObject *threads_object = Py_None;
    int mask_padding = 1, num_threads;
    gd_loss_options options;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O$OOOpO:distill_loss", names, &pred_object,
                                     &target_object, &frames_object, &lam, &loss_type,
                                     &reduction, &mask_padding, &threads_object) ||
        !take_loss_options(lam, loss_type, Py_None, reduction, mask_padding, Py_None, 0, &options) ||
        !take_count(threads_object, "num_threads", &num_threads))
        return NULL;

    struct module_state *state = PyModule_GetState(module);
    PyArrayObject *pred = take_floats(pred_object, "pred", 4,
                                      "float32 (layers, batch, frames, width)");
    PyArrayObject *target = NULL, *frames = NULL, *grad = NULL;
    PyObject *result = NULL;
    const npy_intp *shape = pred ? PyArray_DIMS(pred) : NULL;
    int good = pred && check_sizes(pred) &&
               (target = take_floats_shaped(target_object, "target", 4, shape)) != NULL &&
               (frames_object == Py_None || (frames = take_frames(frames_object, shape)) != NULL) &&
               (grad = (PyArrayObject *)PyArray_SimpleNew(4, shape, NPY_FLOAT32)) != NULL &&
               open_session(state);
    if (good) {
        struct session *session = &state->session;
        struct failure failure;
        gd_loss loss;
        session_refresh(session);
        Py_BEGIN_ALLOW_THREADS
        good = session_lock(session, num_threads, &failure);
        if (good) {
            gd_status status = gd_distill_loss(session->context, PyArray_DATA(pred),
                                               PyArray_DATA(target), shape[0], shape[1], shape[2],
                                               shape[3], frames ? PyArray_DATA(frames) : NULL,
                                               &options, &loss, PyArray_DATA(grad));
            good = failure_note(&failure, status, session->context);
            session_unlock(session);
        }
        Py_END_ALLOW_THREADS
        if (good)
            result = Py_BuildValue("dNNO", loss.loss, loss_terms(loss.l1, (int)shape[0]),
                                   loss_terms(loss.cos, (int)shape[0]), grad);
        else
            failure_raise(&failure, state->device_error, NULL);
    }
    Py_XDECREF(pred);
    Py_XDECREF(target);
    Py_XDECREF(frames);
    Py_XDECREF(grad);
    return result;
}
