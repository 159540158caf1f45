/*
 * pos_conv_fft.c - pos_conv() by overlap-save: windows of `size` rows, of which size - kernel + 1 sums are kept.
 *
 * Windows begin at each utterance's own first row, and each is computed by itself, so that an utterance has the
 * same bits in any batch. A task has one group of several windows: their spectra stay in its scratch, and it reads
 * the group's weights, (size / 2 + 1) n x n complex numbers, once. Of a short utterance that is what takes the time:
 * beside products in bfloat16 or int8 they are bfloat16, half as many bytes.
 */
#include "../size.h"
#include "pos_conv.h"

#include <math.h>

/* Bytes of spectra that a task should keep: they share the L2 cache with the weights that pass by. */
#define TASK_BYTES ((int64_t)640 << 10)
#define MOST_WINDOWS 16

int gd_cpu_pos_conv_by_fft(int64_t n, int64_t kernel)
{
    return kernel >= 64 && 2 * kernel <= FFT_MOST && n <= 128;
}

/* Rows of a window: at least half of them are kept. */
static int64_t window_size(int64_t kernel)
{
    int64_t size = 16;
    while (size < 2 * kernel)
        size *= 2;
    return size;
}

/* Channels of a group in whole vectors. */
static int64_t padded(const struct gd_kernels *kernels, int64_t n)
{
    return gd_round_up(n, kernels->vector);
}

static int is_rounded(const struct gd_pos_conv *conv)
{
    return conv->precision != GD_FLOAT32;
}

/* Floats of a group's weights of one frequency. */
static int64_t frequency_floats(const struct gd_kernels *kernels, int64_t n, int rounded)
{
    return (rounded ? 1 : 2) * n * padded(kernels, n);
}

static size_t header_size(void)
{
    return gd_whole_lines(sizeof(struct gd_fft));
}

size_t gd_cpu_pos_conv_fft_size(const gd_context *context, const struct gd_pos_conv *conv)
{
    const int64_t n = conv->width / conv->groups, bins = window_size(conv->kernel) / 2 + 1;
    const int64_t floats = frequency_floats(gd_cpu_kernels(context), n, is_rounded(conv));
    return header_size() + (size_t)(conv->groups * bins * floats) * sizeof(float);
}

static void turn(double angle, float *to)
{
    to[0] = (float)cos(2 * 3.14159265358979323846 * angle);
    to[1] = (float)-sin(2 * 3.14159265358979323846 * angle);
}

static void make_tables(int64_t size, struct gd_fft *fft)
{
    int64_t half = size / 2, length = half;
    float *to = fft->turns;
    for (; length > 8; length /= 4)
        for (int64_t j = 0; j < length / 4; j++, to += 6)
            for (int64_t i = 1; i <= 3; i++)
                turn((double)(i * j) / (double)length, to + 2 * (i - 1));
    fft->size = size;
    fft->last = length;
    fft->num_turns = to - fft->turns;
    for (int64_t k = 0; k <= half / 2; k++)
        turn((double)k / (double)size, fft->split + 2 * k);
    for (int64_t k = 0; k < half; k++) {
        int32_t place = 0;
        for (int64_t bit = 1; bit < half; bit *= 2)
            place = 2 * place + ((k & bit) != 0);
        fft->place[k] = place;
    }
}

struct pack_job {
    const struct gd_kernels *kernels;
    const struct gd_fft *fft;
    const struct gd_pos_conv *conv;
    const float *w;
    float *spectra;
};

/* One input channel of one group. w[o, c, k] is read as it stands, or with o and c exchanged and k reversed; the
 * product of spectra is a convolution, so the taps of a correlation are reversed once more. */
static void pack_task(void *argument, int64_t index, int slot)
{
    const struct pack_job *job = argument;
    const int64_t n = job->conv->width / job->conv->groups, kernel = job->conv->kernel;
    const int64_t group = index / n, c = index % n, bins = job->fft->size / 2 + 1;
    const int64_t frequency = frequency_floats(job->kernels, n, job->fft->rounded);
    const int transposed = job->conv->transposed;
    const float *w = job->w + group * n * n * kernel + c * kernel * (transposed ? n : 1);
    (void)slot;
    job->kernels->fft_pack(job->fft, n, c, kernel, w, transposed ? kernel : n * kernel, !transposed,
                           0.25f / (float)job->fft->size, job->spectra + group * bins * frequency, frequency);
}

void gd_cpu_pack_pos_conv_fft(gd_context *context, const struct gd_pos_conv *conv, const float *w, void *packed)
{
    struct gd_fft *fft = packed;
    make_tables(window_size(conv->kernel), fft);
    fft->rounded = is_rounded(conv);
    float *spectra = (float *)((char *)packed + header_size());
    struct pack_job job = {gd_cpu_kernels(context), fft, conv, w, spectra};
    gd_cpu_run(context, conv->width, pack_task, &job);
}

/* Windows that a task may hold. */
static int64_t most_windows(int64_t size, int64_t channels)
{
    int64_t bytes = (size / 2 + 1) * 2 * channels * (int64_t)sizeof(float), windows = TASK_BYTES / bytes / 4 * 4;
    return windows < 4 ? 4 : gd_smaller(windows, MOST_WINDOWS);
}

/* Floats between the frequencies of `windows` windows: an odd number of cache lines, so that a window's frequencies
 * lie in different sets. */
