/*
 * gemm_cases.c - linear, gemm.
 *
 * A sum of K products in float32 is made of chains of at most 256 that are then added up. Its bound is BOUND
 * times the sum of |a b|, ten roundings of 2^-24: the errors of the many additions are random in sign.
 *
 * bfloat16 and int8 products are held against those of the rounded factors, so the bounds are of the sums alone: with
 * int8 of the few roundings after the integer sums, which a unit's error in one of these exceeds.
 */
#include "../../csrc/bfloat16.h"
#include "../../csrc/cpu/ops.h"
#include "ops_test.h"
#include "reduced.h"

#include <math.h>
#include <string.h>

#define BOUND 6e-7
/* GELU's own error and the rounding of what is added after the sum. GD_GELU_REDUCED's: see vmath_template.h; a case
 * that keeps what stands before it is held to the tight bound there, and to the same bits without. */
#define BOUND_AFTER 4e-7
#define BOUND_GELU_REDUCED 4.7e-5

static double gelu(double x)
{
    return 0.5 * x * (1 + erf(x * 0.70710678118654752440));
}

/* ---- linear -------------------------------------------------------------------------------------------- */

enum { HAS_BIAS = 1, HAS_GELU = 2, HAS_RESIDUAL = 4, IN_PLACE = 8, HAS_PRE = 16, GAP = 32 };
enum { BFLOAT16 = 64, INT8 = 128, GELU_REDUCED = 256 };

#define REDUCED(precision) \
    {1, 1, 1, 1, 1, precision}, \
    {3, 15, 1, 2, 1, precision | HAS_BIAS | HAS_GELU}, \
    {12, 16, 1, 3, 1, precision | HAS_RESIDUAL}, \
    {13, 17, 1, 31, 1, precision | HAS_BIAS | HAS_GELU | HAS_PRE}, \
    {5, 31, 1, 32, 1, precision | HAS_BIAS | HAS_RESIDUAL | IN_PLACE}, \
    {7, 33, 1, 33, 1, precision | HAS_BIAS | HAS_GELU | HAS_RESIDUAL | HAS_PRE}, \
    {11, 47, 1, 63, 1, precision | HAS_BIAS | HAS_GELU | HAS_RESIDUAL | IN_PLACE}, \
    {24, 48, 1, 511, 1, precision | HAS_BIAS}, \
    {25, 65, 1, 513, 1, precision | HAS_BIAS | HAS_GELU}, \
    {31, 49, 1, 1025, 1, precision | HAS_RESIDUAL}, \
    {23, 40, 3, 24, 2, precision | HAS_GELU | GAP}, \
    {50, 33, 3, 301, 2, precision | HAS_BIAS | HAS_GELU}, \
    {29, 20, 2, 1027, 2, precision | HAS_PRE | GAP}, \
    {22, 20, 3, 1030, 2, precision | HAS_BIAS | GAP}, \
    {9, 20, 2, 37, 5, precision}, \
    {193, 40, 2, 32, 1, precision | HAS_BIAS | HAS_RESIDUAL}, \
    {198, 512, 3, 512, 2, precision | HAS_GELU | GAP}, \
    {99, 768, 1, 768, 1, precision | HAS_BIAS | HAS_RESIDUAL}, \
    {99, 96, 1, 3072, 1, precision | HAS_BIAS}, \
    {25, 80, 1, 65, 1, precision | HAS_BIAS | GELU_REDUCED | HAS_PRE}, \
    {26, 47, 3, 72, 2, precision | GELU_REDUCED | HAS_PRE | GAP}, \
    {31, 64, 1, 4099, 1, precision | GELU_REDUCED | HAS_PRE | HAS_RESIDUAL},

