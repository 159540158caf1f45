/*
 * rounding_template.h - rows of a product's left factor in the precision that it is multiplied in.
 *
 * An element's result depends on its row alone.
 */
#ifndef GD_CPU_ROUNDING_TEMPLATE_H
#define GD_CPU_ROUNDING_TEMPLATE_H

#include <math.h>

#include "kernels.h"
#include "vec.h"

/* float32 to the nearest bfloat16, ties to even, as the upper half of a word. NaN stays NaN. */
GD_INLINE vu bfloat16_word(vf x)
{
    const vu bits = (vu)x, rounded = bits + 0x7fff + (bits >> 16 & 1), nan = bits | 0x400000;
    const vu is_nan = (vu)(x != x);
    return ((rounded & ~is_nan) | (nan & is_nan)) & 0xffff0000;
}

/* For tiles without bfloat16 instructions: float32 words whose values are bfloat16's. */
static inline void round_bfloat16(int64_t width, const float *x, float *words)
{
    for (int64_t c = 0; c < width; c += VL)
        vf_store_left(words + c, (vf)bfloat16_word(vf_load_left(x + c, width - c)), width - c);
}

#if defined(__AVX2__)
/* The integers of four vectors, brought into 0 .. 255. */
GD_INLINE void store_bytes(uint8_t *to, const vi *v)
{
#if defined(__AVX512BW__)
    const __m512i low = _mm512_packs_epi32((__m512i)v[0], (__m512i)v[1]),
        high = _mm512_packs_epi32((__m512i)v[2], (__m512i)v[3]);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
#else
    const __m256i low = _mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]),
        high = _mm256_packs_epi32((__m256i)v[2], (__m256i)v[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i *)to, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order));
#endif
}
#endif

/* q of `width` elements: adding 1.5 2^23 leaves the nearest integer in the low bits. Whole vectors of bytes are
 * written. */
GD_INLINE void round_bytes(int64_t width, const float *x, float inverse, float zero, uint8_t *to)
{
    typedef uint8_t bytes __attribute__((vector_size(VL)));
    typedef uint8_t bytes_unaligned __attribute__((vector_size(VL), aligned(1), may_alias));
    const float round = 0x1.8p23f;
    const vf offset = vf_set(round + zero), least = vf_set(round), most = vf_set(round + 255.0f);
    int64_t c = 0;
#if defined(__AVX2__)
    for (; c + 4 * VL <= width; c += 4 * VL) {
        vi q[4];
        for (int i = 0; i < 4; i++) {
            vf v = vf_load(x + c + i * VL) * inverse;
            vf_opaque(v); /* rounded here, with and without fused multiply-add */
            q[i] = (vi)(v + offset) - (vi)least;
        }
        store_bytes(to + c, q);
    }
#endif
    for (; c < width; c += VL) {
        vf v = vf_load_left(x + c, width - c) * inverse;
        vf_opaque(v);
        v = vf_min(most, vf_max(least, v + offset));
        *(bytes_unaligned *)(to + c) = __builtin_convertvector((vu)v & 0xff, bytes);
    }
}

/* Unsigned bytes q with x = scale (q - zero) within half a step: scale = (largest - smallest) / 255, zero the byte that
 * stands for 0, which counts among the row's values. A row that holds NaN or infinity has the scale NaN. Behind each
 * chain of words stand -zero and -128 zero as int16, and the scale. */
static inline void round_int8(int64_t width, const float *x, float *words)
{
    vf low[2] = {{0}}, high[2] = {{0}}, unfinite[2] = {{0}};
    for (int64_t c = 0; c < width; c += 2 * VL)
        for (int i = 0; i < 2; i++) {
            const vf v = vf_load_left(x + c + i * VL, width - c - i * VL);
            low[i] = vf_min(low[i], v);
            high[i] = vf_max(high[i], v);
            unfinite[i] += v * 0.0f;
        }
    const float smallest = -vf_max_element(-vf_min(low[0], low[1]));
    const float range = vf_max_element(vf_max(high[0], high[1])) - smallest;
    /* The step of a smaller range would not be a normal number: such a row counts as zeros. */
    const float step = range > 1e-30f ? range / 255.0f : 0.0f, inverse = range > 1e-30f ? 255.0f / range : 0.0f;
    const float zero = step < INFINITY ? rintf(-smallest * inverse) : 0.0f,
        scale = step + vf_sum(unfinite[0] + unfinite[1]);
    const int16_t zeros[2] = {(int16_t)-zero, (int16_t)(-128 * zero)};
    for (int64_t left = width; left > 0; left -= 4 * GEMM_CHAIN, x += 4 * GEMM_CHAIN) {
        const int64_t chain = left < 4 * GEMM_CHAIN ? left : 4 * GEMM_CHAIN;
        round_bytes(chain, x, inverse, zero, (uint8_t *)words);
        words += (chain + 3) / 4;
        memcpy(words, zeros, sizeof zeros);
        words[1] = scale;
        words += GEMM_INT8_WORDS;
    }
}

#endif
