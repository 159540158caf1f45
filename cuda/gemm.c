/*
 * gemm.c - linear layers, convolutions and matrix products through cuBLAS.
 *
 * A row-major matrix is cuBLAS's column-major transposed one, so c = a b is computed as c^T = b^T a^T. A
 * convolution is one product for each tap over rows `step` apart, added up in the output. cuBLAS wants a
 * leading dimension of at least the row's length, so rows that overlap (frames of audio) are multiplied in
 * pieces that don't.
 *
 * In bfloat16 cuBLAS reads factors of 16 bits: weights are packed so, others are rounded into the scratch, as much
 * at a time as it holds. Sums stay float32.
 */
#include "ops.h"

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* A matrix in memory: lines of `length` numbers, ld apart; `op` of it, seen column-major, is what enters. */
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

/* c (+)= a b by a single call: of float32, or of bfloat16 factors. Lines of one factor don't overlap. */
static void multiply(gd_context *context, struct gd_cuda *cuda, const struct gd_gemm *g, cudaDataType type)
{
    const float one = 1, beta = g->accumulate ? 1 : 0;
    const struct operand a = operand_of(g->m, g->k, g->a_row, g->a_col);
    const struct operand b = operand_of(g->k, g->n, g->b_row, g->b_col);
    cublasStatus_t status = cuda->cublas.gemm(
        cuda->handle, b.op, a.op, g->n, g->m, g->k, &one, g->b, type, larger(b.ld, b.length), g->a, type,
        larger(a.ld, a.length), &beta, g->c, CUDA_R_32F, larger(g->ldc, g->n), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    gd_cuda_check_cublas(context, status, "cublasGemmEx");
}

/* ---- Factors in bfloat16: rounded copies without gaps, one in each half of the scratch ------------------- */

/* Elements of a copy, at most. */
static int64_t half_scratch(const gd_context *context)
{
    const size_t half = context->scratch_stride / 2 / 256 * 256; /* bytes, aligned for cuBLAS's sake */
    return (int64_t)(half / sizeof(uint16_t));
}

size_t gd_cuda_factor_scratch(const gd_config *config)
{
    int64_t widest = larger(config->encoder_embed_dim, config->encoder_ffn_embed_dim);
    for (int i = 0; i < config->num_conv_layers; i++)
        widest = larger(widest, config->conv_feature_layers[i].dim);
    return (size_t)(2 * GD_CUDA_FACTOR_ROWS * widest) * sizeof(uint16_t);
}

int64_t gd_cuda_rows_at_once(gd_context *context, const struct gd_weight *w)
{
    if (gd_cuda_lacks(context, w->precision))
        return 0;
    if (w->precision != GD_BFLOAT16)
        return INT64_MAX;
    const int64_t held = half_scratch(context) / larger(w->in, w->out);
    if (held >= w->taps)
        return (held - w->taps) / w->stride + 1;
    gd_cuda_keep_failure(context, GD_EUNSUPPORTED, "device: %lld taps of %lld columns are too many for the scratch",
                         (long long)w->taps, (long long)larger(w->in, w->out));
    return 0;
}

struct gd_cuda_factor gd_cuda_factor(gd_context *context, enum gd_precision precision, int half, int64_t rows,
                                     int64_t width, const float *x, int64_t ld)
{
    if (precision != GD_BFLOAT16)
        return (struct gd_cuda_factor){precision, x, ld};
    uint16_t *rounded = (uint16_t *)context->scratch + half * half_scratch(context);
    gd_cuda_round_rows(context, rows, width, x, ld, rounded, width);
    return (struct gd_cuda_factor){precision, rounded, width};
}

void gd_cuda_multiply(gd_context *context, const struct gd_gemm *g)
{
    if (g->precision != GD_BFLOAT16) {
        gd_cuda_gemm(context, g);
        return;
    }
    struct gd_cuda *cuda = gd_cuda_begin(context);
    if (cuda && g->m > 0 && g->n > 0 && gd_cuda_open_cublas(context, cuda))
        multiply(context, cuda, g, CUDA_R_16BF);
}

/* ---- gemm ------------------------------------------------------------------------------------------------- */

static void round_and_multiply(gd_context *context, const struct gd_gemm *g)
{
    const struct operand a = operand_of(g->m, g->k, g->a_row, g->a_col);
    const struct operand b = operand_of(g->k, g->n, g->b_row, g->b_col);
    struct gd_gemm rounded = *g;
    rounded.a = gd_cuda_factor(context, g->precision, 0, a.lines, a.length, g->a, a.ld).at;
    rounded.b = gd_cuda_factor(context, g->precision, 1, b.lines, b.length, g->b, b.ld).at;
    rounded.a_row = a.op == CUBLAS_OP_N ? a.length : 1;
    rounded.a_col = a.op == CUBLAS_OP_N ? 1 : a.length;
    rounded.b_row = b.op == CUBLAS_OP_N ? b.length : 1;
    rounded.b_col = b.op == CUBLAS_OP_N ? 1 : b.length;
    gd_cuda_multiply(context, &rounded);
}

struct parts {
    int64_t m, n, k;
};

/* In float32: lines that don't overlap. */
static struct parts parts_of(const struct gd_gemm *g)
{
    const struct operand a = operand_of(g->m, g->k, g->a_row, g->a_col);
    const struct operand b = operand_of(g->k, g->n, g->b_row, g->b_col);
    return (struct parts){
        .m = a.op == CUBLAS_OP_T ? piece(&a) : g->m, .n = b.op == CUBLAS_OP_N ? piece(&b) : g->n,
        .k = gd_smaller(a.op == CUBLAS_OP_N ? piece(&a) : g->k, b.op == CUBLAS_OP_T ? piece(&b) : g->k),
    };
}

/* In bfloat16: what the scratch holds of either factor. The sums are long first, then the outputs many. */
static struct parts rounded_parts_of(const gd_context *context, const struct gd_gemm *g)
{
    const int64_t held = half_scratch(context), side = gd_smaller(larger(g->m, g->n), GD_CUDA_FACTOR_ROWS);
    const int64_t k = gd_smaller(g->k, larger(held / side, 1));
    return (struct parts){.m = held / k, .n = held / k, .k = k};
}

void gd_cuda_gemm(gd_context *context, const struct gd_gemm *g)
{
    struct gd_cuda *cuda = gd_cuda_lacks(context, g->precision) ? NULL : gd_cuda_begin(context);
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
    const int rounds = g->precision == GD_BFLOAT16;
    const struct parts most = rounds ? rounded_parts_of(context, g) : parts_of(g);
    for (int64_t m = 0; m < g->m; m += most.m)
        for (int64_t n = 0; n < g->n; n += most.n)
            for (int64_t k = 0; k < g->k; k += most.k) {
                struct gd_gemm part = *g;
                part.m = gd_smaller(most.m, g->m - m);
                part.n = gd_smaller(most.n, g->n - n);
                part.k = gd_smaller(most.k, g->k - k);
                part.a += m * g->a_row + k * g->a_col;
                part.b += k * g->b_row + n * g->b_col;
                part.c += m * g->ldc + n;
                part.accumulate = g->accumulate || k > 0;
                if (rounds)
                    round_and_multiply(context, &part);
                else
                    multiply(context, cuda, &part, CUDA_R_32F);
            }
}

/* ---- linear ----------------------------------------------------------------------------------------------- */

size_t gd_cuda_packed_size(const gd_context *context, const struct gd_weight *weight)
{
    (void)context;
    return (size_t)(weight->out * weight->taps * weight->in) * gd_cuda_element(weight->precision);
}

/* sum (+)= the products of all taps; packed weights are (taps, out, in). */
static void multiply_taps(gd_context *context, const struct gd_linear *l, float *sum, int64_t ldsum, int accumulate)
{
    const struct gd_weight *w = l->weight;
    const struct gd_cuda_factor packed = {w->precision, w->packed, w->in};
    const int64_t at_once = gd_cuda_rows_at_once(context, w);
    for (int64_t first = 0; first < l->rows && at_once > 0; first += at_once) {
        const int64_t rows = gd_smaller(at_once, l->rows - first);
        const struct gd_cuda_factor x =
            gd_cuda_factor(context, w->precision, 0, (rows - 1) * w->stride + w->taps, w->in,
                           l->x + first * w->stride * l->ldx, l->ldx);
        for (int64_t tap = 0; tap < w->taps; tap++)
            gd_cuda_multiply(context, &(struct gd_gemm){
                .m = rows, .n = w->out, .k = w->in, .a = gd_cuda_row(x, tap), .a_row = w->stride * x.ld, .a_col = 1,
                .b = gd_cuda_row(packed, tap * w->out), .b_row = 1, .b_col = w->in, .c = sum + first * ldsum,
                .ldc = ldsum, .accumulate = accumulate || tap > 0, .precision = w->precision,
            });
    }
}

/* The residual lies where the output goes and is needed after the activation: sum up elsewhere, some rows at a
 * time. The scratch's first half is the factors'. */
static void linear_in_scratch(gd_context *context, const struct gd_linear *l)
{
    const int64_t floats = half_scratch(context) / 2, rows = floats / l->weight->out;
    float *sum = (float *)context->scratch + floats;
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
    if (gd_refuses_activation(context, l->activation))
        return;
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
