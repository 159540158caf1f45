/*
 * weights.c - pos_conv's weight norm and its backward.
 */
#include "ops.h"

#include <math.h>

struct weight_norm_job {
    int64_t rows, kernel; /* v as (rows, kernel) */
    const float *g, *v, *dw;
    float *w, *dg, *dv;
};

/* Taps of a task: one cache line of them. */
#define NORM_TAPS GD_CACHE_LINE_FLOATS

static void weight_norm_task(void *argument, int64_t index, int slot)
{
    const struct weight_norm_job *job = argument;
    int64_t k0 = index * NORM_TAPS, taps = gd_smaller(job->kernel - k0, NORM_TAPS);
    double squares[NORM_TAPS] = {0};
    float scale[NORM_TAPS];
    (void)slot;
    for (int64_t r = 0; r < job->rows; r++)
        for (int64_t k = 0; k < taps; k++) {
            double v = job->v[r * job->kernel + k0 + k];
            squares[k] += v * v;
        }
    for (int64_t k = 0; k < taps; k++)
        scale[k] = (float)(job->g[k0 + k] / sqrt(squares[k]));
    for (int64_t r = 0; r < job->rows; r++)
        for (int64_t k = 0; k < taps; k++)
            job->w[r * job->kernel + k0 + k] = job->v[r * job->kernel + k0 + k] * scale[k];
}

void gd_cpu_weight_norm(gd_context *context, int64_t out, int64_t in, int64_t kernel, const float *g, const float *v,
                        float *w)
{
    struct weight_norm_job job = {out * in, kernel, g, v, NULL, w, NULL, NULL};
    gd_cpu_run(context, gd_divide_up(kernel, NORM_TAPS), weight_norm_task, &job);
}

/* With u = v / |v|: dg += dw . u, dv += g / |v| (dw - (dw . u) u). */
static void weight_norm_backward_task(void *argument, int64_t index, int slot)
{
    const struct weight_norm_job *job = argument;
    int64_t k0 = index * NORM_TAPS, taps = gd_smaller(job->kernel - k0, NORM_TAPS);
    double squares[NORM_TAPS] = {0}, dots[NORM_TAPS] = {0}, a[NORM_TAPS], b[NORM_TAPS];
    (void)slot;
    for (int64_t r = 0; r < job->rows; r++)
        for (int64_t k = 0; k < taps; k++) {
            double v = job->v[r * job->kernel + k0 + k];
            squares[k] += v * v;
            dots[k] += v * job->dw[r * job->kernel + k0 + k];
        }
    for (int64_t k = 0; k < taps; k++) {
        double norm = sqrt(squares[k]);
        a[k] = job->g[k0 + k] / norm;
        b[k] = a[k] * dots[k] / squares[k];
        job->dg[k0 + k] += (float)(dots[k] / norm);
    }
    for (int64_t r = 0; r < job->rows; r++)
        for (int64_t k = 0; k < taps; k++) {
            int64_t i = r * job->kernel + k0 + k;
            job->dv[i] += (float)(a[k] * job->dw[i] - b[k] * job->v[i]);
        }
}

void gd_cpu_weight_norm_backward(gd_context *context, int64_t out, int64_t in, int64_t kernel, const float *g,
                                 const float *v, const float *dw, float *dg, float *dv)
{
    struct weight_norm_job job = {out * in, kernel, g, v, dw, NULL, dg, dv};
    gd_cpu_run(context, gd_divide_up(kernel, NORM_TAPS), weight_norm_backward_task, &job);
}
