/*
 * kernels.h - the table of kernels that one instruction set provides. Kernels know nothing of threads:
 * the operations beside them (gemm.c, attention.c, ...) divide the outputs and call them.
 */
#ifndef GD_CPU_KERNELS_H
#define GD_CPU_KERNELS_H

#include "../backend.h"

/* Most rows of a struct gd_panel. */
#define GEMM_ROWS 192

/* `rows` rows of A times one panel of packed B, and what linear() does to the sums. Pointers and strides
 * as in struct gd_linear, from the block's first row and the panel's first column on.
 * accumulate: y += the sums (no activation then). */
struct gd_panel {
    int64_t rows;
    int cols; /* at most gemm_cols */
    int64_t taps, in;
    const float *x;
    int64_t step, tap_stride;
    const float *b; /* (taps * in, cols in whole vectors) */
    const float *bias;
    enum gd_activation activation;
    const float *residual;
    int64_t ldresidual;
    float *pre;
    int64_t ldpre;
    float *y;
    int64_t ldy;
};

struct gd_kernels {
    const char *name;
    int vector; /* floats in a vector */

    /* gemm_template.h */
    int gemm_rows, gemm_cols; /* the register tile */
    void (*gemm_panel)(const struct gd_panel *);
    void (*gemm_pack_b)(int64_t k, int64_t cols, const float *b, int64_t b_row, int64_t b_col, float *to);
    void (*gemm_column_sums)(int64_t rows, int64_t cols, const float *x, int64_t ldx, float *out);
};

extern const struct gd_kernels gd_kernels_generic, gd_kernels_avx2, gd_kernels_avx512, gd_kernels_neon;

/* The best table that the processor, the operating system and GENDISTILLER_DISABLE_CPU allow. */
const struct gd_kernels *gd_kernels_select(void);

#endif
