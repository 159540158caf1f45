/*
 * position_cases.c - position_bias, gate and their backwards.
 */
#include "doubles.h"

#include <math.h>

/* ---- position_bias ---------------------------------------------------------------------------------------- */

/* heads, longest, num_buckets, max_distance */
static const int64_t bias_cases[][OPS_ARGS] = {
    {1, 1, 320, 800}, {2, 79, 320, 800}, {12, 81, 320, 800}, {3, 1500, 320, 800}, {1, 40000, 320, 800},
    {2, 200, 32, 128}, {2, 40, 8, 12},
};

/* The bucket in exact arithmetic: no offset comes closer to a bound of two buckets than float32 can tell. */
static int64_t bucket(int64_t num_buckets, int64_t max_distance, int64_t d)
{
    int64_t half = num_buckets / 2, exact = half / 2, distance = d < 0 ? -d : d;
    if (distance >= exact) {
        double position = log((double)distance / (double)exact) / log((double)max_distance / (double)exact);
        int64_t shared = exact + (int64_t)(position * (double)(half - exact) + 1e-9);
        distance = shared < half - 1 ? shared : half - 1;
    }
    return distance + (d > 0 ? half : 0);
}

static gd_config bias_config(const int64_t *args)
{
    return (gd_config){.encoder_attention_heads = (int)args[0], .num_buckets = (int)args[2],
                       .max_distance = (int)args[3]};
}

static void run_position_bias(struct ops_test *test, const int64_t *args)
{
    int64_t heads = args[0], longest = args[1], width = 2 * longest - 1;
    gd_config config = bias_config(args);
    struct ops_mat *table = ops_input(test, args[2], heads, heads, 1), *bias = ops_output(test, heads, width, width);
    OPS_RUN(test)
        test->backend->position_bias(test->context, &config, longest, table->device, bias->device);
    double *wanted = ops_doubles(test, heads * width);
    for (int64_t h = 0; h < heads; h++)
        for (int64_t d = 1 - longest; d < longest; d++)
            wanted[h * width + d + longest - 1] = table->host[bucket(args[2], args[3], d) * heads + h];
    ops_check(test, bias, wanted, 0, 0);
}

const struct ops_family ops_position_bias = {
    .name = "position_bias", .args = "heads longest buckets distance", .run = run_position_bias, .cases = bias_cases,
    .num_cases = OPS_COUNT(bias_cases), .bench = bias_cases + 3, .num_bench = 1};

/* bias is linear in the table: the gradient is the sum over the offsets of a bucket. */
static void run_position_bias_backward(struct ops_test *test, const int64_t *args)
{
    int64_t heads = args[0], longest = args[1], width = 2 * longest - 1;
    gd_config config = bias_config(args);
    struct ops_mat *dbias = ops_input(test, heads, width, width, 1);
    struct ops_mat *dtable = ops_update(test, args[2], heads, heads, 1);
    OPS_RUN(test)
        test->backend->position_bias_backward(test->context, &config, longest, dbias->device, dtable->device);
    if (ops_settled(test))
        return;
    double *wanted = ops_doubles(test, args[2] * heads);
    for (int64_t h = 0; h < heads; h++)
        for (int64_t d = 1 - longest; d < longest; d++)
            wanted[bucket(args[2], args[3], d) * heads + h] += dbias->host[h * width + d + longest - 1];
    ops_add_initial(wanted, dtable);
    ops_check(test, dtable, wanted, 2e-7, 2e-7);
}

const struct ops_family ops_position_bias_backward = {
    .name = "position_bias_backward", .args = "heads longest buckets distance", .run = run_position_bias_backward,
    .cases = bias_cases, .num_cases = OPS_COUNT(bias_cases), .bench = bias_cases + 3, .num_bench = 1};

/* ---- gate ------------------------------------------------------------------------------------------------- */

/* rows, heads, head_dim, 100 size of x */
static const int64_t gate_cases[][OPS_ARGS] = {
    {1, 1, 1, 100}, {3, 2, 3, 100}, {5, 15, 7, 100}, {4, 16, 16, 300}, {4, 17, 17, 100}, {33, 12, 64, 100},
    {70, 3, 5, 1000},
};
static const int64_t gate_bench[][OPS_ARGS] = {{750, 12, 64, 100}};

struct gate {
    int64_t rows, heads, dim;
    double *x, *weight, *bias, *grep_a, *dgate;
};

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

static double gate_of(const struct gate *g, int64_t r, int64_t h, double *size)
{
    double sums[2] = {0}, s0, s1;
    *size = 0;
    for (int64_t o = 0; o < 8; o++) {
        sums[o / 4] += g->bias[o];
        for (int64_t d = 0; d < g->dim; d++) {
            double product = g->x[(r * g->heads + h) * g->dim + d] * g->weight[o * g->dim + d];
            sums[o / 4] += product;
            *size += fabs(product);
        }
    }
    s0 = sigmoid(sums[0]);
    s1 = sigmoid(sums[1]);
    return s0 * (s1 * g->grep_a[h] - 1) + 2;
}

struct gate_operands {
    struct gd_gate call;
    struct ops_mat *x, *weight, *bias, *grep_a;
    struct gate gate;
};

