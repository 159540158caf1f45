/*
 * pos_conv.c - the grouped convolution over time that tells the encoder where a frame stands, computed directly,
 * and its weights' gradient.
 *
 * One group of one utterance is a GEMM over overlapping rows: the group's channels are gathered into a
 * contiguous (frames + kernel - 1, n) buffer, zero beyond the valid rows, whose row t is the kernel * n
 * window that output t sees.
 */
#include "pos_conv.h"

#include <string.h>

/* Output rows of a task: the weights of a group are read once for each. */
#define TASK_ROWS GEMM_ROWS

/* One group as a linear layer over windows of kernel * n floats. */
static struct gd_weight group_weight(int64_t n, int64_t kernel)
{
    return (struct gd_weight){.out = n, .taps = kernel, .in = n, .stride = 1};
}

static size_t group_size(const gd_context *context, int64_t n, int64_t kernel)
{
    const struct gd_weight weight = group_weight(n, kernel);
    return gd_cpu_packed_size(context, &weight);
}

size_t gd_cpu_packed_pos_conv_size(const gd_context *context, const struct gd_pos_conv *conv)
{
    int64_t n = conv->width / conv->groups;
    if (gd_cpu_pos_conv_by_fft(n, conv->kernel))
        return gd_cpu_pos_conv_fft_size(context, conv);
    return (size_t)conv->groups * group_size(context, n, conv->kernel);
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
    void *packed = job->packed + (size_t)group * group_size(job->context, n, kernel);
    const struct gd_weight weight = group_weight(n, kernel);
    (void)slot;
    if (job->transposed)
        gd_cpu_pack(job->context, &weight, w + kernel - 1, kernel, -1, n * kernel, packed);
    else
        gd_cpu_pack(job->context, &weight, w, n * kernel, 1, kernel, packed);
}

