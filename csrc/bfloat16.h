/*
 * bfloat16.h - conversions between float32 and the 16-bit formats of a checkpoint, by bits.
 *
 * bfloat16 is the upper half of a float32: 1 sign, 8 exponent and 7 mantissa bits. float16 is IEEE
 * 754 binary16: 1, 5 and 10. Widening is exact; NaNs keep their sign and the bits of their payload
 * that fit.
 */
#ifndef GD_BFLOAT16_H
#define GD_BFLOAT16_H

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define GD_BFLOAT16_INLINE static __host__ __device__ __forceinline__
#else
#define GD_BFLOAT16_INLINE static inline
#endif

GD_BFLOAT16_INLINE float gd_float_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

GD_BFLOAT16_INLINE uint32_t gd_bits_from_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

GD_BFLOAT16_INLINE float gd_float_from_bfloat16(uint16_t bits)
{
    return gd_float_from_bits((uint32_t)bits << 16);
}

/* Rounds to nearest, ties to even; beyond the largest finite value to infinity. */
GD_BFLOAT16_INLINE uint16_t gd_bfloat16_from_float(float value)
{
    uint32_t bits = gd_bits_from_float(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    /* A NaN's payload may lie in the lower half alone: the quiet bit keeps it a NaN. */
    uint32_t nan = bits >> 16 | 0x40;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

GD_BFLOAT16_INLINE float gd_float_from_float16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) /* infinity, NaN */
        return gd_float_from_bits(sign | 0x7f800000 | magnitude << 13);
    /* With the exponent field read as float32's, the value is 2^112 times too small: subnormals
     * included, the product is exact. */
    float value = gd_float_from_bits(magnitude << 13) * 0x1p112f;
    return gd_float_from_bits(sign | gd_bits_from_float(value));
}

#endif
