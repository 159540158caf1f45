/*
 * pos_conv_cases.c - pos_conv, its gradient by x (the same operation on transposed weights), and
 * pos_conv_backward_weight. Bounds as in gemm_cases.c; but the error of an FFT's output follows from all that lies
 * in its window, not from its own products.
 */
#include "ops_test.h"
#include "reduced.h"

#include <math.h>
#include <string.h>

#define BOUND 6e-7
#define BOUND_AFTER 4e-7

/* Of |x| |w| / sqrt(2 kernel n), the size of an output: Euclidean norms, x over FFT_REACH kernels of rows to either
 * side. From kernels of FFT_KERNEL taps on; of weights whose spectra are bfloat16. */
#define BOUND_FFT 1e-6
#define BOUND_ROUNDED_FFT 6e-3
#define FFT_REACH 4
#define FFT_KERNEL 64

enum {
    HAS_BIAS = 1, HAS_GELU = 2, HAS_RESIDUAL = 4, HAS_PRE = 8, PADDED = 16, TRANSPOSED = 32, BFLOAT16 = 64, INT8 = 128
};

/* batch, longest, width, groups, kernel, flags */
static const int64_t pos_conv_cases[][OPS_ARGS] = {
    {1, 1, 1, 1, 1, 0},
    {1, 2, 4, 2, 3, HAS_BIAS},
    {2, 5, 6, 2, 4, HAS_BIAS | HAS_GELU | HAS_PRE},
    {35, 9, 6, 2, 4, HAS_BIAS | PADDED},
    {3, 17, 34, 2, 7, HAS_BIAS | HAS_GELU | HAS_RESIDUAL},
    {3, 33, 48, 3, 16, HAS_BIAS | HAS_GELU | HAS_RESIDUAL | HAS_PRE | PADDED},
    {2, 20, 66, 2, 8, HAS_PRE | PADDED},
    {2, 31, 24, 1, 9, TRANSPOSED},
    {3, 40, 32, 4, 16, TRANSPOSED | PADDED},
    {4, 40, 34, 2, 16, TRANSPOSED | PADDED | HAS_RESIDUAL},
    {4, 201, 32, 4, 9, HAS_BIAS | HAS_GELU | HAS_RESIDUAL | HAS_PRE | PADDED},
    {2, 193, 40, 2, 5, HAS_BIAS | PADDED},
    {1, 400, 16, 2, 4, HAS_GELU},
    {1, 30, 768, 16, 128, HAS_BIAS | HAS_GELU | HAS_RESIDUAL},
    {2, 99, 96, 2, 128, HAS_BIAS | HAS_GELU | HAS_RESIDUAL | HAS_PRE},
    {2, 99, 96, 2, 128, TRANSPOSED},
    {3, 129, 12, 1, 128, HAS_BIAS | HAS_GELU | HAS_RESIDUAL | HAS_PRE},
    {4, 700, 24, 2, 128, HAS_BIAS | HAS_GELU | HAS_RESIDUAL | HAS_PRE | PADDED},
    {4, 700, 38, 2, 128, TRANSPOSED | PADDED | HAS_RESIDUAL},
    {1, 3000, 32, 2, 128, HAS_GELU},
    {8, 40, 96, 2, 128, TRANSPOSED | HAS_RESIDUAL},
    {2, 260, 128, 2, 64, HAS_BIAS | HAS_RESIDUAL},
    {3, 200, 96, 1, 65, HAS_PRE | PADDED},
    {2, 500, 34, 1, 200, HAS_BIAS | HAS_GELU | HAS_PRE},
    {1, 600, 128, 1, 256, TRANSPOSED},
    {1, 192, 960, 1, 2, 0}, /* needs more scratch than gemm */
    {2, 99, 96, 2, 128, HAS_BIAS | HAS_GELU | HAS_RESIDUAL | HAS_PRE | BFLOAT16},
    {3, 129, 12, 1, 128, TRANSPOSED | HAS_RESIDUAL | BFLOAT16},
    {2, 700, 76, 2, 128, HAS_BIAS | PADDED | INT8},
    {3, 33, 48, 3, 16, HAS_BIAS | BFLOAT16},
};

