/*
 * reduced.c - the factors of products in bfloat16 and int8: rows when they are used, int8 weights when they are packed.
 *
 * A packed panel is (depth, columns) words, whose elements follow one another along K. With int8, the words of each
 * chain (GEMM_CHAIN) are followed by a row of their columns' sums, and the last of all by the columns' scales; of a
 * filtered convolution the last of each matrix. A sum is low + 128 high, as two int16: of at most 4 GEMM_CHAIN
 * elements, high is below 2^10.
 *
 * Minimal filtering's matrices are made of weights that were rounded before: U0, U4 and w1 are their integers, and
 * U1 .. U3 are rounded once more, to scales of their own. So weights that come from an int8 checkpoint have the same
 * products.
 */
#include "reduced.h"

#include <math.h>
#include <string.h>

#include "../int8.h"
#include "ops.h"

/* Elements of an int8 word, and of a chain. */
enum { ELEMENTS = 4, CHAIN = ELEMENTS * GEMM_CHAIN };

int64_t gd_row_words(const struct gd_kernels *kernels, const struct gd_weight *weight)
{
    const int64_t words = gd_divide_up(weight->in, kernels->gemm[weight->precision].elements);
    return words + (weight->precision == GD_INT8 ? gd_divide_up(words, GEMM_CHAIN) * GEMM_INT8_WORDS : 0);
}

int64_t gd_packed_depth(const struct gd_kernels *kernels, const struct gd_weight *weight)
{
    const int64_t words = gd_divide_up(weight->in, kernels->gemm[weight->precision].elements);
    const int64_t chains = gd_divide_up(words, GEMM_CHAIN), matrices = gd_cpu_matrices(kernels, weight);
    if (weight->precision != GD_INT8)
        return matrices * words;
    return matrices * (words + chains) + (gd_cpu_filtered(kernels, weight) ? matrices : 1);
}

static float channel_scale(const struct gd_panel_weights *from, int64_t c)
{
    float largest = 0, unfinite = 0;
    for (int64_t tap = 0; tap < from->weight->taps; tap++)
        for (int64_t k = 0; k < from->weight->in; k++) {
            const float w = from->w[c * from->w_out + tap * from->w_tap + k * from->w_in];
            largest = fabsf(w) > largest ? fabsf(w) : largest;
            unfinite += w * 0;
        }
    return isnan(unfinite) ? NAN : gd_int8_scale(largest);
}

static float inverse_of(float scale)
{
    return scale > 0 ? 1 / scale : 0;
}

/* A column's words of a chain of `count` elements and, behind them, their sum; each word's row is `row` bytes. Returns
 * the row after it. */
static char *pack_chain(int64_t count, const float *w, int64_t w_in, float scale, int64_t row, char *to)
{
    const float inverse = inverse_of(scale);
    int32_t sum = 0;
    for (int64_t k = 0; k < count; k += ELEMENTS, to += row) {
        int8_t q[ELEMENTS] = {0};
        for (int64_t e = 0; e < ELEMENTS && k + e < count; e++) {
            q[e] = gd_int8_from_float(w[(k + e) * w_in], inverse);
            sum += q[e];
        }
        memcpy(to, q, ELEMENTS);
    }
    const int32_t low = (sum & 127);
    const int16_t parts[2] = {(int16_t)low, (int16_t)((sum - low) / 128)};
    memcpy(to, parts, sizeof parts);
    return to + row;
}

/* A column of weights rounded to multiples of `scale`, `count` of each tap from element k on, as minimal filtering's
 * matrices, CHAIN apart. */
static void filtered_chain(const struct gd_kernels *kernels, const struct gd_panel_weights *from, int64_t c,
                           float scale, int64_t k, int64_t count, float *u)
{
    const float inverse = inverse_of(scale);
    for (int64_t tap = 0; tap < from->weight->taps; tap++) {
        const float *w = from->w + c * from->w_out + tap * from->w_tap + k * from->w_in;
        float *to = u + gd_cpu_tap_matrix(kernels, from->weight, tap) * CHAIN;
        for (int64_t i = 0; i < count; i++)
            to[i] = scale * gd_int8_from_float(w[i * from->w_in], inverse);
        memset(to + count, 0, (size_t)(CHAIN - count) * sizeof(float));
    }
    kernels->filter_weights(CHAIN, u);
}

static void pack_filtered_column(const struct gd_kernels *kernels, const struct gd_panel_weights *from, int64_t c,
                                 float scale, char *to)
{
    enum { MATRICES = FILTER_POINTS + 1 };
    const int64_t in = from->weight->in, row = from->width * ELEMENTS;
    const int64_t matrix = gd_packed_depth(kernels, from->weight) / MATRICES * row;
    float u[MATRICES * CHAIN], scales[MATRICES], largest[MATRICES] = {0};
    for (int64_t k = 0; k < in; k += CHAIN) {
        filtered_chain(kernels, from, c, scale, k, gd_smaller(in - k, CHAIN), u);
        for (int64_t i = 0; i < MATRICES * CHAIN; i++)
            largest[i / CHAIN] = fabsf(u[i]) > largest[i / CHAIN] ? fabsf(u[i]) : largest[i / CHAIN];
    }
    for (int m = 0; m < MATRICES; m++)
        scales[m] = m > 0 && m < FILTER_POINTS - 1 ? gd_int8_scale(largest[m]) + scale * 0 : scale;
    for (int64_t k = 0; k < in; k += CHAIN) {
        const int64_t count = gd_smaller(in - k, CHAIN);
        filtered_chain(kernels, from, c, scale, k, count, u);
        for (int m = 0; m < MATRICES; m++) {
            char *end = pack_chain(count, u + m * CHAIN, 1, scales[m], row,
                                   to + m * matrix + k / CHAIN * (GEMM_CHAIN + 1) * row);
            if (k + count == in)
                memcpy(end, &scales[m], sizeof *scales);
        }
    }
}

