/*
 * norm_cases.c - layer_norm and layer_norm_backward.
 */
#include "doubles.h"

#include <math.h>
#include <string.h>

#define EPS 1e-5

enum { HAS_ADD = 1, HAS_STATS = 2, IN_PLACE = 4, OFFSET = 8 /* rows of mean 8, not 0 */, TINY = 16 /* of size 1e-4 */ };

/* ---- layer_norm ------------------------------------------------------------------------------------------- */

/* rows, width, flags */
static const int64_t cases[][OPS_ARGS] = {
    {1, 1, HAS_STATS},
    {3, 2, HAS_ADD},
    {5, 15, HAS_STATS | HAS_ADD},
    {4, 16, IN_PLACE},
    {4, 17, IN_PLACE | HAS_STATS},
    {7, 63, HAS_ADD | OFFSET},
    {7, 64, HAS_STATS | OFFSET},
    {7, 65, HAS_STATS | TINY},
    {33, 512, HAS_ADD | HAS_STATS | OFFSET},
    {99, 768, HAS_STATS},
    {50, 1027, IN_PLACE | HAS_STATS},
};
static const int64_t bench[][OPS_ARGS] = {{750, 768, 0}, {750, 768, HAS_STATS | HAS_ADD}, {48000, 512, 0}};

static double bytes(const int64_t *args)
{
    return 8.0 * (double)(args[0] * args[1]);
}

static void statistics(int64_t width, const double *x, double *mean, double *rstd)
{
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < width; i++)
        sum += x[i];
    *mean = sum / (double)width;
    for (int64_t i = 0; i < width; i++)
        squares += (x[i] - *mean) * (x[i] - *mean);
    *rstd = 1 / sqrt(squares / (double)width + EPS);
}

static void shift_rows(struct ops_test *test, struct ops_mat *x, int64_t flags)
{
    for (int64_t r = 0; r < x->rows; r++)
        for (int64_t c = 0; c < x->width; c++) {
            float *value = x->host + r * x->ld + c;
            *value = flags & TINY ? *value * 1e-4f : flags & OFFSET ? *value + 8 : *value;
        }
    ops_upload(test, x);
}

/* A row alone gives the bits that it has among the others. */
static void check_row_alone(struct ops_test *test, struct gd_layer_norm call, const struct ops_mat *x,
                            const struct ops_mat *y)
{
    int64_t row = x->rows / 2;
    struct ops_mat *input = ops_input(test, 1, x->width, x->width, 1);
    struct ops_mat *output = ops_output(test, 1, x->width, x->width);
    memcpy(input->host, x->host + row * x->ld, (size_t)x->width * sizeof(float));
    ops_upload(test, input);
    call.rows = 1;
    call.x = input->device;
    call.y = output->device;
    call.add = call.add ? call.add + row * call.ldadd : NULL;
    call.stats = NULL;
    test->backend->layer_norm(test->context, &call);
    ops_expect(test, memcmp(ops_result(test, output), ops_result(test, y) + row * y->ld,
                            (size_t)x->width * sizeof(float)) == 0, "row %lld has other bits alone", (long long)row);
}

static void compare_layer_norm(struct ops_test *test, const struct ops_mat *x, const struct ops_mat *gamma,
                               const struct ops_mat *beta, const struct ops_mat *add, const struct ops_mat *y,
                               const struct ops_mat *stats)
{
    const int64_t rows = x->rows, width = x->width;
    double *values = ops_host_doubles(test, x), *reference = ops_doubles(test, rows * width);
    double *bound = ops_doubles(test, rows * width), *wanted = ops_doubles(test, 2 * rows);
    double *within = ops_doubles(test, 2 * rows);
    for (int64_t r = 0; r < rows; r++) {
        double mean, rstd;
        statistics(width, values + r * width, &mean, &rstd);
        /* The mean's error in units of the deviation: rounding of sums as large as the mean. */
        double shift = 2e-7 * fabs(mean) * rstd;
        for (int64_t i = 0; i < width; i++) {
            double unit = (values[r * width + i] - mean) * rstd, added = add ? add->host[r * add->ld + i] : 0;
            double scaled = unit * gamma->host[i];
            reference[r * width + i] = scaled + beta->host[i] + added;
            bound[r * width + i] = 4e-7 * fabs(scaled) + shift * fabs((double)gamma->host[i])
                                   + 2e-7 * (fabs((double)beta->host[i]) + fabs(added)) + 2e-7 * fabs(unit) + 3e-8;
        }
        wanted[2 * r] = mean;
        wanted[2 * r + 1] = rstd;
        within[2 * r] = 2e-7 * fabs(mean) + 1e-7 / rstd;
        within[2 * r + 1] = (4e-7 + 2 * shift * shift) * rstd;
    }
    ops_check_each(test, y, reference, bound);
    if (stats)
        ops_check_each(test, stats, wanted, within);
}