static const int64_t pos_conv_bench[][OPS_ARGS] = {
    {1, 100, 768, 16, 128, HAS_BIAS | HAS_GELU | HAS_RESIDUAL},
    {1, 350, 768, 16, 128, HAS_BIAS | HAS_GELU | HAS_RESIDUAL},
    {1, 750, 768, 16, 128, HAS_BIAS | HAS_GELU | HAS_RESIDUAL},
    {1, 3000, 768, 16, 128, HAS_BIAS | HAS_GELU | HAS_RESIDUAL},
    {8, 749, 768, 16, 128, HAS_BIAS | HAS_GELU | HAS_RESIDUAL},
    {1, 100, 768, 16, 128, HAS_BIAS | HAS_GELU | HAS_RESIDUAL | BFLOAT16},
    {1, 350, 768, 16, 128, HAS_BIAS | HAS_GELU | HAS_RESIDUAL | BFLOAT16},
    {1, 750, 768, 16, 128, HAS_BIAS | HAS_GELU | HAS_RESIDUAL | BFLOAT16},
};

/* An upper limit: the taps beyond the ends count. */
static double pos_conv_flops(const int64_t *args)
{
    return 2.0 * (double)(args[0] * args[1] * args[2] * args[2] / args[3] * args[4]);
}

static enum gd_precision precision_of(const int64_t *args)
{
    return args[5] & BFLOAT16 ? GD_BFLOAT16 : args[5] & INT8 ? GD_INT8 : GD_FLOAT32;
}

/* Utterances of `longest` rows and fewer; some of their rows padding. */
static const struct gd_rows *make_rows(struct ops_test *test, int64_t batch, int64_t longest, int padded)
{
    int64_t rows[40], valid[40];
    for (int64_t b = 0; b < batch; b++) {
        int full = b == batch / 2 || ops_benchmarking(test);
        rows[b] = full ? longest : 1 + (int64_t)(ops_uniform(test) * (double)longest);
        valid[b] = padded && b != 0 ? 1 + (int64_t)(ops_uniform(test) * (double)rows[b]) : rows[b];
    }
    return ops_rows(test, batch, rows, valid);
}

struct pos_conv_operands {
    struct gd_pos_conv call;
    struct ops_mat *x, *w, *bias, *residual, *pre, *y;
    int64_t n, pad; /* channels of a group; padding of the forward convolution */
};

/* Odd margins; in a benchmark, rows as the engine has them. */
static int64_t row_stride(const struct ops_test *test, int64_t width, int64_t margin)
{
    return ops_benchmarking(test) ? gd_row_stride(width) : width + margin;
}

static struct pos_conv_operands make_pos_conv(struct ops_test *test, const int64_t *args, int training)
{
    int64_t width = args[2], groups = args[3], kernel = args[4], flags = args[5], ld = row_stride(test, width, 3);
    struct pos_conv_operands o = {.n = width / groups, .pad = kernel / 2};
    const struct gd_rows *rows = make_rows(test, args[0], args[1], (flags & PADDED) != 0);
    gd_config config = {.encoder_embed_dim = (int)width, .conv_pos = (int)kernel, .conv_pos_groups = (int)groups};
    ops_scratch(test, &config, rows->longest, training);
    o.x = ops_input(test, rows->total, width, ld, 1);
    o.w = ops_input(test, width, o.n * kernel, o.n * kernel, 1 / sqrt((double)(o.n * kernel)));
    o.bias = flags & HAS_BIAS ? ops_input(test, 1, width, width, 1) : NULL;
    o.residual = flags & HAS_RESIDUAL ? ops_input(test, rows->total, width, row_stride(test, width, 1), 1) : NULL;
    o.pre = flags & HAS_PRE ? ops_output(test, rows->total, width, width + 2) : NULL;
    o.y = ops_output(test, rows->total, width, row_stride(test, width, 5));
    o.call = (struct gd_pos_conv){
        .rows = rows, .width = width, .groups = groups, .kernel = kernel, .precision = precision_of(args),
        .pad = flags & TRANSPOSED ? kernel - 1 - o.pad : o.pad,
        .x = o.x->device, .ldx = ld, .bias = o.bias ? o.bias->device : NULL,
        .transposed = (flags & TRANSPOSED) != 0, .activation = flags & HAS_GELU ? GD_GELU : GD_NONE,
        .residual = o.residual ? o.residual->device : NULL, .ldresidual = o.residual ? o.residual->ld : 0,
        .pre = o.pre ? o.pre->device : NULL, .ldpre = o.pre ? o.pre->ld : 0, .y = o.y->device, .ldy = o.y->ld,
    };
    void *packed = ops_memory(test, test->backend->packed_pos_conv_size(test->context, &o.call));
    test->backend->pack_pos_conv(test->context, &o.call, o.w->device, packed);
    o.call.weight = packed;
    return o;
}

