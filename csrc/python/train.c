/* train.c - Model.backward and Model.distill_step. */
#include <stdio.h>

#include "binding.h"

/* ---- backward -------------------------------------------------------------------------------- */

const char model_backward_doc[] =
    "backward($self, wavs, grad_hidden, lengths=None, *, num_layers=None, dropout_seed=None, "
    "into=None, num_threads=None)\n--\n\n"
    "Gradient by the parameters, flat, given the gradient by the hidden states.\n\n"
    "grad_hidden: a list with float32 (B, T, D) or None for each state that forward() returns\n"
    "with the same wavs, lengths and num_layers; rows past an utterance's frames are not read.\n"
    "dropout_seed: as in forward(), which is recomputed here.\n"
    "into: float32 (num_params,) that the gradient is added to; None: a fresh one.\n\n"
    "Returns float32 (num_params,): `into`, or the fresh one.";

/* Contiguous arrays of a list's items, NULL for None. */
static int take_gradients(PyObject *list, Py_ssize_t *count, PyArrayObject ***arrays)
{
    if (!PyList_Check(list) && !PyTuple_Check(list)) {
        PyErr_Format(PyExc_TypeError,
                     "grad_hidden: expected a list of float32 arrays or None, got %.100s",
                     Py_TYPE(list)->tp_name);
        return 0;
    }
    PyObject *items = PySequence_Tuple(list);
    if (!items)
        return 0;
    *count = PyTuple_GET_SIZE(items);
    *arrays = PyMem_Calloc((size_t)*count + 1, sizeof **arrays);
    int good = *arrays != NULL;
    if (!good)
        PyErr_NoMemory();
    for (Py_ssize_t i = 0; good && i < *count; i++) {
        char name[48];
        snprintf(name, sizeof name, "grad_hidden[%zd]", i);
        PyObject *item = PyTuple_GET_ITEM(items, i);
        if (item != Py_None)
            good = ((*arrays)[i] = take_floats(item, name, 3, "float32 (batch, frames, width)")) !=
                   NULL;
    }
    Py_DECREF(items);
    return good;
}

static int check_inputs_apart(const struct run *run, PyArrayObject *into)
{
    for (int64_t i = 0; i < run->wavs.batch.batch; i++)
        if (!check_apart(into, "wavs", run->wavs.rows[i],
                         (size_t)run->wavs.lengths[i] * sizeof(float)))
            return 0;
    gd_model *model = run->handle->model;
    return check_apart(into, "the model's parameters", gd_model_params(model),
                       gd_model_num_params(model) * sizeof(float));
}

static PyObject *run_backward(struct run *run, PyArrayObject **arrays, Py_ssize_t count,
                              PyArrayObject *into)
{
    const float **memory = PyMem_Calloc((size_t)count + 1, sizeof *memory);
    float **unwanted = PyMem_Calloc((size_t)count + 1, sizeof *unwanted); /* the forward's states */
    if (!memory || !unwanted)
        PyErr_NoMemory();
    if (!memory || !unwanted || !run_begin(run, 1)) {
        PyMem_Free(memory);
        PyMem_Free(unwanted);
        return NULL;
    }
    npy_intp shape[3];
    run_shape(run, shape);
    const int states = gd_workspace_num_states(run->workspace);
    Py_ssize_t wrong = -1;
    for (Py_ssize_t i = 0; i < count && wrong < 0; i++) {
        if (arrays[i] && !has_shape(arrays[i], 3, shape))
            wrong = i;
        memory[i] = arrays[i] ? PyArray_DATA(arrays[i]) : NULL;
    }
    struct session *session = &run->handle->session;
    int good = 0;
    Py_BEGIN_ALLOW_THREADS
    if (states == count && wrong < 0) {
        gd_status status = gd_forward(run->workspace, &run->wavs.batch, run_seed(run), unwanted);
        if (status == GD_OK)
            status = gd_backward(run->workspace, &run->wavs.batch, run_seed(run), memory,
                                 PyArray_DATA(into));
        good = failure_note(&run->failure, status, session->context);
    }
    session_unlock(session);
    Py_END_ALLOW_THREADS
    PyMem_Free(memory);
    PyMem_Free(unwanted);
    if (good)
        return Py_NewRef((PyObject *)into);
    if (states != count) {
        PyErr_Format(PyExc_ValueError,
                     "grad_hidden: expected %d items, one for each hidden state, got %zd", states,
                     count);
    } else if (wrong >= 0) {
        char name[48];
        snprintf(name, sizeof name, "grad_hidden[%zd]", wrong);
        raise_shape(name, 3, shape, arrays[wrong]);
    } else {
        failure_raise(&run->failure, run->state->device_error, NULL);
    }
    return NULL;
}

PyObject *model_backward(PyObject *self, PyObject *args, PyObject *kwargs)
{
    char *names[] = {"wavs",         "grad_hidden", "lengths",     "num_layers",
                     "dropout_seed", "into",        "num_threads", NULL};
    PyObject *wavs, *list, *lengths = Py_None, *num_layers = Py_None, *seed = Py_None,
                           *into_object = Py_None;
    PyObject *num_threads = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O$OOOO:backward", names, &wavs, &list,
                                     &lengths, &num_layers, &seed, &into_object, &num_threads))
        return NULL;
    struct run run;
    PyArrayObject **arrays = NULL, *into = NULL;
    Py_ssize_t count = 0;
    int good = run_take(&run, self, wavs, lengths, num_layers, num_threads, seed) &&
               take_gradients(list, &count, &arrays) &&
               (into = take_into(into_object, (npy_intp)gd_model_num_params(run.handle->model))) !=
                   NULL &&
               check_inputs_apart(&run, into);
    for (Py_ssize_t i = 0; good && i < count; i++)
        good = !arrays[i] || check_apart(into, "grad_hidden", PyArray_DATA(arrays[i]),
                                         (size_t)PyArray_NBYTES(arrays[i]));
    PyObject *result = good ? run_backward(&run, arrays, count, into) : NULL;
    for (Py_ssize_t i = 0; arrays && i < count; i++)
        Py_XDECREF(arrays[i]);
    PyMem_Free(arrays);
    Py_XDECREF(into);
    run_free(&run);
    return result;
}

