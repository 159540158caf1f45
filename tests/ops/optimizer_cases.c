/*
 * optimizer_cases.c - sum_squares and adamw.
 */
#include "doubles.h"

#include <math.h>

/* ---- sum_squares ------------------------------------------------------------------------------------------ */

/* count */
static const int64_t sum_cases[][OPS_ARGS] = {{0}, {1}, {15}, {16}, {17}, {63}, {64}, {65}, {4097}, {300001}};
static const int64_t sum_bench[][OPS_ARGS] = {{17589908}};

static double sum_bytes(const int64_t *args)
{
    return 4.0 * (double)args[0];
}

static void run_sum_squares(struct ops_test *test, const int64_t *args)
{
    int64_t count = args[0];
    if (!ops_has(test, test->backend->sum_squares != NULL))
        return;
    struct ops_mat *x = ops_input(test, 1, count, count, 1);
    double got = 0;
    long double wanted = 0;
    OPS_RUN(test)
        got = test->backend->sum_squares(test->context, (size_t)count, x->device);
    ops_digest(test, &got, sizeof got);
    if (ops_settled(test))
        return;
    for (int64_t i = 0; i < count; i++)
        wanted += (long double)x->host[i] * x->host[i];
    ops_expect(test, fabs(got - (double)wanted) <= 1e-14 * (double)wanted, "%.17g, expected %.17g", got,
               (double)wanted);
}

const struct ops_family ops_sum_squares = {
    .name = "sum_squares", .args = "count", .run = run_sum_squares, .cases = sum_cases,
    .num_cases = OPS_COUNT(sum_cases),
    .bench = sum_bench, .num_bench = OPS_COUNT(sum_bench), .bytes = sum_bytes};

/* ---- adamw ------------------------------------------------------------------------------------------------ */

/* count, step, S3PRL's, 1e6 decay, 1000 grad_scale */
static const int64_t cases[][OPS_ARGS] = {
    {1, 1, 0, 1, 1000},      {15, 2, 0, 10000, 1000}, {16, 100, 0, 0, 37},     {17, 1, 1, 1, 1000},
    {33, 7, 1, 0, 1000},     {70001, 50000, 0, 1, 5}, {70001, 200000, 1, 1, 5},
};
static const int64_t bench[][OPS_ARGS] = {{17589908, 1000, 0, 1, 500}};

static double bytes(const int64_t *args)
{
    return 28.0 * (double)args[0];
}

static void run_adamw(struct ops_test *test, const int64_t *args)
{
    int64_t count = args[0];
    if (!ops_has(test, test->backend->adamw != NULL))
        return;
    struct ops_mat *p = ops_update(test, 1, count, count, 0.05), *m = ops_update(test, 1, count, count, 1e-3);
    struct ops_mat *v = ops_update(test, 1, count, count, 1e-3), *g = ops_input(test, 1, count, count, 1e-2);
    for (int64_t i = 0; i < count; i++)
        v->host[i] = args[1] == 1 ? 0 : v->host[i] * v->host[i];
    for (int64_t i = 0; args[1] == 1 && i < count; i++)
        m->host[i] = 0;
    ops_upload(test, v);
    ops_upload(test, m);
    struct gd_adamw_update update = {
        .count = (size_t)count, .p = p->device, .m = m->device, .v = v->device, .g = g->device,
        .lr = 2e-4, .beta1 = 0.9,
        .beta2 = 0.98, .eps = 1e-6, .decay = 1e-6 * (double)args[3], .grad_scale = 1e-3 * (double)args[4],
        .step = args[1], .s3prl = (int)args[2],
    };
    OPS_RUN(test)
        test->backend->adamw(test->context, &update);
    if (ops_settled(test))
        return;
    double *p1 = ops_host_doubles(test, p), *m1 = ops_host_doubles(test, m), *v1 = ops_host_doubles(test, v);
    double *bound = ops_doubles(test, count), *m_bound = ops_doubles(test, count);
    double correct1 = 1 - pow(0.9, (double)args[1]), correct2 = 1 - pow(0.98, (double)args[1]);
    for (int64_t i = 0; i < count; i++) {
        double gradient = update.grad_scale * g->host[i], step;
        m_bound[i] = 2e-7 * (fabs(0.9 * m1[i]) + fabs(0.1 * gradient));
        m1[i] = 0.9 * m1[i] + 0.1 * gradient;
        v1[i] = 0.98 * v1[i] + 0.02 * gradient * gradient;
        if (args[2]) {
            step = update.lr * sqrt(correct2) / correct1 * (m1[i] / (sqrt(v1[i]) + 1e-6) + update.decay * p1[i]);
        } else {
            p1[i] *= 1 - update.lr * update.decay;
            step = update.lr / correct1 * m1[i] / (sqrt(v1[i] / correct2) + 1e-6);
        }
        p1[i] -= step;
        /* The step's error is that of its m, which may have cancelled, and some roundings. */
        bound[i] = 1.2e-7 * fabs(p1[i]) + fabs(step) * (1e-6 + m_bound[i] / (fabs(m1[i]) + 1e-30));
    }
    ops_check_each(test, p, p1, bound);
    ops_check_each(test, m, m1, m_bound);
    ops_check(test, v, v1, 1e-45, 3e-7);
}

const struct ops_family ops_adamw = {
    .name = "adamw", .args = "count step s3prl decay_1e6 scale_1e3", .run = run_adamw, .cases = cases,
    .num_cases = OPS_COUNT(cases), .bench = bench, .num_bench = OPS_COUNT(bench), .bytes = bytes};
