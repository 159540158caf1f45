/*
 * bugs.cu - kernels with a bug that the emulator or a sanitizer must find, each beside the right one: the program
 * runs the kernel that it is told and prints what came of it. test_cuda.py lists who must find what.
 */
#include "kernel.cuh"

#include <stdio.h>

/* ---- Barriers and shuffles: the emulator finds these -------------------------------------------------------- */

__global__ void divergent_barrier(float *x)
{
    if (threadIdx.x < 16)
        __syncthreads();
    x[threadIdx.x] = 1;
}

__global__ void two_barriers(float *x)
{
    if (threadIdx.x < 16)
        __syncthreads();
    else
        __syncthreads();
    x[threadIdx.x] = 1;
}

__global__ void barrier_after_exit(float *x)
{
    if (threadIdx.x == 5)
        return;
    __syncthreads();
    x[threadIdx.x] = 1;
}

__global__ void shuffle_without_all(float *x)
{
    float value = (float)threadIdx.x;
    if (threadIdx.x < 16)
        value = __shfl_xor_sync(0xffffffffu, value, 1);
    x[threadIdx.x] = value;
}

__global__ void shuffle_not_in_mask(float *x)
{
    x[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, (float)threadIdx.x, 1);
}

__global__ void shuffle_from_outside(float *x)
{
    if (threadIdx.x < 16)
        x[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, (float)threadIdx.x, 16);
}

__global__ void shuffle_right(float *x)
{
    float value = __shfl_down_sync(0xffffffffu, (float)threadIdx.x, 1u);
    if (threadIdx.x < 16)
        value = __shfl_xor_sync(0x0000ffffu, value, 8);
    x[threadIdx.x] = value;
}

/* ---- Shared memory ------------------------------------------------------------------------------------------ */

__global__ void shared_unwritten(float *x)
{
    GD_SHARED(float, s, [32]);
    if (threadIdx.x < 31)
        s[threadIdx.x] = 1;
    __syncthreads();
    x[threadIdx.x] = s[threadIdx.x];
}

__global__ void shared_too_large(float *x)
{
    GD_SHARED(float, s, [13000]);
    s[threadIdx.x] = 1;
    x[threadIdx.x] = s[threadIdx.x];
}

__global__ void dynamic_right(float *x)
{
    GD_DYNAMIC_SHARED(float, s);
    s[threadIdx.x] = (float)threadIdx.x;
    __syncthreads();
    x[threadIdx.x] = s[31 - threadIdx.x];
}

/* ---- Bounds: AddressSanitizer finds these ------------------------------------------------------------------- */

__global__ void beyond_global(float *x)
{
    if (threadIdx.x <= 32 && blockIdx.x == 1)
        x[32 + threadIdx.x] = 1;
}

__global__ void before_global(float *x)
{
    x[(int)threadIdx.x - 1] = 1;
}

__global__ void beyond_shared(float *x)
{
    GD_SHARED(float, s, [32]);
    s[threadIdx.x + 1] = 1;
    __syncthreads();
    x[threadIdx.x] = s[threadIdx.x];
}

__global__ void beyond_dynamic(float *x)
{
    GD_DYNAMIC_SHARED(float, s);
    s[threadIdx.x + 1] = 1;
    __syncthreads();
    x[threadIdx.x] = s[threadIdx.x];
}

/* ---- Races: ThreadSanitizer finds these --------------------------------------------------------------------- */

__global__ void race_shared(float *x)
{
    GD_SHARED(float, s, [32]);
    s[threadIdx.x] = (float)threadIdx.x;
    x[threadIdx.x] = s[(threadIdx.x + 1) % 32];
}

__global__ void ordered_shared(float *x)
{
    GD_SHARED(float, s, [32]);
    for (int i = 0; i < 3; i++) {
        s[threadIdx.x] = (float)threadIdx.x;
        __syncthreads();
        x[threadIdx.x + 32 * (blockIdx.x % 2)] = s[(threadIdx.x + 1) % 32];
        __syncthreads();
    }
}

__global__ void race_shared_again(float *x)
{
    GD_SHARED(float, s, [32]);
    for (int i = 0; i < 3; i++) {
        s[threadIdx.x] = (float)threadIdx.x;
        __syncthreads();
        x[threadIdx.x] = s[(threadIdx.x + 1) % 32];
    }
}

__global__ void race_global(float *x)
{
    x[0] += 1;
}

__global__ void race_blocks(float *x)
{
    x[threadIdx.x] += 1;
}