/* rows, out, taps, in, stride (of the convolution, in rows), flags */
static const int64_t linear_cases[][OPS_ARGS] = {
    {1, 1, 1, 1, 1, 0},
    {1, 3, 1, 5, 1, HAS_BIAS},
    {3, 15, 1, 16, 1, HAS_BIAS | HAS_GELU},
    {4, 16, 1, 17, 1, HAS_BIAS | HAS_GELU | HAS_PRE},
    {5, 17, 1, 15, 1, HAS_RESIDUAL},
    {6, 31, 1, 33, 1, HAS_BIAS | HAS_RESIDUAL},
    {7, 32, 1, 31, 1, HAS_BIAS | HAS_RESIDUAL | IN_PLACE},
    {11, 33, 1, 255, 1, HAS_BIAS | HAS_GELU | HAS_RESIDUAL | HAS_PRE},
    {12, 47, 1, 256, 1, HAS_BIAS | HAS_GELU | HAS_RESIDUAL | IN_PLACE},
    {13, 48, 1, 257, 1, HAS_BIAS},
    {23, 49, 1, 513, 1, HAS_PRE},
    {24, 64, 1, 768, 1, HAS_RESIDUAL | IN_PLACE},
    {25, 65, 3, 16, 2, HAS_GELU},
    {17, 8, 10, 1, 5, HAS_BIAS | HAS_GELU | HAS_PRE},
    {40, 512, 10, 1, 5, HAS_BIAS | HAS_GELU},
    {40, 79, 10, 1, 5, HAS_BIAS | GELU_REDUCED | HAS_PRE},
    {50, 20, 3, 24, 2, HAS_BIAS | HAS_GELU | GAP},
    {49, 33, 3, 300, 2, HAS_GELU | GAP},
    {14, 20, 3, 257, 2, HAS_RESIDUAL | IN_PLACE | GAP},
    {36, 16, 2, 257, 2, HAS_BIAS | HAS_PRE | GAP},
    {191, 40, 2, 20, 2, GAP},
    {192, 40, 2, 20, 1, GAP},
    {193, 40, 2, 20, 1, HAS_BIAS | HAS_RESIDUAL},
    {99, 768, 1, 768, 1, HAS_BIAS | HAS_RESIDUAL},
    {99, 768, 1, 3072, 1, HAS_BIAS},
    {49, 3072, 1, 768, 1, HAS_BIAS | HAS_GELU | HAS_PRE},
    {389, 512, 3, 512, 2, HAS_GELU | GAP},
    {198, 512, 2, 512, 2, HAS_GELU | GAP},
};

static const int64_t reduced_cases[][OPS_ARGS] = {REDUCED(BFLOAT16) REDUCED(INT8)};

#define REDUCED_BENCH(precision) \
    {1599, 512, 3, 512, 2, precision | GELU_REDUCED | GAP}, \
    {749, 512, 2, 512, 2, precision | GELU_REDUCED | GAP}, \
    {99, 768, 1, 768, 1, precision | HAS_BIAS | GAP}, \
    {750, 768, 1, 768, 1, precision | HAS_BIAS | GAP}, \
    {750, 3072, 1, 768, 1, precision | HAS_BIAS | GELU_REDUCED | GAP}, \
    {750, 768, 1, 3072, 1, precision | HAS_BIAS | HAS_RESIDUAL | GAP},

static const int64_t linear_bench[][OPS_ARGS] = {
    {3199, 512, 10, 1, 5, HAS_BIAS | HAS_GELU},
    {3199, 512, 10, 1, 5, HAS_BIAS | GELU_REDUCED},
    {500, 512, 3, 512, 2, HAS_GELU | GAP},
    {1599, 512, 3, 512, 2, HAS_GELU | GAP},
    {3000, 512, 3, 512, 2, HAS_GELU | GAP},
    {749, 512, 2, 512, 2, HAS_GELU | GAP},
    {99, 768, 1, 768, 1, HAS_BIAS | GAP},
    {99, 3072, 1, 768, 1, HAS_BIAS | HAS_GELU | GAP},
    {99, 768, 1, 3072, 1, HAS_BIAS | HAS_RESIDUAL | GAP},
    {750, 768, 1, 768, 1, HAS_BIAS | GAP},
    {750, 3072, 1, 768, 1, HAS_BIAS | HAS_GELU | GAP},
    {750, 768, 1, 3072, 1, HAS_BIAS | HAS_RESIDUAL | GAP},
};

static const int64_t reduced_bench[][OPS_ARGS] = {REDUCED_BENCH(BFLOAT16) REDUCED_BENCH(INT8)};

static double linear_flops(const int64_t *args)
{
    return 2.0 * (double)(args[0] * args[1] * args[2] * args[3]);
}

static enum gd_precision linear_precision(const int64_t *args)
{
    const int64_t flags = args[5];
    return flags & INT8 ? GD_INT8 : flags & BFLOAT16 ? GD_BFLOAT16 : GD_FLOAT32;
}

