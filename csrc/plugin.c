/*
 * plugin.c - the CUDA backend, a library of its own beside this one: nothing here links CUDA, and without
 * the library there is simply no such device.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "build_text.h"

#define PLUGIN "gendistiller_cuda.so"

/* What the plug-in exports. A library left over from another build would have another table and other structs: its
 * gd_cuda_open() is called only where both builds are the same. */
typedef void build_function(char text[GD_BUILD_TEXT]);
typedef gd_status open_function(gd_context *context, int device);

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

/* The address of a function into *function, which is a pointer to one. */
static gd_status find_function(gd_context *context, void *library, const char *path, const char *name, void *function)
{
    void *symbol = dlsym(library, name);
    if (!symbol)
        return gd_fail(context, GD_EDEVICE, "device: %.400s has no %s", path, name);
    memcpy(function, &symbol, sizeof symbol);
    return GD_OK;
}

static gd_status check_build(gd_context *context, void *library, const char *path)
{
    build_function *build = NULL;
    gd_status status = find_function(context, library, path, "gd_cuda_build", &build);
    if (status != GD_OK)
        return status;
    char expected[GD_BUILD_TEXT], got[GD_BUILD_TEXT];
    gd_build_text(expected);
    build(got);
    if (strcmp(expected, got) != 0)
        return gd_fail(context, GD_EDEVICE,
                       "device: %.300s is of another build: expected %s, got %.80s; install the package anew",
                       path, expected, got);
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
    open_function *open = NULL;
    status = check_build(context, library, path);
    if (status == GD_OK)
        status = find_function(context, library, path, "gd_cuda_open", &open);
    return status == GD_OK ? open(context, device) : status;
}
