/*
 * cublas.c - opens cuBLAS when it is first needed, without being linked with it: the library may already be in
 * the process (PyTorch brings one), lie in a wheel beside this package, or be the system's.
 */
#define _GNU_SOURCE /* dladdr() */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "ops.h"

/* Any of them has the functions of cublas_api.h. `folder`: where NVIDIA's wheel keeps it, in site-packages. */
static const struct {
    const char *name, *folder;
} libraries[] = {
    {"libcublas.so.13", "nvidia/cu13/lib"},
    {"libcublas.so.12", "nvidia/cublas/lib"},
};
#define NUM_LIBRARIES (sizeof libraries / sizeof *libraries)

/* site-packages, where this library is site-packages/gendistiller_ext/gendistiller_cuda.so; 0 where unknown. */
static int find_site_packages(char *path, size_t size)
{
    Dl_info here;
    if (!dladdr((const void *)libraries, &here) || !here.dli_fname ||
        snprintf(path, size, "%s", here.dli_fname) >= (int)size)
        return 0;
    for (int level = 0; level < 2; level++) {
        char *slash = strrchr(path, '/');
        if (!slash)
            return 0;
        *slash = '\0';
    }
    return 1;
}

static void *open_in(const char *site_packages, const char *folder, const char *name)
{
    char path[4096];
    if (snprintf(path, sizeof path, "%s/%s/%s", site_packages, folder, name) >= (int)sizeof path)
        return NULL;
    return dlopen(path, RTLD_NOW | RTLD_LOCAL);
}

/* The library, or NULL and the reason why the system's loader has not even the first of them. */
static void *open_library(char *reason, size_t size)
{
    char site_packages[4096];
    void *library = NULL;
    for (size_t i = 0; i < NUM_LIBRARIES && !library; i++)
        library = dlopen(libraries[i].name, RTLD_NOW | RTLD_NOLOAD);
    if (!library && find_site_packages(site_packages, sizeof site_packages))
        for (size_t i = 0; i < NUM_LIBRARIES && !library; i++)
            library = open_in(site_packages, libraries[i].folder, libraries[i].name);
    for (size_t i = 0; i < NUM_LIBRARIES && !library; i++) {
        library = dlopen(libraries[i].name, RTLD_NOW | RTLD_LOCAL);
        const char *error = library ? NULL : dlerror();
        if (error && i == 0)
            snprintf(reason, size, "%s", error);
    }
    return library;
}

/* The name of a function that the library lacks, or NULL. */
static const char *load_functions(void *library, struct gd_cublas *cublas)
{
    void *function;
#define LOAD(member, symbol, result, arguments) \
    function = dlsym(library, #symbol); \
    if (!function) \
        return #symbol; \
    memcpy(&cublas->member, &function, sizeof function);
    GD_CUBLAS_FUNCTIONS(LOAD)
    return NULL;
}

int gd_cuda_open_cublas(gd_context *context, struct gd_cuda *cuda)
{
    if (cuda->handle)
        return 1;
    char reason[256] = "";
    void *library = open_library(reason, sizeof reason); /* never closed: CUDA's libraries do not stand it */
    if (!library) {
        gd_cuda_keep_failure(context, GD_EDEVICE,
                             "device: cuBLAS cannot be found; the nvidia-cublas package has it: %s", reason);
        return 0;
    }
    const char *missing = load_functions(library, &cuda->cublas);
    if (missing) {
        gd_cuda_keep_failure(context, GD_EDEVICE, "device: cuBLAS has no %s; expected version 12 or later", missing);
        return 0;
    }
    cublasHandle_t handle = NULL;
    cublasStatus_t status = cuda->cublas.create(&handle);
    gd_cuda_check_cublas(context, status, "cublasCreate");
    if (status != CUBLAS_STATUS_SUCCESS)
        return 0;
    status = cuda->cublas.set_stream(handle, cuda->stream);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cuda->cublas.set_math_mode(handle, CUBLAS_DEFAULT_MATH);
    if (status != CUBLAS_STATUS_SUCCESS) {
        gd_cuda_check_cublas(context, status, "cublasSetStream");
        cuda->cublas.destroy(handle);
        return 0;
    }
    cuda->handle = handle;
    return 1;
}

void gd_cuda_close_cublas(struct gd_cuda *cuda)
{
    if (cuda->handle)
        cuda->cublas.destroy(cuda->handle);
    cuda->handle = NULL;
}

void gd_cuda_check_cublas(gd_context *context, cublasStatus_t status, const char *what)
{
    struct gd_cuda *cuda = context->device;
    if (status != CUBLAS_STATUS_SUCCESS)
        gd_cuda_keep_failure(context, status == CUBLAS_STATUS_ALLOC_FAILED ? GD_ENOMEM : GD_EDEVICE,
                             "device: %s: %s", what, cuda->cublas.status_string(status));
}
