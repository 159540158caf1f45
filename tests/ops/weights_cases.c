/*
 * weights_cases.c - weight_norm and its backward.
 */
#include "doubles.h"

#include <math.h>

/* out, in, kernel */
static const int64_t cases[][OPS_ARGS] = {
    {1, 1, 1}, {2, 1, 3}, {3, 2, 15}, {2, 4, 16}, {4, 3, 17}, {5, 6, 33}, {48, 12, 128},
};
static const int64_t bench[][OPS_ARGS] = {{768, 48, 128}};

static double bytes(const int64_t *args)
{
    return 8.0 * (double)(args[0] * args[1] * args[2]);
}

/* ---- weight_norm ------------------------------------------------------------------------------------------ */

/* w[r, k] = g[k] v[r, k] / |v[., k]| */
static void normalise(int64_t rows, int64_t kernel, const double *g, const double *v, double *w)
{
    for (int64_t k = 0; k < kernel; k++) {
        double squares = 0;
        for (int64_t r = 0; r < rows; r++)
            squares += v[r * kernel + k] * v[r * kernel + k];
        for (int64_t r = 0; r < rows; r++)
            w[r * kernel + k] = g[k] * v[r * kernel + k] / sqrt(squares);
    }
}

static void run_weight_norm(struct ops_test *test, const int64_t *args)
{
    int64_t out = args[0], in = args[1], kernel = args[2], rows = out * in;
    struct ops_mat *g = ops_input(test, 1, kernel, kernel, 1), *v = ops_input(test, rows, kernel, kernel, 1);
    struct ops_mat *w = ops_output(test, rows, kernel, kernel);
    OPS_RUN(test)
        test->backend->weight_norm(test->context, out, in, kernel, g->device, v->device, w->device);
    if (ops_settled(test))
        return;
    double *reference = ops_doubles(test, rows * kernel);
    normalise(rows, kernel, ops_host_doubles(test, g), ops_host_doubles(test, v), reference);
    ops_check(test, w, reference, 0, 2e-7);
}

const struct ops_family ops_weight_norm = {
    .name = "weight_norm",
    .args = "out in kernel",
    .run = run_weight_norm,
    .cases = cases,
    .num_cases = OPS_COUNT(cases),
    .bench = bench,
    .num_bench = OPS_COUNT(bench),
    .bytes = bytes,
};

/* ---- weight_norm_backward --------------------------------------------------------------------------------- */

struct loss {
    int64_t rows, kernel;
    double *g, *v, *dw, *w;
};

/* sum of w dw, whose gradient by w is dw. */
static double weighted_sum(void *argument)
{
    struct loss *loss = argument;
    double sum = 0;
    normalise(loss->rows, loss->kernel, loss->g, loss->v, loss->w);
    for (int64_t i = 0; i < loss->rows * loss->kernel; i++)
        sum += loss->w[i] * loss->dw[i];
    return sum;
}

static void run_weight_norm_backward(struct ops_test *test, const int64_t *args)
{
    int64_t out = args[0], in = args[1], kernel = args[2], rows = out * in;
    struct ops_mat *g = ops_input(test, 1, kernel, kernel, 1), *v = ops_input(test, rows, kernel, kernel, 1);
    struct ops_mat *dw = ops_input(test, rows, kernel, kernel, 1);
    struct ops_mat *dg = ops_update(test, 1, kernel, kernel, 1), *dv = ops_update(test, rows, kernel, kernel, 1);
    OPS_RUN(test)
        test->backend->weight_norm_backward(test->context, out, in, kernel, g->device, v->device, dw->device,
                                            dg->device, dv->device);
    if (ops_settled(test))
        return;
    struct loss loss = {rows, kernel, ops_host_doubles(test, g), ops_host_doubles(test, v), ops_host_doubles(test, dw),
                        ops_doubles(test, rows * kernel)};
    double *wanted_dg = ops_doubles(test, kernel), *wanted_dv = ops_doubles(test, rows * kernel);
    ops_gradient(weighted_sum, &loss, loss.g, kernel, 1e-3, wanted_dg);
    ops_gradient(weighted_sum, &loss, loss.v, rows * kernel, 1e-5, wanted_dv);
    ops_add_initial(wanted_dg, dg);
    ops_add_initial(wanted_dv, dv);
    ops_check(test, dg, wanted_dg, 1e-6, 1e-6);
    ops_check(test, dv, wanted_dv, 1e-6, 1e-6);
}

static const int64_t backward_cases[][OPS_ARGS] = {
    {2, 2, 1}, {3, 2, 3}, {3, 2, 15}, {2, 4, 16}, {4, 3, 17}, {5, 6, 33},
};

const struct ops_family ops_weight_norm_backward = {
    .name = "weight_norm_backward",
    .args = "out in kernel",
    .run = run_weight_norm_backward,
    .cases = backward_cases,
    .num_cases = OPS_COUNT(backward_cases),
    .bench = bench,
    .num_bench = OPS_COUNT(bench),
    .bytes = bytes,
};
