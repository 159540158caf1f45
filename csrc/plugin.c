/*
 * plugin.c - the CUDA backend, a library of its own beside this one: nothing here links CUDA, and without
 * the library there is simply no such device.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "backend.h"

#define PLUGIN "gendistiller_cuda.so"

/* The plug-in's only exported function. It compares the caller's version and sizeof(struct gd_backend) with its own:
 * a library left over from another build would have another table. */
typedef gd_status open_function(gd_context *context, int device, const char *version, size_t backend_size);

/* The plug-in's path, beside this library. */
static gd_status find_plugin(gd_context *context, char *path, size_t size)
{
    Dl_info here;
    if (!dladdr((void *)(size_t)gd_backend_cuda_open, &here) || !here.dli_fname)
        return gd_fail(context, GD_EDEVICE,
                       "device: the folder of this library cannot be found, nor the CUDA backend in it");
    const char *slash = strrchr(here.dli_fname, '/');
    const int folder = slash ? (int)(slash - here.dli_fname) + 1 : 0;
    /* With a slash in it, or the loader would search elsewhere. */
    if (snprintf(path, size, "%s%.*s" PLUGIN, slash ? "" : "./", folder, here.dli_fname) >= (int)size)
        return gd_fail(context, GD_EDEVICE, "device: the path of this library is too long");
    if (access(path, F_OK) != 0)
        return gd_fail(context, GD_EDEVICE, "device: built without CUDA: there is no %.400s", path);
    return GD_OK;
}

gd_status gd_backend_cuda_open(gd_context *context, int device)
{
    char path[4096];
    gd_status status = find_plugin(context, path, sizeof path);
    if (status != GD_OK)
        return status;
    /* Never closed: the driver keeps threads and handlers of its own. */
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return gd_fail(context, GD_EDEVICE, "device: the CUDA backend cannot be loaded: %.400s", dlerror());
    void *symbol = dlsym(library, "gd_cuda_open");
    open_function *open = NULL;
    if (!symbol)
        return gd_fail(context, GD_EDEVICE, "device: %.400s has no gd_cuda_open", path);
    memcpy(&open, &symbol, sizeof open);
    return open(context, device, GD_VERSION, sizeof(struct gd_backend));
}