static void run_layer_norm(struct ops_test *test, const int64_t *args)
{
    int64_t rows = args[0], width = args[1], flags = args[2];
    struct ops_mat *x = (flags & IN_PLACE ? ops_update : ops_input)(test, rows, width, width + 3, 1);
    struct ops_mat *gamma = ops_input(test, 1, width, width, 1), *beta = ops_input(test, 1, width, width, 1);
    struct ops_mat *add = flags & HAS_ADD ? ops_input(test, rows, width, width + 1, 1) : NULL;
    struct ops_mat *y = flags & IN_PLACE ? x : ops_output(test, rows, width, width + 2);
    struct ops_mat *stats = flags & HAS_STATS ? ops_output(test, rows, 2, 2) : NULL;
    shift_rows(test, x, flags);
    struct gd_layer_norm call = {
        .rows = rows, .width = width, .eps = (float)EPS, .x = x->device, .ldx = x->ld, .gamma = gamma->device,
        .beta = beta->device, .add = add ? add->device : NULL, .ldadd = add ? add->ld : 0, .y = y->device, .ldy = y->ld,
        .stats = stats ? stats->device : NULL,
    };
    OPS_RUN(test)
        test->backend->layer_norm(test->context, &call);
    if (ops_benchmarking(test))
        return;
    if (!ops_settled(test))
        compare_layer_norm(test, x, gamma, beta, add, y, stats);
    check_row_alone(test, call, x, y);
}

const struct ops_family ops_layer_norm = {
    .name = "layer_norm",
    .args = "rows width flags",
    .run = run_layer_norm,
    .cases = cases,
    .num_cases = OPS_COUNT(cases),
    .bench = bench,
    .num_bench = OPS_COUNT(bench),
    .bytes = bytes,
};

/* ---- layer_norm_backward ---------------------------------------------------------------------------------- */

/* rows, width, flags: small ones by central differences, all by the formula */
static const int64_t backward_cases[][OPS_ARGS] = {
    {1, 2, 0}, {3, 3, 0}, {4, 15, IN_PLACE}, {3, 16, 0}, {5, 17, IN_PLACE | OFFSET}, {63, 5, 0}, {64, 4, 0},
    {65, 3, IN_PLACE}, {130, 65, OFFSET}, {99, 768, 0}, {200, 512, IN_PLACE},
};
static const int64_t backward_bench[][OPS_ARGS] = {{750, 768, 0}};

struct loss {
    int64_t rows, width;
    double *x, *gamma, *beta, *dy;
};

/* sum of y dy, whose gradient by y is dy. */
static double weighted_sum(void *argument)
{
    struct loss *l = argument;
    double sum = 0;
    for (int64_t r = 0; r < l->rows; r++) {
        double mean, rstd;
        statistics(l->width, l->x + r * l->width, &mean, &rstd);
        for (int64_t i = 0; i < l->width; i++)
            sum += l->dy[r * l->width + i] * ((l->x[r * l->width + i] - mean) * rstd * l->gamma[i] + l->beta[i]);
    }
    return sum;
}

static void formula(const struct loss *l, double *dx, double *dgamma, double *dbeta)
{
    for (int64_t r = 0; r < l->rows; r++) {
        const double *x = l->x + r * l->width, *dy = l->dy + r * l->width;
        double mean, rstd, mean_du = 0, mean_product = 0;
        statistics(l->width, x, &mean, &rstd);
        for (int64_t i = 0; i < l->width; i++) {
            double unit = (x[i] - mean) * rstd;
            mean_du += dy[i] * l->gamma[i] / (double)l->width;
            mean_product += dy[i] * l->gamma[i] * unit / (double)l->width;
            dgamma[i] += dy[i] * unit;
            dbeta[i] += dy[i];
        }
        for (int64_t i = 0; i < l->width; i++)
            dx[r * l->width + i] = (dy[i] * l->gamma[i] - mean_du - (x[i] - mean) * rstd * mean_product) * rstd;
    }
}

