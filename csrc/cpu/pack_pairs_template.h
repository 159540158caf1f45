/*
 * pack_pairs_template.h - both factors of a product whose K runs over rows, in words of two bfloat16: element 2 p in
 * the lower half of a word, 2 p + 1 in the upper one, zero beyond K.
 */
#include "gemm_tile_template.h"
#include "rounding_template.h"

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

/* One tile of pack_pairs_a(): words of rows p .. end - 1 of `mr` columns. Whole vectors are written where the next word
 * is yet to come: its row overwrites them. */
GD_INLINE void pack_pairs_tile(int64_t k, int64_t p, int64_t end, const int64_t mr,
                               const float *a, int64_t a_col, float *to)
{
    for (; p < end; p += 2, to += GEMM_MR) {
        const float *low = a + p * a_col;
        const vf word = pair_word(low, p + 1 < k ? low + a_col : NULL, mr);
        vf_store_left(to, word, p + 2 < k ? VL : GEMM_MR);
    }
}

/* As gemm_pack_a(): of tiles to[depth, GEMM_MR] of a transposed A the first (k + 1) / 2 rows. */
static void pack_pairs_a(int64_t k, int64_t rows, const float *a, int64_t a_col, int64_t depth, float *to)
{
    enum { BLOCK = 32 }; /* rows of which a whole block of columns stays in the L1 cache */
    for (int64_t p = 0; p < k; p += BLOCK) {
        const int64_t end = p + BLOCK < k ? p + BLOCK : k;
        for (int64_t r = 0; r < rows; r += GEMM_MR) {
            float *words = to + r * depth + p / 2 * GEMM_MR;
            if (rows - r >= GEMM_MR)
                pack_pairs_tile(k, p, end, GEMM_MR, a + r, a_col, words);
            else
                pack_pairs_tile(k, p, end, rows - r, a + r, a_col, words);
        }
    }
}