void gd_reduced_pack_int8(const struct gd_kernels *kernels, const struct gd_panel_weights *from, void *to)
{
    const struct gd_weight *weight = from->weight;
    memset(to, 0, (size_t)(gd_packed_depth(kernels, weight) * from->width) * sizeof(float));
    for (int64_t c = 0; c < from->cols; c++) {
        const float scale = channel_scale(from, c);
        char *column = (char *)to + c * ELEMENTS;
        if (gd_cpu_filtered(kernels, weight)) {
            pack_filtered_column(kernels, from, c, scale, column);
            continue;
        }
        for (int64_t tap = 0; tap < weight->taps; tap++)
            for (int64_t k = 0; k < weight->in; k += CHAIN)
                column = pack_chain(gd_smaller(weight->in - k, CHAIN),
                                    from->w + c * from->w_out + tap * from->w_tap + k * from->w_in, from->w_in, scale,
                                    from->width * ELEMENTS, column);
        memcpy(column, &scale, sizeof scale);
    }
}

/* A group's points, formed in float32 in scratch, to rows of `points`. */
static void round_points(const struct gd_kernels *kernels, const struct gd_weight *weight, int64_t rows, const float *x,
                         int64_t ldx, float *scratch, struct gd_points points)
{
    const struct gd_gemm_kernels *gemm = &kernels->gemm[weight->precision];
    const struct gd_points exact = {scratch, 0, gd_row_stride(weight->in)};
    struct gd_range ranges[FILTER_POINTS];
    kernels->filter_input(rows, weight->in, x, ldx, exact, gemm->convert_within != NULL ? ranges : NULL);
    for (int i = 0; i < FILTER_POINTS; i++) {
        const float *from = scratch + i * exact.matrix;
        float *to = points.data + i * points.matrix;
        if (gemm->convert_within != NULL)
            gemm->convert_within(weight->in, from, ranges[i], to);
        else
            gemm->convert(weight->in, from, to);
    }
}

static void round_filtered(const struct gd_kernels *kernels, const struct gd_weight *weight,
                           const float *x, int64_t ldx, float *scratch, struct gd_panel *panel,
                           struct gd_points *points)
{
    const struct gd_gemm_kernels *gemm = &kernels->gemm[weight->precision];
    const int64_t ld = gd_row_stride(gd_row_words(kernels, weight));
    const int64_t groups = gd_divide_up(panel->rows, FILTER_OUTPUTS);
    float *to = scratch + FILTER_POINTS * gd_row_stride(weight->in), *odd = to + FILTER_POINTS * groups * ld;
    *points = (struct gd_points){to, ld, groups * ld};
    for (int64_t g = 0; g < groups; g++) {
        const int64_t left = panel->rows - g * FILTER_OUTPUTS;
        round_points(kernels, weight, gd_smaller(left, FILTER_OUTPUTS), x + g * FILTER_OUTPUTS * 2 * ldx, ldx, scratch,
                     (struct gd_points){to + g * ld, ld, points->matrix});
        for (int64_t r = g * FILTER_OUTPUTS; r < panel->rows && r < (g + 1) * FILTER_OUTPUTS; r++)
            gemm->convert(weight->in, x + (2 * r + 1) * ldx, odd + r * ld);
    }
    panel->x = odd;
    panel->step = ld;
}

void gd_reduced_round(const struct gd_kernels *kernels, const struct gd_linear *linear, int64_t row, int64_t rows,
                      void *scratch, struct gd_panel *panel, struct gd_points *points)
{
    const struct gd_weight *weight = linear->weight;
    const struct gd_gemm_kernels *gemm = &kernels->gemm[weight->precision];
    const int64_t ld = gd_row_stride(gd_row_words(kernels, weight));
    panel->in = gd_divide_up(weight->in, gemm->elements);
    if (gd_cpu_filtered(kernels, weight)) {
        round_filtered(kernels, weight, linear->x + row * weight->stride * linear->ldx, linear->ldx,
                       scratch, panel, points);
        return;
    }
    const int64_t count = (rows - 1) * weight->stride + weight->taps;
    float *to = scratch;
    for (int64_t r = 0; r < count; r++)
        gemm->convert(weight->in, linear->x + (row * weight->stride + r) * linear->ldx, to + r * ld);
    panel->x = to;
    panel->step = weight->stride * ld;
    panel->tap_stride = ld;
}
