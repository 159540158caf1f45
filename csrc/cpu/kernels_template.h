/*
 * kernels_template.h - every kernel, instantiated with the flags of the file that includes it. That file
 * defines GD_KERNELS (the table's C name) and GD_KERNELS_NAME.
 */
#include "kernels.h"
#include "vec.h"

#include "gemm_template.h"

const struct gd_kernels GD_KERNELS = {
    .name = GD_KERNELS_NAME,
    .vector = VL,

    .gemm_rows = GEMM_MR,
    .gemm_cols = GEMM_NR,
    .gemm_panel = gemm_panel,
    .gemm_pack_b = gemm_pack_b,
    .gemm_column_sums = gemm_column_sums,
};
