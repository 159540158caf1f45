#define GD_ISA_AVX512_BF16
#include "isa.h"

#if defined(GD_TARGET)
GD_ISA_BEGIN
#include "pairs_template.h"

GEMM_TILES(tile, GD_BFLOAT16)
GEMM_PACKED_TILE(packed_tile, GD_BFLOAT16)

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

const struct gd_gemm_kernels gd_bfloat16_avx512 = {
    .elements = 2, .rows = GEMM_MR, .filtered = 1, .tile = tile, .convert = round_pairs,
    .packed_tile = packed_tile, .pack_b = pack_pairs_b, .pack_a = pack_pairs_a,
};
GD_ISA_END
#endif