__global__ void atomic_blocks(float *x)
{
    atomicAdd(&x[0], 1);
}

__global__ void race_warp(float *x)
{
    GD_SHARED(float, s, [32]);
    s[threadIdx.x] = (float)threadIdx.x;
    (void)__shfl_xor_sync(0xffffffffu, 0.0f, 1); /* orders no memory */
    x[threadIdx.x] = s[threadIdx.x ^ 1];
}

__global__ void ordered_warp(float *x)
{
    GD_SHARED(float, s, [32]);
    s[threadIdx.x] = (float)threadIdx.x;
    __syncwarp();
    x[threadIdx.x] = s[threadIdx.x ^ 1];
}

/* ---- The program -------------------------------------------------------------------------------------------- */

struct bug {
    const char *name;
    void (*kernel)(float *x);
    unsigned blocks, threads;
    size_t dynamic_bytes;
};

static const size_t large = 50 * 1024;

static const struct bug bugs[] = {
    {"divergent_barrier", divergent_barrier, 1, 32, 0},
    {"two_barriers", two_barriers, 1, 32, 0},
    {"barrier_after_exit", barrier_after_exit, 1, 32, 0},
    {"shuffle_without_all", shuffle_without_all, 1, 32, 0},
    {"shuffle_not_in_mask", shuffle_not_in_mask, 1, 32, 0},
    {"shuffle_from_outside", shuffle_from_outside, 1, 32, 0},
    {"shuffle_beyond_block", shuffle_right, 1, 30, 0},
    {"shuffle_right", shuffle_right, 1, 32, 0},
    {"shared_unwritten", shared_unwritten, 1, 32, 0},
    {"shared_too_large", shared_too_large, 1, 32, 0},
    {"dynamic_right", dynamic_right, 1, 32, 128},
    {"dynamic_not_asked_for", dynamic_right, 1, 32, large},
    {"dynamic_asked_for", dynamic_right, 1, 32, large},
    {"no_blocks", atomic_blocks, 0, 32, 0},
    {"too_many_threads", atomic_blocks, 1, 1025, 0},
    {"beyond_global", beyond_global, 2, 64, 0},
    {"before_global", before_global, 1, 32, 0},
    {"beyond_shared", beyond_shared, 1, 32, 0},
    {"beyond_dynamic", beyond_dynamic, 1, 32, 128},
    {"race_shared", race_shared, 1, 32, 0},
    {"ordered_shared", ordered_shared, 2, 32, 0},
    {"race_shared_again", race_shared_again, 1, 32, 0},
    {"race_global", race_global, 1, 32, 0},
    {"race_blocks", race_blocks, 2, 32, 0},
    {"atomic_blocks", atomic_blocks, 4, 32, 0},
    {"race_warp", race_warp, 1, 32, 0},
    {"ordered_warp", ordered_warp, 1, 32, 0},
};

/* What the host does wrong. */
static void touch_device_memory(float *x)
{
    x[0] = 1;
}

static cudaError_t run(const struct bug *bug, float *x, cudaStream_t stream)
{
    if (strcmp(bug->name, "dynamic_asked_for") == 0)
        cudaFuncSetAttribute(reinterpret_cast<const void *>(bug->kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)large);
    return GD_LAUNCH(bug->kernel, dim3(bug->blocks), dim3(bug->threads), bug->dynamic_bytes, stream, x);
}

int main(int argc, char **argv)
{
    enum { FLOATS = 64 };
    float host[FLOATS] = {0}, *x = nullptr;
    cudaStream_t stream = nullptr;
    if (argc != 2 || cudaMalloc(reinterpret_cast<void **>(&x), sizeof host) != cudaSuccess ||
        cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) != cudaSuccess)
        return 2;
    cudaMemcpyAsync(x, host, sizeof host, cudaMemcpyHostToDevice, stream);
    cudaError_t error = cudaErrorInvalidValue;
    if (strcmp(argv[1], "touch_device_memory") == 0)
        touch_device_memory(x);
    for (const struct bug &bug : bugs)
        if (strcmp(argv[1], bug.name) == 0)
            error = run(&bug, x, stream);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(stream);
    if (error == cudaSuccess)
        error = cudaMemcpyAsync(host, x, sizeof host, cudaMemcpyDeviceToHost, stream);
    int unwritten = 0;
    for (float value : host)
        unwritten += isnan(value);
    printf("%s; %d NaN\n", cudaGetErrorString(error), unwritten);
    return error != cudaSuccess || unwritten > 0;
}
