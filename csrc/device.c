/* device.c - a context from a device's name: opening its backend, closing it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend.h"

/* "cuda" or "cuda:N"; -1 where it is neither. */
static int cuda_index(const char *device)
{
    if (strncmp(device, "cuda", 4) != 0)
        return -1;
    if (device[4] == '\0')
        return 0;
    const size_t digits = strspn(device + 5, "0123456789");
    if (device[4] != ':' || digits < 1 || digits > 2 || device[5 + digits] != '\0')
        return -1;
    return atoi(device + 5);
}

gd_status gd_context_create(const char *device, int num_threads, gd_context **context, char *message, size_t size)
{
    *context = NULL;
    gd_context *created = calloc(1, sizeof *created);
    if (!created) {
        snprintf(message, message ? size : 0, "out of memory for a context");
        return GD_ENOMEM;
    }
    gd_status status = gd_context_set_num_threads(created, num_threads);
    if (status == GD_OK) {
        int index = cuda_index(device);
        if (strcmp(device, "cpu") == 0)
            status = gd_backend_cpu_open(created);
        else if (index >= 0)
            status = gd_backend_cuda_open(created, index);
        else
            status = gd_fail(created, GD_EINVAL, "device: expected \"cpu\", \"cuda\" or \"cuda:N\", got \"%.40s\"",
                             device);
    }
    if (status != GD_OK) {
        if (message)
            snprintf(message, size, "%s", created->message);
        free(created);
        return status;
    }
    *context = created;
    return GD_OK;
}

gd_context *gd_context_host(gd_context *context)
{
    if (context->backend->shares_memory)
        return context;
    if (!context->host &&
        gd_context_create("cpu", context->num_threads, &context->host, context->message,
                          sizeof context->message) != GD_OK)
        return NULL;
    context->host->num_threads = context->num_threads;
    return context->host;
}

void gd_context_free(gd_context *context)
{
    if (!context)
        return;
    gd_context_free(context->host);
    context->backend->close(context);
    free(context);
}
