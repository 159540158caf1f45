/*
 * gemm.c - linear layers, convolutions and matrix products through cuBLAS.
 *
 * A row-major matrix is cuBLAS's column-major transposed one, so c = a b is computed as c^T = b^T a^T. A
 * convolution is one product for each tap over rows `step` apart, added up in the output. cuBLAS wants a
 * leading dimension of at least the row's length, so rows that overlap (frames of audio) are multiplied in
 * pieces that don't.
 */
#include "ops.h"

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* A matrix in memory: lines of `length` floats, ld apart; `op` of it, seen column-major, is what enters. */
struct operand {
    cublasOperation_t op;
    int64_t lines, length, ld;
};

/* The (rows, cols) matrix of these strides, transposed for cuBLAS. */
static struct operand operand_of(int64_t rows, int64_t cols, int64_t row, int64_t col)
{
    if (col == 1 || cols == 1)
        return (struct operand){CUBLAS_OP_N, rows, cols, row};
    return (struct operand){CUBLAS_OP_T, cols, rows, col};
}

/* The longest part of a line that does not reach into the next one. */
static int64_t piece(const struct operand *x)
{
    return x->lines > 1 ? gd_smaller(x->length, larger(x->ld, 1)) : x->length;
}

/* One piece; c += where `accumulate`. */
static void multiply(gd_context *context, struct gd_cuda *cuda, const struct gd_gemm *g)
{
    const float one = 1, beta = g->accumulate ? 1 : 0;
    const struct operand a = operand_of(g->m, g->k, g->a_row, g->a_col);
    const struct operand b = operand_of(g->k, g->n, g->b_row, g->b_col);
    cublasStatus_t status =
        cuda->cublas.sgemm(cuda->handle, b.op, a.op, g->n, g->m, g->k, &one, g->b, larger(b.ld, b.length), g->a,
                           larger(a.ld, a.length), &beta, g->c, larger(g->ldc, g->n));
    gd_cuda_check_cublas(context, status, "cublasSgemm");
}

void gd_cuda_gemm(gd_context *context, const struct gd_gemm *g)
{
    if (gd_cuda_lacks(context, g->precision))
        return;
    struct gd_cuda *cuda = gd_cuda_begin(context);
    if (!cuda || g->m <= 0 || g->n <= 0)
        return;
    if (g->k <= 0) {
        if (!g->accumulate)
            gd_cuda_check(context,
                          cudaMemset2DAsync(g->c, (size_t)g->ldc * sizeof(float), 0, (size_t)g->n * sizeof(float),
                                            (size_t)g->m, cuda->stream),
                          "gemm");
        return;
    }
    if (!gd_cuda_open_cublas(context, cuda))
        return;
    const struct operand a = operand_of(g->m, g->k, g->a_row, g->a_col);
    const struct operand b = operand_of(g->k, g->n, g->b_row, g->b_col);
    const int64_t m_step = a.op == CUBLAS_OP_T ? piece(&a) : g->m, n_step = b.op == CUBLAS_OP_N ? piece(&b) : g->n;
    const int64_t k_step = gd_smaller(a.op == CUBLAS_OP_N ? piece(&a) : g->k, b.op == CUBLAS_OP_T ? piece(&b) : g->k);
    for (int64_t m = 0; m < g->m; m += m_step)
        for (int64_t n = 0; n < g->n; n += n_step)
            for (int64_t k = 0; k < g->k; k += k_step) {
                struct gd_gemm part = *g;
                part.m = gd_smaller(m_step, g->m - m);
                part.n = gd_smaller(n_step, g->n - n);
                part.k = gd_smaller(k_step, g->k - k);
                part.a += m * g->a_row + k * g->a_col;
                part.b += k * g->b_row + n * g->b_col;
                part.c += m * g->ldc + n;
                part.accumulate = g->accumulate || k > 0;
                multiply(context, cuda, &part);
            }
}

size_t gd_cuda_packed_size(const gd_context *context, const struct gd_weight *weight)
{
    (void)context;
    return (size_t)(weight->out * weight->taps * weight->in) * sizeof(float);
}

/* sum (+)= the products of all taps; packed weights are (taps, out, in). */
static void multiply_taps(gd_context *context, const struct gd_linear *l, float *sum, int64_t ldsum, int accumulate)
{
    const struct gd_weight *w = l->weight;
    for (int64_t tap = 0; tap < w->taps; tap++)
        gd_cuda_gemm(context, &(struct gd_gemm){
            .m = l->rows, .n = w->out, .k = w->in, .a = l->x + tap * l->ldx, .a_row = w->stride * l->ldx, .a_col = 1,
            .b = (const float *)w->packed + tap * w->out * w->in, .b_row = 1, .b_col = w->in,
            .c = sum, .ldc = ldsum, .accumulate = accumulate || tap > 0,
        });
}

/* The residual lies where the output goes and is needed after the activation: sum up elsewhere, some rows at a
 * time. */
static void linear_in_scratch(gd_context *context, const struct gd_linear *l)
{
    const int64_t rows = (int64_t)(context->scratch_stride / sizeof(float)) / l->weight->out;
    float *sum = (float *)context->scratch;
    if (rows < 1) {
        gd_cuda_keep_failure(context, GD_EUNSUPPORTED, "device: linear: %lld outputs are too many for the scratch",
                             (long long)l->weight->out);
        return;
    }
    for (int64_t first = 0; first < l->rows; first += rows) {
        struct gd_linear part = *l;
        part.rows = gd_smaller(rows, l->rows - first);
        part.x += first * l->weight->stride * l->ldx;
        part.residual += first * l->ldresidual;
        part.y += first * l->ldy;
        multiply_taps(context, &part, sum, l->weight->out, 0);
        gd_cuda_finish_linear(context, &part, sum, l->weight->out);
    }
}

void gd_cuda_linear(gd_context *context, const struct gd_linear *l)
{
    if (l->pre) {
        multiply_taps(context, l, l->pre, l->ldpre, 0);
        gd_cuda_finish_linear(context, l, l->pre, l->ldpre);
    } else if (l->residual != l->y) {
        multiply_taps(context, l, l->y, l->ldy, 0);
        gd_cuda_finish_linear(context, l, l->y, l->ldy);
    } else if (l->activation == GD_NONE) {
        struct gd_linear rest = *l;
        rest.residual = NULL;
        multiply_taps(context, l, l->y, l->ldy, 1);
        gd_cuda_finish_linear(context, &rest, l->y, l->ldy);
    } else {
        linear_in_scratch(context, l);
    }
}
