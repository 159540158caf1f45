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

/* Adding it leaves the nearest integer in the low bits. */
#define ROUND_BYTE 0x1.8p23f

#if defined(GD_AVX2)
/* The integers of four vectors to which ROUND_BYTE was added, brought into 0 .. 255. */
GD_INLINE void store_bytes(uint8_t *to, const vf *v)
{
#if defined(GD_AVX512)
    /* Lower halves of words: an integer as an int16. */
    static const uint16_t lower[2 * VL] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                           32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    const __m512i halves = _mm512_loadu_si512(lower), order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    const __m512i low = _mm512_permutex2var_epi16((__m512i)v[0], halves, (__m512i)v[1]),
        high = _mm512_permutex2var_epi16((__m512i)v[2], halves, (__m512i)v[3]);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi64(order, _mm512_packus_epi16(low, high)));
#else
    __m256i q[4];
    for (int i = 0; i < 4; i++)
        q[i] = (__m256i)((vi)v[i] - (vi)vf_set(ROUND_BYTE));
    const __m256i low = _mm256_packs_epi32(q[0], q[1]), high = _mm256_packs_epi32(q[2], q[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i *)to, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order));
#endif
}
#endif

/* q of `width` elements. Whole vectors of bytes are written. */
GD_INLINE void round_bytes(int64_t width, const float *x, float inverse, float zero, uint8_t *to)
{
    typedef uint8_t bytes __attribute__((vector_size(VL)));
    typedef uint8_t bytes_unaligned __attribute__((vector_size(VL), aligned(1), may_alias));
    const vf offset = vf_set(ROUND_BYTE + zero), least = vf_set(ROUND_BYTE), most = vf_set(ROUND_BYTE + 255.0f);
    int64_t c = 0;
#if defined(GD_AVX2)
    for (; c + 4 * VL <= width; c += 4 * VL) {
        vf v[4];
        for (int i = 0; i < 4; i++) {
            v[i] = vf_load(x + c + i * VL) * inverse;
            vf_opaque(v[i]); /* rounded here, with and without fused multiply-add */
            v[i] += offset;
        }
        store_bytes(to + c, v);
    }
#endif
    for (; c < width; c += VL) {
        vf v = vf_load_left(x + c, width - c) * inverse;
        vf_opaque(v);
        v = vf_min(most, vf_max(least, v + offset));
        *(bytes_unaligned *)(to + c) = __builtin_convertvector((vu)v & 0xff, bytes);
    }
}

/* The greatest and the least of a row's values and zero, lane by lane, by their bits: those of positive numbers grow
 * with them as signed integers, those of negative ones with their magnitudes as unsigned ones. NaN lies beyond
 * infinity. */
struct extremes {
    vi greatest;
    vu least;
};

GD_INLINE void extremes_add(struct extremes *e, vf v)
{
    e->greatest = vi_max(e->greatest, (vi)v);
    e->least = vu_max(e->least, (vu)v);
}

GD_INLINE struct gd_range extremes_range(struct extremes e)
{
    struct gd_range range;
    const int32_t greatest = vi_max_element(e.greatest);
    uint32_t least = vu_max_element(e.least);
    least = least >> 31 ? least : 0;
    memcpy(&range.greatest, &greatest, sizeof greatest);
    memcpy(&range.least, &least, sizeof least);
    return range;
}

/* Unsigned bytes q with x = scale (q - zero) within half a step: scale = (greatest - least) / 255, zero the byte that
 * stands for 0, which counts among the row's values. A row that holds NaN or infinity has the scale NaN. Behind each
 * chain of words stand -zero and -128 zero as int16, and the scale. */
static inline void round_int8_within(int64_t width, const float *x, struct gd_range within, float *words)
{
    const float range = within.greatest - within.least;
    /* The step of a smaller range would not be a normal number: such a row counts as zeros. */
    const int counts = range > 1e-30f && range < INFINITY;
    const float scale = counts ? range / 255.0f : range * 0.0f, inverse = counts ? 255.0f / range : 0.0f;
    const float zero = counts ? rintf(-within.least * inverse) : 0.0f;
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

static inline void round_int8(int64_t width, const float *x, float *words)
{
    struct extremes e = {{0}, {0}};
    for (int64_t c = 0; c < width; c += VL)
        extremes_add(&e, vf_load_left(x + c, width - c));
    round_int8_within(width, x, extremes_range(e), words);
}

#endif
