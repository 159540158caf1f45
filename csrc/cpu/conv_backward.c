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

/* Groups of a task of the transformations: their points of x and dz fit in a thread's scratch, and in its second
 * cache. */
enum { TASK_GROUPS = 16 };
_Static_assert(2 * TASK_GROUPS <= FILTER_GROUPS,
               "gd_cpu_gemm_scratch() has room for one matrix's points of FILTER_GROUPS");

/* ---- Weights ------------------------------------------------------------------------------------------ */

/* The weights of dx: those of all taps, or of one, from `out` channels to `in`. */
static struct gd_weight exchanged(const struct gd_weight *weight, int64_t taps)
{
    return (struct gd_weight){
        .out = weight->in, .taps = taps, .in = weight->out, .stride = weight->stride, .precision = weight->precision};
}

/* Filtering must pay in both directions. */
static int by_filter(const gd_context *context, const struct gd_weight *weight)
{
    const struct gd_kernels *kernels = gd_cpu_kernels(context);
    const struct gd_weight back = exchanged(weight, weight->taps);
    return gd_cpu_filtered(kernels, weight) && gd_cpu_filtered(kernels, &back);
}

static int64_t matrices(const gd_context *context, const struct gd_weight *weight)
{
    return by_filter(context, weight) ? FILTER_POINTS + 1 : weight->taps;
}

static int64_t tap_matrix(const gd_context *context, const struct gd_weight *weight, int64_t k)
{
    return by_filter(context, weight) ? gd_cpu_tap_matrix(gd_cpu_kernels(context), weight, k) : k;
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
    const size_t gradient = (size_t)(weight->out * matrices(context, weight) * weight->in);
    const size_t packed = by_filter(context, weight) ? gd_cpu_packed_size(context, &back) / sizeof(float)
                                            : (size_t)(weight->taps * tap_floats(context, weight));
    return gradient > packed ? gradient : packed;
}

void gd_cpu_split_taps(gd_context *context, const struct gd_weight *weight, const float *w, float *w_taps)
{
    const int64_t taps = weight->taps, row = weight->in * taps;
    if (by_filter(context, weight)) {
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
    const int filtered = by_filter(job->context, job->weight);
    const float *from = job->from + o * in * matrices(job->context, job->weight);
    float *to = job->to + o * in * taps, *outer = NULL; /* taps 0 and 2 from all of U0 .. U4 */
    (void)slot;
    if (filtered) {
        outer = gd_cpu_scratch(job->context, (size_t)(2 * in) * sizeof *outer);
        gd_cpu_kernels(job->context)->filter_weights_backward(in, from, outer, outer + in);
    }
    for (int64_t k = 0; k < taps; k++) {
        const float *d = filtered && k != 1 ? outer + k / 2 * in : from + tap_matrix(job->context, job->weight, k) * in;
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
            .rows = c->rows, .weight = &tap, .x = c->dz, .ldx = c->lddz,
            .residual = dx, .ldresidual = w->stride * c->lddx, .y = dx, .ldy = w->stride * c->lddx,
        });
    }
}

/* ---- By minimal filtering ----------------------------------------------------------------------------- */

/* A block is as many groups as one chain of sums over them has. */
struct filter_job {
    gd_context *context;
    const struct gd_conv_backward *conv;
    const struct gd_kernels *kernels;
    const struct gd_gemm_kernels *gemm;
    int64_t groups_a_block;
    int64_t first, rows; /* outputs of this block */
    /* Factors of dUi and dw1, packed by pack_a() and pack_b(): dPi and then dz, Di and then x's odd rows. */
    float *left, *right;
    /* Rows that dx is computed from: dPi and dz, rounded to words or, in float32, themselves. */
    struct gd_points dpoints;
    float *rounded; /* dz; NULL in float32 */
    int64_t ldrounded;
};

/* Words of K of matrix i's factors, with `outputs` rows. */
static int64_t depth_of(const struct filter_job *job, int64_t i, int64_t outputs)
{
    return gd_divide_up(i < FILTER_POINTS ? gd_divide_up(outputs, FILTER_OUTPUTS) : outputs, job->gemm->elements);
}

static int64_t left_rows(const struct filter_job *job)
{
    return gd_round_up(job->conv->weight->out, job->gemm->rows);
}

static int64_t right_cols(const struct filter_job *job)
{
    return gd_round_up(job->conv->weight->in, job->kernels->vector);
}

/* Where matrix i's packed factor begins, of `width` rows or columns. */
static int64_t factor_offset(const struct filter_job *job, int64_t i, int64_t width)
{
    return i * gd_divide_up(job->groups_a_block, job->gemm->elements) * width;
}

static struct gd_points points_from(struct gd_points points, int64_t group)
{
    points.data += group * points.ld;
    return points;
}

