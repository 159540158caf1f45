/*
 * elementwise_cases.c - activate, activate_backward, what is no activation, round_rows, widen_rows, axpby, scatter_rows,
 * gather_rows. The whole range of GELU: vmath_cases.c.
 */
#include "../../csrc/bfloat16.h"
#include "doubles.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { IN_PLACE = 1 };

static double bytes(const int64_t *args)
{
    return 8.0 * (double)(args[0] * args[1]);
}

/* ---- activate, activate_backward --------------------------------------------------------------------------- */

static double activated(enum gd_activation activation, double z)
{
    switch (activation) {
    case GD_NONE:
        return z;
    case GD_GELU:
    case GD_GELU_REDUCED:
        return 0.5 * z * erfc(-z / sqrt(2));
    }
    return NAN;
}

/* Of what activate() gives, in |z|. */
static double bound_of(enum gd_activation activation)
{
    switch (activation) {
    case GD_NONE:
        return 0;
    case GD_GELU:
        return 2e-7;
    case GD_GELU_REDUCED:
        return 5e-5;
    }
    return NAN;
}

/* activation, rows, width, flags */
static const int64_t cases[][OPS_ARGS] = {
    {GD_GELU, 1, 1, 0}, {GD_GELU, 3, 3, IN_PLACE}, {GD_GELU, 2, 15, 0}, {GD_GELU, 2, 16, IN_PLACE},
    {GD_GELU, 2, 17, 0}, {GD_GELU, 40, 513, IN_PLACE}, {GD_GELU, 3, 16385, 0}, {GD_GELU, 1, 0, 0},
    {GD_GELU_REDUCED, 2, 17, IN_PLACE}, {GD_GELU_REDUCED, 40, 513, 0}, {GD_NONE, 2, 17, 0},
    {GD_NONE, 40, 513, IN_PLACE},
};
static const int64_t bench[][OPS_ARGS] = {{GD_GELU, 1000, 512, IN_PLACE}, {GD_GELU, 750, 3072, 0}};

static double activation_bytes(const int64_t *args)
{
    return bytes(args + 1);
}

static void run_activate(struct ops_test *test, const int64_t *args)
{
    const enum gd_activation activation = (enum gd_activation)args[0];
    int64_t rows = args[1], width = args[2], count = rows * width;
    struct ops_mat *z = (args[3] & IN_PLACE ? ops_update : ops_input)(test, rows, width, width + 3, 2);
    struct ops_mat *y = args[3] & IN_PLACE ? z : ops_output(test, rows, width, width + 1);
    OPS_RUN(test)
        test->backend->activate(test->context, activation, rows, width, z->device, z->ld, y->device, y->ld);
    if (ops_settled(test))
        return;
    double *values = ops_host_doubles(test, z), *reference = ops_doubles(test, count);
    double *bound = ops_doubles(test, count);
    for (int64_t i = 0; i < count; i++) {
        reference[i] = activated(activation, values[i]);
        bound[i] = bound_of(activation) * fabs(values[i]);
    }
    ops_check_each(test, y, reference, bound);
}

const struct ops_family ops_activate = {
    .name = "activate", .args = "activation rows width flags", .run = run_activate, .cases = cases,
    .num_cases = OPS_COUNT(cases), .bench = bench, .num_bench = OPS_COUNT(bench), .bytes = activation_bytes};

struct loss {
    enum gd_activation activation;
    double *z, *dy;
};

static double weighted(void *argument)
{
    struct loss *l = argument;
    return *l->dy * activated(l->activation, *l->z);
}

static void run_activate_backward(struct ops_test *test, const int64_t *args)
{
    const enum gd_activation activation = (enum gd_activation)args[0];
    int64_t rows = args[1], width = args[2], count = rows * width;
    struct ops_mat *z = ops_input(test, rows, width, width + 3, 2);
    struct ops_mat *dy = (args[3] & IN_PLACE ? ops_update : ops_input)(test, rows, width, width + 1, 1);
    struct ops_mat *dz = args[3] & IN_PLACE ? dy : ops_output(test, rows, width, width + 2);
    OPS_RUN(test)
        test->backend->activate_backward(test->context, activation, rows, width, z->device, z->ld, dy->device, dy->ld,
                                         dz->device, dz->ld);
    if (ops_settled(test))
        return;
    double *zs = ops_host_doubles(test, z), *dys = ops_host_doubles(test, dy);
    double *wanted = ops_doubles(test, count), *bound = ops_doubles(test, count);
    for (int64_t i = 0; i < count; i++) {
        /* One term of the sum at a time. */
        struct loss one = {activation, zs + i, dys + i};
        ops_gradient(weighted, &one, one.z, 1, 1e-5, wanted + i);
        bound[i] = 4e-7 * fabs(dys[i]);
    }
    ops_check_each(test, dz, wanted, bound);
}

