/*
 * conv_backward.c - the backward of the extractor's convolutions, in matrix products: a tap at a time, or in the
 * transformed domain of filter_template.h, of whose forward it is the transpose step for step:
 *
 *     dPi from dz      dUi += dPi^T Di      dDi = dPi Ui      dx from dDi      dw from dUi
 */
#include "ops.h"

#include <string.h>

/* Groups that are transformed at once, and columns of a task of these transformations. */
enum { BLOCK_GROUPS = 256, TASK_GROUPS = 16, TASK_COLS = 64 };

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t divide_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* ---- Weights ------------------------------------------------------------------------------------------ */

size_t gd_cpu_conv_taps_size(const gd_context *context, const struct gd_weight *weight)
{
    (void)context;
    return (size_t)(weight->out * gd_cpu_matrices(weight) * weight->in);
}

struct taps_job {
    gd_context *context;
    const struct gd_weight *weight;
    const float *from;
    float *to;
};

static void split_task(void *argument, int64_t o, int slot)
{
    const struct taps_job *job = argument;
    const int64_t in = job->weight->in, taps = job->weight->taps;
    const float *from = job->from + o * in * taps;
    float *to = job->to + o * in * gd_cpu_matrices(job->weight);
    (void)slot;
    for (int64_t k = 0; k < taps; k++)
        for (int64_t c = 0; c < in; c++)
            to[gd_cpu_tap_matrix(job->weight, k) * in + c] = from[c * taps + k];
    if (gd_cpu_filtered(job->weight))
        gd_cpu_kernels(job->context)->filter_weights(in, to);
}

void gd_cpu_split_taps(gd_context *context, const struct gd_weight *weight, const float *w, float *w_taps)
{
    struct taps_job job = {context, weight, w, w_taps};
    gd_cpu_run(context, weight->out, split_task, &job);
}

