/*
 * conv_cases.c - conv_backward, with split_taps and merge_taps around it.
 *
 * BOUND times the sum of the products' absolute values, as for linear(); the transformations of minimal filtering
 * double it. In bfloat16 each factor is rounded, by 2^-9 of it at most, and the errors of a sum are independent:
 * BOUND_BFLOAT16 times the products' Euclidean norm, in which a filtered sum's neighbours count for the transformed
 * factors.
 */
#include "ops_test.h"

#include <math.h>
#include <string.h>

#define BOUND 1.2e-6
#define BOUND_BFLOAT16 (14 / 256.0)

enum { NO_DX = 1, TWICE = 2, CONTIGUOUS = 4, BFLOAT16 = 8 };

/* rows, out, taps, in, stride, rows of x beyond the last window, flags */
static const int64_t cases[][OPS_ARGS] = {
    {1, 1, 1, 1, 1, 0, 0},
    {3, 5, 2, 4, 2, 0, 0},
    {7, 17, 3, 15, 2, 2, 0},
    {9, 16, 10, 1, 5, 0, NO_DX | CONTIGUOUS},
    {33, 8, 10, 1, 5, 3, NO_DX | CONTIGUOUS | TWICE},
    {1, 16, 3, 16, 2, 0, 0},
    {2, 20, 3, 17, 2, 1, TWICE},
    {3, 33, 3, 31, 2, 3, 0},
    {4, 15, 3, 32, 2, 0, NO_DX},
    {5, 48, 3, 33, 2, 1, TWICE},
    {71, 40, 3, 64, 2, 2, 0},
    {1023, 17, 3, 20, 2, 0, 0},
    {1024, 16, 3, 16, 2, 1, 0},
    {1029, 20, 3, 18, 2, 1, TWICE},
    {300, 512, 3, 512, 2, 1, 0},
    {120, 64, 2, 64, 2, 1, 0},
    {3, 5, 2, 4, 2, 0, BFLOAT16},
    {7, 17, 3, 15, 2, 2, BFLOAT16},
    {1, 16, 3, 16, 2, 0, BFLOAT16},
    {2, 20, 3, 17, 2, 1, TWICE | BFLOAT16},
    {3, 33, 3, 31, 2, 3, BFLOAT16},
    {4, 15, 3, 32, 2, 0, NO_DX | BFLOAT16},
    {5, 48, 3, 33, 2, 1, TWICE | BFLOAT16},
    {2047, 17, 3, 20, 2, 0, BFLOAT16},
    {2048, 16, 3, 16, 2, 1, BFLOAT16},
    {2053, 20, 3, 18, 2, 1, TWICE | BFLOAT16},
    {300, 512, 3, 512, 2, 1, BFLOAT16},
    {121, 64, 2, 64, 2, 1, BFLOAT16},
};
static const int64_t bench[][OPS_ARGS] = {
    {1603, 512, 3, 512, 2, 1, 0}, {6411, 512, 3, 512, 2, 1, 0}, {400, 512, 2, 512, 2, 0, 0},
    {1603, 512, 3, 512, 2, 1, BFLOAT16}, {6411, 512, 3, 512, 2, 1, BFLOAT16}, {400, 512, 2, 512, 2, 0, BFLOAT16},
};

static enum gd_precision precision_of(const int64_t *args)
{
    return args[6] & BFLOAT16 ? GD_BFLOAT16 : GD_FLOAT32;
}

/* Of a sum over `count` products, whose sizes and squares are given. */
static double bound_of(const int64_t *args, int64_t count, double size, double squares)
{
    if (precision_of(args) == GD_BFLOAT16)
        return BOUND_BFLOAT16 * sqrt(squares + (double)count);
    return BOUND * (size + sqrt((double)count));
}

static double flops(const int64_t *args)
{
    return 4.0 * (double)(args[0] * args[1] * args[2] * args[3]);
}

struct operands {
    struct ops_mat *x, *w, *dz, *dw, *dx;
};

