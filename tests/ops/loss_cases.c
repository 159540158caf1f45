/*
 * loss_cases.c - loss_rows.
 */
#include "doubles.h"

#include <math.h>

enum {
    NO_GRADIENT = 1,
    ZERO_ROWS = 2, /* every third prediction is 0, every fourth target */
    EQUAL = 4,
    SMALL = 8, /* 1e-9 */
    SQUARED = 16,
};

/* rows, dim, 100 lam, flags */
static const int64_t cases[][OPS_ARGS] = {
    {1, 1, 100, 0}, {3, 2, 100, 0}, {5, 15, 50, 0}, {4, 16, 100, NO_GRADIENT}, {4, 17, 0, 0}, {6, 33, 100, EQUAL},
    {12, 5, 100, ZERO_ROWS}, {12, 31, 100, SMALL}, {50, 768, 100, 0}, {1, 1, 100, SQUARED}, {5, 15, 50, SQUARED},
    {4, 17, 0, SQUARED}, {6, 33, 100, SQUARED | EQUAL}, {12, 31, 100, SQUARED | ZERO_ROWS}, {50, 768, 100, SQUARED},
};
static const int64_t bench[][OPS_ARGS] = {{750, 768, 100, 0}};

static double terms(int64_t dim, double lam, int squared, const double *p, const double *t, double *l1, double *cosine,
                    double *similarity)
{
    double dot = 0, pp = 0, tt = 0;
    *l1 = 0;
    for (int64_t i = 0; i < dim; i++) {
        *l1 += (squared ? (p[i] - t[i]) * (p[i] - t[i]) : fabs(p[i] - t[i])) / (double)dim;
        dot += p[i] * t[i];
        pp += p[i] * p[i];
        tt += t[i] * t[i];
    }
    *similarity = dot / (fmax(sqrt(pp), 1e-8) * fmax(sqrt(tt), 1e-8));
    *cosine = log1p(exp(-*similarity));
    return *l1 + lam * *cosine;
}

struct row {
    int64_t dim;
    double lam;
    int squared;
    double *p, *t;
};

static double loss_of(void *argument)
{
    const struct row *r = argument;
    double l1, cosine, similarity;
    return terms(r->dim, r->lam, r->squared, r->p, r->t, &l1, &cosine, &similarity);
}

/* The formula, for where central differences fail: predictions of 0 or shorter than 1e-8. */
static void gradient_of(const struct row *r, double *dp)
{
    double l1, cosine, similarity, pp = 0, tt = 0;
    terms(r->dim, r->lam, r->squared, r->p, r->t, &l1, &cosine, &similarity);
    for (int64_t i = 0; i < r->dim; i++) {
        pp += r->p[i] * r->p[i];
        tt += r->t[i] * r->t[i];
    }
    double n = fmax(sqrt(pp), 1e-8), m = fmax(sqrt(tt), 1e-8), slope = -r->lam / (1 + exp(similarity));
    for (int64_t i = 0; i < r->dim; i++) {
        double sign = (r->p[i] > r->t[i]) - (r->p[i] < r->t[i]);
        double along = pp > 0 ? similarity * r->p[i] / (n * sqrt(pp)) : 0;
        dp[i] = (r->squared ? 2 * (r->p[i] - r->t[i]) : sign) / (double)r->dim + slope * (r->t[i] / (n * m) - along);
    }
}

static void run_loss_rows(struct ops_test *test, const int64_t *args)
{
    int64_t rows = args[0], dim = args[1], flags = args[3];
    double lam = (double)args[2] / 100;
    const float grad_scale = 0.37f;
    struct ops_mat *pred = ops_input(test, rows, dim, dim + 3, flags & SMALL ? 1e-9 : 1);
    struct ops_mat *target = ops_input(test, rows, dim, dim + 1, 1);
    struct ops_mat *dpred = flags & NO_GRADIENT ? NULL : ops_output(test, rows, dim, dim + 2);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < dim; i++) {
            if (flags & ZERO_ROWS && r % 3 == 0)
                pred->host[r * pred->ld + i] = 0;
            if (flags & ZERO_ROWS && r % 4 == 0)
                target->host[r * target->ld + i] = 0;
            if (flags & EQUAL && i % 3 == 0)
                pred->host[r * pred->ld + i] = target->host[r * target->ld + i];
        }
    ops_upload(test, pred);
    ops_upload(test, target);
    double sums[3] = {1, 2, 3}, wanted[3] = {1, 2, 3}, *device_sums = ops_memory(test, sizeof sums);
    test->backend->upload(test->context, device_sums, sums, sizeof sums);
    struct gd_loss_rows call = {
        .rows = rows, .dim = dim, .pred = pred->device, .target = target->device, .ldpred = pred->ld,
        .ldtarget = target->ld,
        .lam = (float)lam, .grad_scale = grad_scale, .squared = (flags & SQUARED) != 0,
        .dpred = dpred ? dpred->device : NULL, .lddpred = dpred ? dpred->ld : 0,
        .terms = ops_memory(test, (size_t)(3 * rows) * sizeof(double)), .sums = device_sums,
    };
    OPS_RUN(test)
        test->backend->loss_rows(test->context, &call);
    test->backend->download(test->context, sums, device_sums, sizeof sums);
    ops_digest(test, sums, sizeof sums);
    if (ops_settled(test))
        return;
    double *p = ops_host_doubles(test, pred), *t = ops_host_doubles(test, target), *dp = ops_doubles(test, rows * dim);
    double *bound = ops_doubles(test, rows * dim), *numeric = ops_doubles(test, dim);
    for (int64_t r = 0; r < rows; r++) {
        struct row row = {dim, lam, (flags & SQUARED) != 0, p + r * dim, t + r * dim};
        double l1, cosine, similarity, largest = 0;
        terms(dim, lam, row.squared, row.p, row.t, &l1, &cosine, &similarity);
        wanted[0] += l1;
        wanted[1] += cosine;
        wanted[2] += similarity;
        gradient_of(&row, dp + r * dim);
        if (flags == 0 || flags == SQUARED) {
            ops_gradient(loss_of, &row, row.p, dim, 1e-6, numeric);
            for (int64_t i = 0; i < dim; i++)
                ops_expect(test, fabs(numeric[i] - dp[r * dim + i]) < 1e-7 * (1 + fabs(numeric[i])),
                           "the formula of dpred is wrong: %g, %g by differences", dp[r * dim + i], numeric[i]);
        }
        for (int64_t i = 0; i < dim; i++)
            largest = fmax(largest, fabs(dp[r * dim + i]));
        for (int64_t i = 0; i < dim; i++) {
            dp[r * dim + i] *= grad_scale;
            bound[r * dim + i] = 6e-7 * grad_scale * (largest + 1.0 / (double)dim);
        }
    }
    for (int i = 0; i < 3; i++)
        ops_expect(test, fabs(sums[i] - wanted[i]) < 1e-6 * (double)rows, "sum %d: %.9g, expected %.9g", i, sums[i],
                   wanted[i]);
    if (dpred)
        ops_check_each(test, dpred, dp, bound);
}

const struct ops_family ops_loss_rows = {
    .name = "loss_rows", .args = "rows dim lam_100 flags", .run = run_loss_rows, .cases = cases,
    .num_cases = OPS_COUNT(cases),
    .bench = bench, .num_bench = OPS_COUNT(bench)};
