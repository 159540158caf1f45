/*
 * gemm_tile_template.h - the register tile of a matrix product, in every precision.
 *
 * Both factors are 32-bit words that follow one another along K: a float32, two bfloat16, or four int8. A sum is a
 * float32, of int8 factors an int32. So the tile differs by one instruction from precision to precision; a file of an
 * instruction set that has a better one instantiates the tile anew, and nothing else.
 *
 * With int8, x = scale (q - zero) in a row of A. Behind a chain's words stand in A the row's zero and scale
 * (rounding_template.h), in B the sums of its columns (reduced.c). One more step along K takes zero times
 * those from the integer sums, which are exact; the tile is scale times what they are then.
 */
#ifndef GD_CPU_GEMM_TILE_TEMPLATE_H
#define GD_CPU_GEMM_TILE_TEMPLATE_H

#include "kernels.h"
#include "vec.h"

/* Registers: MR * NV sums, NV of B, one of A; on AArch64 one a row, since the compiler loads them all first. */
#if VL == 16
#define GEMM_MR 12
#elif defined(__aarch64__)
#define GEMM_MR 8
#elif VL == 8
#define GEMM_MR 6
#else
#define GEMM_MR 4
#endif
#define GEMM_NV 2
#define GEMM_NR (GEMM_NV * VL)
#define GEMM_KC GEMM_CHAIN
/* Floats of a packed panel that are fetched ahead of their use: a chain's first tile finds them in the second or third
 * cache, which the processor by itself reads too late. */
#define GEMM_AHEAD 1024

typedef float gemm_word __attribute__((may_alias));

/* sum + a[0] b[0] + .. + a[3] b[3] of each word's unsigned bytes a and signed bytes b, exact in int32. */
GD_INLINE vi gemm_dot4(vi sum, vi a, vi b)
{
#if defined(__SSE2__)
    /* Bytes 0 and 2, then 1 and 3, as pairs of int16: two of their products cannot overflow an int32. */
    typedef int16_t vs __attribute__((vector_size(VL * 4)));
    const vi a_even = a & 0x00ff00ff, a_odd = (vi)((vu)a >> 8) & 0x00ff00ff;
    const vs b_even = (vs)((vs)b << 8) >> 8, b_odd = (vs)b >> 8;
#if defined(GD_AVX512)
    return sum + (vi)_mm512_madd_epi16((__m512i)a_even, (__m512i)b_even) +
           (vi)_mm512_madd_epi16((__m512i)a_odd, (__m512i)b_odd);
#elif defined(GD_AVX2)
    return sum + (vi)_mm256_madd_epi16((__m256i)a_even, (__m256i)b_even) +
           (vi)_mm256_madd_epi16((__m256i)a_odd, (__m256i)b_odd);
#else
    return sum + (vi)_mm_madd_epi16((__m128i)a_even, (__m128i)b_even) +
           (vi)_mm_madd_epi16((__m128i)a_odd, (__m128i)b_odd);
#endif
#else
    sum += (a & 0xff) * (b << 24 >> 24);
    sum += (a >> 8 & 0xff) * (b << 16 >> 24);
    sum += (a >> 16 & 0xff) * (b << 8 >> 24);
    sum += (vi)((vu)a >> 24) * (b >> 24);
    return sum;
#endif
}

/* sum + a[0] b[0] + a[1] b[1] of each word's int16, exact in int32. */
GD_INLINE vi gemm_dot2(vi sum, vi a, vi b)
{
#if defined(GD_AVX512)
    return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(GD_AVX2)
    return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return sum + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

/* One step along K. Without an instruction for bfloat16 its products are float32's, of rounded factors. */
GD_INLINE vf gemm_multiply_add(const enum gd_precision precision, vf sum, vf a, vf b)
{
    if (precision == GD_INT8) {
#if defined(GD_AVX512_VNNI) || defined(GD_AVX_VNNI)
        /* As an intrinsic, on integers, it makes GCC keep every sum twice. {vex}: not AVX-512's encoding. */
#if !defined(GD_AVX512_VNNI)
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#endif
        return sum;
#else
        return (vf)gemm_dot4((vi)sum, (vi)a, (vi)b);
#endif
    }
#if defined(GD_AVX512_BF16)
    if (precision == GD_BFLOAT16)
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
    return sum + a * b;
}

/* Integer sums less zero times the columns' sums. */
GD_INLINE vf gemm_subtract_zero(vf sum, vf zero, vf column_sums)
{
#if defined(GD_AVX512_VNNI)
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(zero), "v"(column_sums));
    return sum;
#elif defined(GD_AVX_VNNI)
    __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(zero), "x"(column_sums));
    return sum;
