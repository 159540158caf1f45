/*
 * vmath_cases.c - the errors of GELU, its derivative and the exponential over their whole range, through the
 * operations that use them: attention of a query x to the keys 0 and 1 with values 0 and 1 is e^x / (1 + e^x).
 */
#include "ops_test.h"

#include <float.h>
#include <math.h>

/* Points from -limit to limit, with the special ones put over the last. */
enum { POINTS = 40001 };
static const float special[] = {0.0f, -0.0f, FLT_MIN, -FLT_MIN, 1e-42f, -1e-42f, 1e-20f, -1e-20f, 5.2f, -5.2f, 6.0f,
                                -6.0f, 100.0f, -100.0f, 1e18f, -1e18f};

/* limit */
static const int64_t cases[][OPS_ARGS] = {{1}, {7}, {20}};

static void fill(struct ops_test *test, struct ops_mat *x, double limit)
{
    const int64_t last = x->rows * x->width - 1;
    for (int64_t i = 0; i <= last; i++)
        x->host[i] = (float)(limit * (2.0 * (double)i / (double)last - 1));
    for (int i = 0; i < OPS_COUNT(special); i++)
        x->host[last - i] = special[i];
    ops_upload(test, x);
}

static void run_gelu(struct ops_test *test, const int64_t *args)
{
    struct ops_mat *x = ops_input(test, 1, POINTS, POINTS, 1), *y = ops_output(test, 1, POINTS, POINTS);
    double *reference = ops_doubles(test, POINTS), *bound = ops_doubles(test, POINTS);
    fill(test, x, (double)args[0]);
    OPS_RUN(test)
        test->backend->activate(test->context, GD_GELU, 1, POINTS, x->device, POINTS, y->device, POINTS);
    for (int64_t i = 0; i < POINTS; i++) {
        double z = x->host[i];
        reference[i] = 0.5 * z * erfc(-z / sqrt(2));
        bound[i] = 2e-7 * fabs(z) + 1e-45;
    }
    ops_check_each(test, y, reference, bound);
    const float *result = ops_result(test, y);
    for (int64_t i = 0; i < POINTS; i++) {
        float z = x->host[i];
        ops_expect(test, z < 5.5f || result[i] == z, "gelu(%.9g) is %.9g", z, result[i]);
        ops_expect(test, z > -5.5f || result[i] == 0, "gelu(%.9g) is %.9g", z, result[i]);
    }
    x->host[0] = NAN;
    x->host[1] = INFINITY;
    ops_upload(test, x);
    test->backend->activate(test->context, GD_GELU, 1, POINTS, x->device, POINTS, y->device, POINTS);
    result = ops_result(test, y);
    ops_expect(test, isnan(result[0]), "gelu(NaN) is %g", result[0]);
    ops_expect(test, result[1] == INFINITY, "gelu(Inf) is %g", result[1]);
}

const struct ops_family ops_gelu_range = {
    .name = "gelu_range", .args = "limit", .run = run_gelu, .cases = cases, .num_cases = OPS_COUNT(cases)};

/* Through the linear layer that multiplies by 1. */
static void run_gelu_reduced(struct ops_test *test, const int64_t *args)
{
    struct ops_mat *x = ops_input(test, POINTS, 1, 1, 1), *w = ops_input(test, 1, 1, 1, 1);
    struct ops_mat *y = ops_output(test, POINTS, 1, 1);
    double *reference = ops_doubles(test, POINTS), *bound = ops_doubles(test, POINTS);
    struct gd_weight weight = {.out = 1, .taps = 1, .in = 1, .stride = 1};
    fill(test, x, (double)args[0]);
    w->host[0] = 1;
    ops_upload(test, w);
    void *packed = ops_memory(test, test->backend->packed_size(test->context, &weight));
    test->backend->pack(test->context, &weight, w->device, 1, 1, 1, packed);
    weight.packed = packed;
    const struct gd_linear call = {.rows = POINTS, .weight = &weight, .x = x->device, .ldx = 1,
                                   .activation = GD_GELU_REDUCED, .y = y->device, .ldy = 1};
    OPS_RUN(test)
        test->backend->linear(test->context, &call);
    for (int64_t i = 0; i < POINTS; i++) {
        double z = x->host[i];
        reference[i] = 0.5 * z * erfc(-z / sqrt(2));
        bound[i] = fmin(4.6e-5 * fabs(z), 2.2e-4) + 2e-7 * fabs(reference[i]) + 1e-45;
    }
    ops_check_each(test, y, reference, bound);
    x->host[0] = NAN;
    x->host[1] = INFINITY;
    x->host[2] = -INFINITY;
    ops_upload(test, x);
    test->backend->linear(test->context, &call);
    const float *result = ops_result(test, y);
    ops_expect(test, isnan(result[0]), "gelu(NaN) is %g", result[0]);
    ops_expect(test, !isfinite(result[1]), "gelu(Inf) is %g", result[1]);
    ops_expect(test, isnan(result[2]), "gelu(-Inf) is %g", result[2]);
}

