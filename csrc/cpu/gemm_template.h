/*
 * gemm_template.h - the product of a block of rows with one panel of packed columns.
 *
 * A tile of MR x (NV * VL) sums stays in registers while K goes by. Each sum is a chain of fused
 * multiply-adds over at most GEMM_KC products in ascending order; the chains of a long K are added up in
 * ascending order in a buffer that stays in the cache. Neither depends on where the tile lies, nor on
 * how many of its rows and columns are real, so an output has the same bits in any tile.
 */
#ifndef GD_CPU_GEMM_TEMPLATE_H
#define GD_CPU_GEMM_TEMPLATE_H

#include "gemm_tile_template.h"
#include "kernels.h"
#include "rounding_template.h"
#include "vec.h"
#include "vmath_template.h"

GEMM_TILES(gemm_float32_tile, GD_FLOAT32)

GEMM_PACKED_TILE(gemm_packed_tile, GD_FLOAT32)

/* Nothing but bias and GD_GELU_REDUCED. */
GD_INLINE int gemm_is_plain(const struct gd_panel *panel)
{
    return panel->activation == GD_GELU_REDUCED && panel->pre == NULL && panel->residual == NULL;
}

GD_INLINE vf gemm_bias(const struct gd_panel *panel, int c)
{
    return panel->bias != NULL ? vf_load_left(panel->bias + c, panel->cols - c) : (vf){0};
}

/* Row i of the block, one vector of columns from c on: sums with bias, to y. plain: gemm_is_plain(), a whole vector. */
GD_INLINE void gemm_finish_vector(const struct gd_panel *panel, int64_t i, int c, vf x, const int plain)
{
    const int left = plain ? VL : panel->cols - c;
    if (!plain && panel->pre != NULL)
        vf_store_left(panel->pre + i * panel->ldpre + c, x, left);
    x = vf_activate(plain ? GD_GELU_REDUCED : panel->activation, x);
    if (!plain && panel->residual != NULL)
        x += vf_load_left(panel->residual + i * panel->ldresidual + c, left);
    vf_store_left(panel->y + i * panel->ldy + c, x, left);
}

/* Rows r .. r + rows - 1 of the block, one vector of columns from c on: sums t[rows, GEMM_NR], each times scale[col]
 * where scale is not NULL. */
GD_INLINE void gemm_finish_column(const struct gd_panel *panel, int64_t r, int rows, int c,
                                  const float *t, const float *scale, const int plain)
{
    const vf factor = scale != NULL ? vf_load(scale + c) : (vf){0}, bias = gemm_bias(panel, c);
    for (int64_t i = r; i < r + rows; i++, t += GEMM_NR) {
        vf x = vf_load(t + c);
        if (scale != NULL)
            x = x * factor + bias;
        else if (panel->bias != NULL)
            x += bias;
        gemm_finish_vector(panel, i, c, x, plain);
    }
}

GD_INLINE void gemm_finish_rows(const struct gd_panel *panel, int64_t r, int rows, const float *t, const float *scale)
{
    for (int c = 0; c < panel->cols; c += VL)
        if (gemm_is_plain(panel) && panel->cols - c >= VL)
            gemm_finish_column(panel, r, rows, c, t, scale, 1);
        else
            gemm_finish_column(panel, r, rows, c, t, scale, 0);
}

GD_INLINE void gemm_prefetch_rows(const float *x, int64_t ldx, int mr)
{
    for (int i = 0; i < mr; i++) {
        const char *row = (const char *)(x + i * ldx);
        __builtin_prefetch(row);
        __builtin_prefetch(row + GEMM_NR * sizeof(float) - 1);
    }
}

/* Where rows r .. r + mr - 1 go and what is added to them, while their sums are computed. */
GD_INLINE void gemm_prefetch(const struct gd_panel *panel, int64_t r, int mr)
{
    gemm_prefetch_rows(panel->y + r * panel->ldy, panel->ldy, mr);
    if (panel->residual != NULL)
        gemm_prefetch_rows(panel->residual + r * panel->ldresidual, panel->ldresidual, mr);
}

/* t[r, GEMM_NR] = x[r] b, r < rows, packed b of nv vectors. finished: the panel whose rows they are, or NULL. */
GD_INLINE void gemm_block(const struct gd_gemm_kernels *gemm, const int int8, int64_t rows, int64_t k,
                          const float *x, int64_t step, const float *b, int nv, float *t,
                          const struct gd_panel *finished)
{
    for (int64_t p = 0; p < k; p += GEMM_KC, b += (GEMM_KC + int8) * nv * VL, x += int8 ? GEMM_INT8_WORDS : 0) {
        int64_t chain = k - p < GEMM_KC ? k - p : GEMM_KC;
        for (int64_t r = 0; r < rows; r += gemm->rows) {
            int mr = (int)gd_smaller(rows - r, gemm->rows);
            if (finished != NULL && p == 0)
                gemm_prefetch(finished, r, mr);
            gemm->tile(mr, nv, chain, x + r * step + p, step, b, nv * VL, t + r * GEMM_NR, p > 0);
        }
    }
}

