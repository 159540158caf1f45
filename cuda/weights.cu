/*
 * weights.cu - what is made of weights: the taps of a convolution for its backward (conv_backward.c), and pos_conv's
 * weight norm with its gradient.
 */
#include "kernel.cuh"

/* ---- Taps ----------------------------------------------------------------------------------------------- */

/* to[o, k, c] = from[o, c, k], in the precision of the products that read it. */
struct split_taps {
    struct gd_weight weight;
    const float *from;
    void *to;

    __device__ void operator()(int64_t o, int64_t i) const
    {
        const float value = from[(o * weight.in + i % weight.in) * weight.taps + i / weight.in];
        gd_store_factor(weight.precision, to, o * weight.taps * weight.in + i, value);
    }
};

void gd_cuda_split_taps(gd_context *context, const struct gd_weight *weight, const float *w, float *w_taps)
{
    gd_for_elements(context, weight->out, weight->taps * weight->in, split_taps{*weight, w, w_taps}, "split_taps");
}

/* to[o, c, k] += from[o, k, c] */
struct merge_taps {
    int64_t taps, in;
    const float *from;
    float *to;

    __device__ void operator()(int64_t o, int64_t i) const
    {
        to[o * taps * in + i] += from[(o * taps + i % taps) * in + i / taps];
    }
};

void gd_cuda_merge_taps(gd_context *context, const struct gd_weight *weight, const float *dw_taps, float *dw)
{
    gd_for_elements(context, weight->out, weight->taps * weight->in,
                    merge_taps{weight->taps, weight->in, dw_taps, dw}, "merge_taps");
}

/* ---- Weight norm: a block takes NORM_TAPS taps, a thread every NORM_ROWS-th row of one of them ----------- */

/* A row's taps of a block are what memory is read in, 32 bytes. */
enum { NORM_TAPS = 8, NORM_ROWS = 64 };

struct weight_norm {
    int64_t rows, kernel; /* v as (rows, kernel) */
    const float *g, *v, *dw;
    float *w, *dg, *dv;
};

/* The sum over a tap's threads, in each of them. */
static __device__ double tap_sum(double value)
{
    GD_SHARED(double, part, [NORM_ROWS][NORM_TAPS]);
    part[threadIdx.y][threadIdx.x] = value;
    for (int half = NORM_ROWS / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.y < half)
            part[threadIdx.y][threadIdx.x] += part[threadIdx.y + half][threadIdx.x];
    }
    __syncthreads();
    const double total = part[0][threadIdx.x];
    __syncthreads(); /* part is the next sum's */
    return total;
}

/* Threads past the last tap sum nothing, but reach the barriers of those that do. */
__global__ void normalize_taps(struct weight_norm n)
{
    const int64_t k = (int64_t)blockIdx.x * NORM_TAPS + threadIdx.x, rows = k < n.kernel ? n.rows : 0;
    double squares = 0;
#pragma unroll 4
    for (int64_t r = threadIdx.y; r < rows; r += NORM_ROWS) {
        const double v = n.v[r * n.kernel + k];
        squares += v * v;
    }
    squares = tap_sum(squares);
    const float scale = rows > 0 ? (float)(n.g[k] / sqrt(squares)) : 0;
#pragma unroll 4
    for (int64_t r = threadIdx.y; r < rows; r += NORM_ROWS)
        n.w[r * n.kernel + k] = n.v[r * n.kernel + k] * scale;
}

/* With u = v / |v|: dg += dw . u, dv += g / |v| (dw - (dw . u) u). */
__global__ void normalize_taps_backward(struct weight_norm n)
{
    const int64_t k = (int64_t)blockIdx.x * NORM_TAPS + threadIdx.x, rows = k < n.kernel ? n.rows : 0;
    double squares = 0, dot = 0;
#pragma unroll 4
    for (int64_t r = threadIdx.y; r < rows; r += NORM_ROWS) {
        const double v = n.v[r * n.kernel + k];
        squares += v * v;
        dot += v * n.dw[r * n.kernel + k];
    }
    squares = tap_sum(squares);
    dot = tap_sum(dot);
    if (rows == 0)
        return;
    const double norm = sqrt(squares), a = n.g[k] / norm, b = a * dot / squares;
    if (threadIdx.y == 0)
        n.dg[k] += (float)(dot / norm);
#pragma unroll 4
    for (int64_t r = threadIdx.y; r < rows; r += NORM_ROWS)
        n.dv[r * n.kernel + k] += (float)(a * n.dw[r * n.kernel + k] - b * n.v[r * n.kernel + k]);
}

void gd_cuda_weight_norm(gd_context *context, int64_t out, int64_t in, int64_t kernel, const float *g, const float *v,
                         float *w)
{
    struct gd_cuda *cuda = gd_cuda_begin(context);
    if (!cuda || kernel <= 0)
        return;
    const struct weight_norm n = {out * in, kernel, g, v, NULL, w, NULL, NULL};
    gd_cuda_check(context, GD_LAUNCH(normalize_taps, dim3((unsigned)gd_divide_up(kernel, NORM_TAPS)),
                                     dim3(NORM_TAPS, NORM_ROWS), 0, cuda->stream, n), "weight_norm");
}

void gd_cuda_weight_norm_backward(gd_context *context, int64_t out, int64_t in, int64_t kernel, const float *g,
                                  const float *v, const float *dw, float *dg, float *dv)
{
    struct gd_cuda *cuda = gd_cuda_begin(context);
    if (!cuda || kernel <= 0)
        return;
    const struct weight_norm n = {out * in, kernel, g, v, dw, NULL, dg, dv};
    gd_cuda_check(context, GD_LAUNCH(normalize_taps_backward, dim3((unsigned)gd_divide_up(kernel, NORM_TAPS)),
                                     dim3(NORM_TAPS, NORM_ROWS), 0, cuda->stream, n), "weight_norm_backward");
}