void gd_cpu_pack_pos_conv(gd_context *context, const struct gd_pos_conv *conv, const float *w, void *packed)
{
    const int64_t n = conv->width / conv->groups;
    if (gd_cpu_pos_conv_by_fft(n, conv->kernel)) {
        gd_cpu_pack_pos_conv_fft(context, conv, w, packed);
        return;
    }
    struct pack_job job = {context, n, conv->kernel, w, conv->transposed, packed};
    gd_cpu_run(context, conv->groups, pack_task, &job);
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

struct pos_conv_job {
    gd_context *context;
    const struct gd_pos_conv *conv;
    int64_t blocks; /* of TASK_ROWS rows, in the longest utterance */
};

/* Rows r .. end - 1 of some, which all have a residual or all have none. */
static void multiply_rows(const struct pos_conv_job *job, const struct gd_pos_conv_rows *some, int64_t group, int64_t r,
                          int64_t end, const float *window)
{
    const struct gd_pos_conv *c = job->conv;
    const struct gd_kernels *kernels = gd_cpu_kernels(job->context);
    int64_t n = c->width / c->groups, k = c->kernel * n;
    const char *weight = (const char *)c->weight + (size_t)group * group_size(job->context, n, c->kernel);
    for (int64_t j = 0; j < n && r < end; j += kernels->gemm_cols) {
        struct gd_panel panel = gd_cpu_pos_conv_panel(c, some->row + r, group * n + j,
                                                      gd_smaller(n - j, kernels->gemm_cols));
        panel.rows = end - r;
        panel.taps = 1;
        panel.gemm = &kernels->gemm[GD_FLOAT32];
        panel.in = panel.tap_stride = k;
        panel.x = window + r * n;
        panel.step = n;
        panel.b = (const float *)weight + j * k;
        if (r >= some->added)
            panel.residual = NULL;
        kernels->gemm_panel(&panel);
    }
}

/* Floats of the windows of `rows` rows. */
static int64_t direct_floats(int64_t rows, int64_t kernel, int64_t n) { return (rows + kernel - 1) * n; }

static void pos_conv_task(void *argument, int64_t index, int slot)
{
    const struct pos_conv_job *job = argument;
    const struct gd_pos_conv *c = job->conv;
    int64_t block = index % job->blocks, group = index / job->blocks % c->groups, b = index / job->blocks / c->groups;
    int64_t n = c->width / c->groups, t = block * TASK_ROWS;
    struct gd_pos_conv_rows some = gd_cpu_pos_conv_rows(c, b, t, TASK_ROWS);
    if (some.rows == 0)
        return;
    const size_t bytes = (size_t)direct_floats(some.rows, c->kernel, n) * sizeof(float);
    float *window = gd_cpu_scratch(job->context, bytes);
    (void)slot;
    gather(c->x + c->rows->first[b] * c->ldx + group * n, c->ldx, some.read, n, t - c->pad, some.rows + c->kernel - 1,
           window);
    multiply_rows(job, &some, group, 0, gd_smaller(some.added, some.summed), window);
    multiply_rows(job, &some, group, some.added, some.summed, window);
    gd_cpu_pos_conv_fill(c, &some, group * n, n);
}

void gd_cpu_pos_conv(gd_context *context, const struct gd_pos_conv *conv)
{
    if (gd_refuses_activation(context, conv->activation))
        return;
    if (gd_cpu_pos_conv_by_fft(conv->width / conv->groups, conv->kernel)) {
        gd_cpu_pos_conv_fft(context, conv);
        return;
    }
    struct pos_conv_job job = {context, conv, gd_divide_up(conv->rows->longest, TASK_ROWS)};
    gd_cpu_run(context, conv->rows->batch * job.blocks * conv->groups, pos_conv_task, &job);
}

/* Taps of a backward task, and frames that it multiplies at once. */
#define TASK_TAPS 16
#define TASK_FRAMES 256

/* Windows, a row more, and beyond them what a whole panel reads; dz in register tiles. */
static int64_t window_floats(const struct gd_kernels *kernels, int64_t n)
{
    return (TASK_FRAMES + TASK_TAPS) * n + kernels->gemm_cols;
}

static int64_t packed_floats(int64_t n)
{
    return gd_round_up(n, GEMM_MOST_MR) * TASK_FRAMES;
}

/* Windows, the same rounded, dz, and the gradient of TASK_TAPS taps. */
static int64_t backward_floats(const struct gd_kernels *kernels, int64_t n)
{
    return 2 * window_floats(kernels, n) + packed_floats(n) + n * TASK_TAPS * n;
}

struct backward_job {
    gd_context *context;
    const struct gd_pos_conv *conv;
    const float *dz;
    int64_t lddz;
    float *dw;
};

/* d[o, k, c] += `frames` frames of dz transposed (packed) times their windows of `taps` taps, both in words. */
static void multiply_windows(const struct gd_kernels *kernels, const struct gd_gemm_kernels *gemm, int64_t n,
                             int64_t taps, int64_t frames, const float *dz, const float *window, float *d)
{
    const int64_t words = gd_divide_up(frames, gemm->elements);
    struct gd_panel panel = {.taps = 1, .in = words, .step = words, .tap_stride = words,
                             .gemm = gemm, .packed = 1, .b_row = gemm->elements * n};
    panel.ldy = panel.ldresidual = taps * n;
    for (int64_t o = 0; o < n; o += GEMM_ROWS)
        for (int64_t j = 0; j < taps * n; j += kernels->gemm_cols) {
            panel.rows = gd_smaller(n - o, GEMM_ROWS);
            panel.cols = (int)gd_smaller(taps * n - j, kernels->gemm_cols);
            panel.x = dz + o * words;
            panel.b = window + j;
            panel.residual = panel.y = d + o * taps * n + j;
            kernels->gemm_panel(&panel);
        }
}

/* TASK_TAPS taps of one group: d[o, k, c], block of frames after block, then dw[o, c, k] += d[o, k, c]. Windows overlap
 * as words too: word i is of elements i, i + n .. of the rows that it sums over, so that a sum's next word is as many
 * rows further on. An odd last row's neighbour is multiplied by a zero. */
static void backward_task(void *argument, int64_t index, int slot)
{
    const struct backward_job *job = argument;
    const struct gd_pos_conv *c = job->conv;
    const struct gd_kernels *kernels = gd_cpu_kernels(job->context);
    const struct gd_gemm_kernels *gemm = &kernels->gemm[c->precision];
    int64_t n = c->width / c->groups, group = index % c->groups, k0 = index / c->groups * TASK_TAPS;
    int64_t taps = gd_smaller(c->kernel - k0, TASK_TAPS);
    float *window = gd_cpu_scratch(job->context, (size_t)backward_floats(kernels, n) * sizeof *window);
    float *rounded = window + window_floats(kernels, n);
    float *packed = rounded + window_floats(kernels, n), *d = packed + packed_floats(n);
    (void)slot;
    memset(d, 0, (size_t)(n * taps * n) * sizeof(float));
    for (int64_t b = 0; b < c->rows->batch; b++) {
        const float *x = c->x + c->rows->first[b] * c->ldx + group * n;
        const float *dz = job->dz + c->rows->first[b] * job->lddz + group * n;
        int64_t rows = c->rows->first[b + 1] - c->rows->first[b];
        for (int64_t t = 0; t < rows; t += TASK_FRAMES) {
            int64_t frames = gd_smaller(rows - t, TASK_FRAMES);
            gather(x, c->ldx, c->rows->valid[b], n, t + k0 - c->pad, frames + taps, window);
            gemm->pack_a(frames, n, dz + t * job->lddz, job->lddz, gd_divide_up(frames, gemm->elements), packed);
            if (c->precision != GD_FLOAT32)
                gemm->pack_b(gemm->elements, (frames + taps - 1) * n, window, n, 1, 1, rounded);
            multiply_windows(kernels, gemm, n, taps, frames, packed, c->precision != GD_FLOAT32 ? rounded : window, d);
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
    gd_cpu_run(context, forward->groups * gd_divide_up(forward->kernel, TASK_TAPS), backward_task, &job);
}

size_t gd_cpu_pos_conv_scratch(const gd_context *context, const gd_config *config, int64_t longest, int training)
{
    if (config->conv_pos_groups == 0)
        return 0;
    const struct gd_kernels *kernels = gd_cpu_kernels(context);
    int64_t n = config->encoder_embed_dim / config->conv_pos_groups;
    size_t forward = (size_t)direct_floats(gd_smaller(longest, TASK_ROWS), config->conv_pos, n) * sizeof(float);
    size_t backward = (size_t)backward_floats(kernels, n) * sizeof(float);
    if (gd_cpu_pos_conv_by_fft(n, config->conv_pos))
        forward = gd_cpu_pos_conv_fft_scratch(context, n, config->conv_pos);
    return training && backward > forward ? backward : forward;
}