static int64_t spectra_stride(int64_t windows, int64_t channels)
{
    return (gd_divide_up(windows * 2 * channels, GD_CACHE_LINE_FLOATS) | 1) * GD_CACHE_LINE_FLOATS;
}

size_t gd_cpu_pos_conv_fft_scratch(const gd_context *context, int64_t n, int64_t kernel)
{
    int64_t size = window_size(kernel), channels = padded(gd_cpu_kernels(context), n);
    return (size_t)((size / 2 + 2) * spectra_stride(most_windows(size, channels), channels)) * sizeof(float);
}

struct fft_job {
    gd_context *context;
    const struct gd_pos_conv *conv;
    const struct gd_fft *fft;
    const float *spectra;
    int64_t kept;           /* rows that a window gives */
    int64_t windows, tasks; /* of the batch; of one group of channels */
};

/* A window: it gives rows t and on of utterance b. */
struct window {
    int64_t b, t;
};

static int64_t rows_of(const struct gd_rows *rows, int64_t b)
{
    return rows->first[b + 1] - rows->first[b];
}

/* The batch's window number `index`, counted utterance by utterance. */
static struct window find_window(const struct fft_job *job, int64_t index)
{
    const struct gd_rows *rows = job->conv->rows;
    for (int64_t b = 0;; b++) {
        int64_t windows = gd_divide_up(rows_of(rows, b), job->kept);
        if (index < windows)
            return (struct window){b, index * job->kept};
        index -= windows;
    }
}

static struct window next_window(const struct fft_job *job, struct window window)
{
    window.t += job->kept;
    if (window.t >= rows_of(job->conv->rows, window.b))
        window = (struct window){window.b + 1, 0};
    return window;
}

static void transform(const struct fft_job *job, int64_t group, struct window window, float *to, int64_t stride,
                      int64_t channels)
{
    const struct gd_pos_conv *c = job->conv;
    int64_t n = c->width / c->groups, row = window.t - c->pad;
    int64_t read = gd_cpu_pos_conv_rows(c, window.b, window.t, job->kept).read;
    int64_t begin = row < 0 ? -row : 0, end = gd_smaller(job->fft->size, read - row);
    const float *x = c->x + (c->rows->first[window.b] + row + begin) * c->ldx + group * n;
    gd_cpu_kernels(job->context)->fft_forward(job->fft, x, c->ldx, begin, end, n, to, stride, channels);
}

static void transform_back(const struct fft_job *job, int64_t group, struct window window, const float *from,
                           int64_t stride, int64_t channels)
{
    const struct gd_pos_conv *c = job->conv;
    int64_t n = c->width / c->groups;
    struct gd_pos_conv_rows some = gd_cpu_pos_conv_rows(c, window.b, window.t, job->kept);
    struct gd_panel panel = gd_cpu_pos_conv_panel(c, some.row, group * n, n);
    panel.rows = some.summed;
    gd_cpu_kernels(job->context)->fft_inverse(job->fft, from, stride, channels, c->kernel - 1, some.added, &panel);
    gd_cpu_pos_conv_fill(c, &some, group * n, n);
}

static void fft_task(void *argument, int64_t index, int slot)
{
    const struct fft_job *job = argument;
    const struct gd_kernels *kernels = gd_cpu_kernels(job->context);
    int64_t n = job->conv->width / job->conv->groups, channels = padded(kernels, n), bins = job->fft->size / 2 + 1;
    int64_t group = index / job->tasks, task = index % job->tasks;
    int64_t begin = job->windows * task / job->tasks, count = job->windows * (task + 1) / job->tasks - begin;
    int64_t stride = spectra_stride(count, channels), frequency = frequency_floats(kernels, n, job->fft->rounded);
    const float *w = job->spectra + group * bins * frequency;
    float *y = gd_cpu_scratch(job->context, gd_cpu_pos_conv_fft_scratch(job->context, n, job->conv->kernel));
    float *x = y + stride; /* a frequency's sums go where the one before it was */
    struct window first = find_window(job, begin), window = first;
    (void)slot;
    for (int64_t i = 0; i < count; i++, window = next_window(job, window))
        transform(job, group, window, x + i * 2 * channels, stride, channels);
    for (int64_t k = 0; k < bins; k++)
        kernels->fft_multiply(job->fft, count, n, x + k * stride, w + k * frequency, y + k * stride, 2 * channels,
                              channels);
    window = first;
    for (int64_t i = 0; i < count; i++, window = next_window(job, window))
        transform_back(job, group, window, y + i * 2 * channels, stride, channels);
}

void gd_cpu_pos_conv_fft(gd_context *context, const struct gd_pos_conv *conv)
{
    struct fft_job job = {.context = context, .conv = conv, .fft = conv->weight};
    job.spectra = (const float *)((const char *)conv->weight + header_size());
    job.kept = job.fft->size - conv->kernel + 1;
    for (int64_t b = 0; b < conv->rows->batch; b++)
        job.windows += gd_divide_up(rows_of(conv->rows, b), job.kept);
    int64_t channels = padded(gd_cpu_kernels(context), conv->width / conv->groups);
    job.tasks = gd_divide_up(job.windows, most_windows(job.fft->size, channels));
    gd_cpu_run(context, conv->groups * job.tasks, fft_task, &job);
}
