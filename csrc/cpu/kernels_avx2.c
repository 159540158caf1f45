/* Compiled with -mavx2 -mfma. */
#if defined(__AVX2__) && defined(__FMA__)
#define GD_KERNELS gd_kernels_avx2
#define GD_KERNELS_NAME "avx2"
#include "kernels_template.h"
#endif