#else
    return (vf)gemm_dot2((vi)sum, (vi)zero, (vi)column_sums);
#endif
}

/* Integer sums as float32: scale (q - zero) for each q of the left factor. */
GD_INLINE vf gemm_scale_sum(vf sum, vf zero, vf scale, vf column_sums)
{
    vf scaled = __builtin_convertvector((vi)gemm_subtract_zero(sum, zero, column_sums), vf) * scale;
    vf_opaque(scaled); /* rounded here, in every tile */
    return scaled;
}

/* A gd_gemm_tile (kernels.h) where a[r, p] = a[r * a_row + p * a_col]. */
GD_INLINE void gemm_tile(const enum gd_precision precision, const int mr, const int nv, int64_t k, const float *a,
                         int64_t a_row, int64_t a_col, const float *b, int64_t b_row, float *t, int add)
{
    /* Every third row has its pointer, and the two after it follow by one stride and by two, which are operands
     * that x86 can address. Left to itself the compiler keeps a stride for each row, in more registers than
     * there are: hence the asm, which hides where the pointers come from. */
    const gemm_word *rows[(GEMM_MR + 2) / 3];
    vf sum[GEMM_MR][GEMM_NV];
#pragma GCC unroll 16
    for (int r = 0; r < mr; r++) {
        if (r % 3 == 0) {
            rows[r / 3] = a + r * a_row;
            __asm__("" : "+r"(rows[r / 3]));
        }
#pragma GCC unroll 2
        for (int v = 0; v < nv; v++)
            sum[r][v] = (vf){0};
    }
    for (int64_t p = 0; p < k; p++, b += b_row) {
        vf column[GEMM_NV];
#pragma GCC unroll 2
        for (int v = 0; v < nv; v++) {
            column[v] = vf_load(b + v * VL);
            __builtin_prefetch(b + v * VL + GEMM_AHEAD);
        }
#pragma GCC unroll 16
        for (int r = 0; r < mr; r++) {
            vf row = vf_set(rows[r / 3][r % 3 * a_row]);
#pragma GCC unroll 2
            for (int v = 0; v < nv; v++)
                sum[r][v] = gemm_multiply_add(precision, sum[r][v], row, column[v]);
            if (r % 3 == 2 || r == mr - 1)
                rows[r / 3] += a_col;
        }
    }
    if (precision == GD_INT8) {
        vf column[GEMM_NV];
#pragma GCC unroll 2
        for (int v = 0; v < nv; v++)
            column[v] = vf_load(b + v * VL);
#pragma GCC unroll 16
        for (int r = 0; r < mr; r++) {
            const gemm_word *row = rows[r / 3] + r % 3 * a_row;
            const vf zero = vf_set(row[0]), scale = vf_set(row[1]);
#pragma GCC unroll 2
            for (int v = 0; v < nv; v++)
                sum[r][v] = gemm_scale_sum(sum[r][v], zero, scale, column[v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 2
        for (int v = 0; v < nv; v++) {
            float *to = t + r * GEMM_NR + v * VL;
            vf_store(to, add ? vf_load(to) + sum[r][v] : sum[r][v]);
        }
}

typedef void gemm_sized_tile(int64_t k, const float *a, int64_t a_row, const float *b, int64_t b_row, float *t,
                             int add);

/* Functions of their own, so that nothing around them competes for registers. */
#define GEMM_TILE(name, precision, mr, nv) \
    static __attribute__((noinline)) void name##_##mr##_##nv(int64_t k, const float *a, int64_t a_row, const float *b, \
                                                             int64_t b_row, float *t, int add) \
    { \
        gemm_tile(precision, mr, nv, k, a, a_row, 1, b, b_row, t, add); \
    }
#define GEMM_TILES_OF_ROWS(name, precision, mr) GEMM_TILE(name, precision, mr, 1) GEMM_TILE(name, precision, mr, 2)
#define GEMM_TILE_NAMES(name, mr) {name##_##mr##_1, name##_##mr##_2}

#define GEMM_TILES_4(name, precision) \
    GEMM_TILES_OF_ROWS(name, precision, 1) \
    GEMM_TILES_OF_ROWS(name, precision, 2) \
    GEMM_TILES_OF_ROWS(name, precision, 3) \
    GEMM_TILES_OF_ROWS(name, precision, 4)
#define GEMM_NAMES_4(name) \
    GEMM_TILE_NAMES(name, 1), GEMM_TILE_NAMES(name, 2), GEMM_TILE_NAMES(name, 3), GEMM_TILE_NAMES(name, 4)
#define GEMM_TILES_6(name, precision) \
    GEMM_TILES_4(name, precision) GEMM_TILES_OF_ROWS(name, precision, 5) GEMM_TILES_OF_ROWS(name, precision, 6)
#define GEMM_NAMES_6(name) GEMM_NAMES_4(name), GEMM_TILE_NAMES(name, 5), GEMM_TILE_NAMES(name, 6)
#define GEMM_TILES_8(name, precision) \
    GEMM_TILES_6(name, precision) GEMM_TILES_OF_ROWS(name, precision, 7) GEMM_TILES_OF_ROWS(name, precision, 8)
#define GEMM_NAMES_8(name) GEMM_NAMES_6(name), GEMM_TILE_NAMES(name, 7), GEMM_TILE_NAMES(name, 8)
#define GEMM_TILES_12(name, precision) \
    GEMM_TILES_8(name, precision) \
    GEMM_TILES_OF_ROWS(name, precision, 9) \
    GEMM_TILES_OF_ROWS(name, precision, 10) \
    GEMM_TILES_OF_ROWS(name, precision, 11) \
    GEMM_TILES_OF_ROWS(name, precision, 12)
#define GEMM_NAMES_12(name) \
    GEMM_NAMES_8(name), GEMM_TILE_NAMES(name, 9), GEMM_TILE_NAMES(name, 10), GEMM_TILE_NAMES(name, 11), \
        GEMM_TILE_NAMES(name, 12)

#define GEMM_PASTE_(a, b) a##b
#define GEMM_PASTE(a, b) GEMM_PASTE_(a, b)

/* name: a gd_gemm_tile of one precision. */
#define GEMM_TILES(name, precision) \
    GEMM_PASTE(GEMM_TILES_, GEMM_MR)(name, precision) \
    static void name(int rows, int vectors, int64_t k, const float *a, int64_t a_row, const float *b, int64_t b_row, \
                     float *t, int add) \
    { \
        static gemm_sized_tile *const tiles[GEMM_MR][GEMM_NV] = {GEMM_PASTE(GEMM_NAMES_, GEMM_MR)(name)}; \
        tiles[rows - 1][vectors - 1](k, a, a_row, b, b_row, t, add); \
    }

/* The same of GEMM_MR rows of a left factor that is packed by columns. */
#define GEMM_PACKED_TILE(name, precision) \
    static __attribute__((noinline)) void name(int rows, int vectors, int64_t k, const float *a, int64_t a_row, \
                                               const float *b, int64_t b_row, float *t, int add) \
    { \
        (void)rows; \
        (void)a_row; \
        if (vectors == 1) \
            gemm_tile(precision, GEMM_MR, 1, k, a, 1, GEMM_MR, b, b_row, t, add); \
        else \
            gemm_tile(precision, GEMM_MR, 2, k, a, 1, GEMM_MR, b, b_row, t, add); \
    }

#endif
