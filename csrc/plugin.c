/*
 * plugin.c - the CUDA backend, a library of its own beside this one: nothing here links CUDA, and without
 * the library there is simply no such device.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "backend.h"

#define PLUGIN "gendistiller_cuda.so"

/* The plug-in's only exported function. */
typedef gd_status open_function(gd_context *context, int device);

gd_status gd_backend_cuda_open(gd_context *context, int device)
{
    Dl_info here;
    char path[4096];
    if (!dladdr((void *)(size_t)gd_backend_cuda_open, &here) || !here.dli_fname)
        return gd_fail(context, GD_EDEVICE, "device: the folder of this library cannot be found, nor the CUDA backend in it");
    const char *slash = strrchr(here.dli_fname, '/');
    const int folder = slash ? (int)(slash - here.dli_fname) + 1 : 0;
    if (snprintf(path, sizeof path, "%.*s" PLUGIN, folder, here.dli_fname) >= (int)sizeof path)
        return gd_fail(context, GD_EDEVICE, "device: the path of this library is too long");

    /* Never closed: the driver keeps threads and handlers of its own. */
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return gd_fail(context, GD_EDEVICE, "device: built without CUDA, or its library cannot be loaded: %.300s", dlerror());
    void *symbol = dlsym(library, "gd_cuda_open");
    open_function *open = NULL;
    if (!symbol)
        return gd_fail(context, GD_EDEVICE, "device: %.300s has no gd_cuda_open", path);
    memcpy(&open, &symbol, sizeof open);
    return open(context, device);
}
