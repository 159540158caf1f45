/*
 * gemm_template.h - the product of a block of rows with one panel of packed columns.
 *
 * A tile of MR x (NV * VL) sums stays in registers while K goes by. Each sum is a chain of fused
 * multiply-adds over at most GEMM_KC products in ascending order; the chains of a long K are added up in
 * ascending order in a buffer that stays in the cache. Neither depends on where the tile lies, nor on
 * how many of its rows and columns are real, so an output has the same bits in any tile.
 */
#include "kernels.h"
#include "vec.h"
#include "vmath_template.h"

/* Registers: MR * NV sums, NV of B, one of A. */
#if VL == 16 || defined(__aarch64__)
#define GEMM_MR 12
#elif VL == 8
#define GEMM_MR 6
#else
#define GEMM_MR 4
#endif
#define GEMM_NV 2
#define GEMM_NR (GEMM_NV * VL)
#define GEMM_KC 256

/* t[mr, GEMM_NR] = or += a[mr, k] b[k, nv * VL]; a[r, p] = a[r * a_row + p * a_col]. */
GD_INLINE void gemm_tile(const int mr, const int nv, int64_t k, const float *a, int64_t a_row, int64_t a_col,
                         const float *b, float *t, int add)
{
    vf sum[GEMM_MR][GEMM_NV];
#pragma GCC unroll 16
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 2
        for (int v = 0; v < nv; v++)
            sum[r][v] = (vf){0};
    for (int64_t p = 0; p < k; p++, a += a_col, b += nv * VL) {
        vf column[GEMM_NV];
#pragma GCC unroll 2
        for (int v = 0; v < nv; v++)
            column[v] = vf_load(b + v * VL);
#pragma GCC unroll 16
        for (int r = 0; r < mr; r++) {
            vf row = vf_set(a[r * a_row]);
#pragma GCC unroll 2
            for (int v = 0; v < nv; v++)
                sum[r][v] += row * column[v];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 2
        for (int v = 0; v < nv; v++) {
            float *to = t + r * GEMM_NR + v * VL;
            vf_store(to, add ? vf_load(to) + sum[r][v] : sum[r][v]);
        }
}

#define GEMM_CASE(mr) \
    case mr: \
        if (nv == 2) \
            gemm_tile(mr, 2, k, a, a_row, a_col, b, t, add); \
        else \
            gemm_tile(mr, 1, k, a, a_row, a_col, b, t, add); \
        break;

static void gemm_any_tile(int mr, int nv, int64_t k, const float *a, int64_t a_row, int64_t a_col, const float *b,
                          float *t, int add)
{
    switch (mr) {
        GEMM_CASE(1)
        GEMM_CASE(2)
        GEMM_CASE(3)
        GEMM_CASE(4)
#if GEMM_MR >= 6
        GEMM_CASE(5)
        GEMM_CASE(6)
#endif
#if GEMM_MR >= 12
        GEMM_CASE(7)
        GEMM_CASE(8)
        GEMM_CASE(9)
        GEMM_CASE(10)
        GEMM_CASE(11)
        GEMM_CASE(12)
#endif
    }
}

GD_INLINE vf gemm_load(const float *p, int n) { return n >= VL ? vf_load(p) : vf_load_n(p, n); }

GD_INLINE void gemm_store(float *p, vf x, int n)
{
    if (n >= VL)
        vf_store(p, x);
    else
        vf_store_n(p, x, n);
}

/* Row r of the block: sums t[cols] to y. */
GD_INLINE void gemm_finish_row(const struct gd_panel *panel, int64_t r, const float *t)
{
    for (int c = 0; c < panel->cols; c += VL) {
        int n = panel->cols - c;
        float *y = panel->y + r * panel->ldy + c;
        vf x = vf_load(t + c);
        if (panel->bias != NULL)
            x += gemm_load(panel->bias + c, n);
        if (panel->pre != NULL)
            gemm_store(panel->pre + r * panel->ldpre + c, x, n);
        if (panel->activation == GD_GELU)
            x = vf_gelu(x);
        if (panel->residual != NULL)
            x += gemm_load(panel->residual + r * panel->ldresidual + c, n);
        gemm_store(y, x, n);
    }
}

static void gemm_panel(const struct gd_panel *panel)
{
    _Alignas(64) float sums[GEMM_ROWS * GEMM_NR];
    int nv = panel->cols <= VL ? 1 : 2;
    /* Taps that touch one another are one tap. */
    int64_t taps = panel->tap_stride == panel->in ? 1 : panel->taps;
    int64_t in = panel->tap_stride == panel->in ? panel->taps * panel->in : panel->in;
    const float *b = panel->b;

    for (int64_t tap = 0; tap < taps; tap++)
        for (int64_t p = 0; p < in; p += GEMM_KC) {
            int64_t k = in - p < GEMM_KC ? in - p : GEMM_KC;
            const float *x = panel->x + tap * panel->tap_stride + p;
            int last = tap == taps - 1 && p + k == in;
            for (int64_t r = 0; r < panel->rows; r += GEMM_MR) {
                int mr = panel->rows - r < GEMM_MR ? (int)(panel->rows - r) : GEMM_MR;
                float *t = sums + r * GEMM_NR;
                if (mr == GEMM_MR && nv == GEMM_NV)
                    gemm_tile(GEMM_MR, GEMM_NV, k, x + r * panel->step, panel->step, 1, b, t, tap + p > 0);
                else
                    gemm_any_tile(mr, nv, k, x + r * panel->step, panel->step, 1, b, t, tap + p > 0);
                for (int i = 0; last && i < mr; i++)
                    gemm_finish_row(panel, r + i, t + i * GEMM_NR);
            }
            b += k * nv * VL;
        }
}

/* to[k, width] = b[p * b_row + c * b_col], c < cols, zero where c >= cols; width: cols in whole vectors. */
static void gemm_pack_b(int64_t k, int64_t cols, const float *b, int64_t b_row, int64_t b_col, float *to)
{
    int64_t width = (cols + VL - 1) / VL * VL;
    for (int64_t p = 0; p < k; p++, b += b_row, to += width)
        for (int64_t c = 0; c < width; c++)
            to[c] = c < cols ? b[c * b_col] : 0;
}

/* out[c] += sum over r of x[r, c]: chains of 256 rows in ascending order, added up in ascending order. */
static void gemm_column_sums(int64_t rows, int64_t cols, const float *x, int64_t ldx, float *out)
{
    for (int64_t c = 0; c < cols; c += VL) {
        int n = cols - c < VL ? (int)(cols - c) : VL;
        vf total = {0};
        for (int64_t r = 0; r < rows; r += 256) {
            vf sum = {0};
            for (int64_t i = r; i < rows && i < r + 256; i++)
                sum += gemm_load(x + i * ldx + c, n);
            total += sum;
        }
        gemm_store(out + c, gemm_load(out + c, n) + total, n);
    }
}
