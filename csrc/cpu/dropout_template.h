/*
 * dropout_template.h - the factors of gd_dropout_factor() (philox.h), 4 VL of them at once.
 */
#ifndef GD_CPU_DROPOUT_TEMPLATE_H
#define GD_CPU_DROPOUT_TEMPLATE_H

#include "../philox.h"
#include "kernels.h"
#include "vec.h"

typedef uint64_t vq __attribute__((vector_size(VL * 4)));

/* Products of the even lanes, 64 bits each. */
GD_INLINE vq vu_multiply_even(vu a, uint32_t m)
{
#if VL == 16
    return (vq)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi32((int)m));
#elif VL == 8
    return (vq)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32((int)m));
#elif defined(__SSE2__)
    return (vq)_mm_mul_epu32((__m128i)a, _mm_set1_epi32((int)m));
#else
    vq product;
    for (int i = 0; i < VL / 2; i++)
        product[i] = (uint64_t)a[2 * i] * m;
    return product;
#endif
}

GD_INLINE void vu_multiply(vu a, uint32_t m, vu *high, vu *low)
{
    const uint64_t lower = 0xffffffffu;
    vq even = vu_multiply_even(a, m), odd = vu_multiply_even((vu)((vq)a >> 32), m);
    *low = (vu)((even & lower) | (odd << 32));
    *high = (vu)((even >> 32) | (odd & ~lower));
}

/* Transposes the 4 x 4 matrices that the vectors' quarters number g form, for each g. */
GD_INLINE void vu_transpose_quarters(vu w[4])
{
#if defined(__SSE2__)
#if VL == 16
#define UNPACK(part, bits, a, b) (vu)_mm512_unpack##part##_epi##bits((__m512i)(a), (__m512i)(b))
#elif VL == 8
#define UNPACK(part, bits, a, b) (vu)_mm256_unpack##part##_epi##bits((__m256i)(a), (__m256i)(b))
#else
#define UNPACK(part, bits, a, b) (vu)_mm_unpack##part##_epi##bits((__m128i)(a), (__m128i)(b))
#endif
    vu low01 = UNPACK(lo, 32, w[0], w[1]), low23 = UNPACK(lo, 32, w[2], w[3]);
    vu high01 = UNPACK(hi, 32, w[0], w[1]), high23 = UNPACK(hi, 32, w[2], w[3]);
    w[0] = UNPACK(lo, 64, low01, low23);
    w[1] = UNPACK(hi, 64, low01, low23);
    w[2] = UNPACK(lo, 64, high01, high23);
    w[3] = UNPACK(hi, 64, high01, high23);
#undef UNPACK
#else
    vu t[4];
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < VL; i++)
            t[k][i] = w[i % 4][i - i % 4 + k];
    memcpy(w, t, sizeof t);
#endif
}

/* Factors of elements index .. index + 4 VL - 1, index a multiple of four. Lane 4 g + k counts for elements
 * k VL + 4 g .. + 3, so that the transposition brings every word to its element's lane. */
GD_INLINE void dropout_factors(const struct gd_dropout_row *row, uint32_t index, vf factor[4])
{
    vu w[4], high, low;
    for (int i = 0; i < VL; i++)
        w[0][i] = (uint32_t)(i % 4 * (VL / 4) + i / 4);
    w[0] += index >> 2;
    w[1] = row->frame - (vu){0};
    w[2] = row->line - (vu){0};
    w[3] = row->site - (vu){0};
    uint32_t k0 = row->key[0], k1 = row->key[1];
    for (int round = 0; round < GD_PHILOX_ROUNDS; round++) {
        vu w1 = w[1], w3 = w[3], high2, low2;
        vu_multiply(w[0], GD_PHILOX_M0, &high, &low);
        vu_multiply(w[2], GD_PHILOX_M1, &high2, &low2);
        w[0] = high2 ^ w1 ^ k0;
        w[1] = low2;
        w[2] = high ^ w3 ^ k1;
        w[3] = low;
        k0 += GD_PHILOX_W0;
        k1 += GD_PHILOX_W1;
    }
    vu_transpose_quarters(w);
    for (int k = 0; k < 4; k++)
        factor[k] = vf_select((vi)(w[k] >= row->threshold), vf_set(row->scale), (vf){0});
}

/* x[i] *= factor of element index + i, i < width; index a multiple of four. */
static void dropout(const struct gd_dropout_row *row, int64_t index, int64_t width, float *x)
{
    for (int64_t i = 0; i < width; i += 4 * VL) {
        vf factor[4];
        dropout_factors(row, (uint32_t)(index + i), factor);
        for (int k = 0; k < 4; k++) {
            int64_t at = i + k * VL, left = width - at;
            vf_store_left(x + at, vf_load_left(x + at, left) * factor[k], left);
        }
    }
}

#endif
