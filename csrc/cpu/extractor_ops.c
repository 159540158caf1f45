/*
 * extractor_ops.c - the first convolution's norm over time as an affine map, from the moments of its input; and the
 * normalisation of an utterance. Each works on one utterance, undivided.
 */
#include "ops.h"

#include <math.h>

void gd_cpu_moments(gd_context *context, const struct gd_moments *m)
{
    gd_cpu_kernels(context)->moments(m);
}

void gd_cpu_normalize(gd_context *context, int64_t samples, float *x, const double *statistics, float eps)
{
    gd_cpu_kernels(context)->normalize(samples, x, statistics, eps);
}

/* Mean and standard deviation over time of channel c, w . x_t: w . m and sqrt(w^T R w + eps). */
static void channel_statistics(const struct gd_norm_fold *n, int64_t c, double *mean, double *sigma)
{
    const double *m = n->moments, *covariance = n->moments + n->kernel;
    const float *w = n->w + c * n->kernel;
    double variance = 0;
    *mean = 0;
    for (int64_t k = 0; k < n->kernel; k++) {
        double product = 0;
        for (int64_t l = 0; l < n->kernel; l++)
            product += covariance[k * n->kernel + l] * w[l];
        variance += w[k] * product;
        *mean += w[k] * m[k];
    }
    *sigma = sqrt((variance > 0 ? variance : 0) + n->eps);
}

void gd_cpu_norm_fold(gd_context *context, const struct gd_norm_fold *n)
{
    (void)context;
    for (int64_t c = 0; c < n->dim; c++) {
        double mean, sigma;
        channel_statistics(n, c, &mean, &sigma);
        double scale = n->gamma[c] / sigma;
        for (int64_t k = 0; k < n->kernel; k++)
            n->weight[c * n->kernel + k] = (float)(scale * n->w[c * n->kernel + k]);
        n->bias[c] = (float)(n->beta[c] - scale * mean);
    }
}

void gd_cpu_norm_fold_backward(gd_context *context, const struct gd_norm_fold_backward *n)
{
    const struct gd_norm_fold *f = &n->forward;
    const double *m = f->moments, *covariance = f->moments + f->kernel;
    (void)context;
    for (int64_t c = 0; c < f->dim; c++) {
        const float *w = f->w + c * f->kernel, *g = n->g + c * f->kernel;
        double mean, sigma, s = n->s[c], s2 = 0;
        channel_statistics(f, c, &mean, &sigma);
        for (int64_t k = 0; k < f->kernel; k++)
            s2 += (double)w[k] * g[k];
        s2 = (s2 - mean * s) / sigma;
        for (int64_t k = 0; k < f->kernel; k++) {
            double product = 0;
            for (int64_t l = 0; l < f->kernel; l++)
                product += covariance[k * f->kernel + l] * w[l];
            n->dw[c * f->kernel + k] += (float)(f->gamma[c] / sigma * (g[k] - s * m[k] - s2 / sigma * product));
        }
        n->dgamma[c] += (float)s2;
        n->dbeta[c] += (float)s;
    }
}
