/*
 * binding.h - the CPython module gendistiller_ext._core: what its files share.
 *
 * A call walks through: arguments to C values (scalars.c, arrays.c, audio.c); without the GIL the
 * session's lock (session.c) and the call of the C library; results as fresh NumPy arrays. While a
 * session is locked nothing Python is made but NumPy arrays, which run no other code.
 */
#ifndef GD_PYTHON_BINDING_H
#define GD_PYTHON_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#define NPY_TARGET_VERSION NPY_1_22_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL gd_numpy_api
#ifndef GD_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>
#include <pythread.h>
#include <stdatomic.h>

#include "../gendistiller.h"

#if PY_VERSION_HEX < 0x030A0000
static inline PyObject *Py_NewRef(PyObject *object)
{
    Py_INCREF(object);
    return object;
}

static inline int PyModule_AddObjectRef(PyObject *module, const char *name, PyObject *value)
{
    Py_INCREF(value);
    int failed = PyModule_AddObject(module, name, value);
    if (failed)
        Py_DECREF(value);
    return failed;
}
#endif

/* ---- Failures (session.c) -------------------------------------------------------------------- */

/* A C call's outcome, kept until Python may be told. */
struct failure {
    gd_status status;
    int error; /* errno where the status is GD_EIO */
    char message[512];
};

/* Notes `status`, errno and the context's message; returns 1 where it is GD_OK. */
int failure_note(struct failure *failure, gd_status status, const gd_context *context);
/* Notes a wrong argument (printf format); returns 0. */
int failure_set(struct failure *failure, gd_status status, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 3, 4)))
#endif
    ;
/* Raises the exception of the status: ValueError, MemoryError, OSError (of `path`, may be NULL),
 * DeviceError or NotImplementedError. Returns NULL. */
PyObject *failure_raise(const struct failure *failure, PyObject *device_error, PyObject *path);

/* ---- Session (session.c): a context, used by one thread at a time ---------------------------- */

struct session {
    gd_context *context;
    PyThread_type_lock lock;
    atomic_ulong holder; /* thread that holds the lock, or 0 */
    long process;        /* pid that the lock belongs to */
    int default_threads; /* cores that the process may use */
};

/* Opens a context with a thread for each core that the process may use. */
int session_open(struct session *session, const char *device, struct failure *failure);
void session_close(struct session *session);
/* With the GIL, before each locking: a lock that fork() copied is made anew. */
void session_refresh(struct session *session);
/* Without the GIL. Fails where this thread holds the lock already (a finaliser that ran amid a
 * call), or where num_threads (0: the default) is refused. */
int session_lock(struct session *session, int num_threads, struct failure *failure);
void session_unlock(struct session *session);

/* ---- Scalars (scalars.c). Each returns 0 with an exception set that names the argument. ------ */

int take_integer(PyObject *value, const char *name, int64_t low, int64_t high, int64_t *result);
/* None gives 0, else 1 .. INT_MAX. */
int take_count(PyObject *value, const char *name, int *result);
int take_unsigned(PyObject *value, const char *name, uint64_t *result);
/* A finite number from low to high, without `high` itself where open is 1. */
int take_number(PyObject *value, const char *name, double low, double high, int open,
                double *result);
/* The index of a string among `choices`, which end with NULL. */
int take_choice(PyObject *value, const char *name, const char *const *choices, int *result);
/* One of "float32", "bfloat16" and "int8"; None leaves *precision as it is. */
int take_precision(PyObject *value, enum gd_precision *precision);
/* None (gives *given 0) or (seed, step, first_utterance). */
int take_dropout_seed(PyObject *value, gd_dropout_seed *seed, int *given);

/* ---- Arrays (arrays.c). Each returns 0 or NULL with an exception set that names the argument.  */

/* "float32 (2, 3)", or the type's name for what is no array; a new str. */
PyObject *describe(PyObject *value, PyArrayObject *array);
/* Any object as an array of whatever dtype; TypeError "<name>: expected <expected>, got <type>". */
PyArrayObject *take_array(PyObject *value, const char *name, const char *expected);
/* C-contiguous native float32 of `ndim` dimensions; the object's own memory where it is that. */
PyArrayObject *take_floats(PyObject *value, const char *name, int ndim, const char *expected);
/* The same for a shape that is known; names its sizes. */
PyArrayObject *take_floats_shaped(PyObject *value, const char *name, int ndim,
                                  const npy_intp *shape);
/* C-contiguous native float64 of a shape that is known; names its sizes. */
PyArrayObject *take_doubles(PyObject *value, const char *name, int ndim, const npy_intp *shape);
/* int64 of one dimension, `count` long. */
PyArrayObject *take_int64s(PyObject *value, const char *name, npy_intp count);
/* The flat buffer to add a gradient to, or a fresh one of zeros for None. */
PyArrayObject *take_into(PyObject *value, npy_intp count);
int has_shape(PyArrayObject *array, int ndim, const npy_intp *shape);
/* ValueError "<name>: expected float32 <shape>, got <array>". */
void raise_shape(const char *name, int ndim, const npy_intp *shape, PyArrayObject *array);
int overlaps(const void *a, size_t a_bytes, const void *b, size_t b_bytes);
/* ValueError where `into` shares memory with `name`. */
int check_apart(PyArrayObject *into, const char *name, const void *data, size_t bytes);
/* Index of the first NaN or infinity, or -1. */
int64_t first_nonfinite(const float *x, int64_t count);
/* A view of `count` floats of `owner`'s memory. */
PyObject *view_floats(PyObject *owner, float *data, int ndim, const npy_intp *shape, int writable);

