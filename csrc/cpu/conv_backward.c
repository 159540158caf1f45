/*
 * conv_backward.c - the backward of the extractor's convolutions, in matrix products: a tap at a time, or in the
 * transformed domain of filter_template.h, of whose forward it is the transpose step for step:
 *
 *     dPi from dz      dUi += dPi^T Di      dDi = dPi Ui      dx from dDi      dw from dUi
 *
 * dx is a convolution's forward with the channels exchanged, so that linear.c's packed weights serve: those of a
 * filtered convolution, or a linear layer a tap.
 */
#include "ops.h"

#include <string.h>

/* Groups of a task of the transformations. */
enum { TASK_GROUPS = 16 };

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t divide_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* ---- Weights ------------------------------------------------------------------------------------------ */

/* The weights of dx: those of all taps, or of one, from `out` channels to `in`. */
static struct gd_weight exchanged(const struct gd_weight *weight, int64_t taps)
{
    return (struct gd_weight){.out = weight->in, .taps = taps, .in = weight->out, .stride = weight->stride, .precision = weight->precision};
}

/* Filtering must pay in both directions. */
static int by_filter(const struct gd_weight *weight)
{
    const struct gd_weight back = exchanged(weight, weight->taps);
    return gd_cpu_filtered(weight) && gd_cpu_filtered(&back);
}

static int64_t matrices(const struct gd_weight *weight)
{
    return by_filter(weight) ? FILTER_POINTS + 1 : weight->taps;
}

static int64_t tap_matrix(const struct gd_weight *weight, int64_t k)
{
    return by_filter(weight) ? gd_cpu_tap_matrix(weight, k) : k;
}

/* Floats of a tap's packed weights. */
static int64_t tap_floats(const gd_context *context, const struct gd_weight *weight)
{
    const struct gd_weight tap = exchanged(weight, 1);
    return (int64_t)(gd_cpu_packed_size(context, &tap) / sizeof(float));
}

size_t gd_cpu_conv_taps_size(const gd_context *context, const struct gd_weight *weight)
{
    const struct gd_weight back = exchanged(weight, weight->taps);
    const size_t gradient = (size_t)(weight->out * matrices(weight) * weight->in);
    const size_t packed = by_filter(weight) ? gd_cpu_packed_size(context, &back) / sizeof(float)
                                            : (size_t)(weight->taps * tap_floats(context, weight));
    return gradient > packed ? gradient : packed;
}

void gd_cpu_split_taps(gd_context *context, const struct gd_weight *weight, const float *w, float *w_taps)
{
    const int64_t taps = weight->taps, row = weight->in * taps;
    if (by_filter(weight)) {
        const struct gd_weight back = exchanged(weight, taps);
        gd_cpu_pack(context, &back, w, taps, 1, row, w_taps);
        return;
    }
    const struct gd_weight tap = exchanged(weight, 1);
    for (int64_t k = 0; k < taps; k++)
        gd_cpu_pack(context, &tap, w + k, taps, 0, row, w_taps + k * tap_floats(context, weight));
}

struct taps_job {
    gd_context *context;
    const struct gd_weight *weight;
    const float *from;
    float *to;
};

static void merge_task(void *argument, int64_t o, int slot)
{
    const struct taps_job *job = argument;
    const int64_t in = job->weight->in, taps = job->weight->taps;
    const int filtered = by_filter(job->weight);
    const float *from = job->from + o * in * matrices(job->weight);
    float *to = job->to + o * in * taps, *outer = gd_cpu_scratch(job->context); /* taps 0 and 2 from all of U0 .. U4 */
    (void)slot;
    if (filtered)
        gd_cpu_kernels(job->context)->filter_weights_backward(in, from, outer, outer + in);
    for (int64_t k = 0; k < taps; k++) {
        const float *d = filtered && k != 1 ? outer + k / 2 * in : from + tap_matrix(job->weight, k) * in;
        for (int64_t c = 0; c < in; c++)
            to[c * taps + k] += d[c];
    }
}

void gd_cpu_merge_taps(gd_context *context, const struct gd_weight *weight, const float *dw_taps, float *dw)
{
    struct taps_job job = {context, weight, dw_taps, dw};
    gd_cpu_run(context, weight->out, merge_task, &job);
}

/* ---- A tap at a time ---------------------------------------------------------------------------------- */

/* dw_taps[o, k] += sum over rows of dz[t, o] x[t * stride + k]; dx[t * stride + k] += dz[t] w[., k]. Taps of
 * contiguous rows are one long row. */
