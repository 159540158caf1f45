/*
 * attention_cases.c - attention and attention_backward.
 */
#include "doubles.h"

#include <math.h>
#include <string.h>

#include "../../csrc/bfloat16.h"
#include "../../csrc/philox.h"

enum { HAS_BIAS = 1, HAS_GATE = 2, HAS_LSE = 4, HAS_DROPOUT = 8, PADDED = 16 /* two rows of the second past valid */,
       LARGE = 32 /* logits of size 60 */, IN_PLACE = 64 /* out takes q's place */, BFLOAT16 = 128,
       MANY = 256 /* the three utterances REPEATS times */ };

#define DROPOUT 0.2
#define SITE 65
#define REPEATS 30

/* heads, head_dim, rows of the utterances, flags */
static const int64_t cases[][OPS_ARGS] = {
    {1, 1, 1, 1, 1, 0},
    {2, 3, 5, 3, 1, HAS_BIAS | HAS_GATE | HAS_LSE},
    {3, 15, 17, 31, 2, HAS_BIAS | HAS_LSE},
    {2, 16, 33, 5, 16, HAS_DROPOUT | HAS_LSE | PADDED},
    {2, 17, 96, 97, 15, HAS_BIAS | HAS_GATE | HAS_DROPOUT | HAS_LSE},
    {2, 33, 50, 60, 9, HAS_BIAS | HAS_GATE | LARGE | HAS_LSE},
    {2, 64, 100, 383, 49, HAS_BIAS | HAS_GATE | PADDED},
    {1, 64, 384, 385, 1, HAS_BIAS | HAS_GATE | HAS_LSE | HAS_DROPOUT},
    {1, 80, 800, 449, 3, HAS_BIAS | HAS_GATE | HAS_LSE | LARGE},
    {12, 64, 99, 12, 50, HAS_BIAS | HAS_GATE | HAS_LSE},
    {3, 17, 97, 3, 200, HAS_BIAS | HAS_GATE | IN_PLACE},
    {2, 200, 41, 33, 5, HAS_BIAS | HAS_GATE | IN_PLACE},
    {2, 3, 7, 4, 1, HAS_BIAS | HAS_GATE | HAS_DROPOUT | HAS_LSE | PADDED | MANY},
};
static const int64_t reduced_cases[][OPS_ARGS] = {
    {1, 1, 1, 1, 1, BFLOAT16},
    {2, 3, 5, 3, 1, BFLOAT16 | HAS_BIAS | HAS_GATE},
    {3, 15, 17, 31, 2, BFLOAT16 | HAS_BIAS},
    {2, 16, 33, 5, 16, BFLOAT16 | PADDED},
    {2, 17, 96, 97, 15, BFLOAT16 | HAS_BIAS | HAS_GATE},
    {2, 33, 50, 60, 9, BFLOAT16 | HAS_BIAS | HAS_GATE | LARGE},
    {2, 64, 100, 383, 49, BFLOAT16 | HAS_BIAS | HAS_GATE | PADDED},
    {1, 80, 800, 449, 3, BFLOAT16 | HAS_BIAS | HAS_GATE},
    {12, 64, 99, 12, 50, BFLOAT16 | HAS_BIAS | HAS_GATE},
    {3, 17, 97, 3, 200, BFLOAT16 | HAS_BIAS | HAS_GATE | IN_PLACE},
};
static const int64_t reduced_bench[][OPS_ARGS] = {
    {12, 64, 99, 0, 0, BFLOAT16 | HAS_BIAS | HAS_GATE},
    {12, 64, 749, 0, 0, BFLOAT16 | HAS_BIAS | HAS_GATE},
    {1, 64, 30000, 0, 0, BFLOAT16 | HAS_BIAS | HAS_GATE},
};
/* One utterance: rows 0 are left out. */
static const int64_t bench[][OPS_ARGS] = {
    {12, 64, 99, 0, 0, HAS_BIAS | HAS_GATE},   {12, 64, 350, 0, 0, HAS_BIAS | HAS_GATE},
    {12, 64, 749, 0, 0, 0},                    {12, 64, 749, 0, 0, HAS_BIAS | HAS_GATE},
    {12, 64, 749, 0, 0, HAS_BIAS | HAS_GATE | HAS_LSE | HAS_DROPOUT}, {1, 64, 30000, 0, 0, HAS_BIAS | HAS_GATE},
};