static void run_layer_norm_backward(struct ops_test *test, const int64_t *args)
{
    int64_t rows = args[0], width = args[1], flags = args[2], count = rows * width;
    struct ops_mat *x = ops_input(test, rows, width, width + 3, 1), *gamma = ops_input(test, 1, width, width, 1);
    struct ops_mat *dy = (flags & IN_PLACE ? ops_update : ops_input)(test, rows, width, width + 1, 1);
    struct ops_mat *dx = flags & IN_PLACE ? dy : ops_output(test, rows, width, width + 2);
    struct ops_mat *dgamma = ops_update(test, 1, width, width, 1), *dbeta = ops_update(test, 1, width, width, 1);
    struct ops_mat *stats = ops_input(test, rows, 2, 2, 1);
    shift_rows(test, x, flags);
    struct loss loss = {rows, width, ops_host_doubles(test, x), ops_host_doubles(test, gamma), ops_doubles(test, width),
                        ops_host_doubles(test, dy)};
    for (int64_t r = 0; r < rows; r++) {
        double mean, rstd;
        statistics(width, loss.x + r * width, &mean, &rstd);
        stats->host[2 * r] = (float)mean;
        stats->host[2 * r + 1] = (float)rstd;
    }
    ops_upload(test, stats);
    struct gd_layer_norm_backward call = {
        .rows = rows, .width = width, .x = x->device, .dy = dy->device, .ldx = x->ld, .lddy = dy->ld,
        .gamma = gamma->device, .stats = stats->device, .dx = dx->device, .lddx = dx->ld, .dgamma = dgamma->device,
        .dbeta = dbeta->device,
    };
    OPS_RUN(test)
        test->backend->layer_norm_backward(test->context, &call);
    if (ops_settled(test))
        return;
    double *wanted = ops_doubles(test, count), *wanted_gamma = ops_doubles(test, width);
    double *wanted_beta = ops_doubles(test, width);
    double *bound = ops_doubles(test, count);
    formula(&loss, wanted, wanted_gamma, wanted_beta);
    if (count <= 400) {
        double *numeric = ops_doubles(test, count);
        ops_gradient(weighted_sum, &loss, loss.x, count, 1e-5, numeric);
        for (int64_t i = 0; i < count; i++)
            ops_expect(test, fabs(numeric[i] - wanted[i]) <
                                 1e-6 * (1 + fabs(wanted[i]) + stats->host[2 * (i / width) + 1]),
                       "the formula of dx is wrong: %g, %g by differences", wanted[i], numeric[i]);
        memset(wanted_gamma, 0, (size_t)width * sizeof(double));
        memset(wanted_beta, 0, (size_t)width * sizeof(double));
        ops_gradient(weighted_sum, &loss, loss.gamma, width, 1e-3, wanted_gamma);
        ops_gradient(weighted_sum, &loss, loss.beta, width, 1e-3, wanted_beta);
    }
    ops_add_initial(wanted_gamma, dgamma);
    ops_add_initial(wanted_beta, dbeta);
    for (int64_t r = 0; r < rows; r++) {
        double mean = stats->host[2 * r], rstd = stats->host[2 * r + 1];
        for (int64_t i = 0; i < width; i++)
            bound[r * width + i] = (1 + fabs(mean) * rstd) * rstd *
                                   (2e-6 + 4e-7 * fabs(loss.gamma[i] * loss.dy[r * width + i]));
    }
    ops_check_each(test, dx, wanted, bound);
    ops_check(test, dgamma, wanted_gamma, 1e-6 * sqrt((double)rows) + (flags & OFFSET ? 8e-7 * (double)rows : 0), 1e-6);
    ops_check(test, dbeta, wanted_beta, 1e-6 * sqrt((double)rows), 1e-6);
}

const struct ops_family ops_layer_norm_backward = {
    .name = "layer_norm_backward",
    .args = "rows width flags",
    .run = run_layer_norm_backward,
    .cases = backward_cases,
    .num_cases = OPS_COUNT(backward_cases),
    .bench = backward_bench,
    .num_bench = OPS_COUNT(backward_bench),
};