/* int8: each chain's words are followed by what gemm_tile_template.h says, the last row of b by the columns' scales. */
GD_INLINE void gemm_panel_of(const struct gd_panel *panel, const int int8)
{
    _Alignas(64) float sums[GEMM_ROWS * GEMM_NR];
    const struct gd_gemm_kernels *gemm = panel->gemm;
    gd_gemm_tile *tile = panel->packed ? gemm->packed_tile : gemm->tile;
    int nv = panel->cols <= VL ? 1 : 2;
    /* Taps that touch one another are one tap, where they have one scale. */
    int joined = !int8 && panel->tap_stride == panel->in;
    int64_t taps = joined ? 1 : panel->taps, in = joined ? panel->taps * panel->in : panel->in;
    int64_t b_row = panel->b_row > 0 ? panel->b_row : nv * VL;
    const float *b = panel->b;

    for (int64_t tap = 0; tap < taps; tap++)
        for (int64_t p = 0; p < in; p += GEMM_KC) {
            int64_t k = in - p < GEMM_KC ? in - p : GEMM_KC;
            const float *x = panel->x + tap * panel->tap_stride + (panel->packed ? p * gemm->rows : p);
            x += int8 ? p / GEMM_KC * GEMM_INT8_WORDS : 0;
            const float *next = b + (k + int8) * b_row;
            int add = tap + p > 0, last = tap == taps - 1 && p + k == in;
            for (int64_t r = 0; r < panel->rows; r += gemm->rows) {
                int mr = (int)gd_smaller(panel->rows - r, gemm->rows);
                float *t = sums + r * GEMM_NR;
                if (last)
                    gemm_prefetch(panel, r, mr);
                tile(mr, nv, k, x + r * panel->step, panel->step, b, b_row, t, add);
                if (last)
                    gemm_finish_rows(panel, r, mr, t, int8 ? next : NULL);
            }
            b = next;
        }
}

static void gemm_panel(const struct gd_panel *panel)
{
    if (gd_gemm_is_int8(panel->gemm))
        gemm_panel_of(panel, 1);
    else
        gemm_panel_of(panel, 0);
}

/* Panels of GEMM_NR columns, each to[depth, width], of which the first k rows are written: b[p * b_row + c * b_col],
 * zero where c >= cols; width: the panel's columns in whole vectors. */
static void gemm_pack_b(int64_t k, int64_t cols, const float *b, int64_t b_row, int64_t b_col, int64_t depth, float *to)
{
    enum { BLOCK = 64 }; /* rows whose part of a panel stays in the L1 cache while its columns go by */
    if (b_col == 1) {
        for (int64_t p = 0; p < k; p++, b += b_row)
            for (int64_t n = 0; n < cols; n += GEMM_NR) {
                int64_t width = cols - n <= VL ? VL : GEMM_NR;
                float *row = to + n * depth + p * width;
                vf_store(row, vf_load_left(b + n, cols - n));
                if (width > VL)
                    vf_store(row + VL, vf_load_left(b + n + VL, cols - n - VL));
            }
        return;
    }
    for (int64_t n = 0; n < cols; n += GEMM_NR) {
        int64_t width = cols - n <= VL ? VL : GEMM_NR;
        for (int64_t block = 0; block < k; block += BLOCK)
            for (int64_t c = n; c < n + width; c++)
                for (int64_t p = block; p < k && p < block + BLOCK; p++)
                    to[n * depth + p * width + c - n] = c < cols ? b[p * b_row + c * b_col] : 0;
    }
}

/* Tiles of GEMM_MR rows of a transposed A, each to[depth, GEMM_MR], of which the first k rows are written:
 * a[p * a_col + r], zero beyond the last row. */
static void gemm_pack_a(int64_t k, int64_t rows, const float *a, int64_t a_col, int64_t depth, float *to)
{
    for (int64_t r = 0; r < rows; r += GEMM_MR) {
        const int64_t mr = rows - r < GEMM_MR ? rows - r : GEMM_MR;
        float *row = to + r * depth;
        if (mr == GEMM_MR) {
            for (int64_t p = 0; p < k; p++, row += GEMM_MR)
                memcpy(row, a + p * a_col + r, GEMM_MR * sizeof(float));
            continue;
        }
        for (int64_t p = 0; p < k; p++, row += GEMM_MR)
            for (int64_t i = 0; i < GEMM_MR; i++)
                row[i] = i < mr ? a[p * a_col + r + i] : 0;
    }
}

/* The same with every element rounded to bfloat16. */
static void pack_rounded_b(int64_t k, int64_t cols, const float *b, int64_t b_row, int64_t b_col,
                           int64_t depth, float *to)
{
    gemm_pack_b(k, cols, b, b_row, b_col, depth, to);
    for (int64_t n = 0; n < cols; n += GEMM_NR)
        round_bfloat16((cols - n <= VL ? VL : GEMM_NR) * k, to + n * depth, to + n * depth);
}

static void pack_rounded_a(int64_t k, int64_t rows, const float *a, int64_t a_col, int64_t depth, float *to)
{
    gemm_pack_a(k, rows, a, a_col, depth, to);
    for (int64_t r = 0; r < rows; r += GEMM_MR)
        round_bfloat16(GEMM_MR * k, to + r * depth, to + r * depth);
}

/* out[c] += sum over r of x[r, c]: chains of 256 rows in ascending order, added up in ascending order. */
static void gemm_column_sums(int64_t rows, int64_t cols, const float *x, int64_t ldx, float *out)
{
    for (int64_t c = 0; c < cols; c += VL) {
        int64_t n = cols - c;
        vf total = {0};
        for (int64_t r = 0; r < rows; r += 256) {
            vf sum = {0};
            for (int64_t i = r; i < rows && i < r + 256; i++)
                sum += vf_load_left(x + i * ldx + c, n);
            total += sum;
        }
        vf_store_left(out + c, vf_load_left(out + c, n) + total, n);
    }
}

#endif