static double flops(const int64_t *args)
{
    return 4.0 * (double)(args[0] * args[1]) * (double)(args[2] * args[2] + args[3] * args[3] + args[4] * args[4]);
}

struct operands {
    struct gd_attention call;
    gd_dropout_seed seed;
    struct ops_mat *q, *k, *v, *gate, *bias, *out, *lse;
};

static struct operands make_attention(struct ops_test *test, const int64_t *args, int training)
{
    int64_t heads = args[0], dim = args[1], width = heads * dim, flags = args[5];
    int64_t counts[3 * REPEATS], valid[3 * REPEATS];
    for (int i = 0; i < 3 * REPEATS; i++)
        valid[i] = (counts[i] = args[2 + i % 3]) - (flags & PADDED && i % 3 == 1 ? 2 : 0);
    const struct gd_rows *rows = ops_rows(test, args[3] == 0 ? 1 : flags & MANY ? 3 * REPEATS : 3, counts, valid);
    double size = flags & LARGE ? 8 : 1;
    struct operands o = {.seed = {7, 1234, 5},
                         .q = (flags & IN_PLACE ? ops_update : ops_input)(test, rows->total, width, width + 2, size),
                         .k = ops_input(test, rows->total, width, width + 1, size),
                         .v = ops_input(test, rows->total, width, width + 3, 1)};
    for (int64_t b = 0; b < rows->batch; b++)
        for (int64_t t = valid[b]; t < counts[b]; t++) /* never read */
            for (int64_t c = 0; c < width; c++)
                o.k->host[(rows->first[b] + t) * o.k->ld + c] = o.v->host[(rows->first[b] + t) * o.v->ld + c] = NAN;
    ops_upload(test, o.k);
    ops_upload(test, o.v);
    o.gate = flags & HAS_GATE ? ops_input(test, rows->total, heads, heads, 1) : NULL;
    o.bias = flags & HAS_BIAS ? ops_input(test, heads, 2 * rows->longest - 1, 2 * rows->longest - 1, 1) : NULL;
    o.out = flags & IN_PLACE ? o.q : ops_output(test, rows->total, width, width + 5);
    o.lse = flags & HAS_LSE ? ops_output(test, rows->total, heads, heads) : NULL;
    const gd_config config = {.encoder_attention_heads = (int)heads, .encoder_embed_dim = (int)width};
    ops_scratch(test, &config, rows->longest, training);
    o.call = (struct gd_attention){
        .rows = rows, .heads = heads, .head_dim = dim, .scale = (float)(1 / sqrt((double)dim)), .q = o.q->device,
        .k = o.k->device, .v = o.v->device, .ldq = o.q->ld, .ldk = o.k->ld, .ldv = o.v->ld,
        .gate = o.gate ? o.gate->device : NULL, .bias = o.bias ? o.bias->device : NULL, .out = o.out->device,
        .ldout = o.out->ld, .lse = o.lse ? o.lse->device : NULL, .dropout = flags & HAS_DROPOUT ? DROPOUT : 0,
        .precision = flags & BFLOAT16 ? GD_BFLOAT16 : GD_FLOAT32, .site = SITE,
        /* seed: by the caller, in whose frame this lies */
    };
    return o;
}

/* One query of one head in float64: everything by index of the operands' rows and columns. */
struct model {
    const struct operands *o;
    double *q, *k, *v, *gate, *bias, *dout;
    double *p, *factor;       /* of the last query: probabilities, dropout factors */
    double lse, largest, size; /* of the last query: largest logit, largest sum of |q k| scale + |gate bias| */
};

static void round_all(double *x, int64_t count, float scale)
{
    for (int64_t i = 0; i < count; i++)
        x[i] = (double)gd_float_from_bfloat16(gd_bfloat16_from_float((float)x[i] * scale)) / scale;
}