const struct ops_family ops_gelu_reduced_range = {
    .name = "gelu_reduced_range", .args = "limit", .run = run_gelu_reduced, .cases = cases,
    .num_cases = OPS_COUNT(cases)};

static void run_gelu_derivative(struct ops_test *test, const int64_t *args)
{
    struct ops_mat *x = ops_input(test, 1, POINTS, POINTS, 1), *dy = ops_input(test, 1, POINTS, POINTS, 1);
    struct ops_mat *dx = ops_output(test, 1, POINTS, POINTS);
    double *reference = ops_doubles(test, POINTS);
    fill(test, x, (double)args[0]);
    for (int64_t i = 0; i < POINTS; i++)
        dy->host[i] = 1;
    ops_upload(test, dy);
    OPS_RUN(test)
        test->backend->activate_backward(test->context, GD_GELU, 1, POINTS, x->device, POINTS, dy->device, POINTS,
                                         dx->device, POINTS);
    for (int64_t i = 0; i < POINTS; i++) {
        double z = x->host[i];
        reference[i] = 0.5 * erfc(-z / sqrt(2)) + z * exp(-0.5 * z * z) / sqrt(2 * acos(-1));
    }
    ops_check(test, dx, reference, 3.5e-7, 0);
}

const struct ops_family ops_gelu_derivative_range = {
    .name = "gelu_derivative_range", .args = "limit", .run = run_gelu_derivative, .cases = cases,
    .num_cases = OPS_COUNT(cases)};

/* 1000 times the lower end */
static const int64_t exp_cases[][OPS_ARGS] = {{-1}, {-700}, {-16000}, {-86980}, {-87340}, {-1000000}};

static void run_exp(struct ops_test *test, const int64_t *args)
{
    enum { ROWS = 3000 };
    int64_t rows[] = {ROWS}, keys[] = {2};
    const gd_config config = {.encoder_embed_dim = 1, .encoder_attention_heads = 1};
    struct ops_mat *q = ops_input(test, ROWS, 1, 1, 1), *k = ops_input(test, ROWS, 1, 1, 1);
    struct ops_mat *v = ops_input(test, ROWS, 1, 1, 1), *out = ops_output(test, ROWS, 1, 1);
    double *reference = ops_doubles(test, ROWS), *bound = ops_doubles(test, ROWS);
    for (int64_t i = 0; i < ROWS; i++)
        q->host[i] = (float)(1e-3 * (double)args[0] * (double)i / (ROWS - 1));
    for (int64_t i = 2; i < ROWS; i++)
        k->host[i] = v->host[i] = NAN; /* no keys */
    k->host[0] = v->host[0] = 0;
    k->host[1] = v->host[1] = 1;
    ops_upload(test, q);
    ops_upload(test, k);
    ops_upload(test, v);
    ops_scratch(test, &config, ROWS, 0);
    struct gd_attention call = {
        .rows = ops_rows(test, 1, rows, keys), .heads = 1, .head_dim = 1, .scale = 1, .q = q->device, .k = k->device,
        .v = v->device, .ldq = 1, .ldk = 1, .ldv = 1, .out = out->device, .ldout = 1,
    };
    OPS_RUN(test)
        test->backend->attention(test->context, &call);
    for (int64_t i = 0; i < ROWS; i++) {
        double e = exp((double)q->host[i]);
        reference[i] = e / (1 + e);
        /* 1.5 ulp of the exponential, and the rounding of the sum and the quotient; below 2^-125.5 zero will do. */
        bound[i] = 3e-7 * reference[i] + (e < 1.7e-38 ? e : 0);
    }
    ops_check_each(test, out, reference, bound);
}

const struct ops_family ops_exp_range = {
    .name = "exp_range", .args = "lower_end_1000", .run = run_exp, .cases = exp_cases,
    .num_cases = OPS_COUNT(exp_cases)};
