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

/* Rows of a tile, with x and dz as products take them. */
struct part {
    const struct gd_conv_backward *c;
    int64_t rows;
    struct gd_cuda_factor x, dz;
};

/* dw_taps[o, k] += sum over rows t of dz[t, o] x[t * stride + k]. Taps of contiguous rows are one long row, which
 * overlaps the next one. */
static void add_to_weight(gd_context *context, const struct part *p)
{
    const struct gd_weight *w = p->c->weight;
    const int64_t joined = w->precision == GD_FLOAT32 && p->x.ld == w->in ? w->taps : 1;
    for (int64_t k = 0; k < w->taps; k += joined)
        gd_cuda_multiply(context, &(struct gd_gemm){
            .m = w->out, .n = joined * w->in, .k = p->rows, .a = gd_cuda_row(p->dz, 0), .a_row = 1, .a_col = p->dz.ld,
            .b = gd_cuda_row(p->x, k), .b_row = w->stride * p->x.ld, .b_col = 1,
            .c = p->c->dw_taps + k * w->in, .ldc = w->taps * w->in, .accumulate = 1, .precision = w->precision,
        });
}

/* dx[t * stride + k] += dz[t] w[., k]: the rows of one tap don't overlap, those of different taps do. */
static void multiply_by_weight(gd_context *context, const struct part *p, float *dx)
{
    const struct gd_weight *w = p->c->weight;
    const struct gd_cuda_factor taps = {w->precision, p->c->w_taps, w->in}; /* (out, taps, in) */
    for (int64_t k = 0; k < w->taps; k++)
        gd_cuda_multiply(context, &(struct gd_gemm){
            .m = p->rows, .n = w->in, .k = w->out, .a = gd_cuda_row(p->dz, 0), .a_row = p->dz.ld, .a_col = 1,
            .b = gd_cuda_row(taps, k), .b_row = w->taps * w->in, .b_col = 1,
            .c = dx + k * p->c->lddx, .ldc = w->stride * p->c->lddx, .accumulate = 1, .precision = w->precision,
        });
}

void gd_cuda_conv_backward(gd_context *context, const struct gd_conv_backward *c)
{
    const struct gd_weight *w = c->weight;
    const int64_t at_once = gd_cuda_rows_at_once(context, w);
    struct gd_cuda *cuda = gd_cuda_begin(context);
    if (!cuda)
        return;
    if (c->dx && c->dx_rows > 0)
        gd_cuda_check(context,
                      cudaMemset2DAsync(c->dx, (size_t)c->lddx * sizeof(float), 0, (size_t)w->in * sizeof(float),
                                        (size_t)c->dx_rows, cuda->stream),
                      "conv_backward");
    for (int64_t first = 0; first < c->rows; first += at_once) {
        const int64_t rows = gd_smaller(at_once, c->rows - first), row = first * w->stride;
        const struct part part = {
            .c = c, .rows = rows,
            .x = gd_cuda_factor(context, w->precision, 0, (rows - 1) * w->stride + w->taps, w->in, c->x + row * c->ldx,
                                c->ldx),
            .dz = gd_cuda_factor(context, w->precision, 1, rows, w->out, c->dz + first * c->lddz, c->lddz),
        };
        add_to_weight(context, &part);
        if (c->dx && c->dx_rows > 0)
            multiply_by_weight(context, &part, c->dx + row * c->lddx);
    }
}