/* Row t of utterance b, column j: the sum, and the sum of its products' sizes. */
static double sum_of(const struct pos_conv_operands *o, int64_t b, int64_t t, int64_t j, double *size)
{
    int64_t n = o->n, kernel = o->call.kernel, group = j / n, first = o->call.rows->first[b];
    int64_t valid = o->call.rows->valid[b], rows = o->call.rows->first[b + 1] - first;
    int transposed = o->call.transposed;
    double sum = 0;
    *size = 0;
    for (int64_t k = 0; k < kernel; k++) {
        int64_t s = transposed ? t - k + o->pad : t + k - o->pad;
        if (s < 0 || s >= (transposed ? rows : valid) || (transposed && t >= valid))
            continue;
        for (int64_t c = 0; c < n; c++) {
            int64_t weight = transposed ? (group * n + c) * n + j % n : j * n + c;
            double product = (double)o->w->host[weight * kernel + k] *
                             o->x->host[(first + s) * o->x->ld + group * n + c];
            sum += product;
            *size += fabs(product);
        }
    }
    return sum;
}

/* An utterance alone has the bits that it has in the batch. */
static void check_alone(struct ops_test *test, const struct pos_conv_operands *o)
{
    const struct gd_rows *rows = o->call.rows;
    int64_t b = rows->batch - 1, first = rows->first[b], count = rows->first[b + 1] - first, width = o->call.width;
    struct gd_pos_conv call = o->call;
    struct ops_mat *y = ops_output(test, count, width, width);
    call.rows = ops_rows(test, 1, &count, &rows->valid[b]);
    call.x += first * call.ldx;
    call.residual = call.residual ? call.residual + first * call.ldresidual : NULL;
    call.pre = NULL;
    call.y = y->device;
    call.ldy = width;
    test->backend->pos_conv(test->context, &call);
    const float *alone = ops_result(test, y), *among = ops_result(test, o->y);
    for (int64_t r = 0; r < count; r++)
        ops_expect(test, memcmp(alone + r * width, among + (first + r) * o->y->ld, (size_t)width * sizeof(float)) == 0,
                   "row %lld of the last utterance has other bits alone", (long long)r);
}

/* energy[r] = sum over the group of j's channels of x[r, c]^2, of the rows that count. */
static double *energy_of_rows(struct ops_test *test, const struct pos_conv_operands *o)
{
    const struct gd_rows *rows = o->call.rows;
    int64_t groups = o->call.groups, n = o->n;
    double *energy = ops_doubles(test, rows->total * groups);
    for (int64_t b = 0; b < rows->batch; b++)
        for (int64_t r = rows->first[b]; r < rows->first[b + 1]; r++)
            for (int64_t c = 0; c < groups * n && (o->call.transposed || r - rows->first[b] < rows->valid[b]); c++)
                energy[r * groups + c / n] += pow(o->x->host[r * o->x->ld + c], 2);
    return energy;
}

