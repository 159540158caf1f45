/*
 * vec.h - one vector of float32 in the compiler's own vector types, so that a kernel is written once and
 * takes its instruction set from the file that it is compiled in (isa.h; GCC and Clang).
 *
 * a * b + c in one expression becomes a fused multiply-add where the target has one: the kernels are
 * compiled with -ffp-contract=fast. Everything here is static, and kernels are instantiated one file an
 * instruction set: see kernels_template.h.
 */
#ifndef GD_CPU_VEC_H
#define GD_CPU_VEC_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE__)
#include <immintrin.h>
#endif

#if defined(GD_AVX512)
#define VL 16
#elif defined(GD_AVX2)
#define VL 8
#else
#define VL 4
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef float vf_unaligned __attribute__((vector_size(VL * 4), aligned(4), may_alias));

/* float64: half as many lanes. */
#define VDL (VL / 2)
typedef double vd __attribute__((vector_size(VL * 4)));
typedef double vd_unaligned __attribute__((vector_size(VL * 4), aligned(8), may_alias));
typedef float vf_half __attribute__((vector_size(VL * 2), aligned(4), may_alias));

#define GD_INLINE static inline __attribute__((always_inline, unused))

GD_INLINE vf vf_load(const float *p) { return *(const vf_unaligned *)p; }
GD_INLINE void vf_store(float *p, vf v) { *(vf_unaligned *)p = v; }
GD_INLINE vf vf_set(float s) { return s - (vf){0}; }
GD_INLINE vd vd_load(const double *p) { return *(const vd_unaligned *)p; }
GD_INLINE void vd_store(double *p, vd v) { *(vd_unaligned *)p = v; }

/* VDL floats, widened. */
GD_INLINE vd vd_widen(const float *p)
{
#if defined(GD_AVX512)
    return (vd)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif defined(GD_AVX2)
    return (vd)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
    return __builtin_convertvector(*(const vf_half *)p, vd);
#endif
}

/* The first n < VL elements; the others are zero, and not stored. No memory past them is touched. */
GD_INLINE vf vf_load_n(const float *p, int n)
{
#if defined(GD_AVX512)
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
    vf v = {0};
    memcpy(&v, p, (size_t)n * sizeof *p);
    return v;
#endif
}

GD_INLINE void vf_store_n(float *p, vf v, int n)
{
#if defined(GD_AVX512)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
    memcpy(p, &v, (size_t)n * sizeof *p);
#endif
}

/* A vector of a row of which `left` elements are left: all of it, the first ones, or none. */
GD_INLINE vf vf_load_left(const float *p, int64_t left)
{
    return left >= VL ? vf_load(p) : left > 0 ? vf_load_n(p, (int)left) : (vf){0};
}

GD_INLINE void vf_store_left(float *p, vf v, int64_t left)
{
    if (left >= VL)
        vf_store(p, v);
    else if (left > 0)
        vf_store_n(p, v, (int)left);
}

/* v with zeros after its first `left` elements. */
GD_INLINE vf vf_keep_left(vf v, int64_t left)
{
    vf kept = {0};
    if (left >= VL)
        return v;
    if (left > 0)
        vf_store_n((float *)&kept, v, (int)left);
    return kept;
}

/* mask holds -1 (take a) or 0 (take b), as comparisons give it. */
GD_INLINE vf vf_select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

/* a > b ? a : b and a < b ? a : b, so that a NaN in either gives b. x86 has an instruction of just that
 * meaning, which GCC does not find from the comparison and selection. */
#if defined(GD_AVX512)
GD_INLINE vf vf_max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
GD_INLINE vf vf_min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
GD_INLINE vf vf_sqrt(vf a) { return (vf)_mm512_sqrt_ps((__m512)a); }
#elif defined(GD_AVX2)
GD_INLINE vf vf_max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
GD_INLINE vf vf_min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
GD_INLINE vf vf_sqrt(vf a) { return (vf)_mm256_sqrt_ps((__m256)a); }
#elif defined(__SSE__)
GD_INLINE vf vf_max(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
GD_INLINE vf vf_min(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
GD_INLINE vf vf_sqrt(vf a) { return (vf)_mm_sqrt_ps((__m128)a); }
#else
GD_INLINE vf vf_max(vf a, vf b) { return vf_select(a > b, a, b); }
GD_INLINE vf vf_min(vf a, vf b) { return vf_select(a < b, a, b); }
GD_INLINE vf vf_sqrt(vf a)
{
    for (int i = 0; i < VL; i++)
        a[i] = __builtin_sqrtf(a[i]);
    return a;
}
#endif

/* Of integers, signed and unsigned. */
#if defined(GD_AVX512)
GD_INLINE vi vi_max(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
GD_INLINE vu vu_max(vu a, vu b) { return (vu)_mm512_max_epu32((__m512i)a, (__m512i)b); }
#elif defined(GD_AVX2)
GD_INLINE vi vi_max(vi a, vi b) { return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b); }
GD_INLINE vu vu_max(vu a, vu b) { return (vu)_mm256_max_epu32((__m256i)a, (__m256i)b); }
#else
GD_INLINE vi vi_max(vi a, vi b) { return (vi)vf_select(a > b, (vf)a, (vf)b); }
GD_INLINE vu vu_max(vu a, vu b) { return (vu)vf_select((vi)(a > b), (vf)a, (vf)b); }
#endif
GD_INLINE vf vf_abs(vf a) { return (vf)((vi)a & 0x7fffffff); }

/* Keeps the compiler from looking through v's value, such as from fusing the product that it is with a sum. */
#if defined(__SSE__)
#define vf_opaque(v) __asm__("" : "+v"(v))
#elif defined(__aarch64__)
#define vf_opaque(v) __asm__("" : "+w"(v))
#else
#define vf_opaque(v) __asm__("" : "+m"(v))
#endif

/* Sum in a fixed tree, the same for a vector length whatever calls it. */
GD_INLINE float vf_sum(vf v)
{
    typedef float quarter __attribute__((vector_size(16)));
    quarter q[VL / 4];
    memcpy(q, &v, sizeof v);
    for (int width = VL / 8; width > 0; width /= 2)
        for (int i = 0; i < width; i++)
            q[i] += q[i + width];
    return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
}

GD_INLINE double vd_sum(vd v)
{
    double s = v[0];
    for (int i = 1; i < VDL; i++)
        s += v[i];
    return s;
}

GD_INLINE float vf_max_element(vf v)
{
#if defined(GD_AVX512)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float s[VL], m;
    vf_store(s, v);
    m = s[0];
    for (int i = 1; i < VL; i++)
        m = s[i] > m ? s[i] : m;
    return m;
#endif
}

GD_INLINE int32_t vi_max_element(vi v)
{
#if defined(GD_AVX512)
    return _mm512_reduce_max_epi32((__m512i)v);
#else
    int32_t m = v[0];
    for (int i = 1; i < VL; i++)
        m = v[i] > m ? v[i] : m;
    return m;
#endif
}

GD_INLINE uint32_t vu_max_element(vu v)
{
    return (uint32_t)vi_max_element((vi)(v ^ 0x80000000)) ^ 0x80000000;
}

#endif
