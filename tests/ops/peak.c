/*
 * peak.c - see peak.h. The loops are the benchmarks'.
 */
#include "peak.h"

#include <time.h>

#include "../../benchmarks/peak.c"

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

double peak_flops(const char *precision)
{
    enum { ROUNDS = 200000 };
    double best = 0;
    for (int i = 0; i < 40; i++) {
        const double before = seconds(), done = peak_run(precision, gd_cpu_features(), ROUNDS);
        const double flops = done / (seconds() - before);
        best = flops > best ? flops : best;
    }
    return best > 0 ? best : peak_flops("float32");
}
