/* session.c - a context that one thread at a time uses, and its failures as exceptions. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "binding.h"

/* ---- Failures -------------------------------------------------------------------------------- */

int failure_note(struct failure *failure, gd_status status, const gd_context *context)
{
    failure->error = errno;
    failure->status = status;
    if (status == GD_OK)
        return 1;
    snprintf(failure->message, sizeof failure->message, "%s",
             context ? gd_context_message(context) : "");
    return 0;
}

int failure_set(struct failure *failure, gd_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(failure->message, sizeof failure->message, format, arguments);
    va_end(arguments);
    failure->status = status;
    failure->error = 0;
    return 0;
}

PyObject *failure_raise(const struct failure *failure, PyObject *device_error, PyObject *path)
{
    PyObject *type = PyExc_RuntimeError;
    switch (failure->status) {
    case GD_EIO:
        if (failure->error) {
            errno = failure->error;
            return PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path);
        }
        type = PyExc_OSError;
        break;
    case GD_EINVAL:
    case GD_EFORMAT:
        type = PyExc_ValueError;
        break;
    case GD_ENOMEM:
        type = PyExc_MemoryError;
        break;
    case GD_EDEVICE:
        type = device_error;
        break;
    case GD_EUNSUPPORTED:
        type = PyExc_NotImplementedError;
        break;
    case GD_OK: /* RuntimeError: a failure without a status is a fault of this module */
        break;
    }
    /* A path in the message may hold bytes that are no UTF-8. */
    PyObject *message = PyUnicode_DecodeUTF8(failure->message, (Py_ssize_t)strlen(failure->message),
                                             "replace");
    if (message) {
        PyErr_SetObject(type, message);
        Py_DECREF(message);
    }
    return NULL;
}

/* ---- Session --------------------------------------------------------------------------------- */

int session_open(struct session *session, const char *device, struct failure *failure)
{
    memset(session, 0, sizeof *session);
    memset(failure, 0, sizeof *failure);
    gd_status status = gd_context_create(device, 0, &session->context, failure->message,
                                         sizeof failure->message);
    if (status != GD_OK) {
        failure->status = status;
        failure->error = errno;
        return 0;
    }
    session->default_threads = gd_context_num_threads(session->context);
    session->process = (long)getpid();
    session->lock = PyThread_allocate_lock();
    if (!session->lock) {
        session_close(session);
        return failure_set(failure, GD_ENOMEM, "out of memory for a lock");
    }
    return 1;
}

void session_close(struct session *session)
{
    if (session->lock)
        PyThread_free_lock(session->lock);
    gd_context_free(session->context);
    session->lock = NULL;
    session->context = NULL;
}

void session_refresh(struct session *session)
{
    if (session->process == (long)getpid())
        return;
    /* Another thread of the parent may have held the lock: in this process nobody will release it.
     * The old one is left alone, as freeing a held lock is undefined. */
    PyThread_type_lock lock = PyThread_allocate_lock();
    if (!lock)
        return;
    session->lock = lock;
    atomic_store(&session->holder, 0);
    session->process = (long)getpid();
}

int session_lock(struct session *session, int num_threads, struct failure *failure)
{
    unsigned long thread = PyThread_get_thread_ident();
    if (!PyThread_acquire_lock(session->lock, NOWAIT_LOCK)) {
        if (atomic_load(&session->holder) == thread)
            return failure_set(failure, GD_OK, "model: called from within another of its calls");
        PyThread_acquire_lock(session->lock, WAIT_LOCK);
    }
    atomic_store(&session->holder, thread);
    if (num_threads == 0)
        num_threads = session->default_threads;
    gd_status status = GD_OK;
    if (gd_context_num_threads(session->context) != num_threads)
        status = gd_context_set_num_threads(session->context, num_threads);
    if (failure_note(failure, status, session->context))
        return 1;
    session_unlock(session);
    return 0;
}

void session_unlock(struct session *session)
{
    atomic_store(&session->holder, 0);
    PyThread_release_lock(session->lock);
}