/* energy[j] of the weights of output j. */
static double *energy_of_weights(struct ops_test *test, const struct pos_conv_operands *o)
{
    int64_t n = o->n, kernel = o->call.kernel, width = o->call.width;
    double *energy = ops_doubles(test, width);
    for (int64_t i = 0; i < width * n * kernel; i++) {
        int64_t out = i / (n * kernel), in = out / n * n + i / kernel % n;
        energy[o->call.transposed ? in : out] += pow(o->w->host[i], 2);
    }
    return energy;
}

/* The FFT's share of the bound of row t of utterance b, group g, |w|^2 given. */
static double fft_bound(const struct pos_conv_operands *o, const double *energy, int64_t b, int64_t t, int64_t group,
                        double w)
{
    const struct gd_rows *rows = o->call.rows;
    int64_t first = rows->first[b], count = rows->first[b + 1] - first, reach = FFT_REACH * o->call.kernel;
    double x = 0;
    for (int64_t s = t < reach ? 0 : t - reach; s < count && s <= t + reach; s++)
        x += energy[(first + s) * o->call.groups + group];
    const double share = o->call.precision == GD_FLOAT32 ? BOUND_FFT : BOUND_ROUNDED_FFT;
    return share * sqrt(x * w / (double)(2 * o->call.kernel * o->n));
}

/* What is added to each output: (rows, width). */
static const double *masked_residual(struct ops_test *test, const struct pos_conv_operands *o)
{
    const struct gd_rows *rows = o->call.rows;
    int64_t width = o->call.width;
    double *residual = ops_doubles(test, rows->total * width);
    for (int64_t b = 0; b < rows->batch && o->residual; b++)
        for (int64_t r = rows->first[b]; r < rows->first[b + 1]; r++)
            for (int64_t j = 0; j < width && (o->call.transposed || r - rows->first[b] < rows->valid[b]); j++)
                residual[r * width + j] = o->residual->host[r * o->residual->ld + j];
    return residual;
}

static void compare_pos_conv(struct ops_test *test, const int64_t *args, const struct pos_conv_operands *o)
{
    const int64_t width = o->call.width, flags = args[5];
    const struct gd_rows *rows = o->call.rows;
    double *y = ops_doubles(test, rows->total * width), *bound = ops_doubles(test, rows->total * width);
    double *pre = ops_doubles(test, rows->total * width), *pre_bound = ops_doubles(test, rows->total * width);
    double share = 1e7 / pos_conv_flops(args);
    const double *residual = masked_residual(test, o);
    const double *x_energy = energy_of_rows(test, o), *w_energy = energy_of_weights(test, o);
    for (int64_t b = 0; b < rows->batch; b++)
        for (int64_t r = rows->first[b]; r < rows->first[b + 1]; r++)
            for (int64_t j = 0; j < width; j++) {
                int64_t i = r * width + j, t = r - rows->first[b];
                double size;
                if (ops_uniform(test) > share) {
                    y[i] = pre[i] = NAN;
                    continue;
                }
                pre[i] = sum_of(o, b, t, j, &size);
                pre[i] += o->bias ? o->bias->host[j] : 0;
                pre_bound[i] = BOUND * size;
                if (o->call.kernel >= FFT_KERNEL)
                    pre_bound[i] = fft_bound(o, x_energy, b, t, j / o->n, w_energy[j]);
                pre_bound[i] += BOUND_AFTER * fabs(pre[i]);
                y[i] = flags & HAS_GELU ? 0.5 * pre[i] * (1 + erf(pre[i] * 0.70710678118654752440)) : pre[i];
                y[i] += residual[i];
                bound[i] = 1.13 * pre_bound[i] + BOUND_AFTER * (fabs(y[i]) + fabs(pre[i]));
            }
    ops_check_each(test, o->y, y, bound);
    if (o->pre)
        ops_check_each(test, o->pre, pre, pre_bound);
}

static void run_pos_conv(struct ops_test *test, const int64_t *args)
{
    struct pos_conv_operands o = make_pos_conv(test, args, 0);
    OPS_RUN(test)
        test->backend->pos_conv(test->context, &o.call);
    if (ops_benchmarking(test))
        return;
    if (!ops_settled(test))
        compare_pos_conv(test, args, &o);
    check_alone(test, &o);
}

