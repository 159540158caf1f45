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

#include "kernels.h"
#include "vec.h"
#include "vmath_template.h"

/* Registers: MR * NV sums, NV of B, one of A; on AArch64 one a row, since the compiler loads them all first. */
#if VL == 16
#define GEMM_MR 12
#elif defined(__aarch64__)
#define GEMM_MR 8
#elif VL == 8
#define GEMM_MR 6
#else
#define GEMM_MR 4
#endif
#define GEMM_NV 2
#define GEMM_NR (GEMM_NV * VL)
#define GEMM_KC 256

/* t[mr, GEMM_NR] = or += a[mr, k] b[k, nv * VL] with a[r, p] = a[r * a_row + p * a_col] and rows of b b_row apart. */
typedef void gemm_tile_function(int64_t k, const float *a, int64_t a_row, const float *b, int64_t b_row, float *t,
                                int add);

GD_INLINE void gemm_tile(const int mr, const int nv, int64_t k, const float *a, int64_t a_row, int64_t a_col,
                         const float *b, int64_t b_row, float *t, int add)
{
    /* Every third row has its pointer, and the two after it follow by one stride and by two, which are operands
     * that x86 can address. Left to itself the compiler keeps a stride for each row, in more registers than
     * there are: hence the asm, which hides where the pointers come from. */
    const float *rows[(GEMM_MR + 2) / 3];
    vf sum[GEMM_MR][GEMM_NV];
#pragma GCC unroll 16
    for (int r = 0; r < mr; r++) {
        if (r % 3 == 0) {
            rows[r / 3] = a + r * a_row;
            __asm__("" : "+r"(rows[r / 3]));
        }
#pragma GCC unroll 2
        for (int v = 0; v < nv; v++)
            sum[r][v] = (vf){0};
    }
    for (int64_t p = 0; p < k; p++, b += b_row) {
        vf column[GEMM_NV];
#pragma GCC unroll 2
        for (int v = 0; v < nv; v++)
            column[v] = vf_load(b + v * VL);
#pragma GCC unroll 16
        for (int r = 0; r < mr; r++) {
            vf row = vf_set(rows[r / 3][r % 3 * a_row]);
#pragma GCC unroll 2
            for (int v = 0; v < nv; v++)
                sum[r][v] += row * column[v];
            if (r % 3 == 2 || r == mr - 1)
                rows[r / 3] += a_col;
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

/* Functions of their own, so that nothing around them competes for registers. */
#define GEMM_TILE(mr, nv) \
    static __attribute__((noinline)) void gemm_tile_##mr##_##nv(int64_t k, const float *a, int64_t a_row, \
                                                               const float *b, int64_t b_row, float *t, int add) \
    { \
        gemm_tile(mr, nv, k, a, a_row, 1, b, b_row, t, add); \
    }
#define GEMM_TILES(mr) GEMM_TILE(mr, 1) GEMM_TILE(mr, 2)

GEMM_TILES(1)
GEMM_TILES(2)
GEMM_TILES(3)
GEMM_TILES(4)
#if GEMM_MR >= 6
GEMM_TILES(5)
GEMM_TILES(6)
#endif
#if GEMM_MR >= 8
GEMM_TILES(7)
GEMM_TILES(8)
#endif
#if GEMM_MR >= 12
GEMM_TILES(9)
GEMM_TILES(10)
GEMM_TILES(11)
GEMM_TILES(12)
#endif

static gemm_tile_function *const gemm_tiles[GEMM_MR][GEMM_NV] = {
    {gemm_tile_1_1, gemm_tile_1_2},
    {gemm_tile_2_1, gemm_tile_2_2},
    {gemm_tile_3_1, gemm_tile_3_2},
    {gemm_tile_4_1, gemm_tile_4_2},
#if GEMM_MR >= 6
    {gemm_tile_5_1, gemm_tile_5_2},
    {gemm_tile_6_1, gemm_tile_6_2},
#endif
#if GEMM_MR >= 8
    {gemm_tile_7_1, gemm_tile_7_2},
    {gemm_tile_8_1, gemm_tile_8_2},
#endif
#if GEMM_MR >= 12
    {gemm_tile_9_1, gemm_tile_9_2},
    {gemm_tile_10_1, gemm_tile_10_2},
    {gemm_tile_11_1, gemm_tile_11_2},
    {gemm_tile_12_1, gemm_tile_12_2},
#endif
};

/* The same of what gemm_pack_a() wrote: GEMM_MR rows, always. */
static __attribute__((noinline)) void gemm_packed_tile_1(int64_t k, const float *a, int64_t a_row, const float *b,
                                                         int64_t b_row, float *t, int add)
{
    (void)a_row;
    gemm_tile(GEMM_MR, 1, k, a, 1, GEMM_MR, b, b_row, t, add);
}

static __attribute__((noinline)) void gemm_packed_tile_2(int64_t k, const float *a, int64_t a_row, const float *b,
                                                         int64_t b_row, float *t, int add)
{
    (void)a_row;
    gemm_tile(GEMM_MR, 2, k, a, 1, GEMM_MR, b, b_row, t, add);
}

static gemm_tile_function *const gemm_packed_tiles[GEMM_NV] = {gemm_packed_tile_1, gemm_packed_tile_2};

/* Row r of the block: sums t[cols] to y. */
GD_INLINE void gemm_finish_row(const struct gd_panel *panel, int64_t r, const float *t)
{
    for (int c = 0; c < panel->cols; c += VL) {
        int left = panel->cols - c;
        vf x = vf_load(t + c);
        if (panel->bias != NULL)
            x += vf_load_left(panel->bias + c, left);
        if (panel->pre != NULL)
            vf_store_left(panel->pre + r * panel->ldpre + c, x, left);
        if (panel->activation == GD_GELU)
            x = vf_gelu(x);
        if (panel->residual != NULL)
            x += vf_load_left(panel->residual + r * panel->ldresidual + c, left);
        vf_store_left(panel->y + r * panel->ldy + c, x, left);
    }
}

/* What is added to the sums of rows r .. r + mr - 1, while they are computed. */
GD_INLINE void gemm_prefetch(const struct gd_panel *panel, int64_t r, int mr)
{
    for (int i = 0; i < mr; i++) {
        const char *row = (const char *)(panel->residual + (r + i) * panel->ldresidual);
        __builtin_prefetch(row);
        __builtin_prefetch(row + GEMM_NR * sizeof(float) - 1);
    }
}

/* t[r, GEMM_NR] = x[r] b, r < rows, packed b of nv vectors. */
static void gemm_block(int64_t rows, int64_t k, const float *x, int64_t step, const float *b, int nv, float *t)
{
    for (int64_t p = 0; p < k; p += GEMM_KC, b += GEMM_KC * nv * VL) {
        int64_t part = k - p < GEMM_KC ? k - p : GEMM_KC;
        for (int64_t r = 0; r < rows; r += GEMM_MR) {
            int mr = rows - r < GEMM_MR ? (int)(rows - r) : GEMM_MR;
            gemm_tiles[mr - 1][nv - 1](part, x + r * step + p, step, b, nv * VL, t + r * GEMM_NR, p > 0);
        }
    }
}

static void gemm_panel(const struct gd_panel *panel)
{
    _Alignas(64) float sums[GEMM_ROWS * GEMM_NR];
    int nv = panel->cols <= VL ? 1 : 2;
    /* Taps that touch one another are one tap. */
    int64_t taps = panel->tap_stride == panel->in ? 1 : panel->taps;
    int64_t in = panel->tap_stride == panel->in ? panel->taps * panel->in : panel->in;
    int64_t b_row = panel->b_row > 0 ? panel->b_row : nv * VL;
    const float *b = panel->b;

    for (int64_t tap = 0; tap < taps; tap++)
        for (int64_t p = 0; p < in; p += GEMM_KC) {
            int64_t k = in - p < GEMM_KC ? in - p : GEMM_KC;
            const float *x = panel->x + tap * panel->tap_stride + (panel->tiled ? p * GEMM_MR : p);
            int last = tap == taps - 1 && p + k == in;
            for (int64_t r = 0; r < panel->rows; r += GEMM_MR) {
                int mr = panel->rows - r < GEMM_MR ? (int)(panel->rows - r) : GEMM_MR;
                gemm_tile_function *tile = panel->tiled ? gemm_packed_tiles[nv - 1] : gemm_tiles[mr - 1][nv - 1];
                float *t = sums + r * GEMM_NR;
                if (last && panel->residual != NULL)
                    gemm_prefetch(panel, r, mr);
                tile(k, x + r * panel->step, panel->step, b, b_row, t, tap + p > 0);
                for (int i = 0; last && i < mr; i++)
                    gemm_finish_row(panel, r + i, t + i * GEMM_NR);
            }
            b += k * b_row;
        }
}

/* Panels of GEMM_NR columns, each to[k, width] = b[p * b_row + c * b_col], zero where c >= cols; width: the
 * panel's columns in whole vectors. */
static void gemm_pack_b(int64_t k, int64_t cols, const float *b, int64_t b_row, int64_t b_col, float *to)
{
    enum { BLOCK = 64 }; /* rows whose part of a panel stays in the L1 cache while its columns go by */
    if (b_col == 1) {
        for (int64_t p = 0; p < k; p++, b += b_row)
            for (int64_t n = 0; n < cols; n += GEMM_NR) {
                int64_t width = cols - n <= VL ? VL : GEMM_NR;
                float *row = to + n * k + p * width;
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
                    to[n * k + p * width + c - n] = c < cols ? b[p * b_row + c * b_col] : 0;
    }
}

/* Tiles of GEMM_MR rows of a transposed A, each to[k, GEMM_MR] = a[p * a_col + r], zero beyond the last row. */
static void gemm_pack_a(int64_t k, int64_t rows, const float *a, int64_t a_col, float *to)
{
    for (int64_t r = 0; r < rows; r += GEMM_MR) {
        int64_t mr = rows - r < GEMM_MR ? rows - r : GEMM_MR;
        if (mr == GEMM_MR) {
            for (int64_t p = 0; p < k; p++, to += GEMM_MR)
                memcpy(to, a + p * a_col + r, GEMM_MR * sizeof(float));
            continue;
        }
        for (int64_t p = 0; p < k; p++, to += GEMM_MR)
            for (int64_t i = 0; i < GEMM_MR; i++)
                to[i] = i < mr ? a[p * a_col + r + i] : 0;
    }
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
