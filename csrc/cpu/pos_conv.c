/*
 * pos_conv.c - the grouped convolution over time that tells the encoder where a frame stands.
 *
 * One group of one utterance is a GEMM over overlapping rows: the group's channels are gathered into a
 * contiguous (frames + kernel - 1, n) buffer, zero beyond the valid rows, whose row t is the kernel * n
 * window that output t sees.
 */
#include "ops.h"

#include <string.h>

/* Output rows of a task: the weights of a group are read once for each. */
#define TASK_ROWS GEMM_ROWS

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t divide_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

size_t gd_cpu_packed_pos_conv_size(const gd_context *context, int64_t width, int64_t groups, int64_t kernel)
{
    return (size_t)groups * gd_cpu_packed_size(context, width / groups, kernel, width / groups);
}

struct pack_job {
    gd_context *context;
    int64_t n, kernel;
    const float *w;
    int transposed;
    char *packed;
};

static void pack_task(void *argument, int64_t group, int slot)
{
    const struct pack_job *job = argument;
    int64_t n = job->n, kernel = job->kernel;
    const float *w = job->w + group * n * n * kernel;
    void *packed = job->packed + (size_t)group * gd_cpu_packed_size(job->context, n, kernel, n);
    (void)slot;
    if (job->transposed)
        gd_cpu_pack(job->context, n, kernel, n, w + kernel - 1, kernel, -1, n * kernel, packed);
    else
        gd_cpu_pack(job->context, n, kernel, n, w, n * kernel, 1, kernel, packed);
}

void gd_cpu_pack_pos_conv(gd_context *context, int64_t width, int64_t groups, int64_t kernel, const float *w,
                          int transposed, void *packed)
{
    struct pack_job job = {context, width / groups, kernel, w, transposed, packed};
    gd_cpu_run(context, groups, pack_task, &job);
}

/* to[i, n] = x[first + i, group's channels] of an utterance, zero outside of its `read` rows; i < count. */
static void gather(const float *x, int64_t ldx, int64_t read, int64_t n, int64_t first, int64_t count, float *to)
{
    for (int64_t i = 0; i < count; i++, to += n) {
        if (first + i >= 0 && first + i < read)
            memcpy(to, x + (first + i) * ldx, (size_t)n * sizeof(float));
        else
            memset(to, 0, (size_t)n * sizeof(float));
    }
}

/* How many of `rows` rows lie in the block that begins at t. */
static int64_t within(int64_t rows, int64_t t)
{
    return rows <= t ? 0 : smaller(rows - t, TASK_ROWS);
}

struct pos_conv_job {
    gd_context *context;
    const struct gd_pos_conv *conv;
    int64_t blocks; /* of TASK_ROWS rows, in the longest utterance */
};

static void pos_conv_task(void *argument, int64_t index, int slot)
{
    const struct pos_conv_job *job = argument;
    const struct gd_pos_conv *c = job->conv;
    const struct gd_kernels *kernels = gd_cpu_kernels(job->context);
    int64_t n = c->width / c->groups, k = c->kernel * n;
    int64_t block = index % job->blocks, group = index / job->blocks % c->groups, b = index / job->blocks / c->groups;
    int64_t first = c->rows->first[b], rows = c->rows->first[b + 1] - first, t = block * TASK_ROWS;
    if (t >= rows)
        return;
    /* Rows of the utterance that count, and from the block on, rows with a sum and rows that the residual has. */
    int64_t valid = c->rows->valid[b], read = c->transposed ? rows : valid;
    int64_t summed = within(c->transposed ? valid : rows, t), added = within(read, t);
    rows = within(rows, t);
    float *window = gd_cpu_scratch(job->context);
    const char *weight = (const char *)c->weight + (size_t)group * gd_cpu_packed_size(job->context, n, c->kernel, n);
    (void)slot;
    gather(c->x + first * c->ldx + group * n, c->ldx, read, n, t - c->pad, rows + c->kernel - 1, window);

    int64_t row = first + t;
    for (int64_t j = 0; j < n; j += kernels->gemm_cols) {
        int64_t o = group * n + j;
        struct gd_panel panel = {
            .cols = (int)smaller(n - j, kernels->gemm_cols),
            .taps = 1,
            .in = k,
            .step = n,
            .tap_stride = k,
            .b = (const float *)weight + j * k,
            .bias = c->bias != NULL ? c->bias + o : NULL,
            .activation = c->activation,
            .ldresidual = c->ldresidual,
            .ldpre = c->ldpre,
            .ldy = c->ldy,
        };
        /* The rows that the residual has, then those that it has not. */
        for (int64_t r = 0, end = smaller(summed, added); r < summed; r = end, end = summed) {
            panel.rows = end - r;
            panel.x = window + r * n;
            panel.residual = c->residual != NULL && r < added ? c->residual + (row + r) * c->ldresidual + o : NULL;
            panel.pre = c->pre != NULL ? c->pre + (row + r) * c->ldpre + o : NULL;
            panel.y = c->y + (row + r) * c->ldy + o;
            kernels->gemm_panel(&panel);
        }
    }
    for (int64_t r = row + summed; r < row + rows; r++) {
        float *y = c->y + r * c->ldy + group * n;
        if (c->residual != NULL)
            memmove(y, c->residual + r * c->ldresidual + group * n, (size_t)n * sizeof(float));
        else
            memset(y, 0, (size_t)n * sizeof(float));
    }
}