static struct model make_model(struct ops_test *test, const struct operands *o)
{
    struct model m = {.o = o, .q = ops_host_doubles(test, o->q), .k = ops_host_doubles(test, o->k),
                      .v = ops_host_doubles(test, o->v)};
    m.gate = o->gate ? ops_host_doubles(test, o->gate) : NULL;
    m.bias = o->bias ? ops_host_doubles(test, o->bias) : NULL;
    if (o->call.precision == GD_BFLOAT16) { /* queries are scaled before they are rounded */
        round_all(m.q, o->q->rows * o->q->width, o->call.scale);
        round_all(m.k, o->k->rows * o->k->width, 1);
        round_all(m.v, o->v->rows * o->v->width, 1);
    }
    m.p = ops_doubles(test, o->call.rows->longest);
    m.factor = ops_doubles(test, o->call.rows->longest);
    return m;
}

static double bias_at(const struct model *m, int64_t h, int64_t i, int64_t j)
{
    int64_t longest = m->o->call.rows->longest;
    return m->bias ? m->bias[h * (2 * longest - 1) + j - i + longest - 1] : 0;
}

static double gate_at(const struct model *m, int64_t row, int64_t h)
{
    return m->gate ? m->gate[row * m->o->call.heads + h] : 1;
}

static double factor_at(const struct operands *o, int64_t b, int64_t h, int64_t i, int64_t j)
{
    if (o->call.dropout == 0)
        return 1;
    struct gd_dropout_row row = gd_dropout_row(o->call.dropout, &o->seed, o->call.site);
    row.frame = (uint32_t)i;
    row.line = (uint32_t)((o->seed.first_utterance + b) * o->call.heads + h);
    return gd_dropout_factor(&row, (uint32_t)j) != 0 ? 1 / (1 - o->call.dropout) : 0;
}

static void query(struct model *m, int64_t b, int64_t h, int64_t i)
{
    const struct gd_attention *a = &m->o->call;
    int64_t first = a->rows->first[b], width = a->heads * a->head_dim, column = h * a->head_dim;
    int64_t keys = a->rows->valid[b];
    double sum = 0;
    m->largest = -INFINITY;
    m->size = 0;
    for (int64_t j = 0; j < keys; j++) {
        double logit = 0, size = 0, added = gate_at(m, first + i, h) * bias_at(m, h, i, j);
        for (int64_t d = 0; d < a->head_dim; d++) {
            double product = m->q[(first + i) * width + column + d] * m->k[(first + j) * width + column + d] * a->scale;
            logit += product;
            size += fabs(product);
        }
        m->p[j] = logit + added;
        m->largest = fmax(m->largest, m->p[j]);
        m->size = fmax(m->size, size + fabs(added));
        m->factor[j] = factor_at(m->o, b, h, i, j);
    }
    for (int64_t j = 0; j < keys; j++)
        sum += m->p[j] = exp(m->p[j] - m->largest);
    for (int64_t j = 0; j < keys; j++)
        m->p[j] /= sum;
    m->lse = m->largest + log(sum);
}

/* An utterance alone, with the longest batch's bias cut to its own, has the bits that it has in the batch. */
static void check_alone(struct ops_test *test, const struct operands *o, int64_t flags)
{
    struct gd_attention call = o->call;
    int64_t b = 1, first = call.rows->first[b], rows = call.rows->first[b + 1] - first;
    int64_t width = call.heads * call.head_dim;
    int64_t longest = call.rows->longest, valid = call.rows->valid[b];
    struct ops_mat *out = ops_output(test, rows, width, width);
    if (call.bias) {
        struct ops_mat *bias = ops_input(test, call.heads, 2 * rows - 1, 2 * rows - 1, 1);
        for (int64_t h = 0; h < call.heads; h++)
            memcpy(bias->host + h * (2 * rows - 1), o->bias->host + h * (2 * longest - 1) + longest - rows,
                   (size_t)(2 * rows - 1) * sizeof(float));
        ops_upload(test, bias);
        call.bias = bias->device;
    }
    gd_dropout_seed seed = {o->seed.seed, o->seed.step, o->seed.first_utterance + b};
    call.seed = flags & HAS_DROPOUT ? &seed : NULL;
    call.rows = ops_rows(test, 1, &rows, &valid);
    call.q += first * call.ldq;
    call.k += first * call.ldk;
    call.v += first * call.ldv;
    call.gate = call.gate ? call.gate + first * call.heads : NULL;
    call.lse = NULL;
    call.out = out->device;
    call.ldout = width;
    test->backend->attention(test->context, &call);
    const float *alone = ops_result(test, out), *among = ops_result(test, o->out);
    for (int64_t r = 0; r < rows; r++)
        ops_expect(test, memcmp(alone + r * width, among + (first + r) * o->out->ld,
                                (size_t)width * sizeof(float)) == 0,
                   "row %lld of the second utterance has other bits alone", (long long)r);
}

