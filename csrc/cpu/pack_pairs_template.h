/*
 * pack_pairs_template.h - both factors of a product whose K runs over rows, in words of two bfloat16: element 2 p in the
 * lower half of a word, 2 p + 1 in the upper one, zero beyond K.
 */
#include "gemm_tile_template.h"
#include "rounding_template.h"

/* Words of `left` columns of two rows of floats. */
GD_INLINE vf pair_word(const float *low, const float *high, int64_t left)
{
    const vu upper = high != NULL ? bfloat16_word(vf_load_left(high, left)) : (vu){0};
    return (vf)(upper | bfloat16_word(vf_load_left(low, left)) >> 16);
}

/* As gemm_pack_b(), whose words are floats: panels to[(k + 1) / 2, width]. */
static void pack_pairs_b(int64_t k, int64_t cols, const float *b, int64_t b_row, int64_t b_col, float *to)
{
    float row[2][GEMM_NR];
    for (int64_t n = 0; n < cols; n += GEMM_NR) {
        const int64_t width = cols - n <= VL ? VL : GEMM_NR;
        for (int64_t p = 0; p < k; p += 2, to += width) {
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
                vf_store(to + v, pair_word(low + v, high != NULL ? high + v : NULL, cols - n - v));
        }
    }
}

/* As gemm_pack_a(): tiles to[(k + 1) / 2, GEMM_MR] of a transposed A. */
static void pack_pairs_a(int64_t k, int64_t rows, const float *a, int64_t a_col, float *to)
{
    for (int64_t r = 0; r < rows; r += GEMM_MR) {
        const int64_t mr = rows - r < GEMM_MR ? rows - r : GEMM_MR;
        for (int64_t p = 0; p < k; p += 2, to += GEMM_MR) {
            const float *low = a + p * a_col + r;
            vf_store_left(to, pair_word(low, p + 1 < k ? low + a_col : NULL, mr), GEMM_MR);
        }
    }
}