void gd_cpu_pos_conv(gd_context *context, const struct gd_pos_conv *conv)
{
    struct pos_conv_job job = {context, conv, divide_up(conv->rows->longest, TASK_ROWS)};
    gd_cpu_run(context, conv->rows->batch * job.blocks * conv->groups, pos_conv_task, &job);
}

/* Taps of a backward task, and frames that it multiplies at once. */
#define TASK_TAPS 16
#define TASK_FRAMES 256

/* Windows, and beyond them what a whole panel reads; dz in register tiles. */
static int64_t window_floats(const struct gd_kernels *kernels, int64_t n)
{
    return (TASK_FRAMES + TASK_TAPS - 1) * n + kernels->gemm_cols;
}

static int64_t packed_floats(const struct gd_kernels *kernels, int64_t n)
{
    return divide_up(n, kernels->gemm_rows) * kernels->gemm_rows * TASK_FRAMES;
}

struct backward_job {
    gd_context *context;
    const struct gd_pos_conv *conv;
    const float *dz;
    int64_t lddz;
    float *dw;
};

/* d[o, k, c] += `frames` frames of dz transposed (packed) times their windows of `taps` taps. */
static void multiply_windows(const struct gd_kernels *kernels, int64_t n, int64_t taps, int64_t frames, const float *dz,
                             const float *window, float *d)
{
    struct gd_panel panel = {.taps = 1, .in = frames, .step = frames, .tap_stride = frames, .tiled = 1, .b_row = n};
    panel.ldy = panel.ldresidual = taps * n;
    for (int64_t o = 0; o < n; o += GEMM_ROWS)
        for (int64_t j = 0; j < taps * n; j += kernels->gemm_cols) {
            panel.rows = smaller(n - o, GEMM_ROWS);
            panel.cols = (int)smaller(taps * n - j, kernels->gemm_cols);
            panel.x = dz + o * frames;
            panel.b = window + j;
            panel.residual = panel.y = d + o * taps * n + j;
            kernels->gemm_panel(&panel);
        }
}

/* TASK_TAPS taps of one group: d[o, k, c], block of frames after block, then dw[o, c, k] += d[o, k, c]. */
static void backward_task(void *argument, int64_t index, int slot)
{
    const struct backward_job *job = argument;
    const struct gd_pos_conv *c = job->conv;
    const struct gd_kernels *kernels = gd_cpu_kernels(job->context);
    int64_t n = c->width / c->groups, group = index % c->groups, k0 = index / c->groups * TASK_TAPS;
    int64_t taps = smaller(c->kernel - k0, TASK_TAPS);
    float *window = gd_cpu_scratch(job->context);
    float *packed = window + window_floats(kernels, n), *d = packed + packed_floats(kernels, n);
    (void)slot;
    memset(d, 0, (size_t)(n * taps * n) * sizeof(float));
    for (int64_t b = 0; b < c->rows->batch; b++) {
        const float *x = c->x + c->rows->first[b] * c->ldx + group * n;
        const float *dz = job->dz + c->rows->first[b] * job->lddz + group * n;
        int64_t rows = c->rows->first[b + 1] - c->rows->first[b];
        for (int64_t t = 0; t < rows; t += TASK_FRAMES) {
            int64_t frames = smaller(rows - t, TASK_FRAMES);
            gather(x, c->ldx, c->rows->valid[b], n, t + k0 - c->pad, frames + taps - 1, window);
            kernels->gemm_pack_a(frames, n, dz + t * job->lddz, job->lddz, packed);
            multiply_windows(kernels, n, taps, frames, packed, window, d);
        }
    }
    for (int64_t o = 0; o < n; o++)
        for (int64_t i = 0; i < n; i++) {
            float *dw = job->dw + ((group * n + o) * n + i) * c->kernel + k0;
            for (int64_t k = 0; k < taps; k++)
                dw[k] += d[(o * taps + k) * n + i];
        }
}

void gd_cpu_pos_conv_backward_weight(gd_context *context, const struct gd_pos_conv *forward, const float *dz,
                                     int64_t lddz, float *dw)
{
    struct backward_job job = {context, forward, dz, lddz, dw};
    gd_cpu_run(context, forward->groups * divide_up(forward->kernel, TASK_TAPS), backward_task, &job);
}

size_t gd_cpu_pos_conv_scratch(const gd_context *context, const gd_config *config, int64_t longest, int training)
{
    if (config->conv_pos_groups == 0)
        return 0;
    const struct gd_kernels *kernels = gd_cpu_kernels(context);
    int64_t n = config->encoder_embed_dim / config->conv_pos_groups;
    int64_t forward = (smaller(longest, TASK_ROWS) + config->conv_pos - 1) * n;
    int64_t backward = window_floats(kernels, n) + packed_floats(kernels, n) + n * TASK_TAPS * n;
    return (size_t)(training && backward > forward ? backward : forward) * sizeof(float);
}
