/*
 * backend_cuda.c - a CUDA device as a gd_backend: the table of its operations (ops.h), its memory, and the two
 * functions that this library exports, which csrc/plugin.c looks for.
 */
#include "../csrc/build_text.h"

#include "ops.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

/* The lowest compute capability that this library has code for, times 10: build.py says. */
#ifndef GD_CUDA_LOWEST_CAPABILITY
#error "GD_CUDA_LOWEST_CAPABILITY is not defined"
#endif

/* Earlier devices do not multiply bfloat16: cuBLAS refuses it there, or emulates it, slower than float32. */
enum { LOWEST_BFLOAT16 = 80 };

/* ---- Failures ----------------------------------------------------------------------------------------- */

static void set_message(gd_context *context, const char *format, va_list arguments)
{
    vsnprintf(context->message, sizeof context->message, format, arguments);
}

/* As the core's, which hides its symbols from this library. */
gd_status gd_fail(gd_context *context, gd_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    set_message(context, format, arguments);
    va_end(arguments);
    return status;
}

void gd_cuda_keep_failure(gd_context *context, gd_status status, const char *format, ...)
{
    if (context->status != GD_OK)
        return;
    va_list arguments;
    va_start(arguments, format);
    set_message(context, format, arguments);
    va_end(arguments);
    context->status = status;
}

int gd_cuda_lacks(gd_context *context, enum gd_precision precision)
{
    const int lacks = !(context->backend->precisions >> precision & 1);
    if (lacks)
        gd_cuda_keep_failure(context, GD_EUNSUPPORTED, "precision: this device has no products in it");
    return lacks;
}

static gd_status status_of(cudaError_t error)
{
    return error == cudaErrorMemoryAllocation ? GD_ENOMEM : GD_EDEVICE;
}

void gd_cuda_check(gd_context *context, cudaError_t error, const char *what)
{
    if (error == cudaSuccess)
        return;
    gd_cuda_keep_failure(context, status_of(error), "device: %s: %s", what, cudaGetErrorString(error));
    cudaGetLastError(); /* or it would be the next call's */
}

struct gd_cuda *gd_cuda_begin(gd_context *context)
{
    struct gd_cuda *cuda = context->device;
    if (context->status == GD_OK)
        gd_cuda_check(context, cudaSetDevice(cuda->device), "cudaSetDevice");
    return context->status == GD_OK ? cuda : NULL;
}

/* ---- Memory ------------------------------------------------------------------------------------------- */

static gd_status allocate(gd_context *context, size_t bytes, void **memory)
{
    struct gd_cuda *cuda = context->device;
    *memory = NULL;
    cudaError_t error = cudaSetDevice(cuda->device);
    if (error == cudaSuccess)
        error = cudaMalloc(memory, bytes > 0 ? bytes : 1);
    if (error == cudaSuccess)
        return GD_OK;
    *memory = NULL;
    cudaGetLastError();
    return gd_fail(context, status_of(error), "device: %zu bytes on cuda:%d: %s", bytes, cuda->device,
                   cudaGetErrorString(error));
}

/* Also after a failure. */
static void release(gd_context *context, void *memory)
{
    struct gd_cuda *cuda = context->device;
    if (cudaSetDevice(cuda->device) != cudaSuccess || cudaFree(memory) != cudaSuccess)
        cudaGetLastError();
}

/* Pageable host memory is read before the call returns; page-locked memory has to stay until synchronize(). */
static void upload(gd_context *context, void *to, const void *from, size_t bytes)
{
    struct gd_cuda *cuda = gd_cuda_begin(context);
    if (cuda && bytes > 0)
        gd_cuda_check(context, cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, cuda->stream),
                      "upload");
}

/* Pageable host memory is written before the call returns; page-locked memory by synchronize() at the latest. */
static void download(gd_context *context, void *to, const void *from, size_t bytes)
{
    struct gd_cuda *cuda = gd_cuda_begin(context);
    if (cuda && bytes > 0)
        gd_cuda_check(context, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, cuda->stream),
                      "download");
}

static void zero(gd_context *context, void *memory, size_t bytes)
{
    struct gd_cuda *cuda = gd_cuda_begin(context);
    if (cuda && bytes > 0)
        gd_cuda_check(context, cudaMemsetAsync(memory, 0, bytes, cuda->stream), "zero");
}

static gd_status synchronize(gd_context *context)
{
    struct gd_cuda *cuda = context->device;
    cudaError_t error = cudaSetDevice(cuda->device);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(cuda->stream);
    gd_cuda_check(context, error, "an operation failed");
    gd_status status = context->status;
    context->status = GD_OK;
    return status;
}

/* The device divides each operation's work, not the host. */
static void for_each(gd_context *context, int64_t count, gd_task *task, void *argument)
{
    (void)context;
    for (int64_t i = 0; i < count; i++)
        task(argument, i, 0);
}

static size_t scratch_size(const gd_context *context, const gd_config *config, int64_t longest, int training)
{
    const size_t sizes[] = {
        GD_CUDA_SCRATCH,
        context->backend->precisions >> GD_BFLOAT16 & 1 ? gd_cuda_factor_scratch(config) : 0,
        training ? gd_cuda_attention_backward_scratch(config, longest) : 0,
        training ? gd_cuda_gate_backward_scratch(config) : 0,
    };
    size_t most = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        most = sizes[i] > most ? sizes[i] : most;
    return most;
}

static void close_device(gd_context *context)
{
    struct gd_cuda *cuda = context->device;
    if (cuda == NULL)
        return;
    if (cudaSetDevice(cuda->device) == cudaSuccess) {
        gd_cuda_close_cublas(cuda);
        cudaStreamDestroy(cuda->stream);
    }
    cudaGetLastError();
    free(cuda);
    context->device = NULL;
}