static void backward_by_taps(gd_context *context, const struct gd_conv_backward *c)
{
    const struct gd_weight *w = c->weight;
    const int64_t joined = c->ldx == w->in ? w->taps : 1;
    for (int64_t k = 0; k < w->taps; k += joined)
        gd_cpu_gemm(context, &(struct gd_gemm){
            .m = w->out, .n = joined * w->in, .k = c->rows, .a = c->dz, .a_row = 1, .a_col = c->lddz,
            .b = c->x + k * c->ldx, .b_row = w->stride * c->ldx, .b_col = 1,
            .c = c->dw_taps + k * w->in, .ldc = w->taps * w->in, .accumulate = 1, .precision = w->precision,
        });
    if (c->dx == NULL)
        return;
    for (int64_t r = 0; r < c->dx_rows; r++)
        memset(c->dx + r * c->lddx, 0, (size_t)w->in * sizeof(float));
    for (int64_t k = 0; k < w->taps; k++) {
        struct gd_weight tap = exchanged(w, 1);
        float *dx = c->dx + k * c->lddx;
        tap.stride = 1;
        tap.packed = c->w_taps + k * tap_floats(context, w);
        gd_cpu_linear(context, &(struct gd_linear){
            .rows = c->rows, .weight = &tap, .x = c->dz, .ldx = c->lddz, .residual = dx, .ldresidual = w->stride * c->lddx,
            .y = dx, .ldy = w->stride * c->lddx,
        });
    }
}

/* ---- By minimal filtering ----------------------------------------------------------------------------- */

/* A block is as many groups as one chain of sums over them has; `input` and `output` are Di and dPi. dx is multiplied
 * from `left` and the odd rows `dz`: dPi and dz themselves, or rounded to words. */
struct filter_job {
    gd_context *context;
    const struct gd_conv_backward *conv;
    const struct gd_gemm_kernels *gemm;
    int64_t groups_a_block, panels_a_task;
    int64_t first, rows; /* outputs of this block */
    struct gd_points input, output, left;
    const float *dz;
    int64_t lddz;
    float *rounded; /* where dz is rounded to; or NULL */
};

static struct gd_points points_from(struct gd_points points, int64_t group)
{
    points.data += group * points.ld;
    return points;
}

/* Di and dPi of some groups. */
static void transform_task(void *argument, int64_t index, int slot)
{
    const struct filter_job *job = argument;
    const struct gd_conv_backward *c = job->conv;
    const struct gd_kernels *kernels = gd_cpu_kernels(job->context);
    const int64_t group = index * TASK_GROUPS, row = group * FILTER_OUTPUTS;
    const int64_t rows = smaller(job->rows - row, TASK_GROUPS * FILTER_OUTPUTS), groups = divide_up(rows, FILTER_OUTPUTS);
    const float *dz = c->dz + (job->first + row) * c->lddz;
    (void)slot;
    kernels->filter_input(rows, c->weight->in, c->x + (job->first + row) * 2 * c->ldx, c->ldx, points_from(job->input, group));
    kernels->filter_output_backward(rows, c->weight->out, dz, c->lddz, points_from(job->output, group));
    if (job->rounded == NULL)
        return;
    for (int i = 0; i < FILTER_POINTS; i++)
        for (int64_t g = group; g < group + groups; g++)
            job->gemm->convert(c->weight->out, job->output.data + i * job->output.matrix + g * job->output.ld,
                               job->left.data + i * job->left.matrix + g * job->left.ld);
    for (int64_t r = 0; r < rows; r++)
        job->gemm->convert(c->weight->out, dz + r * c->lddz, job->rounded + (row + r) * job->lddz);
}

/* Some panels of dx's columns. */
static void input_task(void *argument, int64_t index, int slot)
{
    const struct filter_job *job = argument;
    const struct gd_conv_backward *c = job->conv;
    const struct gd_kernels *kernels = gd_cpu_kernels(job->context);
    const struct gd_weight back = exchanged(c->weight, c->weight->taps);
    const int64_t nr = kernels->gemm_cols, words = divide_up(back.in, job->gemm->elements);
    const int64_t begin = index * job->panels_a_task * nr, end = smaller(back.out, begin + job->panels_a_task * nr);
    (void)slot;
    for (int64_t r = 0; r < job->rows; r += FILTER_GROUPS * FILTER_OUTPUTS)
        for (int64_t n = begin; n < end; n += nr) {
            const struct gd_panel panel = {
                .rows = smaller(job->rows - r, FILTER_GROUPS * FILTER_OUTPUTS), .cols = (int)smaller(end - n, nr), .in = words,
                .x = job->dz + r * job->lddz, .step = job->lddz, .tiles = job->rounded != NULL ? job->gemm->tiles : NULL,
                .b = c->w_taps + n * (FILTER_POINTS + 1) * words, .y = c->dx + (job->first + r) * 2 * c->lddx + n, .ldy = c->lddx,
            };
            kernels->filter_input_panel(&panel, points_from(job->left, r / FILTER_OUTPUTS), job->first + r == 0);
        }
}

