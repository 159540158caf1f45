/*
 * bias_cases.c - bias_backward: sums over rows, within BOUND times the sum of absolute values.
 */
#include "ops_test.h"

#include <math.h>

#define BOUND 6e-7 /* as in gemm_cases.c: chains of at most 256, and errors random in sign */

/* rows, width */
static const int64_t bias_cases[][OPS_ARGS] = {
    {1, 1}, {3, 15}, {255, 16}, {256, 17}, {257, 63}, {513, 64}, {99, 65}, {1000, 768}, {0, 5},
};

static const int64_t bias_bench[][OPS_ARGS] = {{750, 768}, {750, 3072}, {1599, 512}};

static double bias_bytes(const int64_t *args)
{
    return 4.0 * (double)(args[0] * args[1]);
}

static void run_bias(struct ops_test *test, const int64_t *args)
{
    int64_t rows = args[0], width = args[1];
    struct ops_mat *dy = ops_input(test, rows, width, width + 3, 1), *dbias = ops_update(test, 1, width, width, 1);
    OPS_RUN(test)
        test->backend->bias_backward(test->context, rows, width, dy->device, dy->ld, dbias->device);
    if (ops_settled(test))
        return;
    double *reference = ops_doubles(test, width), *bound = ops_doubles(test, width);
    for (int64_t c = 0; c < width; c++) {
        reference[c] = dbias->host[c];
        bound[c] = BOUND * fabs(reference[c]);
        for (int64_t r = 0; r < rows; r++) {
            reference[c] += dy->host[r * dy->ld + c];
            bound[c] += BOUND * fabs(dy->host[r * dy->ld + c]);
        }
    }
    ops_check_each(test, dbias, reference, bound);
}

const struct ops_family ops_bias_backward = {
    .name = "bias_backward",
    .args = "rows width",
    .run = run_bias,
    .cases = bias_cases,
    .num_cases = OPS_COUNT(bias_cases),
    .bench = bias_bench,
    .num_bench = OPS_COUNT(bias_bench),
    .bytes = bias_bytes,
};
