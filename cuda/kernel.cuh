/*
 * kernel.cuh - what the kernels share. Three macros stand for what plain C++ cannot say, so that the same source
 * also compiles for the emulator in tests/cuda, which runs it on the CPU.
 *
 *     GD_LAUNCH(kernel, grid, block, dynamic_bytes, stream, arguments...)    a cudaError_t
 *     GD_SHARED(float, name, [8][33]);                                       shared memory of a block
 *     GD_DYNAMIC_SHARED(float, name);                                        the same, dynamic_bytes of it
 */
#ifndef GD_CUDA_KERNEL_CUH
#define GD_CUDA_KERNEL_CUH

#ifdef GD_CUDA_EMULATOR
#include "emulator.h"
#else
#include <cuda_runtime.h>
#define GD_LAUNCH(kernel, grid, block, dynamic_bytes, stream, ...) \
    (kernel<<<(grid), (block), (dynamic_bytes), (stream)>>>(__VA_ARGS__), cudaGetLastError())
#define GD_SHARED(type, name, dims) __shared__ type name dims
#define GD_DYNAMIC_SHARED(type, name) \
    extern __shared__ __align__(16) unsigned char name##_bytes[]; \
    type *const name = reinterpret_cast<type *>(name##_bytes)
#endif

#include "../csrc/bfloat16.h"
#include "ops.h"

enum { GD_WARP = 32, GD_BLOCK_ROWS = 8 };

/* x (1 + erf(x / sqrt 2)) / 2: x itself from 5.3 on and zero below -5.3, as on the CPU. */
__device__ inline float gd_gelu(float x)
{
    float half_erf = fabsf(x) >= 5.3f ? copysignf(0.5f, x) : 0.5f * erff(x * 0.707106781f);
    return x * (half_erf + 0.5f);
}

/* gelu'(x) = (1 + erf(x / sqrt 2)) / 2 + x e^(-x^2 / 2) / sqrt(2 pi) */
__device__ inline float gd_gelu_derivative(float x)
{
    /* Past 14 the exponential is 0, and the square of what is beyond could be infinite. */
    const float bounded = fminf(fmaxf(x, -14.0f), 14.0f);
    const float density = bounded * 0.398942280f * expf(-0.5f * bounded * bounded);
    return 0.5f * (1.0f + erff(x * 0.707106781f)) + density;
}

/* act(x) and act'(x). No other value comes here: gd_refuses_activation(). */
__device__ inline float gd_activated(enum gd_activation activation, float x)
{
    switch (activation) {
    case GD_NONE:
        return x;
    case GD_GELU:
    case GD_GELU_REDUCED:
        return gd_gelu(x);
    }
    __builtin_unreachable();
}

__device__ inline float gd_activation_derivative(enum gd_activation activation, float x)
{
    switch (activation) {
    case GD_NONE:
        return 1;
    case GD_GELU:
    case GD_GELU_REDUCED:
        return gd_gelu_derivative(x);
    }
    __builtin_unreachable();
}

/* x as products in this precision take it: with the value of a bfloat16 number, or as it is. */
__device__ inline float gd_rounded(enum gd_precision precision, float x)
{
    return precision == GD_BFLOAT16 ? gd_float_from_bfloat16(gd_bfloat16_from_float(x)) : x;
}

/* Element `at` of a factor (ops.h) of this precision becomes x. */
__device__ inline void gd_store_factor(enum gd_precision precision, void *factor, int64_t at, float x)
{
    if (precision == GD_BFLOAT16)
        ((uint16_t *)factor)[at] = gd_bfloat16_from_float(x);
    else
        ((float *)factor)[at] = x;
}

/* The sum over a warp's threads, in each of them. */
template <class T> __device__ inline T gd_warp_sum(T value)
{
#pragma unroll
    for (int distance = GD_WARP / 2; distance > 0; distance /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

/* ---- Elements: apply(row, column) for each of a matrix ------------------------------------------------- */

enum { GD_ELEMENT_COLUMNS = 64, GD_ELEMENT_ROWS = 4, GD_ELEMENTS_EACH = 4 };

template <class Apply> __global__ void gd_elements(int64_t rows, int64_t width, Apply apply)
{
    const int64_t row = (int64_t)blockIdx.x * GD_ELEMENT_ROWS + threadIdx.y;
    if (row >= rows)
        return;
    for (int64_t column = (int64_t)blockIdx.y * GD_ELEMENT_COLUMNS + threadIdx.x; column < width;
         column += (int64_t)gridDim.y * GD_ELEMENT_COLUMNS)
        apply(row, column);
}

template <class Apply>
static void gd_for_elements(gd_context *context, int64_t rows, int64_t width, Apply apply, const char *what)
{
    const int64_t most_across = 65535; /* of a grid's second dimension */
    struct gd_cuda *cuda = gd_cuda_begin(context);
    if (!cuda || rows <= 0 || width <= 0)
        return;
    const int64_t across = gd_divide_up(width, GD_ELEMENT_COLUMNS * GD_ELEMENTS_EACH);
    const dim3 grid((unsigned)gd_divide_up(rows, GD_ELEMENT_ROWS),
                    (unsigned)(across < most_across ? across : most_across));
    gd_cuda_check(context, GD_LAUNCH((gd_elements<Apply>), grid, dim3(GD_ELEMENT_COLUMNS, GD_ELEMENT_ROWS), 0,
                                     cuda->stream, rows, width, apply), what);
}

/* ---- Columns: sums over a matrix's rows ----------------------------------------------------------------- */

/* A block of (GD_WARP, GD_BLOCK_ROWS) threads, one column a lane: the sum over the column's threads, in those of
 * threadIdx.y 0. A sum over rows so runs in an order that depends on their number alone. */
__device__ inline float gd_column_total(float value)
{
    GD_SHARED(float, part, [GD_BLOCK_ROWS][GD_WARP]);
    part[threadIdx.y][threadIdx.x] = value;
    __syncthreads();
    float total = 0;
    if (threadIdx.y == 0)
        for (int i = 0; i < GD_BLOCK_ROWS; i++)
            total += part[i][threadIdx.x];
    __syncthreads(); /* part is the next sum's */
    return total;
}

#endif
