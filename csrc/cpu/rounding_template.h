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

/* Unsigned bytes q with x = scale (q - zero) within half a step: scale = (largest - smallest) / 255, zero the byte that
 * stands for 0, which counts among the row's values. A row that holds NaN or infinity has the scale NaN. Behind each
 * chain of words stand -zero and -128 zero as int16, and the scale. */
static inline void round_int8(int64_t width, const float *x, float *words)
{
    typedef uint8_t bytes __attribute__((vector_size(VL)));
    typedef uint8_t bytes_unaligned __attribute__((vector_size(VL), aligned(1), may_alias));
    const float round = 0x1.8p23f; /* adding it leaves the nearest integer in the low bits */
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
    const float zero = step < INFINITY ? rintf(-smallest * inverse) : 0.0f, scale = step + vf_sum(unfinite[0] + unfinite[1]);
    const int16_t zeros[2] = {(int16_t)-zero, (int16_t)(-128 * zero)};
    const vf offset = vf_set(round + zero), least = vf_set(round), most = vf_set(round + 255.0f);
    for (int64_t chain = 0; chain < width; chain += 4 * GEMM_CHAIN) {
        const int64_t end = chain + 4 * GEMM_CHAIN < width ? chain + 4 * GEMM_CHAIN : width;
        for (int64_t c = chain; c < end; c += VL, words += VL / 4) {
            vf v = vf_load_left(x + c, width - c) * inverse;
            vf_opaque(v); /* rounded here, with and without fused multiply-add */
            v = vf_min(most, vf_max(least, v + offset));
            *(bytes_unaligned *)words = __builtin_convertvector((vu)v & 0xff, bytes);
        }
        words -= ((end - chain + VL - 1) / VL * VL - (end - chain)) / 4; /* whole vectors of bytes were written */
        memcpy(words, zeros, sizeof zeros);
        words[1] = scale;
        words += 2;
    }
}

#endif