static void compare_attention(struct ops_test *test, const int64_t *args, const struct operands *o)
{
    int64_t heads = args[0], dim = args[1], width = heads * dim;
    const struct gd_rows *rows = o->call.rows;
    struct model m = make_model(test, o);
    double *out = ops_doubles(test, rows->total * width), *bound = ops_doubles(test, rows->total * width);
    double *lse = ops_doubles(test, rows->total * heads), *lse_bound = ops_doubles(test, rows->total * heads);
    for (int64_t b = 0; b < rows->batch; b++)
        for (int64_t i = 0; i < rows->first[b + 1] - rows->first[b]; i++)
            for (int64_t h = 0; h < heads; h++) {
                int64_t row = rows->first[b] + i;
                query(&m, b, h, i);
                double error = 3e-7 * m.size + 1.2e-7 * fabs(m.largest) + 6e-7;
                if (o->call.precision == GD_BFLOAT16) /* the numerators are rounded too */
                    error += 0x1p-8;
                for (int64_t d = 0; d < dim; d++) {
                    double *sum = out + row * width + h * dim + d, size = 0;
                    for (int64_t j = 0; j < rows->valid[b]; j++) {
                        double product = m.p[j] * m.factor[j] * m.v[(rows->first[b] + j) * width + h * dim + d];
                        *sum += product;
                        size += fabs(product);
                    }
                    bound[row * width + h * dim + d] = error * size;
                }
                lse[row * heads + h] = m.lse;
                lse_bound[row * heads + h] = error;
            }
    ops_check_each(test, o->out, out, bound);
    if (o->lse)
        ops_check_each(test, o->lse, lse, lse_bound);
}

static void run_attention(struct ops_test *test, const int64_t *args)
{
    int64_t flags = args[5];
    struct operands o = make_attention(test, args, 0);
    o.call.seed = flags & HAS_DROPOUT ? &o.seed : NULL;
    OPS_RUN(test)
        test->backend->attention(test->context, &o.call);
    if (ops_benchmarking(test))
        return;
    if (!ops_settled(test))
        compare_attention(test, args, &o);
    if (!(flags & IN_PLACE)) /* q is gone */
        check_alone(test, &o, flags);
}

const struct ops_family ops_attention = {
    .name = "attention", .args = "heads head_dim rows rows rows flags", .run = run_attention, .cases = cases,
    .num_cases = OPS_COUNT(cases), .bench = bench, .num_bench = OPS_COUNT(bench), .flops = flops};

/* A device may not have attention() in each precision. */
static enum gd_precision reduced_precision(const int64_t *args)
{
    return args[5] & BFLOAT16 ? GD_BFLOAT16 : GD_FLOAT32;
}

const struct ops_family ops_attention_reduced = {
    .name = "attention_reduced", .args = "heads head_dim rows rows rows flags", .run = run_attention,
    .cases = reduced_cases, .num_cases = OPS_COUNT(reduced_cases), .bench = reduced_bench,
    .num_bench = OPS_COUNT(reduced_bench), .flops = flops,
    .precision = reduced_precision};

/* ---- attention_backward ----------------------------------------------------------------------------------- */