struct linear_operands {
    struct gd_weight weight;
    struct gd_linear call;
    struct ops_mat *x, *w, *bias, *residual, *pre, *y;
};

static void make_linear(struct ops_test *test, const int64_t *args, struct linear_operands *operands)
{
    int64_t rows = args[0], out = args[1], taps = args[2], in = args[3], stride = args[4], flags = args[5];
    int64_t ldx = flags & GAP ? gd_row_stride(in) : in, ldy = ops_benchmarking(test) ? gd_row_stride(out) : out + 3;
    struct linear_operands o = {0};
    o.x = ops_input(test, (rows - 1) * stride + taps, in, ldx, 1);
    o.w = ops_input(test, out, taps * in, taps * in, 1 / sqrt((double)(taps * in)));
    o.bias = flags & HAS_BIAS ? ops_input(test, 1, out, out, 1) : NULL;
    o.y = flags & IN_PLACE ? ops_update(test, rows, out, ldy, 1) : ops_output(test, rows, out, ldy);
    o.residual = flags & IN_PLACE ? o.y : flags & HAS_RESIDUAL ? ops_input(test, rows, out, out + 1, 1) : NULL;
    o.pre = flags & HAS_PRE ? ops_output(test, rows, out, out + 2) : NULL;
    o.weight = (struct gd_weight){.out = out, .taps = taps, .in = in, .stride = stride,
                                   .precision = linear_precision(args)};
    void *packed = ops_memory(test, test->backend->packed_size(test->context, &o.weight));
    /* The checkpoint's layout (out, in, taps) where there is more than one tap. */
    test->backend->pack(test->context, &o.weight, o.w->device, taps * in, 1, taps, packed);
    o.weight.packed = packed;
    o.call = (struct gd_linear){
        .rows = rows, .weight = &operands->weight, .x = o.x->device, .ldx = ldx,
        .bias = o.bias ? o.bias->device : NULL,
        .activation = flags & HAS_GELU ? GD_GELU : flags & GELU_REDUCED ? GD_GELU_REDUCED : GD_NONE,
        .residual = o.residual ? o.residual->device : NULL, .ldresidual = o.residual ? o.residual->ld : 0,
        .pre = o.pre ? o.pre->device : NULL, .ldpre = o.pre ? o.pre->ld : 0, .y = o.y->device, .ldy = ldy,
    };
    *operands = o;
}

/* Any run of rows, of whole groups where they are computed in groups, gives alone the bits that it has among the
 * others. */
static void check_rows_alone(struct ops_test *test, const struct linear_operands *o)
{
    int64_t first = (int64_t)(ops_uniform(test) * (double)o->call.rows);
    int64_t rows = 1 + (int64_t)(ops_uniform(test) * (double)(o->call.rows - first));
    if (o->weight.taps == 3 && o->weight.stride == 2) {
        rows += first % GD_ROW_GROUP;
        first -= first % GD_ROW_GROUP;
        rows += (GD_ROW_GROUP - rows % GD_ROW_GROUP) % GD_ROW_GROUP;
        rows = rows < o->call.rows - first ? rows : o->call.rows - first;
    }
    int64_t out = o->weight.out;
    struct gd_linear part = o->call;
    struct ops_mat *y;
    if (o->residual == o->y) { /* what it held before is what the rows alone start from */
        y = ops_update(test, rows, out, out, 1);
        for (int64_t r = 0; r < rows; r++)
            memcpy(y->host + r * out, o->y->host + (first + r) * o->y->ld, (size_t)out * sizeof(float));
        ops_upload(test, y);
        part.residual = y->device;
        part.ldresidual = out;
    } else {
        y = ops_output(test, rows, out, out);
        part.residual = part.residual ? part.residual + first * part.ldresidual : NULL;
    }
    part.rows = rows;
    part.x += first * o->weight.stride * part.ldx;
    part.pre = NULL;
    part.y = y->device;
    part.ldy = out;
    test->backend->linear(test->context, &part);
    const float *alone = ops_result(test, y), *among = ops_result(test, o->y);
    for (int64_t r = 0; r < rows; r++)
        ops_expect(test, memcmp(alone + r * out, among + (first + r) * o->y->ld, (size_t)out * sizeof(float)) == 0,
                   "row %lld has other bits in rows %lld .. %lld alone", (long long)(first + r), (long long)first,
                   (long long)(first + rows - 1));
}