const struct ops_family ops_activate_backward = {
    .name = "activate_backward", .args = "activation rows width flags", .run = run_activate_backward, .cases = cases,
    .num_cases = OPS_COUNT(cases), .bench = bench, .num_bench = OPS_COUNT(bench), .bytes = activation_bytes};

/* ---- No activation ---------------------------------------------------------------------------------------- */

/* activation, operation: each that takes one refuses it and writes nothing. */
enum { ACTIVATE, ACTIVATE_BACKWARD, WIDEN_ROWS, LINEAR, POS_CONV };
static const int64_t no_activations[][OPS_ARGS] = {
    {GD_GELU_REDUCED + 1, ACTIVATE}, {-1, ACTIVATE}, {GD_GELU_REDUCED + 1, ACTIVATE_BACKWARD}, {-1, ACTIVATE_BACKWARD},
    {GD_GELU_REDUCED + 1, WIDEN_ROWS}, {-1, WIDEN_ROWS}, {GD_GELU_REDUCED + 1, LINEAR}, {-1, LINEAR},
    {GD_GELU_REDUCED + 1, POS_CONV}, {-1, POS_CONV},
};

static void run_no_activation(struct ops_test *test, const int64_t *args)
{
    enum { ROWS = 3, WIDTH = 8 };
    const enum gd_activation activation = (enum gd_activation)args[0];
    const struct gd_backend *backend = test->backend;
    const int64_t lengths[] = {ROWS};
    struct ops_mat *z = ops_input(test, ROWS, WIDTH, WIDTH, 1), *dy = ops_input(test, ROWS, WIDTH, WIDTH, 1);
    struct ops_mat *y = ops_output(test, ROWS, WIDTH, WIDTH), *kept = ops_output(test, ROWS, WIDTH, WIDTH);
    struct gd_weight weight = {.out = WIDTH, .taps = 1, .in = WIDTH, .stride = 1};
    struct gd_pos_conv conv = {.rows = ops_rows(test, 1, lengths, NULL), .width = WIDTH, .groups = 1, .kernel = 1,
                               .x = z->device, .ldx = WIDTH, .activation = activation, .y = y->device, .ldy = WIDTH};
    weight.packed = conv.weight = ops_memory(test, backend->packed_size(test->context, &weight) +
                                                   backend->packed_pos_conv_size(test->context, &conv));
    switch (args[1]) {
    case ACTIVATE:
        backend->activate(test->context, activation, ROWS, WIDTH, z->device, WIDTH, y->device, WIDTH);
        break;
    case ACTIVATE_BACKWARD:
        backend->activate_backward(test->context, activation, ROWS, WIDTH, z->device, WIDTH, dy->device, WIDTH,
                                   y->device, WIDTH);
        break;
    case WIDEN_ROWS:
        backend->widen_rows(test->context, activation, ROWS, WIDTH, (const uint16_t *)z->device, WIDTH, kept->device,
                            WIDTH, y->device, WIDTH);
        break;
    case LINEAR:
        backend->linear(test->context, &(struct gd_linear){
            .rows = ROWS, .weight = &weight, .x = z->device, .ldx = WIDTH, .activation = activation, .y = y->device,
            .ldy = WIDTH,
        });
        break;
    case POS_CONV:
        backend->pos_conv(test->context, &conv);
        break;
    }
    const gd_status status = backend->synchronize(test->context);
    char message[80];
    snprintf(message, sizeof message, "activation: expected one of enum gd_activation, got %d", (int)activation);
    ops_expect(test, status == GD_EINVAL && strcmp(test->context->message, message) == 0, "status %d, \"%s\"",
               (int)status, test->context->message);
    const float *written = ops_result(test, y), *widened = ops_result(test, kept);
    for (int i = 0; i < ROWS * WIDTH; i++)
        ops_expect(test, isnan(written[i]) && isnan(widened[i]), "element %d was written", i);
}