/* Those up to 6 rows by central differences too. */
static const int64_t backward_cases[][OPS_ARGS] = {
    {1, 1, 2, 1, 3, 0},
    {2, 3, 5, 3, 1, HAS_BIAS | HAS_GATE},
    {2, 3, 6, 4, 2, HAS_BIAS | HAS_GATE | HAS_DROPOUT},
    {1, 5, 4, 6, 3, HAS_BIAS | PADDED},
    {3, 15, 17, 31, 2, HAS_BIAS},
    {2, 16, 33, 5, 16, HAS_DROPOUT | PADDED},
    {2, 17, 96, 97, 15, HAS_BIAS | HAS_GATE | HAS_DROPOUT},
    {2, 33, 50, 60, 9, HAS_BIAS | HAS_GATE | LARGE},
    {1, 64, 384, 385, 49, HAS_BIAS | HAS_GATE | HAS_DROPOUT | PADDED},
    {2, 5, 500, 3, 1, HAS_BIAS | HAS_GATE | HAS_DROPOUT},
    {2, 129, 41, 33, 5, HAS_BIAS | HAS_GATE | HAS_DROPOUT | PADDED},
    {2, 3, 7, 4, 1, HAS_BIAS | HAS_GATE | HAS_DROPOUT | PADDED | MANY},
};
static const int64_t backward_bench[][OPS_ARGS] = {
    {12, 64, 749, 0, 0, HAS_BIAS | HAS_GATE}, {12, 64, 749, 0, 0, HAS_BIAS | HAS_GATE | HAS_DROPOUT}};

static double backward_flops(const int64_t *args)
{
    return 2.5 * flops(args);
}

static double weighted_sum(void *argument)
{
    struct model *m = argument;
    const struct gd_attention *a = &m->o->call;
    int64_t width = a->heads * a->head_dim;
    double sum = 0;
    for (int64_t b = 0; b < a->rows->batch; b++)
        for (int64_t i = 0; i < a->rows->first[b + 1] - a->rows->first[b]; i++)
            for (int64_t c = 0; c < width; c++) {
                int64_t first = a->rows->first[b];
                if (c % a->head_dim == 0)
                    query(m, b, c / a->head_dim, i);
                for (int64_t j = 0; j < a->rows->valid[b]; j++)
                    sum += m->p[j] * m->factor[j] * m->v[(first + j) * width + c] * m->dout[(first + i) * width + c];
            }
    return sum;
}

struct gradients {
    double *q, *k, *v, *gate, *bias;
};

static struct gradients make_gradients(struct ops_test *test, const struct gd_attention *a)
{
    int64_t count = a->rows->total * a->heads * a->head_dim;
    return (struct gradients){ops_doubles(test, count), ops_doubles(test, count), ops_doubles(test, count),
                              ops_doubles(test, a->rows->total * a->heads),
                              ops_doubles(test, a->heads * (2 * a->rows->longest - 1))};
}

/* softmax's gradient, dlogit = p (dp - sum of p dp), spelled out. */
static void add_query_gradient(struct model *m, int64_t b, int64_t h, int64_t i, struct gradients *g)
{
    const struct gd_attention *a = &m->o->call;
    int64_t first = a->rows->first[b], width = a->heads * a->head_dim, longest = a->rows->longest;
    const double *dout = m->dout + (first + i) * width + h * a->head_dim;
    const double *q = m->q + (first + i) * width + h * a->head_dim;
    double mean = 0;
    query(m, b, h, i);
    for (int pass = 0; pass < 2; pass++)
        for (int64_t j = 0; j < a->rows->valid[b]; j++) {
            int64_t at = (first + j) * width + h * a->head_dim;
            double dp = 0;
            for (int64_t d = 0; d < a->head_dim; d++)
                dp += dout[d] * m->v[at + d] * m->factor[j];
            if (pass == 0) {
                mean += m->p[j] * dp;
                continue;
            }
            double dlogit = m->p[j] * (dp - mean);
            for (int64_t d = 0; d < a->head_dim; d++) {
                g->q[(first + i) * width + h * a->head_dim + d] += dlogit * a->scale * m->k[at + d];
                g->k[at + d] += dlogit * a->scale * q[d];
                g->v[at + d] += m->p[j] * m->factor[j] * dout[d];
            }
            g->gate[(first + i) * a->heads + h] += dlogit * bias_at(m, h, i, j);
            g->bias[h * (2 * longest - 1) + j - i + longest - 1] += dlogit * gate_at(m, first + i, h);
        }
}

