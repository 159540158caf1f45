/*
 * conv_backward.c - the backward of the extractor's convolutions, in matrix products, a tap at a time.
 */
#include "ops.h"

size_t gd_cuda_conv_taps_size(const gd_context *context, const struct gd_weight *weight)
{
    (void)context;
    return (size_t)(weight->out * weight->taps * weight->in);
}

size_t gd_cuda_conv_backward_scratch(const gd_context *context, const struct gd_weight *weight)
{
    (void)context, (void)weight;
    return 0;
}

/* dw_taps[o, k] += sum over rows t of dz[t, o] x[t * stride + k]. Taps of contiguous rows are one long row. */
static void add_to_weight(gd_context *context, const struct gd_conv_backward *c)
{
    const struct gd_weight *w = c->weight;
    const int64_t joined = c->ldx == w->in ? w->taps : 1;
    for (int64_t k = 0; k < w->taps; k += joined)
        gd_cuda_gemm(context, &(struct gd_gemm){
            .m = w->out, .n = joined * w->in, .k = c->rows, .a = c->dz, .a_row = 1, .a_col = c->lddz,
            .b = c->x + k * c->ldx, .b_row = w->stride * c->ldx, .b_col = 1,
            .c = c->dw_taps + k * w->in, .ldc = w->taps * w->in, .accumulate = 1, .precision = w->precision,
        });
}

/* dx[t * stride + k] += dz[t] w[., k]: the rows of one tap don't overlap, those of different taps do. */
static void multiply_by_weight(gd_context *context, const struct gd_conv_backward *c)
{
    const struct gd_weight *w = c->weight;
    struct gd_cuda *cuda = gd_cuda_begin(context);
    if (!cuda || c->dx_rows <= 0)
        return;
    gd_cuda_check(context,
                  cudaMemset2DAsync(c->dx, (size_t)c->lddx * sizeof(float), 0, (size_t)w->in * sizeof(float),
                                    (size_t)c->dx_rows, cuda->stream),
                  "conv_backward");
    for (int64_t k = 0; k < w->taps; k++)
        gd_cuda_gemm(context, &(struct gd_gemm){
            .m = c->rows, .n = w->in, .k = w->out, .a = c->dz, .a_row = c->lddz, .a_col = 1,
            .b = c->w_taps + k * w->in, .b_row = w->taps * w->in, .b_col = 1,
            .c = c->dx + k * c->lddx, .ldc = w->stride * c->lddx, .accumulate = 1, .precision = w->precision,
        });
}

void gd_cuda_conv_backward(gd_context *context, const struct gd_conv_backward *c)
{
    add_to_weight(context, c);
    if (c->dx)
        multiply_by_weight(context, c);
}
