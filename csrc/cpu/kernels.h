/*
 * kernels.h - the table of kernels that one instruction set provides. Kernels know nothing of threads:
 * the operations beside them (gemm.c, attention.c, ...) divide the outputs and call them.
 */
#ifndef GD_CPU_KERNELS_H
#define GD_CPU_KERNELS_H

#include "../backend.h"

struct gd_kernels {
    const char *name;
};

extern const struct gd_kernels gd_kernels_generic, gd_kernels_avx2, gd_kernels_avx512, gd_kernels_neon;

/* The best table that the processor, the operating system and GENDISTILLER_DISABLE_CPU allow. */
const struct gd_kernels *gd_kernels_select(void);

#endif