/* NaN or infinity in an element of x: a row that reads it has no number left, and one whose group does not has the bits
 * that it had. */
static void check_unfinite(struct ops_test *test, const struct linear_operands *o)
{
    static const float values[] = {NAN, -NAN, INFINITY, -INFINITY};
    const int64_t out = o->weight.out, taps = o->weight.taps, stride = o->weight.stride;
    const int64_t group = taps == 3 && stride == 2 ? GD_ROW_GROUP : 1;
    const int64_t at = (int64_t)(ops_uniform(test) * (double)o->x->rows);
    float *element = o->x->host + at * o->x->ld + (int64_t)(ops_uniform(test) * (double)o->x->width);
    const float before = *element, *finite = ops_result(test, o->y);
    struct ops_mat *y = ops_output(test, o->call.rows, out, out);
    struct gd_linear call = o->call;
    call.pre = NULL;
    call.y = y->device;
    call.ldy = out;
    *element = values[(int)(ops_uniform(test) * OPS_COUNT(values))];
    ops_upload(test, o->x);
    test->backend->linear(test->context, &call);
    *element = before;
    ops_upload(test, o->x);
    const float *result = ops_result(test, y);
    for (int64_t r = 0; r < call.rows; r++) {
        const float *row = result + r * out;
        const int64_t first = r / group * group * stride, last = (r / group * group + group - 1) * stride + taps - 1;
        int64_t numbers = 0;
        for (int64_t n = 0; n < out; n++)
            numbers += isfinite(row[n]) != 0;
        if (at >= r * stride && at < r * stride + taps)
            ops_expect(test, numbers == 0, "row %lld has %lld numbers, though it reads row %lld of x",
                       (long long)r, (long long)numbers, (long long)at);
        else if (at < first || at > last)
            ops_expect(test, memcmp(row, finite + r * o->y->ld, (size_t)out * sizeof *row) == 0,
                       "row %lld has other bits, though it does not read row %lld of x", (long long)r, (long long)at);
    }
}

static void compare_linear(struct ops_test *test, const int64_t *args, const struct linear_operands *o)
{
    int64_t rows = args[0], out = args[1], taps = args[2], in = args[3], stride = args[4];
    double *y = ops_doubles(test, rows * out), *bound = ops_doubles(test, rows * out);
    double *pre = ops_doubles(test, rows * out), *pre_bound = ops_doubles(test, rows * out);
    double *xs = ops_rounded(test, o->x, o->weight.precision, 1), *ws = ops_rounded(test, o->w, o->weight.precision, 0);
    const int filtered = test->backend->shares_memory && o->weight.precision != GD_FLOAT32 &&
                         gd_cpu_filtered(gd_cpu_kernels(test->context), &o->weight);
    const struct ops_filtered factors = filtered ? ops_filtered(test, o->x, o->w, o->weight.precision)
                                                 : (struct ops_filtered){0};
    /* Of a large product some elements are computed. */
    double share = 5e6 / linear_flops(args);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t n = 0; n < out; n++) {
            int64_t i = r * out + n;
            double sum = 0, size = 0;
            if (ops_uniform(test) > share) {
                y[i] = pre[i] = NAN;
                continue;
            }
            if (filtered)
                sum = ops_filtered_sum(&factors, r, n, &size);
            for (int64_t t = 0; t < taps && !filtered; t++)
                sum += ops_dot(o->weight.precision, in, xs + (r * stride + t) * in, ws + n * taps * in + t, taps,
                               &size);
            pre[i] = sum + (o->bias ? o->bias->host[n] : 0);
            pre_bound[i] = BOUND * size + BOUND_AFTER * fabs(pre[i]);
            y[i] = o->call.activation != GD_NONE ? gelu(pre[i]) : pre[i];
            y[i] += o->residual ? o->residual->host[r * o->residual->ld + n] : 0;
            bound[i] = 1.13 * pre_bound[i] + BOUND_AFTER * (fabs(y[i]) + fabs(pre[i]));
            bound[i] += o->call.activation == GD_GELU_REDUCED ? BOUND_GELU_REDUCED * fabs(pre[i]) : 0;
        }
    ops_check_each(test, o->y, y, bound);
    if (o->pre)
        ops_check_each(test, o->pre, pre, pre_bound);
}

