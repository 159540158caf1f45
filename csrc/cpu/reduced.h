/*
 * reduced.h - what gemm.c needs for products in bfloat16 and int8: see reduced.c.
 */
#ifndef GD_CPU_REDUCED_H
#define GD_CPU_REDUCED_H

#include "kernels.h"

/* Columns of one panel: w[c * w_out + t * w_tap + k * w_in], c < cols; width: cols in whole vectors. */
struct gd_panel_weights {
    const struct gd_weight *weight;
    const float *w;
    int64_t w_out, w_tap, w_in, cols, width;
};

/* Words of one column of a packed panel, in any precision. */
int64_t gd_packed_depth(const struct gd_kernels *, const struct gd_weight *);
void gd_reduced_pack_int8(const struct gd_kernels *, const struct gd_panel_weights *, void *to);

/* Words of a row of the left factor, in any precision. */
int64_t gd_row_words(const struct gd_kernels *, const struct gd_weight *);

/* Rounds what the output rows row .. row + rows - 1 read into scratch, and points the panel's x there; of a filtered
 * convolution x are the odd rows, and *points are set too. */
void gd_reduced_round(const struct gd_kernels *, const struct gd_linear *, int64_t row, int64_t rows, void *scratch,
                      struct gd_panel *, struct gd_points *);

#endif
