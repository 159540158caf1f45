/* Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16. */
#if defined(__AVX512BF16__)
#include "pack_pairs_template.h"

GEMM_TILES(tiles, GD_BFLOAT16)
GEMM_PACKED_TILES(packed_tiles, GD_BFLOAT16)

static void round_pairs(int64_t width, const float *x, float *words)
{
    for (int64_t c = 0; c < width; c += 2 * VL) {
        const vf low = vf_load_left(x + c, width - c), high = vf_load_left(x + c + VL, width - c - VL);
        vf_store(words + c / 2, (vf)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    }
}

const struct gd_gemm_kernels gd_bfloat16_avx512 = {
    .elements = 2, .tiles = tiles, .convert = round_pairs,
    .packed_tiles = packed_tiles, .pack_b = pack_pairs_b, .pack_a = pack_pairs_a,
};
#endif