static const struct gd_backend backend_cuda = {
    .name = "cuda",
    .shares_memory = 0,
    .precisions = 1 << GD_FLOAT32 | 1 << GD_BFLOAT16,
    .tile_frames = 0,
    .block_rows = 0,
    .allocate = allocate,
    .release = release,
    .upload = upload,
    .download = download,
    .zero = zero,
    .synchronize = synchronize,
    .for_each = for_each,
    .scratch_size = scratch_size,
    .packed_size = gd_cuda_packed_size,
    .pack = gd_cuda_pack,
    .linear = gd_cuda_linear,
    .gemm = gd_cuda_gemm,
    .bias_backward = gd_cuda_bias_backward,
    .layer_norm = gd_cuda_layer_norm,
    .layer_norm_backward = gd_cuda_layer_norm_backward,
    .activate = gd_cuda_activate,
    .activate_backward = gd_cuda_activate_backward,
    .round_rows = gd_cuda_round_rows,
    .widen_rows = gd_cuda_widen_rows,
    .axpby = gd_cuda_axpby,
    .dropout = gd_cuda_dropout,
    .moments = gd_cuda_moments,
    .norm_fold = gd_cuda_norm_fold,
    .norm_fold_backward = gd_cuda_norm_fold_backward,
    .normalize = gd_cuda_normalize,
    .conv_taps_size = gd_cuda_conv_taps_size,
    .split_taps = gd_cuda_split_taps,
    .merge_taps = gd_cuda_merge_taps,
    .conv_backward_scratch = gd_cuda_conv_backward_scratch,
    .conv_backward = gd_cuda_conv_backward,
    .weight_norm = gd_cuda_weight_norm,
    .weight_norm_backward = gd_cuda_weight_norm_backward,
    .packed_pos_conv_size = gd_cuda_packed_pos_conv_size,
    .pack_pos_conv = gd_cuda_pack_pos_conv,
    .pos_conv = gd_cuda_pos_conv,
    .pos_conv_backward_weight = gd_cuda_pos_conv_backward_weight,
    .position_bias = gd_cuda_position_bias,
    .position_bias_backward = gd_cuda_position_bias_backward,
    .gate = gd_cuda_gate,
    .gate_backward = gd_cuda_gate_backward,
    .attention = gd_cuda_attention,
    .attention_backward = gd_cuda_attention_backward,
    .scatter_rows = gd_cuda_scatter_rows,
    .gather_rows = gd_cuda_gather_rows,
    .loss_rows = gd_cuda_loss_rows,
    .close = close_device,
};

/* ---- Opening a device --------------------------------------------------------------------------------- */

static gd_status refuse(gd_context *context, cudaError_t error)
{
    cudaGetLastError();
    return gd_fail(context, status_of(error), "device: CUDA: %s", cudaGetErrorString(error));
}

/* Is there a driver, does it know this CUDA, and how many devices does it see? */
static gd_status count_devices(gd_context *context, int *count)
{
    int driver = 0;
    cudaError_t error = cudaDriverGetVersion(&driver);
    if (error == cudaSuccess && driver == 0)
        return gd_fail(context, GD_EDEVICE, "device: this machine has no NVIDIA driver (libcuda.so.1)");
    if (error == cudaSuccess)
        error = cudaGetDeviceCount(count);
    if (error == cudaErrorInsufficientDriver) {
        cudaGetLastError();
        return gd_fail(context, GD_EDEVICE,
                       "device: the NVIDIA driver is too old: it knows CUDA %d.%d, this library needs %d.0",
                       driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000);
    }
    if (error == cudaErrorNoDevice || (error == cudaSuccess && *count == 0)) {
        cudaGetLastError();
        return gd_fail(context, GD_EDEVICE, "device: the NVIDIA driver sees no device");
    }
    return error == cudaSuccess ? GD_OK : refuse(context, error);
}

/* *capability: the device's, times 10. */
static gd_status check_device(gd_context *context, int device, int *capability)
{
    int count = 0, major = 0, minor = 0;
    gd_status status = count_devices(context, &count);
    if (status != GD_OK)
        return status;
    if (device >= count)
        return gd_fail(context, GD_EDEVICE, "device: expected cuda:0 to cuda:%d, got cuda:%d", count - 1, device);
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error != cudaSuccess)
        return refuse(context, error);
    *capability = 10 * major + minor;
    if (*capability < GD_CUDA_LOWEST_CAPABILITY)
        return gd_fail(context, GD_EDEVICE,
                       "device: cuda:%d has compute capability %d.%d, this library needs %d.%d or later", device, major,
                       minor, GD_CUDA_LOWEST_CAPABILITY / 10, GD_CUDA_LOWEST_CAPABILITY % 10);
    return GD_OK;
}

/* The build that gd_cuda_open() needs its caller to be of. */
__attribute__((visibility("default")))
void gd_cuda_build(char text[GD_BUILD_TEXT]) { gd_build_text(text); }

__attribute__((visibility("default")))
gd_status gd_cuda_open(gd_context *context, int device)
{
    int capability = 0;
    gd_status status = check_device(context, device, &capability);
    if (status != GD_OK)
        return status;
    struct gd_cuda *cuda = calloc(1, sizeof *cuda);
    if (!cuda)
        return gd_fail(context, GD_ENOMEM, "out of memory");
    cuda->backend = backend_cuda;
    if (capability < LOWEST_BFLOAT16)
        cuda->backend.precisions &= ~(1u << GD_BFLOAT16);
    cuda->device = device;
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess)
        error = cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking);
    if (error != cudaSuccess) {
        free(cuda);
        return refuse(context, error);
    }
    context->backend = &cuda->backend;
    context->device = cuda;
    return GD_OK;
}
