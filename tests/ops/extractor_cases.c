/*
 * extractor_cases.c - moments, norm_fold and its backward, normalize.
 */
#include "doubles.h"

#include <math.h>
#include <string.h>

#define EPS 1e-5

/* ---- moments ---------------------------------------------------------------------------------------------- */

/* frames, kernel, stride, 1000 offset of the samples, frames of the last of two calls */
static const int64_t moments_cases[][OPS_ARGS] = {
    {80, 10, 5, 500, 1}, {3199, 10, 5, 0, 900}, {500, 10, 5, 1000000, 499}, {50, 1, 1, 0, 20}, {33, 17, 4, 100, 16},
    {1, 10, 5, 0}, {2, 10, 5, 0}, {79, 10, 5, 0}, {80, 10, 5, 500}, {3199, 10, 5, 0}, {500, 10, 5, 1000000},
    {50, 1, 1, 0}, {50, 3, 2, 0}, {33, 16, 8, 0}, {33, 17, 4, 100}, {20, 40, 7, 0},
};
static const int64_t moments_bench[][OPS_ARGS] = {{47999, 10, 5, 0}};

static void direct_moments(int64_t frames, int64_t kernel, int64_t stride, const float *x, double *moments)
{
    double *mean = moments, *covariance = moments + kernel;
    memset(moments, 0, (size_t)(kernel + kernel * kernel) * sizeof *moments);
    for (int64_t k = 0; k < kernel; k++)
        for (int64_t t = 0; t < frames; t++)
            mean[k] += x[t * stride + k] / (double)frames;
    for (int64_t k = 0; k < kernel; k++)
        for (int64_t l = 0; l < kernel; l++)
            for (int64_t t = 0; t < frames; t++)
                covariance[k * kernel + l] += (x[t * stride + k] - mean[k]) *
                                              (x[t * stride + l] - mean[l]) / (double)frames;
}

static void run_moments(struct ops_test *test, const int64_t *args)
{
    int64_t frames = args[0], kernel = args[1], stride = args[2], count = kernel + kernel * kernel;
    int64_t samples = (frames - 1) * stride + kernel;
    struct ops_mat *x = ops_input(test, 1, samples, samples, 0.1);
    for (int64_t i = 0; i < samples; i++)
        x->host[i] += (float)args[3] / 1000;
    ops_upload(test, x);
    double *moments = ops_memory(test, (size_t)count * sizeof(double));
    struct gd_moments call = {.frames = frames, .kernel = kernel, .stride = stride, .x = x->device, .moments = moments};
    struct gd_moments rest = call;
    rest.before = call.frames -= args[4];
    rest.frames = args[4];
    rest.x += call.frames * stride;
    OPS_RUN(test) {
        test->backend->moments(test->context, &call);
        if (rest.frames)
            test->backend->moments(test->context, &rest);
    }
    double *got = ops_doubles(test, count), *wanted = ops_doubles(test, count);
    test->backend->download(test->context, got, moments, (size_t)count * sizeof(double));
    ops_digest(test, got, (size_t)count * sizeof(double));
    if (ops_settled(test))
        return;
    direct_moments(frames, kernel, stride, x->host, wanted);
    /* A cancelled mean of 1000 would cost six digits more than this allows. */
    for (int64_t i = 0; i < count; i++)
        ops_expect(test, fabs(got[i] - wanted[i]) <= 1e-12 * (i < kernel ? 1 + fabs(wanted[i]) : 0.01),
                   "%s %lld: %.17g, expected %.17g", i < kernel ? "mean" : "covariance",
                   (long long)(i < kernel ? i : i - kernel), got[i], wanted[i]);
}

const struct ops_family ops_moments = {
    .name = "moments", .args = "frames kernel stride offset_1000 last", .run = run_moments, .cases = moments_cases,
    .num_cases = OPS_COUNT(moments_cases), .bench = moments_bench, .num_bench = OPS_COUNT(moments_bench)};

/* ---- norm_fold -------------------------------------------------------------------------------------------- */

/* dim, kernel, frames */
static const int64_t fold_cases[][OPS_ARGS] = {{1, 1, 5}, {3, 10, 7}, {5, 3, 40}, {17, 10, 200}};
static const int64_t fold_bench[][OPS_ARGS] = {{512, 10, 100}};

enum { STRIDE = 5 };

/* A convolution over `frames` frames, its norm over time and affine map, all in float64. */
struct fold {
    int64_t dim, kernel, frames;
    double *x, *w, *gamma, *beta, *dz;
};

