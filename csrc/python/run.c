/* run.c - a call that runs a Model: arguments, lock, workspace; and Model.forward. */
#include <limits.h>
#include <string.h>

#include "binding.h"

void run_free(struct run *run) { wavs_free(&run->wavs); }

/* Takes the arguments that all runs have. run_free() also after a failure. */
int run_take(struct run *run, PyObject *self, PyObject *wavs, PyObject *lengths,
             PyObject *num_layers, PyObject *num_threads, PyObject *seed)
{
    memset(run, 0, sizeof *run);
    run->handle = ((ModelObject *)self)->handle;
    run->state = module_state_of(Py_TYPE(self));
    run->precision = GD_FLOAT32;
    return run->state && take_count(num_layers, "num_layers", &run->num_layers) &&
           take_count(num_threads, "num_threads", &run->num_threads) &&
           take_dropout_seed(seed, &run->seed, &run->has_seed) &&
           wavs_take(&run->wavs, wavs, lengths,
                     gd_min_samples(gd_model_config(run->handle->model)));
}

/* Locks the model and plans its workspace. On failure nothing is locked and an exception is set. */
int run_begin(struct run *run, int training)
{
    struct model_handle *handle = run->handle;
    struct session *session = &handle->session;
    int good;
    session_refresh(session);
    Py_BEGIN_ALLOW_THREADS
    good = wavs_check_finite(&run->wavs, &run->failure) &&
           session_lock(session, run->num_threads, &run->failure);
    if (good) {
        gd_status status = GD_OK;
        if (!handle->workspaces[training])
            status = gd_workspace_create(handle->model, &handle->workspaces[training]);
        run->workspace = handle->workspaces[training];
        if (status == GD_OK)
            status = gd_workspace_plan(run->workspace, &run->wavs.batch, run->num_layers, training,
                                       run->precision);
        good = failure_note(&run->failure, status, session->context);
        if (!good)
            session_unlock(session);
    }
    Py_END_ALLOW_THREADS
    if (!good)
        failure_raise(&run->failure, run->state->device_error, NULL);
    return good;
}

const gd_dropout_seed *run_seed(const struct run *run) { return run->has_seed ? &run->seed : NULL; }

/* (B, T, D) of each hidden state. */
void run_shape(const struct run *run, npy_intp shape[3])
{
    shape[0] = (npy_intp)run->wavs.batch.batch;
    shape[1] = (npy_intp)gd_workspace_max_frames(run->workspace);
    shape[2] = gd_model_config(run->handle->model)->encoder_embed_dim;
}

/* ---- forward --------------------------------------------------------------------------------- */

const char model_forward_doc[] =
    "forward($self, wavs, lengths=None, *, num_layers=None, precision=None, num_threads=None, "
    "dropout_seed=None, statistics=None, states=None)\n--\n\n"
    "Hidden states of a batch: (hidden, frames).\n\n"
    "wavs: float32 (B, N), 16 kHz, or a list of float32 (N,) of different lengths.\n"
    "lengths: int64 (B,), samples of each row; None: all of them.\n"
    "num_layers: how many layers to generate (generative) or blocks to run (encoder); None:\n"
    "all.\n"
    "precision: of matrix products: 'float32', 'bfloat16' or 'int8'; None: the attribute\n"
    "precision, which is the checkpoint's. Sums, norms and softmax are float32 always. CUDA has no\n"
    "'int8', and 'bfloat16' from compute capability 8.0 on: NotImplementedError.\n"
    "num_threads: None: one for each core that the process may use (_core.usable_cores()).\n"
    "statistics: None, or float64 (B, n): wavs are windows of longer utterances, which these are\n"
    "the statistics of (gendistiller_ext.stream.statistics).\n"
    "dropout_seed: None: evaluation; (seed, step, first_utterance): dropout as a training step\n"
    "has it.\n"
    "states: which hidden states to return, by their places in the list of all; None: all of\n"
    "them. The others take no memory.\n\n"
    "Returns the states, a list of float32 (B, T, D): [f, h1, ..., hL] of a generative model,\n"
    "[block 0's input, each block's output] of an encoder; and frames, int64 (B,). Rows past an\n"
    "utterance's frames are zero. An utterance's rows are the same bits whatever it is batched\n"
    "with and however many threads run.\n\n"
    "Raises ValueError or TypeError that names the argument; NaN, infinity and utterances\n"
    "shorter than one frame are refused. The audio must not be changed by another thread\n"
    "meanwhile.";

/* Which states are wanted: `count` places, or all where it is -1. */
struct chosen {
    int64_t *places;
    Py_ssize_t count;
};

static int take_chosen(PyObject *states, struct chosen *chosen)
{
    *chosen = (struct chosen){NULL, -1};
    if (states == Py_None)
        return 1;
    if (!PyList_Check(states) && !PyTuple_Check(states)) {
        PyErr_Format(PyExc_TypeError, "states: expected a list of integers, got %.100s",
                     Py_TYPE(states)->tp_name);
        return 0;
    }
    PyObject *items = PySequence_Tuple(states);
    if (!items)
        return 0;
    chosen->count = PyTuple_GET_SIZE(items);
    chosen->places = PyMem_Calloc((size_t)chosen->count + 1, sizeof *chosen->places);
    int good = chosen->places != NULL;
    if (!good)
        PyErr_NoMemory();
    for (Py_ssize_t i = 0; good && i < chosen->count; i++)
        good = take_integer(PyTuple_GET_ITEM(items, i), "states", 0, INT_MAX, &chosen->places[i]);
    Py_DECREF(items);
    return good;
}

