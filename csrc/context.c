/* context.c - what all below a device need of its context: the message of the last failure, the number of threads. */
#include <stdarg.h>
#include <stdio.h>

#include "backend.h"

#define MAX_THREADS 1024

gd_status gd_fail(gd_context *context, gd_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(context->message, sizeof context->message, format, arguments);
    va_end(arguments);
    return status;
}

const char *gd_context_message(const gd_context *context) { return context->message; }

int gd_context_num_threads(const gd_context *context) { return context->num_threads; }

gd_status gd_context_set_num_threads(gd_context *context, int num_threads)
{
    if (num_threads < 0 || num_threads > MAX_THREADS)
        return gd_fail(context, GD_EINVAL, "num_threads: expected 1 to %d, or 0 for one a core, got %d", MAX_THREADS,
                       num_threads);
    context->num_threads = num_threads ? num_threads : gd_usable_cores();
    return GD_OK;
}