static void run_linear(struct ops_test *test, const int64_t *args)
{
    struct linear_operands o;
    make_linear(test, args, &o);
    OPS_RUN(test)
        test->backend->linear(test->context, &o.call);
    if (ops_benchmarking(test))
        return;
    if (!ops_settled(test))
        compare_linear(test, args, &o);
    check_rows_alone(test, &o);
    if (o.residual != o.y)
        check_unfinite(test, &o);
}

const struct ops_family ops_linear = {
    .name = "linear",
    .args = "rows out taps in stride flags",
    .run = run_linear,
    .cases = linear_cases,
    .num_cases = OPS_COUNT(linear_cases),
    .bench = linear_bench,
    .num_bench = OPS_COUNT(linear_bench),
    .flops = linear_flops,
    .precision = linear_precision,
};

/* A device may not have linear() in each precision. */
const struct ops_family ops_linear_reduced = {
    .name = "linear_reduced",
    .args = "rows out taps in stride flags",
    .run = run_linear,
    .cases = reduced_cases,
    .num_cases = OPS_COUNT(reduced_cases),
    .bench = reduced_bench,
    .num_bench = OPS_COUNT(reduced_bench),
    .flops = linear_flops,
    .precision = linear_precision,
};

/* ---- gemm ---------------------------------------------------------------------------------------------- */

enum { A_TRANSPOSED = 1, B_TRANSPOSED = 2, ACCUMULATE = 4, STRIDED = 8 /* every other row of c */ };
enum { WINDOWS = 16, HOP = 5 }; /* rows of b start HOP floats apart, as frames of audio do */

/* m, n, k, flags */
#define GEMM_CASES(precision) \
    {1, 1, 1, precision}, \
    {1, 17, 3, precision | ACCUMULATE}, \
    {17, 1, 16, precision | A_TRANSPOSED}, \
    {5, 15, 1, precision | B_TRANSPOSED}, \
    {12, 16, 0, precision}, \
    {12, 16, 0, precision | ACCUMULATE}, \
    {13, 33, 31, precision | A_TRANSPOSED | B_TRANSPOSED}, \
    {24, 32, 255, precision | ACCUMULATE | STRIDED}, \
    {25, 31, 256, precision | A_TRANSPOSED | ACCUMULATE}, \
    {11, 48, 257, precision | B_TRANSPOSED | ACCUMULATE}, \
    {48, 47, 513, precision | A_TRANSPOSED | STRIDED}, \
    {193, 49, 40, precision}, \
    {193, 513, 40, precision | A_TRANSPOSED | ACCUMULATE}, \
    {192, 530, 270, precision | STRIDED}, \
    {48, 1040, 33, precision | B_TRANSPOSED}, \
    {99, 768, 768, precision}, \
    {389, 512, 512, precision | ACCUMULATE | STRIDED}, \
    {512, 512, 389, precision | A_TRANSPOSED | ACCUMULATE}, \
    {512, 10, 799, precision | A_TRANSPOSED | ACCUMULATE}, \
    {768, 3072, 99, precision | A_TRANSPOSED | ACCUMULATE}, \
    {99, 99, 64, precision | B_TRANSPOSED}, \
    {64, 10, 50, precision | A_TRANSPOSED | ACCUMULATE | WINDOWS}, \
    {13, 12, 33, precision | WINDOWS},

static const int64_t gemm_cases[][OPS_ARGS] = {GEMM_CASES(0)};
static const int64_t gemm_reduced_cases[][OPS_ARGS] = {GEMM_CASES(BFLOAT16)};

static const int64_t gemm_bench[][OPS_ARGS] = {
    {1599, 512, 512, ACCUMULATE | STRIDED},
    {512, 512, 1599, A_TRANSPOSED | ACCUMULATE},
    {512, 1536, 1599, A_TRANSPOSED | ACCUMULATE},
    {512, 10, 3199, A_TRANSPOSED | ACCUMULATE},
    {750, 768, 768, 0},
    {768, 768, 750, A_TRANSPOSED | ACCUMULATE},
    {750, 768, 3072, 0},
    {750, 3072, 768, 0},
    {768, 3072, 750, A_TRANSPOSED | ACCUMULATE},
    {3072, 768, 750, A_TRANSPOSED | ACCUMULATE},
    {768, 768, 768, 0},
};

