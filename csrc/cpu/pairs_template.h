/*
 * pairs_template.h - the factors of a product in words of two bfloat16: element 2 p of K in the lower half of a
 * word, 2 p + 1 in the upper one, zero beyond K.
 */
#include "gemm_tile_template.h"
#include "rounding_template.h"

/* A row of the left factor, where K runs along it. */
static void round_pairs(int64_t width, const float *x, float *words)
{
    for (int64_t c = 0; c < width; c += 2 * VL) {
        const vf low = vf_load_left(x + c, width - c), high = vf_load_left(x + c + VL, width - c - VL);
        vf_store(words + c / 2, (vf)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    }
}

/* Words of `left` columns of two rows of floats. */
GD_INLINE vf pair_word(const float *low, const float *high, int64_t left)
{
    /* The instruction puts one vector behind the other; the permutation takes an element of each in turn. */
    static const uint16_t turns[2 * VL] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const vf upper = high != NULL ? vf_load_left(high, left) : (vf){0};
    const __m512i behind = (__m512i)_mm512_cvtne2ps_pbh((__m512)upper, (__m512)vf_load_left(low, left));
    return (vf)_mm512_permutexvar_epi16(_mm512_loadu_si512(turns), behind);
}

/* As gemm_pack_b(), whose words are floats: of panels to[depth, width] the first (k + 1) / 2 rows. */
static void pack_pairs_b(int64_t k, int64_t cols, const float *b, int64_t b_row, int64_t b_col,
                         int64_t depth, float *to)
{
    float row[2][GEMM_NR];
    for (int64_t n = 0; n < cols; n += GEMM_NR) {
        const int64_t width = cols - n <= VL ? VL : GEMM_NR;
        float *row_to = to + n * depth;
        for (int64_t p = 0; p < k; p += 2, row_to += width) {
            const float *low = b + p * b_row + n * b_col, *high = p + 1 < k ? low + b_row : NULL;
            if (b_col != 1) {
                for (int64_t c = 0; c < width && c < cols - n; c++) {
                    row[0][c] = low[c * b_col];
                    row[1][c] = high != NULL ? high[c * b_col] : 0;
                }
                low = row[0];
                high = row[1];
            }
            for (int64_t v = 0; v < width; v += VL)
                vf_store(row_to + v, pair_word(low + v, high != NULL ? high + v : NULL, cols - n - v));
        }
    }
}