const struct ops_family ops_no_activation = {
    .name = "no_activation", .args = "activation operation", .run = run_no_activation, .cases = no_activations,
    .num_cases = OPS_COUNT(no_activations)};

/* ---- round_rows, widen_rows ------------------------------------------------------------------------------- */

/* There and back: rows, width, no GELU */
static const int64_t kept_cases[][OPS_ARGS] = {
    {1, 1, 0}, {3, 3, 1}, {2, 15, 0}, {2, 16, 1}, {2, 17, 0}, {40, 513, 0}, {3, 16385, 1}, {1, 0, 0},
};

static const int64_t kept_bench[][OPS_ARGS] = {{1000, 512, 1}};

static void run_kept(struct ops_test *test, const int64_t *args)
{
    const int64_t rows = args[0], width = args[1], count = rows * width, ld = width + 5;
    struct ops_mat *x = ops_input(test, rows, width, width + 3, 2), *z = ops_output(test, rows, width, width + 1);
    struct ops_mat *y = args[2] ? NULL : ops_output(test, rows, width, width + 2);
    uint16_t *kept = ops_memory(test, (size_t)((rows - 1) * ld + width) * sizeof *kept);
    OPS_RUN(test) {
        test->backend->round_rows(test->context, rows, width, x->device, x->ld, kept, ld);
        test->backend->widen_rows(test->context, GD_GELU, rows, width, kept, ld, z->device, z->ld,
                                  y ? y->device : NULL, y ? y->ld : 0);
    }
    if (ops_settled(test))
        return;
    double *wanted = ops_host_doubles(test, x), *bound = ops_doubles(test, count);
    for (int64_t i = 0; i < count; i++) {
        wanted[i] = gd_float_from_bfloat16(gd_bfloat16_from_float((float)wanted[i]));
        bound[i] = 0;
    }
    ops_check_each(test, z, wanted, bound);
    for (int64_t i = 0; i < count; i++) {
        bound[i] = 2e-7 * fabs(wanted[i]);
        wanted[i] = 0.5 * wanted[i] * erfc(-wanted[i] / sqrt(2));
    }
    if (y)
        ops_check_each(test, y, wanted, bound);
}

static double kept_bytes(const int64_t *args)
{
    return 16.0 * (double)(args[0] * args[1]);
}

const struct ops_family ops_round_rows = {
    .name = "round_rows", .args = "rows width without_gelu", .run = run_kept, .cases = kept_cases,
    .num_cases = OPS_COUNT(kept_cases),
    .bench = kept_bench, .num_bench = 1, .bytes = kept_bytes};
const struct ops_family ops_widen_rows = {
    .name = "widen_rows", .args = "rows width without_gelu", .run = run_kept, .cases = kept_cases + 2, .num_cases = 3};

/* ---- axpby ------------------------------------------------------------------------------------------------ */

/* rows, width, 100 alpha, 100 beta */
static const int64_t axpby_cases[][OPS_ARGS] = {
    {1, 1, 100, 100}, {3, 15, -37, 100}, {2, 16, 50, 0}, {2, 17, 100, -25}, {50, 768, 10, 0}, {1, 40000, 3, 100},
};
static const int64_t axpby_bench[][OPS_ARGS] = {{750, 768, 100, 100}};

static void run_axpby(struct ops_test *test, const int64_t *args)
{
    int64_t rows = args[0], width = args[1], count = rows * width;
    float alpha = (float)args[2] / 100, beta = (float)args[3] / 100;
    struct ops_mat *x = ops_input(test, rows, width, width + 3, 1);
    /* Where beta is 0, y holds NaN. */
    struct ops_mat *y = beta != 0 ? ops_update(test, rows, width, width + 1, 1)
                                  : ops_output(test, rows, width, width + 1);
    OPS_RUN(test)
        test->backend->axpby(test->context, rows, width, alpha, x->device, x->ld, beta, y->device, y->ld);
    if (ops_settled(test))
        return;
    double *a = ops_host_doubles(test, x), *b = ops_host_doubles(test, y), *bound = ops_doubles(test, count);
    for (int64_t i = 0; i < count; i++) {
        double before = beta != 0 ? beta * b[i] : 0;
        bound[i] = 1.3e-7 * (fabs(alpha * a[i]) + fabs(before));
        a[i] = alpha * a[i] + before;
    }
    ops_check_each(test, y, a, bound);
}