/* ---- distill_step ---------------------------------------------------------------------------- */

const char model_distill_step_doc[] =
    "_distill_step($self, wavs, targets, lengths=None, *, lam=1.0, loss_type='l1', "
    "feat_pen_loss=0.0, reduction='mean', mask_padding=True, history='free', detach_history=False, dropout_seed=None, "
    "precision=None, into=None, num_threads=None)\n--\n\n"
    "(loss, l1, cos, similarity, feature_penalty, flat gradient): see gendistiller_ext.Model.distill_step.";

/* Under the lock: notes the first target that is NaN or infinite, among the frames that count. */
static int targets_check_finite(struct run *run, const float *targets, const npy_intp shape[4],
                                int count_padding)
{
    const int64_t *frames = gd_workspace_frames(run->workspace);
    for (npy_intp l = 0; l < shape[0]; l++) {
        for (npy_intp b = 0; b < shape[1]; b++) {
            const float *rows = targets + (l * shape[1] + b) * shape[2] * shape[3];
            int64_t place = first_nonfinite(rows,
                                            (count_padding ? shape[2] : frames[b]) * shape[3]);
            if (place >= 0)
                return failure_set(
                    &run->failure, GD_EINVAL,
                    "targets[%lld, %lld]: expected finite values, got %s in frame %lld",
                    (long long)l, (long long)b, rows[place] != rows[place] ? "NaN" : "infinity",
                    (long long)(place / shape[3]));
        }
    }
    return 1;
}

static PyObject *run_distill_step(struct run *run, PyArrayObject *targets,
                                  const gd_loss_options *options, PyArrayObject *into)
{
    if (!run_begin(run, 1))
        return NULL;
    npy_intp shape[4];
    shape[0] = gd_model_config(run->handle->model)->num_targets;
    run_shape(run, shape + 1);
    struct session *session = &run->handle->session;
    const int fits = has_shape(targets, 4, shape);
    const float *values = PyArray_DATA(targets);
    gd_loss loss;
    int good = 0;
    Py_BEGIN_ALLOW_THREADS
    if (fits && targets_check_finite(run, values, shape, options->count_padding)) {
        gd_status status = gd_distill_step(run->workspace, &run->wavs.batch, values, options,
                                           run_seed(run), &loss, PyArray_DATA(into));
        good = failure_note(&run->failure, status, session->context);
    }
    session_unlock(session);
    Py_END_ALLOW_THREADS
    if (!fits) {
        raise_shape("targets", 4, shape, targets);
        return NULL;
    }
    if (!good)
        return failure_raise(&run->failure, run->state->device_error, NULL);
    const int layers = (int)shape[0];
    return Py_BuildValue("dNNNdO", loss.loss, loss_terms(loss.l1, layers),
                         loss_terms(loss.cos, layers), loss_terms(loss.similarity, layers),
                         loss.feature_penalty, into);
}

PyObject *model_distill_step(PyObject *self, PyObject *args, PyObject *kwargs)
{
    char *names[] = {
        "wavs",      "targets",      "lengths", "lam",            "loss_type",    "feat_pen_loss",
        "reduction", "mask_padding", "history", "detach_history", "dropout_seed", "precision",
        "into",      "num_threads",  NULL};
    PyObject *wavs, *targets_object, *lengths = Py_None, *lam = Py_None, *loss_type = Py_None,
                                     *feat_pen_loss = Py_None, *reduction = Py_None,
                                     *history = Py_None;
    PyObject *seed = Py_None, *precision = Py_None, *into_object = Py_None, *num_threads = Py_None;
    int mask_padding = 1, detach_history = 0;
    enum gd_precision wanted = GD_FLOAT32;
    gd_loss_options options;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O$OOOOpOpOOOO:distill_step", names, &wavs,
                                     &targets_object, &lengths, &lam, &loss_type, &feat_pen_loss,
                                     &reduction, &mask_padding, &history, &detach_history, &seed,
                                     &precision, &into_object, &num_threads) ||
        !take_precision(precision, &wanted) ||
        !take_loss_options(lam, loss_type, feat_pen_loss, reduction, mask_padding, history,
                           detach_history, &options))
        return NULL;
    struct run run;
    PyArrayObject *targets = NULL, *into = NULL;
    int good = run_take(&run, self, wavs, lengths, Py_None, num_threads, seed) &&
               (targets = take_floats(targets_object, "targets", 4,
                                      "float32 (layers, batch, frames, width)")) != NULL &&
               (into = take_into(into_object, (npy_intp)gd_model_num_params(run.handle->model))) !=
                   NULL &&
               check_inputs_apart(&run, into) &&
               check_apart(into, "targets", PyArray_DATA(targets), (size_t)PyArray_NBYTES(targets));
    run.precision = wanted;
    PyObject *result = good ? run_distill_step(&run, targets, &options, into) : NULL;
    Py_XDECREF(targets);
    Py_XDECREF(into);
    run_free(&run);
    return result;
}
