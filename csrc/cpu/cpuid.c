/*
 * cpuid.c - which instruction sets the processor has, the operating system saves, and the user allows:
 * GENDISTILLER_DISABLE_CPU="avx512,avx2" masks some (unknown names mean nothing). Read once a process.
 */
#include "kernels.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct gd_kernels best;
static char features[96] = "generic";

/* 1 where `name` is an entry of the comma-separated list. */
static int listed(const char *list, const char *name)
{
    size_t length = strlen(name);
    while (list != NULL && *list != '\0') {
        size_t entry = strcspn(list, ", ");
        if (entry == length && memcmp(list, name, length) == 0)
            return 1;
        list += entry;
        list += strspn(list, ", ");
    }
    return 0;
}

static int masked(const char *name)
{
    return listed(getenv("GENDISTILLER_DISABLE_CPU"), name);
}

/* 1, and a word of the features, where an instruction set is there and not masked. */
static int allowed(const char *name, int present)
{
    if (!present || masked(name))
        return 0;
    strncat(features, " ", sizeof features - strlen(features) - 1);
    strncat(features, name, sizeof features - strlen(features) - 1);
    return 1;
}

static int offer(const struct gd_kernels *kernels, int present)
{
    int taken = allowed(kernels->name, present);
    if (taken)
        best = *kernels;
    return taken;
}

/* An extension of a set, of no use without it. */
static void offer_products(const char *name, enum gd_precision precision, const struct gd_gemm_kernels *kernels,
                           int present)
{
    if (allowed(name, present))
        best.gemm[precision] = *kernels;
}

#if defined(__x86_64__) || defined(__i386__)

/* Register sets that the operating system saves at a context switch (XCR0). */
static unsigned saved_state(void)
{
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

/* 1 where the system lets this process have AMX's registers, which it gives only to those that ask
 * (Documentation/arch/x86/xstate.rst of Linux). */
static int amx_permitted(void)
{
#if defined(__x86_64__) && defined(__linux__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#else
    return 0;
#endif
}

static void detect(void)
{
    enum { SSE_AVX = 0x06, AVX512 = 0xe6, AMX = 0x60000, AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24, AMX_INT8 = 1 << 25 };
    unsigned a, b, c, d, leaf7, leaf7_c, leaf7_d, leaf7_1 = 0, state;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_AVX) || !(c & bit_FMA))
        return;
    state = saved_state();
    if (!__get_cpuid_count(7, 0, &a, &leaf7, &leaf7_c, &leaf7_d) || (state & SSE_AVX) != SSE_AVX || !(leaf7 & bit_AVX2))
        return;
    if (a >= 1)
        __get_cpuid_count(7, 1, &leaf7_1, &b, &c, &d);
    if (offer(&gd_kernels_avx2, 1))
        offer_products("avx_vnni", GD_INT8, &gd_int8_avx2, (leaf7_1 & bit_AVXVNNI) != 0);
    const unsigned wanted = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    if (offer(&gd_kernels_avx512, (state & AVX512) == AVX512 && (leaf7 & wanted) == wanted)) {
        const int vnni = (leaf7_c & bit_AVX512VNNI) != 0, bf16 = (leaf7_1 & bit_AVX512BF16) != 0;
        const int amx = vnni && bf16 && (state & AMX) == AMX && (leaf7_d & AMX_TILE) &&
                        !(masked("amx_int8") && masked("amx_bf16")) && amx_permitted();
        offer_products("avx512_vnni", GD_INT8, &gd_int8_avx512, vnni);
        offer_products("avx512_bf16", GD_BFLOAT16, &gd_bfloat16_avx512, bf16);
        offer_products("amx_int8", GD_INT8, &gd_int8_amx, amx && (leaf7_d & AMX_INT8));
        offer_products("amx_bf16", GD_BFLOAT16, &gd_bfloat16_amx, amx && (leaf7_d & AMX_BF16));
    }
}

#elif defined(__aarch64__)

static void detect(void)
{
    offer(&gd_kernels_neon, 1);
}

#else

static void detect(void)
{
}

#endif

static void select_best(void)
{
    best = gd_kernels_generic;
    detect();
}

const struct gd_kernels *gd_kernels_select(void)
{
    pthread_once(&once, select_best);
    return &best;
}

const char *gd_cpu_features(void)
{
    pthread_once(&once, select_best);
    return features;
}
