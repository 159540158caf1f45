/*
 * peak.c - what this machine's cores could do at most: multiply-adds on registers alone, no memory touched.
 *
 * Each loop runs as many independent sums as hide the latency of one, and returns the operations that it did:
 * two a multiply-add. speed.py compiles it for itself and calls it from several threads at once; tests/ops includes
 * it.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define SUMS 12
#define UNROLL _Pragma("GCC unroll 12")

/* Keeps a loop whose result nobody wants. */
#define USE(sum) __asm__ volatile("" : : "m"(sum))

#define FLOAT_LOOP(name, bytes, target) \
    target static double name(int64_t rounds) \
    { \
        typedef float vector __attribute__((vector_size(bytes))); \
        volatile float half = 0.5f; \
        vector x = half - (vector){0}, y = 1 - x, sum[SUMS]; \
        for (int i = 0; i < SUMS; i++) \
            sum[i] = x * (float)i; \
        for (int64_t r = 0; r < rounds; r++) \
            UNROLL for (int i = 0; i < SUMS; i++) sum[i] = sum[i] * x + y; \
        USE(sum); \
        return 2.0 * (bytes / 4) * SUMS * (double)rounds; \
    }

FLOAT_LOOP(float32_baseline, 16, )

#if defined(__x86_64__)
#include <immintrin.h>

FLOAT_LOOP(float32_avx2, 32, __attribute__((target("avx2,fma"))))
FLOAT_LOOP(float32_avx512, 64, __attribute__((target("avx512f,fma"))))

__attribute__((target("avx512f,avx512bf16"))) static double bfloat16_avx512(int64_t rounds)
{
    __m512 sum[SUMS];
    volatile float half = 0.5f;
    __m512bh x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(half), _mm512_set1_ps(half));
    for (int i = 0; i < SUMS; i++)
        sum[i] = _mm512_set1_ps((float)i);
    for (int64_t r = 0; r < rounds; r++)
        UNROLL for (int i = 0; i < SUMS; i++) sum[i] = _mm512_dpbf16_ps(sum[i], x, x);
    USE(sum);
    return 2.0 * 32 * SUMS * (double)rounds;
}

__attribute__((target("avx512f,avx512vnni"))) static double int8_avx512(int64_t rounds)
{
    __m512i sum[SUMS];
    volatile int one = 0x01010101;
    __m512i x = _mm512_set1_epi32(one);
    for (int i = 0; i < SUMS; i++)
        sum[i] = _mm512_set1_epi32(i);
    for (int64_t r = 0; r < rounds; r++)
        UNROLL for (int i = 0; i < SUMS; i++) sum[i] = _mm512_dpbusd_epi32(sum[i], x, x);
    USE(sum);
    return 2.0 * 64 * SUMS * (double)rounds;
}

#if defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { AMX_BF16 = 1 << 22, AMX_INT8 = 1 << 25 }; /* CPUID 7, EDX */

/* 1 where the processor has that extension, or `features` says so, and the system lets this process use it. */
static int amx_permitted(const char *features, const char *name, unsigned extension)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
    unsigned a, b, c, d = 0;
    const int there = features != NULL ? strstr(features, name) != NULL
                                       : __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & extension) != 0;
    return there && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}

/* Four sums of 16 x 16, of 16 words each, whose elements are so many. */
#define AMX_LOOP(name, elements, instruction, extension) \
    __attribute__((target("amx-tile," extension))) static double name(int64_t rounds) \
    { \
        struct { \
            uint8_t palette, start_row, reserved[14]; \
            uint16_t row_bytes[16]; \
            uint8_t rows[16]; \
        } config = {.palette = 1}; \
        for (int i = 0; i < 8; i++) { \
            config.row_bytes[i] = 64; \
            config.rows[i] = 16; \
        } \
        USE(config); \
        _tile_loadconfig(&config); \
        for (int64_t r = 0; r < rounds; r++) { \
            instruction(0, 4, 6); \
            instruction(1, 4, 7); \
            instruction(2, 5, 6); \
            instruction(3, 5, 7); \
        } \
        _tile_release(); \
        return 2.0 * 4 * 16 * 16 * 16 * (elements) * (double)rounds; \
    }

AMX_LOOP(bfloat16_amx, 2, _tile_dpbf16ps, "amx-bf16")
AMX_LOOP(int8_amx, 4, _tile_dpbusd, "amx-int8")
#endif
#endif

#if defined(__x86_64__)
/* __builtin_cpu_supports() takes a literal. */
#define HAS(features, name, builtin) \
    ((features) != NULL ? strstr(features, name) != NULL : __builtin_cpu_supports(builtin) != 0)
#endif

/* Operations done in `rounds` rounds; 0 where there is no instruction for that precision. features: those to use, as
 * gd_cpu_features() names them; NULL: what the processor has. */
double peak_run(const char *precision, const char *features, int64_t rounds)
{
#if defined(__x86_64__)
    if (strcmp(precision, "float32") == 0 && HAS(features, "avx512", "avx512f"))
        return float32_avx512(rounds);
    if (strcmp(precision, "float32") == 0 && HAS(features, "avx2", "avx2") && __builtin_cpu_supports("fma"))
        return float32_avx2(rounds);
#if defined(__linux__)
    if (strcmp(precision, "bfloat16") == 0 && amx_permitted(features, "amx_bf16", AMX_BF16))
        return bfloat16_amx(rounds);
    if (strcmp(precision, "int8") == 0 && amx_permitted(features, "amx_int8", AMX_INT8))
        return int8_amx(rounds);
#endif
    if (strcmp(precision, "bfloat16") == 0 && HAS(features, "avx512_bf16", "avx512bf16"))
        return bfloat16_avx512(rounds);
    if (strcmp(precision, "int8") == 0 && HAS(features, "avx512_vnni", "avx512vnni"))
        return int8_avx512(rounds);
#endif
    (void)features;
    return strcmp(precision, "float32") == 0 ? float32_baseline(rounds) : 0;
}
