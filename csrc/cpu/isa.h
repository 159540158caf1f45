/*
 * isa.h - the instruction sets that files are compiled for beyond the platform's own: each once.
 *
 * Such a file defines one of the names GD_ISA_... below, includes this before anything else, and is written between
 *
 *     #if defined(GD_TARGET)
 *     GD_ISA_BEGIN
 *     ...
 *     GD_ISA_END
 *     #endif
 *
 * All other files are compiled for what every processor of the platform has, and so are all files by the same flags:
 * what a processor has beyond it is asked when the program runs (cpuid.c).
 */
#ifndef GD_CPU_ISA_H
#define GD_CPU_ISA_H

#if defined(__x86_64__) || defined(__i386__)
/* Before GD_ISA_BEGIN: intrinsics have targets of their own. */
#include <immintrin.h>

#if defined(GD_ISA_AVX2)
#define GD_TARGET "avx2,fma"
#define GD_AVX2 1
#elif defined(GD_ISA_AVX_VNNI)
#define GD_TARGET "avx2,fma,avxvnni"
#define GD_AVX2 1
#define GD_AVX_VNNI 1
#elif defined(GD_ISA_AVX512)
#define GD_TARGET "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"
#define GD_AVX2 1
#define GD_AVX512 1
#elif defined(GD_ISA_AVX512_VNNI)
#define GD_TARGET "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#define GD_AVX2 1
#define GD_AVX512 1
#define GD_AVX512_VNNI 1
#elif defined(GD_ISA_AVX512_BF16)
#define GD_TARGET "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#define GD_AVX2 1
#define GD_AVX512 1
#define GD_AVX512_BF16 1
#elif defined(GD_ISA_AMX)
#define GD_TARGET "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8"
#define GD_AVX2 1
#define GD_AVX512 1
#define GD_AVX512_VNNI 1
#define GD_AVX512_BF16 1
#endif
#elif defined(__aarch64__) && defined(GD_ISA_NEON)
#define GD_TARGET "" /* vectors of four and fused multiply-add are always there */
#endif

#define GD_PRAGMA_TEXT(...) _Pragma(#__VA_ARGS__)
#define GD_PRAGMA(...) GD_PRAGMA_TEXT(__VA_ARGS__)

#if defined(GD_ISA_NEON)
#define GD_ISA_BEGIN
#define GD_ISA_END
#elif defined(__clang__)
#define GD_ISA_BEGIN GD_PRAGMA(clang attribute push(__attribute__((target(GD_TARGET))), apply_to = function))
#define GD_ISA_END GD_PRAGMA(clang attribute pop)
#else
#define GD_ISA_BEGIN GD_PRAGMA(GCC push_options) GD_PRAGMA(GCC target(GD_TARGET))
#define GD_ISA_END GD_PRAGMA(GCC pop_options)
#endif

#endif