static void forward(const struct fold *f, int64_t c, double *z)
{
    double mean = 0, variance = 0, frames = (double)f->frames;
    for (int64_t t = 0; t < f->frames; t++) {
        z[t] = 0;
        for (int64_t k = 0; k < f->kernel; k++)
            z[t] += f->w[c * f->kernel + k] * f->x[t * STRIDE + k];
        mean += z[t] / frames;
    }
    for (int64_t t = 0; t < f->frames; t++)
        variance += (z[t] - mean) * (z[t] - mean) / frames;
    for (int64_t t = 0; t < f->frames; t++)
        z[t] = (z[t] - mean) / sqrt(variance + EPS) * f->gamma[c] + f->beta[c];
}

static double weighted_sum(void *argument)
{
    const struct fold *f = argument;
    double z[256], sum = 0;
    for (int64_t c = 0; c < f->dim; c++) {
        forward(f, c, z);
        for (int64_t t = 0; t < f->frames; t++)
            sum += z[t] * f->dz[t * f->dim + c];
    }
    return sum;
}

struct fold_operands {
    struct gd_norm_fold call;
    struct ops_mat *x, *w, *gamma, *beta;
    struct fold fold;
};

static struct fold_operands make_fold(struct ops_test *test, const int64_t *args)
{
    int64_t dim = args[0], kernel = args[1], frames = args[2], samples = (frames - 1) * STRIDE + kernel;
    struct fold_operands o = {.x = ops_input(test, 1, samples, samples, 0.3),
                              .w = ops_input(test, dim, kernel, kernel, 0.4),
                              .gamma = ops_input(test, 1, dim, dim, 1), .beta = ops_input(test, 1, dim, dim, 1)};
    double *moments = ops_memory(test, (size_t)(kernel + kernel * kernel) * sizeof(double));
    struct gd_moments call = {.frames = frames, .kernel = kernel, .stride = STRIDE, .x = o.x->device,
                              .moments = moments};
    test->backend->moments(test->context, &call);
    o.call = (struct gd_norm_fold){.dim = dim, .kernel = kernel, .eps = EPS, .moments = moments, .w = o.w->device,
                                   .gamma = o.gamma->device, .beta = o.beta->device};
    o.fold = (struct fold){dim, kernel, frames, ops_host_doubles(test, o.x), ops_host_doubles(test, o.w),
                           ops_host_doubles(test, o.gamma), ops_host_doubles(test, o.beta), NULL};
    return o;
}

/* The affine map applied to the frames is the normalised convolution. */
static void run_norm_fold(struct ops_test *test, const int64_t *args)
{
    struct fold_operands o = make_fold(test, args);
    int64_t dim = args[0], kernel = args[1], frames = args[2];
    struct ops_mat *weight = ops_output(test, dim, kernel, kernel), *bias = ops_output(test, 1, dim, dim);
    o.call.weight = weight->device;
    o.call.bias = bias->device;
    OPS_RUN(test)
        test->backend->norm_fold(test->context, &o.call);
    if (ops_settled(test))
        return;
    const float *w = ops_result(test, weight), *b = ops_result(test, bias);
    double z[256];
    for (int64_t c = 0; c < dim; c++) {
        forward(&o.fold, c, z);
        for (int64_t t = 0; t < frames; t++) {
            double sum = b[c], size = fabs(sum);
            for (int64_t k = 0; k < kernel; k++) {
                sum += w[c * kernel + k] * o.fold.x[t * STRIDE + k];
                size += fabs(w[c * kernel + k] * o.fold.x[t * STRIDE + k]);
            }
            ops_expect(test, fabs(sum - z[t]) <= 1e-7 * size, "frame %lld, channel %lld: %.9g, expected %.9g",
                       (long long)t, (long long)c, sum, z[t]);
        }
    }
}

const struct ops_family ops_norm_fold = {
    .name = "norm_fold", .args = "dim kernel frames", .run = run_norm_fold, .cases = fold_cases,
    .num_cases = OPS_COUNT(fold_cases), .bench = fold_bench, .num_bench = OPS_COUNT(fold_bench)};