/* Of a large product some elements are computed: the others are NaN. */
static void check_dw(struct ops_test *test, const int64_t *args, const struct operands *o, double factor)
{
    const int64_t rows = args[0], out = args[1], taps = args[2], in = args[3], stride = args[4];
    double *dw = ops_doubles(test, out * in * taps), *bound = ops_doubles(test, out * in * taps);
    const double share = 5e6 / flops(args);
    for (int64_t i = 0; i < out * in * taps; i++) {
        const int64_t n = i / (in * taps), c = i / taps % in, k = i % taps;
        double sum = 0, size = 0, squares = 0;
        if (ops_uniform(test) > share) {
            dw[i] = NAN;
            continue;
        }
        for (int64_t t = 0; t < rows; t++) {
            double product = o->dz->host[t * o->dz->ld + n];
            product *= o->x->host[(t * stride + k) * o->x->ld + c];
            sum += product;
            size += fabs(product);
            squares += product * product;
        }
        dw[i] = o->dw->host[i] + factor * sum;
        /* A sum's neighbours in its group take part in its rounding. */
        bound[i] = factor * bound_of(args, rows, size, squares) + 2e-7 * fabs(dw[i]);
    }
    ops_check_each(test, o->dw, dw, bound);
}

static void check_dx(struct ops_test *test, const int64_t *args, const struct operands *o)
{
    const int64_t rows = args[0], out = args[1], taps = args[2], in = args[3], stride = args[4];
    double *dx = ops_doubles(test, o->dx->rows * in), *bound = ops_doubles(test, o->dx->rows * in);
    const double share = 5e6 / flops(args);
    for (int64_t r = 0; r < o->dx->rows; r++)
        for (int64_t c = 0; c < in; c++) {
            double sum = 0, size = 0, squares = 0;
            if (ops_uniform(test) > share) {
                dx[r * in + c] = NAN;
                continue;
            }
            for (int64_t k = 0; k < taps; k++) {
                const int64_t t = (r - k) / stride;
                if (r < k || (r - k) % stride || t >= rows)
                    continue;
                for (int64_t n = 0; n < out; n++) {
                    double product = o->dz->host[t * o->dz->ld + n];
                    product *= o->w->host[(n * in + c) * taps + k];
                    sum += product;
                    size += fabs(product);
                    squares += product * product;
                }
            }
            dx[r * in + c] = sum;
            bound[r * in + c] = size > 0 ? bound_of(args, out, size, squares) : 0;
        }
    ops_check_each(test, o->dx, dx, bound);
}

static void run(struct ops_test *test, const int64_t *args)
{
    const int64_t rows = args[0], out = args[1], taps = args[2], in = args[3], stride = args[4], flags = args[6];
    const int64_t x_rows = (rows - 1) * stride + taps + args[5], ldx = flags & CONTIGUOUS ? in : gd_row_stride(in);
    const struct gd_backend *backend = test->backend;
    const struct gd_weight weight = {.out = out, .taps = taps, .in = in, .stride = stride,
                                     .precision = precision_of(args)};
    const struct operands o = {
        .x = ops_input(test, x_rows, in, ldx, 1),
        .w = ops_input(test, out, in * taps, in * taps, 1),
        .dz = ops_input(test, rows, out, out + 3, 1),
        .dw = ops_update(test, out, in * taps, in * taps, 1),
        .dx = flags & NO_DX ? NULL : ops_output(test, x_rows, in, ldx + 1),
    };
    const size_t size = backend->conv_taps_size(test->context, &weight) * sizeof(float);
    float *w_taps = ops_memory(test, size), *dw_taps = ops_memory(test, size);
    float *scratch = ops_memory(test, backend->conv_backward_scratch(test->context, &weight) * sizeof(float));
    const struct gd_conv_backward call = {
        .rows = rows, .weight = &weight, .x = o.x->device, .ldx = ldx, .dz = o.dz->device, .lddz = o.dz->ld,
        .w_taps = w_taps, .dw_taps = dw_taps, .dx = o.dx ? o.dx->device : NULL, .lddx = o.dx ? o.dx->ld : 0,
        .dx_rows = o.dx ? x_rows : 0, .scratch = scratch,
    };
    backend->split_taps(test->context, &weight, o.w->device, w_taps);
    backend->zero(test->context, dw_taps, size);
    OPS_RUN(test)
        backend->conv_backward(test->context, &call);
    if (ops_benchmarking(test))
        return;
    if (flags & TWICE)
        backend->conv_backward(test->context, &call);
    backend->merge_taps(test->context, &weight, dw_taps, o.dw->device);
    if (ops_settled(test))
        return;
    check_dw(test, args, &o, flags & TWICE ? 2 : 1);
    if (o.dx)
        check_dx(test, args, &o);
}

const struct ops_family ops_conv_backward = {
    .name = "conv_backward",
    .args = "rows out taps in stride beyond flags",
    .run = run,
    .cases = cases,
    .num_cases = OPS_COUNT(cases),
    .bench = bench,
    .num_bench = OPS_COUNT(bench),
    .flops = flops,
    .precision = precision_of,
};
