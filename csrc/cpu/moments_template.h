/*
 * moments_template.h - float64 statistics of one utterance's samples. Sums run over time in order, in a fixed
 * number of lanes, so that they depend on the utterance alone.
 */
#ifndef GD_CPU_MOMENTS_TEMPLATE_H
#define GD_CPU_MOMENTS_TEMPLATE_H

#include <math.h>

#include "kernels.h"
#include "vec.h"

/* The first `left` of VDL floats, widened; zeros after. */
GD_INLINE vd moments_load(const float *x, int64_t left)
{
    float first[VDL] = {0};
    if (left >= VDL)
        return vd_widen(x);
    if (left > 0)
        memcpy(first, x, (size_t)left * sizeof *x);
    return vd_widen(first);
}

static double moments_mean(int64_t samples, const float *x)
{
    vd sum[4] = {{0}};
    for (int64_t i = 0; i < samples; i += 4 * VDL)
        for (int s = 0; s < 4; s++)
            sum[s] += moments_load(x + i + s * VDL, samples - i - s * VDL);
    return vd_sum((sum[0] + sum[1]) + (sum[2] + sum[3])) / (double)samples;
}

enum { MOMENTS_K = 5, MOMENTS_L = 2 };

/* p[k][l] = sum over t of (x_t[k] - centre) (x_t[l] - centre) and s[l] = sum of x_t[l] - centre, for k and l of one
 * tile: MOMENTS_K values of k from k0, MOMENTS_L vectors of l from l0. Vectors run over l, which lies side by side
 * in memory. */
GD_INLINE void moments_tile(const struct gd_moments *m, double centre, int64_t k0, int64_t l0,
                            double p[MOMENTS_K][MOMENTS_L * VDL], double s[MOMENTS_L * VDL])
{
    vd product[MOMENTS_K][MOMENTS_L] = {{{0}}}, sum[MOMENTS_L] = {{0}};
    int64_t end = (m->frames - 1) * m->stride + m->kernel, last_k = m->kernel - 1;
    for (int64_t t = 0; t < m->frames; t++) {
        const float *x = m->x + t * m->stride;
        vd row[MOMENTS_L];
        for (int l = 0; l < MOMENTS_L; l++) {
            int64_t at = l0 + l * VDL;
            row[l] = moments_load(x + at, end - t * m->stride - at) - centre;
            sum[l] += row[l];
        }
        for (int k = 0; k < MOMENTS_K; k++) {
            double left = (double)x[k0 + k < last_k ? k0 + k : last_k] - centre;
            for (int l = 0; l < MOMENTS_L; l++)
                product[k][l] += left * row[l];
        }
    }
    for (int l = 0; l < MOMENTS_L; l++) {
        vd_store(s + l * VDL, sum[l]);
        for (int k = 0; k < MOMENTS_K; k++)
            vd_store(p[k] + l * VDL, product[k][l]);
    }
}

/* About the mean of all samples, close to each of the means, so that nothing cancels; then about the means. What the
 * frames before had becomes sums about the same centre first. */
static void moments(const struct gd_moments *m)
{
    int64_t kernel = m->kernel;
    double centre = moments_mean((m->frames - 1) * m->stride + kernel, m->x), before = (double)m->before;
    double frames = (double)(m->before + m->frames), *mean = m->moments, *covariance = m->moments + kernel;
    for (int64_t k = 0; k < kernel; k++)
        for (int64_t l = 0; l < kernel; l++)
            covariance[k * kernel + l] =
                m->before ? before * (covariance[k * kernel + l] + (mean[k] - centre) * (mean[l] - centre)) : 0;
    for (int64_t k = 0; k < kernel; k++)
        mean[k] = m->before ? before * (mean[k] - centre) : 0;
    for (int64_t l0 = 0; l0 < kernel; l0 += MOMENTS_L * VDL)
        for (int64_t k0 = 0; k0 < kernel; k0 += MOMENTS_K) {
            double p[MOMENTS_K][MOMENTS_L * VDL], s[MOMENTS_L * VDL];
            moments_tile(m, centre, k0, l0, p, s);
            for (int64_t l = l0; l < l0 + MOMENTS_L * VDL && l < kernel; l++) {
                mean[l] += k0 == 0 ? s[l - l0] : 0;
                for (int64_t k = k0; k < k0 + MOMENTS_K && k < kernel; k++)
                    covariance[k * kernel + l] += p[k - k0][l - l0];
            }
        }
    for (int64_t k = 0; k < kernel; k++)
        mean[k] /= frames;
    for (int64_t k = 0; k < kernel; k++)
        for (int64_t l = 0; l < kernel; l++)
            covariance[k * kernel + l] = covariance[k * kernel + l] / frames - mean[k] * mean[l];
    for (int64_t k = 0; k < kernel; k++)
        mean[k] += centre;
}

static double moments_variance(int64_t samples, const float *x, double mean)
{
    double rest = 0;
    vd sum[4] = {{0}};
    int64_t i = 0;
    for (; i + 4 * VDL <= samples; i += 4 * VDL)
        for (int s = 0; s < 4; s++) {
            vd d = vd_widen(x + i + s * VDL) - mean;
            sum[s] += d * d;
        }
    for (; i < samples; i++)
        rest += (x[i] - mean) * (x[i] - mean);
    return (vd_sum((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest) / (double)samples;
}

static void normalize(int64_t samples, float *x, const double *statistics, float eps)
{
    double mean = statistics ? statistics[0] : moments_mean(samples, x);
    double variance = statistics ? statistics[1] : moments_variance(samples, x, mean);
    float centre = (float)mean, scale = (float)(1 / sqrt(variance + (double)eps));
    for (int64_t i = 0; i < samples; i += VL)
        vf_store_left(x + i, (vf_load_left(x + i, samples - i) - centre) * scale, samples - i);
}

#endif