/* `count` rows of dz and of x from `row` on, or of dPi and Di, as a part of matrix i's factors. */
static void pack_factors(const struct filter_job *job, int64_t i, int64_t row, int64_t count,
                         const float *dz, int64_t lddz, const float *x, int64_t ldx)
{
    const struct gd_weight *w = job->conv->weight;
    const int64_t depth = depth_of(job, i, job->rows), word = row / job->gemm->elements, nr = job->kernels->gemm_cols;
    job->gemm->pack_a(count, w->out, dz, lddz, depth,
                      job->left + factor_offset(job, i, left_rows(job)) + word * job->gemm->rows);
    float *right = job->right + factor_offset(job, i, right_cols(job));
    for (int64_t n = 0; n < w->in; n += nr) {
        const int64_t cols = gd_smaller(w->in - n, nr), width = gd_smaller(right_cols(job) - n, nr);
        job->gemm->pack_b(count, cols, x + n, ldx, 1, depth, right + n * depth + word * width);
    }
}

/* Di and dPi of some groups, and their rows of x and dz, each in the forms that products need. */
static void transform_task(void *argument, int64_t index, int slot)
{
    const struct filter_job *job = argument;
    const struct gd_conv_backward *c = job->conv;
    const struct gd_weight *w = c->weight;
    const int64_t group = index * TASK_GROUPS, row = group * FILTER_OUTPUTS, ldin = gd_row_stride(w->in);
    const int64_t rows = gd_smaller(job->rows - row, TASK_GROUPS * FILTER_OUTPUTS);
    const int64_t groups = gd_divide_up(rows, FILTER_OUTPUTS);
    const float *dz = c->dz + (job->first + row) * c->lddz, *x = c->x + (job->first + row) * 2 * c->ldx;
    const int64_t ldout = job->rounded != NULL ? gd_row_stride(w->out) : 0;
    const size_t bytes = (size_t)(FILTER_POINTS * TASK_GROUPS * (ldin + ldout)) * sizeof(float);
    const struct gd_points input = {gd_cpu_scratch(job->context, bytes), ldin, TASK_GROUPS * ldin};
    struct gd_points output = points_from(job->dpoints, group);
    (void)slot;
    if (job->rounded != NULL)
        output = (struct gd_points){input.data + FILTER_POINTS * input.matrix, ldout, TASK_GROUPS * ldout};
    job->kernels->filter_input(rows, w->in, x, c->ldx, input, NULL);
    job->kernels->filter_output_backward(rows, w->out, dz, c->lddz, output);
    for (int64_t i = 0; i < FILTER_POINTS; i++)
        pack_factors(job, i, group, groups, output.data + i * output.matrix, output.ld,
                     input.data + i * input.matrix, input.ld);
    pack_factors(job, FILTER_POINTS, row, rows, dz, c->lddz, x + c->ldx, 2 * c->ldx);
    if (job->rounded == NULL)
        return;
    const struct gd_points to = points_from(job->dpoints, group);
    for (int i = 0; i < FILTER_POINTS; i++)
        for (int64_t g = 0; g < groups; g++)
            job->gemm->convert(w->out, output.data + i * output.matrix + g * output.ld,
                               to.data + i * to.matrix + g * to.ld);
    for (int64_t r = 0; r < rows; r++)
        job->gemm->convert(w->out, dz + r * c->lddz, job->rounded + (row + r) * job->ldrounded);
}

/* dw and dx have columns of w->in: some whole panels of them are a task's. */
static int64_t cols_a_task(const struct filter_job *job)
{
    const int64_t nr = job->kernels->gemm_cols, panels = gd_divide_up(job->conv->weight->in, nr);
    return gd_divide_up(panels, job->context->num_threads) * nr;
}

static int64_t tasks_across(const struct filter_job *job)
{
    return gd_divide_up(job->conv->weight->in, cols_a_task(job));
}

/* Some columns of dU4 .. dU0 and, before them, for it takes longest, of dw1. */
static void weight_task(void *argument, int64_t index, int slot)
{
    const struct filter_job *job = argument;
    const struct gd_weight *w = job->conv->weight;
    const int64_t across = tasks_across(job), i = FILTER_POINTS - index / across, nr = job->kernels->gemm_cols;
    const int64_t begin = index % across * cols_a_task(job), end = gd_smaller(w->in, begin + cols_a_task(job));
    const int64_t depth = depth_of(job, i, job->rows), lddw = (FILTER_POINTS + 1) * w->in;
    (void)slot;
    for (int64_t r = 0; r < w->out; r += GEMM_ROWS)
        for (int64_t n = begin; n < end; n += nr) {
            float *dw = job->conv->dw_taps + r * lddw + i * w->in + n;
            job->kernels->gemm_panel(&(struct gd_panel){
                .rows = gd_smaller(w->out - r, GEMM_ROWS), .cols = (int)gd_smaller(end - n, nr), .taps = 1, .in = depth,
                .x = job->left + factor_offset(job, i, left_rows(job)) + r * depth, .step = depth,
                .gemm = job->gemm, .packed = 1,
                .b = job->right + factor_offset(job, i, right_cols(job)) + n * depth,
                .residual = dw, .ldresidual = lddw, .y = dw, .ldy = lddw,
            });
        }
}

