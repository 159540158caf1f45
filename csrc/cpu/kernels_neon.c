/* Compiled for AArch64, where vectors of four and fused multiply-add are always there. */
#if defined(__aarch64__)
#define GD_KERNELS gd_kernels_neon
#define GD_KERNELS_NAME "neon"
#include "kernels_template.h"
#endif