/* ---- Audio (audio.c) ------------------------------------------------------------------------- */

struct wavs {
    gd_batch batch;
    const float **rows;
    int64_t *lengths;
    PyObject *keep; /* the arrays that rows point into */
    const double **statistics;
    PyArrayObject *keep_statistics;
};

/* float32 (B, N) or a list of float32 (N,), and their lengths or None. wavs_free() also after a
 * failure. */
int wavs_take(struct wavs *wavs, PyObject *object, PyObject *lengths, int64_t min_samples);
void wavs_free(struct wavs *wavs);
/* None, or float64 (B, size): the statistics of the utterances that the batch has windows of. */
int wavs_take_statistics(struct wavs *wavs, PyObject *object, const gd_config *config);
/* Without the GIL: notes the first sample that is NaN or infinite. */
int wavs_check_finite(const struct wavs *wavs, struct failure *failure);

/* ---- Module state and types ------------------------------------------------------------------ */

struct module_state {
    PyTypeObject *model_type, *adamw_type, *tensor_type, *facts_type;
    PyObject *device_error;
    struct session session; /* of the functions that have no model: opened at first use */
};

/* State of the module that `type`, or a base of it, was made by. */
struct module_state *module_state_of(PyTypeObject *type);

/* What a Model owns; arrays over the parameters keep it alive through a capsule. */
struct model_handle {
    struct session session;
    gd_model *model;
    gd_workspace *workspaces[2]; /* inference, training: made at first use */
};

typedef struct {
    PyObject_HEAD
    struct model_handle *handle;
    PyObject *owner;  /* capsule of handle */
    PyObject *device; /* str, as it was given */
} ModelObject;

extern PyType_Spec gd_model_spec, gd_adamw_spec;

/* Statistics of whole utterances (statistics.c). */
PyObject *model_add_statistics(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *model_get_statistics(PyObject *self, void *closure);
int model_set_statistics(PyObject *self, PyObject *value, void *closure);
extern const char model_add_statistics_doc[];

/* Parameters (params.c). */
PyObject *model_get_params(PyObject *self, void *closure);
PyObject *model_get_tensors(PyObject *self, void *closure);
PyObject *model_flat_params(PyObject *self, PyObject *unused);
PyObject *model_touch(PyObject *self, PyObject *unused);
PyObject *model_load_params(PyObject *self, PyObject *params);
extern const char model_flat_params_doc[], model_touch_doc[], model_load_params_doc[];

/* ---- Runs (run.c) ---------------------------------------------------------------------------- */

/* One call under way: its arguments as C values, and the workspace that it runs in. */
struct run {
    struct model_handle *handle;
    struct module_state *state;
    struct wavs wavs;
    int num_layers, num_threads, has_seed;
    enum gd_precision precision;
    gd_dropout_seed seed;
    gd_workspace *workspace;
    struct failure failure;
};

/* Takes the arguments that all runs have; the precision is float32. run_free() also after a failure. */
int run_take(struct run *run, PyObject *self, PyObject *wavs, PyObject *lengths,
             PyObject *num_layers, PyObject *num_threads, PyObject *seed);
void run_free(struct run *run);
/* Locks the model and plans its workspace. On failure nothing is locked and an exception is set. */
int run_begin(struct run *run, int training);
const gd_dropout_seed *run_seed(const struct run *run); /* NULL: none */
/* (B, T, D) of each hidden state, once begun. */
void run_shape(const struct run *run, npy_intp shape[3]);

/* Methods that run the model (run.c, train.c). */
PyObject *model_forward(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *model_backward(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *model_distill_step(PyObject *self, PyObject *args, PyObject *kwargs);
extern const char model_forward_doc[], model_backward_doc[], model_distill_step_doc[];

/* Functions of the module (config.c, loss.c). */
PyObject *module_config_facts(PyObject *module, PyObject *json);
PyObject *module_config_tensors(PyObject *module, PyObject *json);
PyObject *module_num_frames(PyObject *module, PyObject *args);
PyObject *module_distill_loss(PyObject *module, PyObject *args, PyObject *kwargs);
extern const char module_config_facts_doc[], module_config_tensors_doc[], module_num_frames_doc[],
    module_distill_loss_doc[];

/* The loss's options as keyword arguments (loss.c). history and detach may be NULL. */
int take_loss_options(PyObject *lam, PyObject *loss_type, PyObject *feat_pen_loss, PyObject *reduction,
                      int mask_padding, PyObject *history, int detach, gd_loss_options *options);
/* float64 (layers,). */
PyObject *loss_terms(const double *terms, int layers);

#endif
