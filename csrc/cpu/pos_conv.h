/*
 * pos_conv.h - what the two ways to compute pos_conv() share: directly (pos_conv.c), and by FFT
 * (pos_conv_fft.c), which takes less time where the kernel is long. They share pos_conv_rows.c.
 */
#ifndef GD_CPU_POS_CONV_H
#define GD_CPU_POS_CONV_H

#include "ops.h"

/* Rows t .. t + rows - 1 of an utterance: the first `summed` have a sum, the first `added` a residual. */
struct gd_pos_conv_rows {
    int64_t row;  /* where t is in the batch */
    int64_t read; /* rows of the whole utterance that count in x */
    int64_t rows, summed, added;
};

/* At most `most` rows of utterance b. */
struct gd_pos_conv_rows gd_cpu_pos_conv_rows(const struct gd_pos_conv *, int64_t b, int64_t t, int64_t most);

/* What is done to the sums of columns `column` and on, and where they go, for the batch's rows `row` and on. */
struct gd_panel gd_cpu_pos_conv_panel(const struct gd_pos_conv *, int64_t row, int64_t column, int64_t cols);

/* Writes the rows that have no sum. */
void gd_cpu_pos_conv_fill(const struct gd_pos_conv *, const struct gd_pos_conv_rows *some, int64_t column,
                          int64_t cols);

/* Whether groups of n channels are convolved by FFT. Follows from the model alone, as the weights are packed for one
 * way only. With 128 taps and 48 channels an FFT takes a twelfth of the direct way's time from 350 rows on, and a
 * seventh for 100; with 64 taps and four channels three quarters. */
int gd_cpu_pos_conv_by_fft(int64_t n, int64_t kernel);

size_t gd_cpu_pos_conv_fft_size(const gd_context *, const struct gd_pos_conv *);
size_t gd_cpu_pos_conv_fft_scratch(const gd_context *, int64_t n, int64_t kernel);
void gd_cpu_pack_pos_conv_fft(gd_context *, const struct gd_pos_conv *, const float *w, void *packed);
void gd_cpu_pos_conv_fft(gd_context *, const struct gd_pos_conv *);

#endif