/* Some columns of dx. */
static void input_task(void *argument, int64_t index, int slot)
{
    const struct filter_job *job = argument;
    const struct gd_conv_backward *c = job->conv;
    const struct gd_weight *w = c->weight;
    const int64_t nr = job->kernels->gemm_cols, words = gd_divide_up(w->out, job->gemm->elements);
    const int64_t begin = index * cols_a_task(job), end = gd_smaller(w->in, begin + cols_a_task(job));
    const float *dz = job->rounded != NULL ? job->rounded : c->dz + job->first * c->lddz;
    const int64_t lddz = job->rounded != NULL ? job->ldrounded : c->lddz;
    (void)slot;
    for (int64_t r = 0; r < job->rows; r += FILTER_GROUPS * FILTER_OUTPUTS)
        for (int64_t n = begin; n < end; n += nr) {
            const struct gd_panel panel = {
                .rows = gd_smaller(job->rows - r, FILTER_GROUPS * FILTER_OUTPUTS), .cols = (int)gd_smaller(end - n, nr),
                .in = words, .x = dz + r * lddz, .step = lddz, .gemm = job->gemm,
                .b = c->w_taps + n * (FILTER_POINTS + 1) * words,
                .y = c->dx + (job->first + r) * 2 * c->lddx + n, .ldy = c->lddx,
            };
            job->kernels->filter_input_panel(&panel, points_from(job->dpoints, r / FILTER_OUTPUTS),
                                             job->first + r == 0);
        }
}

static struct filter_job job_of(gd_context *context, const struct gd_conv_backward *c)
{
    const struct gd_kernels *kernels = gd_cpu_kernels(context);
    const struct gd_gemm_kernels *gemm = &kernels->gemm[c->weight->precision];
    return (struct filter_job){
        .context = context, .conv = c, .kernels = kernels, .gemm = gemm, .groups_a_block = GEMM_CHAIN * gemm->elements};
}

/* Gives out the scratch, or only counts where it is NULL. Returns the floats taken. */
static int64_t lay_out_filter(struct filter_job *job, float *scratch)
{
    const struct gd_weight *w = job->conv->weight;
    const int reduced = w->precision != GD_FLOAT32;
    const int64_t factors = factor_offset(job, FILTER_POINTS + FILTER_OUTPUTS, 1), groups = job->groups_a_block;
    const int64_t ld = gd_row_stride(gd_divide_up(w->out, job->gemm->elements));
    const int64_t parts[] = {factors * left_rows(job), factors * right_cols(job), FILTER_POINTS * groups * ld,
                             reduced ? FILTER_OUTPUTS * groups * ld : 0};
    if (scratch != NULL) {
        job->left = scratch;
        job->right = job->left + parts[0];
        job->dpoints = (struct gd_points){job->right + parts[1], ld, groups * ld};
        job->rounded = reduced ? job->dpoints.data + parts[2] : NULL;
        job->ldrounded = ld;
    }
    return parts[0] + parts[1] + parts[2] + parts[3];
}

static void backward_by_filter(gd_context *context, const struct gd_conv_backward *c)
{
    struct filter_job job = job_of(context, c);
    lay_out_filter(&job, c->scratch);
    const int64_t block = job.groups_a_block * FILTER_OUTPUTS;
    for (job.first = 0; job.first < c->rows; job.first += block) {
        job.rows = gd_smaller(c->rows - job.first, block);
        gd_cpu_run(context, gd_divide_up(job.rows, TASK_GROUPS * FILTER_OUTPUTS), transform_task, &job);
        gd_cpu_run(context, (FILTER_POINTS + 1) * tasks_across(&job), weight_task, &job);
        if (c->dx != NULL)
            gd_cpu_run(context, tasks_across(&job), input_task, &job);
    }
    for (int64_t r = 2 * c->rows + 1; c->dx != NULL && r < c->dx_rows; r++)
        memset(c->dx + r * c->lddx, 0, (size_t)c->weight->in * sizeof(float));
}

size_t gd_cpu_conv_backward_scratch(const gd_context *context, const struct gd_weight *weight)
{
    const struct gd_conv_backward conv = {.weight = weight};
    struct filter_job job = job_of((gd_context *)context, &conv);
    return by_filter(context, weight) ? (size_t)lay_out_filter(&job, NULL) : 0;
}

void gd_cpu_conv_backward(gd_context *context, const struct gd_conv_backward *conv)
{
    if (by_filter(context, conv->weight))
        backward_by_filter(context, conv);
    else
        backward_by_taps(context, conv);
}
