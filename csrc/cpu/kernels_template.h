/*
 * kernels_template.h - every kernel, instantiated with the flags of the file that includes it. That file
 * defines GD_KERNELS (the table's C name) and GD_KERNELS_NAME.
 */
#include "kernels.h"
#include "vec.h"

const struct gd_kernels GD_KERNELS = {
    .name = GD_KERNELS_NAME,
};