/* The first place that is beyond the model's states; or -1. */
static int64_t chosen_beyond(const struct chosen *chosen, int states)
{
    for (Py_ssize_t i = 0; i < chosen->count; i++)
        if (chosen->places[i] >= states)
            return chosen->places[i];
    return -1;
}

/* Of `states` arrays (B, T, D) those that are wanted, and where their memory is. */
static int allocate_states(PyArrayObject **arrays, float **memory, int states,
                           const struct chosen *chosen, const npy_intp shape[3])
{
    for (int64_t i = 0; i < (chosen->count < 0 ? states : chosen->count); i++) {
        const int64_t place = chosen->count < 0 ? i : chosen->places[i];
        if (!arrays[place])
            arrays[place] = (PyArrayObject *)PyArray_SimpleNew(3, shape, NPY_FLOAT32);
        if (!arrays[place])
            return 0;
        memory[place] = PyArray_DATA(arrays[place]);
    }
    return 1;
}

static PyObject *list_states(PyArrayObject **arrays, int states, const struct chosen *chosen)
{
    const Py_ssize_t count = chosen->count < 0 ? states : chosen->count;
    PyObject *hidden = PyList_New(count);
    for (Py_ssize_t i = 0; hidden && i < count; i++) {
        PyArrayObject *state = arrays[chosen->count < 0 ? i : chosen->places[i]];
        PyList_SET_ITEM(hidden, i, Py_NewRef((PyObject *)state));
    }
    return hidden;
}

PyObject *model_forward(PyObject *self, PyObject *args, PyObject *kwargs)
{
    char *names[] = {"wavs",         "lengths",    "num_layers", "precision", "num_threads",
                     "dropout_seed", "statistics", "states",     NULL};
    PyObject *wavs, *lengths = Py_None, *num_layers = Py_None, *precision = Py_None,
                    *num_threads = Py_None, *seed = Py_None, *statistics = Py_None,
                    *wanted_states = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O$OOOOOO:forward", names, &wavs, &lengths,
                                     &num_layers, &precision, &num_threads, &seed, &statistics,
                                     &wanted_states))
        return NULL;
    enum gd_precision wanted = gd_model_precision(((ModelObject *)self)->handle->model);
    if (!take_precision(precision, &wanted))
        return NULL;
    struct run run;
    struct chosen chosen = {NULL, -1};
    int taken = run_take(&run, self, wavs, lengths, num_layers, num_threads, seed);
    run.precision = wanted;
    if (!taken || !take_chosen(wanted_states, &chosen) ||
        !wavs_take_statistics(&run.wavs, statistics, gd_model_config(run.handle->model)) ||
        !run_begin(&run, 0)) {
        PyMem_Free(chosen.places);
        run_free(&run);
        return NULL;
    }

    struct session *session = &run.handle->session;
    const int states = gd_workspace_num_states(run.workspace);
    npy_intp shape[3];
    run_shape(&run, shape);
    PyArrayObject **arrays = PyMem_Calloc((size_t)states, sizeof *arrays);
    float **memory = PyMem_Calloc((size_t)states, sizeof *memory);
    PyArrayObject *frames = (PyArrayObject *)PyArray_SimpleNew(1, shape, NPY_INT64);
    const int64_t beyond = chosen_beyond(&chosen, states);
    int allocated = arrays && memory && frames && beyond < 0 &&
                    allocate_states(arrays, memory, states, &chosen, shape),
        good = 0;
    Py_BEGIN_ALLOW_THREADS
    if (allocated) {
        memcpy(PyArray_DATA(frames), gd_workspace_frames(run.workspace),
               (size_t)shape[0] * sizeof(int64_t));
        gd_status status = gd_forward(run.workspace, &run.wavs.batch, run_seed(&run), memory);
        good = failure_note(&run.failure, status, session->context);
    }
    session_unlock(session);
    Py_END_ALLOW_THREADS

    PyObject *result = NULL;
    if (good) {
        PyObject *hidden = list_states(arrays, states, &chosen);
        result = hidden ? Py_BuildValue("NO", hidden, frames) : NULL;
    } else if (allocated) {
        failure_raise(&run.failure, run.state->device_error, NULL);
    } else if (beyond >= 0) {
        PyErr_Format(PyExc_ValueError, "states: expected 0 to %d, got %lld", states - 1,
                     (long long)beyond);
    } else if (!PyErr_Occurred()) {
        PyErr_NoMemory();
    }
    for (int i = 0; arrays && i < states; i++)
        Py_XDECREF(arrays[i]);
    Py_XDECREF(frames);
    PyMem_Free(arrays);
    PyMem_Free(memory);
    PyMem_Free(chosen.places);
    run_free(&run);
    return result;
}