const struct ops_family ops_pos_conv = {
    .name = "pos_conv",
    .args = "batch longest width groups kernel flags",
    .run = run_pos_conv,
    .cases = pos_conv_cases,
    .num_cases = OPS_COUNT(pos_conv_cases),
    .bench = pos_conv_bench,
    .num_bench = OPS_COUNT(pos_conv_bench),
    .flops = pos_conv_flops,
};

/* ---- pos_conv_backward_weight ---------------------------------------------------------------------------- */

static const int64_t backward_cases[][OPS_ARGS] = {
    {1, 1, 1, 1, 1, 0},
    {2, 5, 6, 2, 4, 0},
    {35, 9, 6, 2, 4, PADDED},
    {3, 17, 34, 2, 7, 0},
    {3, 33, 48, 3, 16, PADDED},
    {2, 300, 20, 2, 17, PADDED},
    {1, 40, 96, 2, 128, 0},
    {2, 150, 4, 2, 140, PADDED},
    {1, 300, 200, 1, 16, 0}, /* needs more scratch than gemm */
    {1, 1, 1, 1, 1, BFLOAT16},
    {3, 17, 34, 2, 7, BFLOAT16},
    {3, 33, 48, 3, 16, PADDED | BFLOAT16},
    {2, 300, 20, 2, 17, PADDED | BFLOAT16},
    {1, 41, 96, 2, 128, BFLOAT16},
    {1, 300, 200, 1, 16, BFLOAT16},
};

/* As large as float32's bench, in both precisions. */
static const int64_t backward_bench[][OPS_ARGS] = {
    {4, 199, 768, 16, 128, 0}, {4, 199, 768, 16, 128, BFLOAT16}, {1, 750, 768, 16, 128, 0},
    {1, 750, 768, 16, 128, BFLOAT16},
};

static void run_backward(struct ops_test *test, const int64_t *args)
{
    int64_t width = args[2], kernel = args[4];
    struct pos_conv_operands o = make_pos_conv(test, args, 1);
    const struct gd_rows *rows = o.call.rows;
    int64_t n = o.n;
    struct ops_mat *dz = ops_input(test, rows->total, width, width + 4, 1);
    struct ops_mat *dw = ops_update(test, width, n * kernel, n * kernel, 1);
    OPS_RUN(test)
        test->backend->pos_conv_backward_weight(test->context, &o.call, dz->device, dz->ld, dw->device);
    if (ops_settled(test))
        return;
    double *reference = ops_doubles(test, width * n * kernel), *bound = ops_doubles(test, width * n * kernel);
    double share = 1e7 / pos_conv_flops(args);
    const double *x = ops_rounded(test, o.x, o.call.precision, 1), *d = ops_rounded(test, dz, o.call.precision, 1);
    for (int64_t i = 0; i < width * n * kernel; i++) {
        int64_t out = i / (n * kernel), in = out / n * n + i / kernel % n, k = i % kernel;
        if (ops_uniform(test) > share) {
            reference[i] = NAN;
            continue;
        }
        double sum = dw->host[i], size = fabs(sum);
        for (int64_t b = 0; b < rows->batch; b++)
            for (int64_t t = 0; t < rows->first[b + 1] - rows->first[b]; t++) {
                int64_t s = t + k - o.pad;
                if (s < 0 || s >= rows->valid[b])
                    continue;
                double product = d[(rows->first[b] + t) * width + out];
                product *= x[(rows->first[b] + s) * width + in];
                sum += product;
                size += fabs(product);
            }
        reference[i] = sum;
        bound[i] = BOUND * size;
    }
    ops_check_each(test, dw, reference, bound);
}

const struct ops_family ops_pos_conv_backward_weight = {
    .name = "pos_conv_backward_weight",
    .args = "batch longest width groups kernel flags",
    .run = run_backward,
    .cases = backward_cases,
    .num_cases = OPS_COUNT(backward_cases),
    .bench = backward_bench,
    .num_bench = OPS_COUNT(backward_bench),
    .flops = pos_conv_flops,
    .precision = precision_of,
};
