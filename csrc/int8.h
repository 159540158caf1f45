/*
 * int8.h - weights as int8, symmetric, a scale for each output channel: w is near scale q, |q| <= 127.
 *
 * A scale has 16 significant bits, so all its multiples up to 127 are float32 numbers: weights that were rounded once
 * have the same scale and integers when they are rounded again.
 */
#ifndef GD_INT8_H
#define GD_INT8_H

#include "bfloat16.h"

/* Of weights of magnitude `largest` at most: largest / 127 or up to 2^-15 of it more; 0 where it is no normal number
 * or so near that its multiples might not be. */
static inline float gd_int8_scale(float largest)
{
    float scale = largest / 127;
    return scale >= 0x1p-100f ? gd_float_from_bits((gd_bits_from_float(scale) + 0xff) & ~(uint32_t)0xff) : 0;
}

/* inverse: 1 / scale, or 0 with it. */
static inline int8_t gd_int8_from_float(float w, float inverse)
{
    const float round = 0x1.8p23f; /* adding it leaves the nearest integer in the low bits */
    float shifted = w * inverse;
    shifted += round;
    return (int8_t)(gd_bits_from_float(shifted) & 0xff);
}

#endif
