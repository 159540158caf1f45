/*
 * peak.c - see peak.h. The loops' sums are independent and as many as hide the latency of an addition.
 */
#include "peak.h"

#include <string.h>
#include <time.h>

#define SUMS 12
#define ROUNDS 200000

#define PEAK_LOOP(name, bytes, target) \
    target static float name(float a) \
    { \
        typedef float vector __attribute__((vector_size(bytes))); \
        vector x = a - (vector){0}, y = 1 - x, sum[SUMS]; \
        for (int i = 0; i < SUMS; i++) \
            sum[i] = x * (float)i; \
        for (int r = 0; r < ROUNDS; r++) \
            _Pragma("GCC unroll 12") for (int i = 0; i < SUMS; i++) sum[i] = sum[i] * x + y; \
        for (int i = 1; i < SUMS; i++) \
            sum[0] += sum[i]; \
        return sum[0][0]; \
    }

#if defined(__x86_64__)
PEAK_LOOP(loop_avx512, 64, __attribute__((target("avx512f,fma"))))
PEAK_LOOP(loop_avx2, 32, __attribute__((target("avx2,fma"))))
#endif
PEAK_LOOP(loop_baseline, 16, )

#if defined(__x86_64__)
/* Without an intrinsic's types, which keep GCC from leaving the sums in registers. */
#define DOT_LOOP(name, feature, instruction) \
    __attribute__((target("avx512f," feature))) static float name(float a) \
    { \
        typedef float vector __attribute__((vector_size(64))); \
        vector x = a - (vector){0}, sum[SUMS]; \
        for (int i = 0; i < SUMS; i++) \
            sum[i] = x * (float)i; \
        for (int r = 0; r < ROUNDS; r++) \
            _Pragma("GCC unroll 12") for (int i = 0; i < SUMS; i++) \
                __asm__ volatile(instruction " %1, %1, %0" : "+v"(sum[i]) : "v"(x)); \
        for (int i = 1; i < SUMS; i++) \
            sum[0] += sum[i]; \
        return sum[0][0]; \
    }

DOT_LOOP(loop_bfloat16, "avx512bf16", "vdpbf16ps")
DOT_LOOP(loop_int8, "avx512vnni", "vpdpbusd")
#endif

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

double peak_flops(enum gd_precision precision)
{
    float (*loop)(float) = loop_baseline;
    int lanes = 4;
#if defined(__x86_64__)
    if (strstr(gd_cpu_features(), "avx512") != NULL) {
        loop = loop_avx512;
        lanes = 16;
    } else if (strstr(gd_cpu_features(), "avx2") != NULL) {
        loop = loop_avx2;
        lanes = 8;
    }
#endif
#if defined(__x86_64__)
    if (precision == GD_BFLOAT16 && strstr(gd_cpu_features(), "avx512_bf16") != NULL) {
        loop = loop_bfloat16;
        lanes = 32;
    } else if (precision == GD_INT8 && strstr(gd_cpu_features(), "avx512_vnni") != NULL) {
        loop = loop_int8;
        lanes = 64;
    }
#endif
    (void)precision;
    double best = 0;
    volatile float start = 0.5f, sink;
    for (int i = 0; i < 40; i++) {
        double before = seconds();
        sink = loop(start);
        double flops = 2.0 * lanes * SUMS * ROUNDS / (seconds() - before);
        best = flops > best ? flops : best;
    }
    (void)sink;
    return best;
}