static void run_norm_fold_backward(struct ops_test *test, const int64_t *args)
{
    struct fold_operands o = make_fold(test, args);
    int64_t dim = args[0], kernel = args[1], frames = args[2];
    struct ops_mat *dw = ops_update(test, dim, kernel, kernel, 1), *dgamma = ops_update(test, 1, dim, dim, 1);
    struct ops_mat *dbeta = ops_update(test, 1, dim, dim, 1);
    struct ops_mat *g = ops_input(test, dim, kernel, kernel, 1), *s = ops_input(test, 1, dim, dim, 1);
    double *dz = o.fold.dz = ops_doubles(test, frames * dim);
    for (int64_t c = 0; c < dim; c++) {
        double sums[64] = {0}, sum = 0;
        for (int64_t t = 0; t < frames; t++) {
            dz[t * dim + c] = ops_normal(test);
            sum += dz[t * dim + c];
            for (int64_t k = 0; k < kernel; k++)
                sums[k] += dz[t * dim + c] * o.fold.x[t * STRIDE + k];
        }
        s->host[c] = (float)sum;
        for (int64_t k = 0; k < kernel; k++)
            g->host[c * kernel + k] = (float)sums[k];
    }
    ops_upload(test, g);
    ops_upload(test, s);
    struct gd_norm_fold_backward call = {.forward = o.call, .g = g->device, .s = s->device, .dw = dw->device,
                                         .dgamma = dgamma->device, .dbeta = dbeta->device};
    OPS_RUN(test)
        test->backend->norm_fold_backward(test->context, &call);
    if (ops_settled(test))
        return;
    double *wanted_w = ops_doubles(test, dim * kernel), *wanted_gamma = ops_doubles(test, dim);
    double *wanted_beta = ops_doubles(test, dim);
    ops_gradient(weighted_sum, &o.fold, o.fold.w, dim * kernel, 1e-5, wanted_w);
    ops_gradient(weighted_sum, &o.fold, o.fold.gamma, dim, 1e-3, wanted_gamma);
    ops_gradient(weighted_sum, &o.fold, o.fold.beta, dim, 1e-3, wanted_beta);
    ops_add_initial(wanted_w, dw);
    ops_add_initial(wanted_gamma, dgamma);
    ops_add_initial(wanted_beta, dbeta);
    /* g and s come rounded to float32. */
    double size = 1e-6 * sqrt((double)frames);
    ops_check(test, dw, wanted_w, 5 * size, 1e-6);
    ops_check(test, dgamma, wanted_gamma, size, 1e-6);
    ops_check(test, dbeta, wanted_beta, size, 1e-6);
}

const struct ops_family ops_norm_fold_backward = {
    .name = "norm_fold_backward", .args = "dim kernel frames", .run = run_norm_fold_backward, .cases = fold_cases,
    .num_cases = OPS_COUNT(fold_cases), .bench = fold_bench, .num_bench = OPS_COUNT(fold_bench)};

/* ---- normalize -------------------------------------------------------------------------------------------- */

/* samples, 1000 offset, 1000 deviation, 1: by given statistics, of twice the mean and the variance */
static const int64_t normalize_cases[][OPS_ARGS] = {
    {17, 10, 100, 1}, {31999, 500, 100, 1},
    {1, 0, 100}, {15, 0, 100}, {16, 10, 100}, {17, 0, 1}, {400, 0, 100}, {31999, 500, 100}, {100000, 0, 1},
    {1200000, 20, 100},
};
static const int64_t normalize_bench[][OPS_ARGS] = {{240000, 0, 100}};

static void run_normalize(struct ops_test *test, const int64_t *args)
{
    int64_t samples = args[0];
    struct ops_mat *x = ops_update(test, 1, samples, samples, (double)args[2] / 1000);
    double mean = 0, squares = 0;
    for (int64_t i = 0; i < samples; i++) {
        x->host[i] += (float)args[1] / 1000;
        mean += x->host[i];
    }
    ops_upload(test, x);
    mean /= (double)samples;
    for (int64_t i = 0; i < samples; i++)
        squares += (x->host[i] - mean) * (x->host[i] - mean);
    const double statistics[2] = {2 * mean, 2 * squares / (double)samples};
    OPS_RUN(test)
        test->backend->normalize(test->context, samples, x->device, args[3] ? statistics : NULL, (float)EPS);
    if (ops_settled(test))
        return;
    if (args[3]) {
        mean *= 2;
        squares *= 2;
    }
    double rstd = 1 / sqrt(squares / (double)samples + EPS), *reference = ops_host_doubles(test, x);
    for (int64_t i = 0; i < samples; i++)
        reference[i] = (reference[i] - mean) * rstd;
    /* The mean is rounded to float32 before it is taken away. */
    ops_check(test, x, reference, 6.1e-8 * fabs(mean) * rstd + 1e-7, 3e-7);
}

const struct ops_family ops_normalize = {
    .name = "normalize", .args = "samples offset_1000 deviation_1000 given", .run = run_normalize,
    .cases = normalize_cases,
    .num_cases = OPS_COUNT(normalize_cases), .bench = normalize_bench, .num_bench = OPS_COUNT(normalize_bench)};