static void merge_task(void *argument, int64_t o, int slot)
{
    const struct taps_job *job = argument;
    const int64_t in = job->weight->in, taps = job->weight->taps;
    const int filtered = gd_cpu_filtered(job->weight);
    const float *from = job->from + o * in * gd_cpu_matrices(job->weight);
    float *to = job->to + o * in * taps, *outer = gd_cpu_scratch(job->context); /* taps 0 and 2 from all of U0 .. U4 */
    (void)slot;
    if (filtered)
        gd_cpu_kernels(job->context)->filter_weights_backward(in, from, outer, outer + in);
    for (int64_t k = 0; k < taps; k++) {
        const float *d = filtered && k != 1 ? outer + k / 2 * in : from + gd_cpu_tap_matrix(job->weight, k) * in;
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
    for (int64_t k = 0; k < w->taps; k++)
        gd_cpu_gemm(context, &(struct gd_gemm){
            .m = c->rows, .n = w->in, .k = w->out, .a = c->dz, .a_row = c->lddz, .a_col = 1,
            .b = c->w_taps + k * w->in, .b_row = w->taps * w->in, .b_col = 1,
            .c = c->dx + k * c->lddx, .ldc = w->stride * c->lddx, .accumulate = 1, .precision = w->precision,
        });
}

/* ---- By minimal filtering ----------------------------------------------------------------------------- */

struct filter_job {
    const struct gd_kernels *kernels;
    const struct gd_conv_backward *conv;
    int64_t first, rows; /* outputs of this block of groups */
    struct gd_points input, output;
};

static struct gd_points points_from(struct gd_points points, int64_t group, int64_t column)
{
    points.data += group * points.ld + column;
    return points;
}

/* Di and dPi of some groups. */
static void transform_task(void *argument, int64_t index, int slot)
{
    const struct filter_job *job = argument;
    const struct gd_conv_backward *c = job->conv;
    const int64_t group = index * TASK_GROUPS, row = group * FILTER_OUTPUTS;
    const int64_t rows = smaller(job->rows - row, TASK_GROUPS * FILTER_OUTPUTS);
    (void)slot;
    job->kernels->filter_input(rows, c->weight->in, c->x + (job->first + row) * 2 * c->ldx, c->ldx,
                               points_from(job->input, group, 0));
    job->kernels->filter_output_backward(rows, c->weight->out, c->dz + (job->first + row) * c->lddz, c->lddz,
                                         points_from(job->output, group, 0));
}

/* Some columns of the even rows of dx: neighbouring groups share a row, so that rows cannot be divided. */
static void input_backward_task(void *argument, int64_t index, int slot)
{
    const struct filter_job *job = argument;
    const struct gd_conv_backward *c = job->conv;
    const int64_t column = index * TASK_COLS;
    (void)slot;
    job->kernels->filter_input_backward(job->rows, smaller(c->weight->in - column, TASK_COLS),
                                        points_from(job->input, 0, column), job->first == 0,
                                        c->dx + job->first * 2 * c->lddx + column, c->lddx);
}

/* dw_taps[o, i] += sum over rows of dz[r, o] x[r]. */
static void add_to_weight(gd_context *context, const struct gd_conv_backward *c, int64_t i, int64_t rows, const float *dz,
                          int64_t lddz, const float *x, int64_t ldx)
{
    const struct gd_weight *w = c->weight;
    gd_cpu_gemm(context, &(struct gd_gemm){
        .m = w->out, .n = w->in, .k = rows, .a = dz, .a_row = 1, .a_col = lddz, .b = x, .b_row = ldx, .b_col = 1,
        .c = c->dw_taps + i * w->in, .ldc = gd_cpu_matrices(w) * w->in, .accumulate = 1, .precision = w->precision,
    });
}

/* dx[r] = dz[r] w_taps[., i]. */
static void multiply_by_weight(gd_context *context, const struct gd_conv_backward *c, int64_t i, int64_t rows, const float *dz,
                               int64_t lddz, float *dx, int64_t lddx)
{
    const struct gd_weight *w = c->weight;
    gd_cpu_gemm(context, &(struct gd_gemm){
        .m = rows, .n = w->in, .k = w->out, .a = dz, .a_row = lddz, .a_col = 1,
        .b = c->w_taps + i * w->in, .b_row = gd_cpu_matrices(w) * w->in, .b_col = 1, .c = dx, .ldc = lddx, .precision = w->precision,
    });
}

static void backward_by_filter(gd_context *context, const struct gd_conv_backward *c)
{
    const struct gd_weight *w = c->weight;
    const int64_t ldin = gd_row_stride(w->in), ldout = gd_row_stride(w->out);
    struct filter_job job = {
        .kernels = gd_cpu_kernels(context), .conv = c,
        .input = {c->scratch, ldin, BLOCK_GROUPS * ldin},
        .output = {c->scratch + FILTER_POINTS * BLOCK_GROUPS * ldin, ldout, BLOCK_GROUPS * ldout},
    };
    for (job.first = 0; job.first < c->rows; job.first += BLOCK_GROUPS * FILTER_OUTPUTS) {
        job.rows = smaller(c->rows - job.first, BLOCK_GROUPS * FILTER_OUTPUTS);
        const int64_t groups = divide_up(job.rows, FILTER_OUTPUTS), odd = job.first * 2 + 1;
        const float *dz = c->dz + job.first * c->lddz;
        gd_cpu_run(context, divide_up(groups, TASK_GROUPS), transform_task, &job);
        for (int i = 0; i < FILTER_POINTS; i++) {
            float *input = job.input.data + i * job.input.matrix, *output = job.output.data + i * job.output.matrix;
            add_to_weight(context, c, i, groups, output, ldout, input, ldin);
            if (c->dx != NULL)
                multiply_by_weight(context, c, i, groups, output, ldout, input, ldin);
        }
        add_to_weight(context, c, FILTER_POINTS, job.rows, dz, c->lddz, c->x + odd * c->ldx, 2 * c->ldx);
        if (c->dx != NULL) {
            multiply_by_weight(context, c, FILTER_POINTS, job.rows, dz, c->lddz, c->dx + odd * c->lddx, 2 * c->lddx);
            gd_cpu_run(context, divide_up(w->in, TASK_COLS), input_backward_task, &job);
        }
    }
    for (int64_t r = 2 * c->rows + 1; c->dx != NULL && r < c->dx_rows; r++)
        memset(c->dx + r * c->lddx, 0, (size_t)w->in * sizeof(float));
}

size_t gd_cpu_conv_backward_scratch(const gd_context *context, const struct gd_weight *weight)
{
    (void)context;
    const int64_t floats = FILTER_POINTS * BLOCK_GROUPS * (gd_row_stride(weight->in) + gd_row_stride(weight->out));
    return gd_cpu_filtered(weight) ? (size_t)floats : 0;
}

void gd_cpu_conv_backward(gd_context *context, const struct gd_conv_backward *conv)
{
    if (gd_cpu_filtered(conv->weight))
        backward_by_filter(context, conv);
    else
        backward_by_taps(context, conv);
}