static struct gate_operands make_gate(struct ops_test *test, const int64_t *args)
{
    int64_t rows = args[0], heads = args[1], dim = args[2];
    const gd_config config = {.encoder_attention_heads = (int)heads, .encoder_embed_dim = (int)(heads * dim)};
    struct gate_operands o = {
        .x = ops_input(test, rows, heads * dim, heads * dim + 3, (double)args[3] / 100),
        .weight = ops_input(test, 8, dim, dim, 0.2), .bias = ops_input(test, 1, 8, 8, 0.2),
        .grep_a = ops_input(test, 1, heads, heads, 1),
    };
    ops_scratch(test, &config, rows, 1);
    o.call = (struct gd_gate){.rows = rows, .heads = heads, .head_dim = dim, .x = o.x->device, .ldx = o.x->ld,
                              .weight = o.weight->device, .bias = o.bias->device, .grep_a = o.grep_a->device};
    o.gate = (struct gate){rows, heads, dim, ops_host_doubles(test, o.x), ops_host_doubles(test, o.weight),
                           ops_host_doubles(test, o.bias), ops_host_doubles(test, o.grep_a), NULL};
    return o;
}

static void run_gate(struct ops_test *test, const int64_t *args)
{
    int64_t rows = args[0], heads = args[1];
    struct gate_operands o = make_gate(test, args);
    struct ops_mat *gate = ops_output(test, rows, heads, heads);
    o.call.gate = gate->device;
    OPS_RUN(test)
        test->backend->gate(test->context, &o.call);
    if (ops_settled(test))
        return;
    double *wanted = ops_doubles(test, rows * heads), *bound = ops_doubles(test, rows * heads);
    for (int64_t i = 0; i < rows * heads; i++) {
        double size, a = fabs(o.gate.grep_a[i % heads]);
        wanted[i] = gate_of(&o.gate, i / heads, i % heads, &size);
        bound[i] = (1 + a) * (2e-7 * size + 4e-7) + 2e-7;
    }
    ops_check_each(test, gate, wanted, bound);
}

const struct ops_family ops_gate = {
    .name = "gate", .args = "rows heads head_dim size_100", .run = run_gate, .cases = gate_cases,
    .num_cases = OPS_COUNT(gate_cases), .bench = gate_bench, .num_bench = OPS_COUNT(gate_bench)};

static double weighted_sum(void *argument)
{
    const struct gate *g = argument;
    double sum = 0, size;
    for (int64_t i = 0; i < g->rows * g->heads; i++)
        sum += g->dgate[i] * gate_of(g, i / g->heads, i % g->heads, &size);
    return sum;
}

/* Each row's and head's share of the gradients, at one term of the sum at a time. */
static void gate_gradient(struct ops_test *test, struct gate *g, double *dx, double *dweight, double *dbias,
                          double *dgrep_a)
{
    double *one = ops_doubles(test, 8 * g->dim);
    for (int64_t r = 0; r < g->rows; r++)
        for (int64_t h = 0; h < g->heads; h++) {
            int64_t at = r * g->heads + h;
            struct gate term = {1, 1, g->dim, g->x + at * g->dim, g->weight, g->bias, g->grep_a + h, g->dgate + at};
            ops_gradient(weighted_sum, &term, term.x, g->dim, 1e-5, dx + at * g->dim);
            ops_gradient(weighted_sum, &term, term.weight, 8 * g->dim, 1e-5, one);
            for (int64_t i = 0; i < 8 * g->dim; i++)
                dweight[i] += one[i];
            ops_gradient(weighted_sum, &term, term.bias, 8, 1e-5, one);
            for (int64_t i = 0; i < 8; i++)
                dbias[i] += one[i];
            ops_gradient(weighted_sum, &term, term.grep_a, 1, 1e-5, one);
            dgrep_a[h] += one[0];
        }
}

static void run_gate_backward(struct ops_test *test, const int64_t *args)
{
    int64_t rows = args[0], heads = args[1], dim = args[2];
    struct gate_operands o = make_gate(test, args);
    struct ops_mat *dgate = ops_input(test, rows, heads, heads, 1);
    struct ops_mat *dx = ops_update(test, rows, heads * dim, heads * dim + 1, 1);
    struct ops_mat *dweight = ops_update(test, 8, dim, dim, 1), *dbias = ops_update(test, 1, 8, 8, 1);
    struct ops_mat *dgrep_a = ops_update(test, 1, heads, heads, 1);
    struct gd_gate_backward call = {.forward = o.call, .dgate = dgate->device, .dx = dx->device, .lddx = dx->ld,
                                    .dweight = dweight->device, .dbias = dbias->device, .dgrep_a = dgrep_a->device};
    OPS_RUN(test)
        test->backend->gate_backward(test->context, &call);
    if (ops_settled(test))
        return;
    double *wanted_x = ops_doubles(test, rows * heads * dim), *wanted_weight = ops_doubles(test, 8 * dim);
    double *wanted_bias = ops_doubles(test, 8), *wanted_a = ops_doubles(test, heads);
    double size = sqrt((double)(rows * heads));
    o.gate.dgate = ops_host_doubles(test, dgate);
    gate_gradient(test, &o.gate, wanted_x, wanted_weight, wanted_bias, wanted_a);
    ops_add_initial(wanted_x, dx);
    ops_add_initial(wanted_weight, dweight);
    ops_add_initial(wanted_bias, dbias);
    ops_add_initial(wanted_a, dgrep_a);
    double x_size = (double)args[3] / 100;
    ops_check(test, dx, wanted_x, 2e-6 * (1 + x_size), 1e-6);
    ops_check(test, dweight, wanted_weight, 1e-6 * size * (1 + x_size * x_size), 1e-6);
    ops_check(test, dbias, wanted_bias, 1e-6 * size * (1 + x_size), 1e-6);
    ops_check(test, dgrep_a, wanted_a, 1e-6 * sqrt((double)rows) * (1 + x_size), 1e-6);
}

const struct ops_family ops_gate_backward = {
    .name = "gate_backward", .args = "rows heads head_dim size_100", .run = run_gate_backward, .cases = gate_cases,
    .num_cases = OPS_COUNT(gate_cases), .bench = gate_bench, .num_bench = OPS_COUNT(gate_bench)};