static const int64_t gemm_reduced_bench[][OPS_ARGS] = {
    {1599, 512, 512, BFLOAT16 | ACCUMULATE | STRIDED},
    {512, 512, 1599, BFLOAT16 | A_TRANSPOSED | ACCUMULATE},
    {750, 768, 3072, BFLOAT16},
    {3072, 768, 750, BFLOAT16 | A_TRANSPOSED | ACCUMULATE},
};

static double gemm_flops(const int64_t *args)
{
    return 2.0 * (double)(args[0] * args[1] * args[2]);
}

static enum gd_precision gemm_precision(const int64_t *args)
{
    return args[3] & BFLOAT16 ? GD_BFLOAT16 : GD_FLOAT32;
}

static void run_gemm(struct ops_test *test, const int64_t *args)
{
    int64_t m = args[0], n = args[1], k = args[2], flags = args[3];
    int transposed_a = (flags & A_TRANSPOSED) != 0, transposed_b = (flags & B_TRANSPOSED) != 0;
    int real = ops_benchmarking(test);
    struct ops_mat *a = transposed_a ? ops_input(test, k, m, real ? gd_row_stride(m) : m + 3, 1)
                                     : ops_input(test, m, k, real ? gd_row_stride(k) : k + 1, 1);
    struct ops_mat *b = flags & WINDOWS ? ops_input(test, (k - 1) * HOP + n, 1, 1, 1)
                        : transposed_b  ? ops_input(test, n, k, real ? gd_row_stride(k) : k + 2, 1)
                                        : ops_input(test, k, n, real ? gd_row_stride(n) : n + 3, 1);
    int64_t ldb = flags & WINDOWS ? HOP : b->ld;
    int64_t ldc = real ? gd_row_stride(n) : n + 5, step = flags & STRIDED ? 2 * ldc : ldc;
    int accumulate = (flags & ACCUMULATE) != 0;
    struct ops_mat *c = accumulate ? ops_update(test, m, n, step, 1) : ops_output(test, m, n, step);
    struct gd_gemm call = {
        .m = m, .n = n, .k = k, .a = a->device, .a_row = transposed_a ? 1 : a->ld, .a_col = transposed_a ? a->ld : 1,
        .b = b->device, .b_row = transposed_b ? 1 : ldb, .b_col = transposed_b ? ldb : 1, .c = c->device, .ldc = step,
        .accumulate = accumulate, .precision = gemm_precision(args),
    };
    OPS_RUN(test)
        test->backend->gemm(test->context, &call);
    if (ops_settled(test))
        return;
    double *reference = ops_doubles(test, m * n), *bound = ops_doubles(test, m * n);
    double share = 5e6 / (gemm_flops(args) + 1);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            double sum = accumulate ? c->host[i * step + j] : 0, size = fabs(sum);
            if (ops_uniform(test) > share) {
                reference[i * n + j] = NAN;
                continue;
            }
            for (int64_t p = 0; p < k; p++) {
                double factors[] = {a->host[i * call.a_row + p * call.a_col], b->host[p * call.b_row + j * call.b_col]};
                for (int f = 0; f < 2 && call.precision == GD_BFLOAT16; f++)
                    factors[f] = gd_float_from_bfloat16(gd_bfloat16_from_float((float)factors[f]));
                sum += factors[0] * factors[1];
                size += fabs(factors[0] * factors[1]);
            }
            reference[i * n + j] = sum;
            bound[i * n + j] = BOUND * size;
        }
    ops_check_each(test, c, reference, bound);
}

const struct ops_family ops_gemm = {
    .name = "gemm",
    .args = "m n k flags",
    .run = run_gemm,
    .cases = gemm_cases,
    .num_cases = OPS_COUNT(gemm_cases),
    .bench = gemm_bench,
    .num_bench = OPS_COUNT(gemm_bench),
    .flops = gemm_flops,
};

const struct ops_family ops_gemm_reduced = {
    .name = "gemm_reduced",
    .args = "m n k flags",
    .run = run_gemm,
    .cases = gemm_reduced_cases,
    .num_cases = OPS_COUNT(gemm_reduced_cases),
    .bench = gemm_reduced_bench,
    .num_bench = OPS_COUNT(gemm_reduced_bench),
    .flops = gemm_flops,
    .precision = gemm_precision,
};