static void compare_formula(struct ops_test *test, struct model *m, double *x, int64_t count, const double *formula,
                            const char *name)
{
    double *numeric = ops_doubles(test, count);
    ops_gradient(weighted_sum, m, x, count, 1e-5, numeric);
    for (int64_t i = 0; i < count; i++)
        ops_expect(test, isnan(x[i]) || fabs(numeric[i] - formula[i]) < 1e-7 * (1 + fabs(numeric[i])),
                   "the formula of %s is wrong: %g, %g by differences", name, formula[i], numeric[i]);
}

static void run_attention_backward(struct ops_test *test, const int64_t *args)
{
    int64_t heads = args[0], dim = args[1], width = heads * dim, flags = args[5];
    int64_t forward_args[OPS_ARGS];
    memcpy(forward_args, args, sizeof forward_args);
    forward_args[5] |= HAS_LSE;
    struct operands o = make_attention(test, forward_args, 1);
    int64_t total = o.call.rows->total, count = total * width, offsets = 2 * o.call.rows->longest - 1;
    o.call.seed = flags & HAS_DROPOUT ? &o.seed : NULL;
    struct ops_mat *dout = ops_input(test, total, width, width + 4, 1), *dq = ops_output(test, total, width, width + 1);
    struct ops_mat *dk = ops_output(test, total, width, width + 2), *dv = ops_output(test, total, width, width + 3);
    struct ops_mat *dgate = o.gate ? ops_output(test, total, heads, heads) : NULL;
    struct ops_mat *dbias = o.bias ? ops_update(test, heads, offsets, offsets, 1) : NULL;
    test->backend->attention(test->context, &o.call);
    struct gd_attention_backward call = {
        .forward = o.call, .dout = dout->device, .lddout = dout->ld, .dq = dq->device, .dk = dk->device,
        .dv = dv->device, .lddq = dq->ld, .lddk = dk->ld, .lddv = dv->ld, .dgate = dgate ? dgate->device : NULL,
        .dbias = dbias ? dbias->device : NULL,
    };
    OPS_RUN(test)
        test->backend->attention_backward(test->context, &call);
    if (ops_settled(test))
        return;
    struct model m = make_model(test, &o);
    struct gradients wanted = make_gradients(test, &o.call);
    m.dout = ops_host_doubles(test, dout);
    for (int64_t b = 0; b < o.call.rows->batch; b++)
        for (int64_t i = 0; i < o.call.rows->first[b + 1] - o.call.rows->first[b]; i++)
            for (int64_t h = 0; h < heads; h++)
                add_query_gradient(&m, b, h, i, &wanted);
    if (o.call.rows->longest <= 6) {
        compare_formula(test, &m, m.q, count, wanted.q, "dq");
        compare_formula(test, &m, m.k, count, wanted.k, "dk");
        compare_formula(test, &m, m.v, count, wanted.v, "dv");
        if (m.gate)
            compare_formula(test, &m, m.gate, total * heads, wanted.gate, "dgate");
        if (m.bias)
            compare_formula(test, &m, m.bias, heads * offsets, wanted.bias, "dbias");
    }
    /* Of unit-size operands dp is of size sqrt(dim), and so are sums of p dp; an error of a logit is a relative one
     * of p. */
    double size = flags & LARGE ? 100 : 1, error = 2e-6 * (1 + sqrt((double)dim)) * size;
    ops_check(test, dq, wanted.q, error * (flags & LARGE ? 8 : 1), 2e-6 * size);
    ops_check(test, dk, wanted.k, error * (flags & LARGE ? 8 : 1), 2e-6 * size);
    ops_check(test, dv, wanted.v, error, 2e-6 * size);
    if (dgate)
        ops_check(test, dgate, wanted.gate, error, 2e-6 * size);
    if (dbias) {
        ops_add_initial(wanted.bias, dbias);
        ops_check(test, dbias, wanted.bias, error, 2e-6 * size);
    }
}

const struct ops_family ops_attention_backward = {
    .name = "attention_backward", .args = "heads head_dim rows rows rows flags", .run = run_attention_backward,
    .cases = backward_cases, .num_cases = OPS_COUNT(backward_cases), .bench = backward_bench,
    .num_bench = OPS_COUNT(backward_bench), .flops = backward_flops};