/* dw_taps[o, i] += sum over rows of dz[r, o] x[r]. */
static void add_to_weight(gd_context *context, const struct gd_conv_backward *c, int64_t i, int64_t rows, const float *dz,
                          int64_t lddz, const float *x, int64_t ldx)
{
    const struct gd_weight *w = c->weight;
    gd_cpu_gemm(context, &(struct gd_gemm){
        .m = w->out, .n = w->in, .k = rows, .a = dz, .a_row = 1, .a_col = lddz, .b = x, .b_row = ldx, .b_col = 1,
        .c = c->dw_taps + i * w->in, .ldc = (FILTER_POINTS + 1) * w->in, .accumulate = 1, .precision = w->precision,
    });
}

/* Gives out the scratch, or only counts where it is NULL. Returns the floats taken. */
static int64_t lay_out_filter(const gd_context *context, const struct gd_weight *w, float *scratch, struct filter_job *job)
{
    const struct gd_gemm_kernels *gemm = &gd_cpu_kernels(context)->gemm[w->precision];
    const int64_t ldin = gd_row_stride(w->in), ldout = gd_row_stride(w->out), groups = GEMM_CHAIN * gemm->elements;
    const int64_t ldwords = gd_row_stride(divide_up(w->out, gemm->elements)), exact = FILTER_POINTS * groups * (ldin + ldout);
    const int64_t words = w->precision == GD_FLOAT32 ? 0 : (FILTER_POINTS + FILTER_OUTPUTS) * groups * ldwords;
    job->gemm = gemm;
    job->groups_a_block = groups;
    if (scratch == NULL)
        return exact + words;
    job->input = (struct gd_points){scratch, ldin, groups * ldin};
    job->output = job->left = (struct gd_points){scratch + FILTER_POINTS * job->input.matrix, ldout, groups * ldout};
    if (words > 0) {
        job->left = (struct gd_points){scratch + exact, ldwords, groups * ldwords};
        job->rounded = job->left.data + FILTER_POINTS * job->left.matrix;
        job->lddz = ldwords;
    }
    return exact + words;
}

static void backward_by_filter(gd_context *context, const struct gd_conv_backward *c)
{
    const struct gd_weight *w = c->weight;
    struct filter_job job = {.context = context, .conv = c};
    lay_out_filter(context, w, c->scratch, &job);
    if (c->dx == NULL)
        job.rounded = NULL;
    const int64_t panels = divide_up(w->in, gd_cpu_kernels(context)->gemm_cols), block = job.groups_a_block * FILTER_OUTPUTS;
    job.panels_a_task = divide_up(panels, context->num_threads);
    for (job.first = 0; job.first < c->rows; job.first += block) {
        job.rows = smaller(c->rows - job.first, block);
        const int64_t groups = divide_up(job.rows, FILTER_OUTPUTS), odd = job.first * 2 + 1;
        const float *dz = c->dz + job.first * c->lddz;
        gd_cpu_run(context, divide_up(groups, TASK_GROUPS), transform_task, &job);
        for (int i = 0; i < FILTER_POINTS; i++)
            add_to_weight(context, c, i, groups, job.output.data + i * job.output.matrix, job.output.ld,
                          job.input.data + i * job.input.matrix, job.input.ld);
        add_to_weight(context, c, FILTER_POINTS, job.rows, dz, c->lddz, c->x + odd * c->ldx, 2 * c->ldx);
        if (c->dx == NULL)
            continue;
        job.dz = job.rounded != NULL ? job.rounded : dz;
        job.lddz = job.rounded != NULL ? job.lddz : c->lddz;
        gd_cpu_run(context, divide_up(panels, job.panels_a_task), input_task, &job);
    }
    for (int64_t r = 2 * c->rows + 1; c->dx != NULL && r < c->dx_rows; r++)
        memset(c->dx + r * c->lddx, 0, (size_t)w->in * sizeof(float));
}

size_t gd_cpu_conv_backward_scratch(const gd_context *context, const struct gd_weight *weight)
{
    struct filter_job job;
    return by_filter(weight) ? (size_t)lay_out_filter(context, weight, NULL, &job) : 0;
}

void gd_cpu_conv_backward(gd_context *context, const struct gd_conv_backward *conv)
{
    if (by_filter(conv->weight))
        backward_by_filter(context, conv);
    else
        backward_by_taps(context, conv);
}