const struct ops_family ops_axpby = {
    .name = "axpby", .args = "rows width alpha_100 beta_100", .run = run_axpby, .cases = axpby_cases,
    .num_cases = OPS_COUNT(axpby_cases), .bench = axpby_bench, .num_bench = OPS_COUNT(axpby_bench)};

/* ---- scatter_rows, gather_rows ---------------------------------------------------------------------------- */

/* width, frames_max, rows less than frames_max of the four utterances, frames that are not valid in each */
static const int64_t ragged_cases[][OPS_ARGS] = {
    {1, 1, 0, 0}, {3, 5, 1, 0}, {17, 40, 5, 2}, {768, 9, 2, 1}, {64, 700, 30, 0}, {5, 12, -3, 2},
};

struct ragged {
    const struct gd_rows *rows;
    int64_t counts[4], valid[4];
};

static struct ragged make_ragged(struct ops_test *test, const int64_t *args)
{
    struct ragged ragged = {0};
    for (int64_t b = 0; b < 4; b++) {
        int64_t rows = args[1] - b * args[2];
        ragged.counts[b] = rows > 1 ? rows : 1;
        ragged.valid[b] = ragged.counts[b] > args[3] ? ragged.counts[b] - args[3] : 1;
    }
    ragged.rows = ops_rows(test, 4, ragged.counts, ragged.valid);
    return ragged;
}

static void run_scatter_rows(struct ops_test *test, const int64_t *args)
{
    int64_t width = args[0], frames = args[1];
    struct ragged ragged = make_ragged(test, args);
    struct ops_mat *x = ops_input(test, ragged.rows->total, width, width + 2, 1);
    struct ops_mat *padded = ops_output(test, 4 * frames, width, width);
    OPS_RUN(test)
        test->backend->scatter_rows(test->context, ragged.rows, width, x->device, x->ld, frames, padded->device);
    double *reference = ops_doubles(test, 4 * frames * width);
    for (int64_t b = 0; b < 4; b++)
        for (int64_t t = 0; t < frames && t < ragged.valid[b]; t++)
            for (int64_t c = 0; c < width; c++)
                reference[(b * frames + t) * width + c] = x->host[(ragged.rows->first[b] + t) * x->ld + c];
    ops_check(test, padded, reference, 0, 0);
}

const struct ops_family ops_scatter_rows = {
    .name = "scatter_rows", .args = "width frames shorter invalid", .run = run_scatter_rows, .cases = ragged_cases,
    .num_cases = OPS_COUNT(ragged_cases)};

static void run_gather_rows(struct ops_test *test, const int64_t *args)
{
    int64_t width = args[0], frames = args[1];
    struct ragged ragged = make_ragged(test, args);
    struct ops_mat *padded = ops_input(test, 4 * frames, width, width, 1);
    struct ops_mat *x = ops_output(test, ragged.rows->total, width, width + 2);
    OPS_RUN(test)
        test->backend->gather_rows(test->context, ragged.rows, width, padded->device, frames, x->device, x->ld);
    double *reference = ops_doubles(test, ragged.rows->total * width);
    for (int64_t b = 0; b < 4; b++)
        for (int64_t t = 0; t < frames && t < ragged.counts[b]; t++)
            for (int64_t c = 0; c < width; c++)
                reference[(ragged.rows->first[b] + t) * width + c] = padded->host[(b * frames + t) * width + c];
    ops_check(test, x, reference, 0, 0);
}

const struct ops_family ops_gather_rows = {
    .name = "gather_rows", .args = "width frames shorter invalid", .run = run_gather_rows, .cases = ragged_cases,
    .num_cases = OPS_COUNT(ragged_cases)};
