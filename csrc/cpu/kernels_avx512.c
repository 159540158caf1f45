/* Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma. */
#if defined(__AVX512F__)
#define GD_KERNELS gd_kernels_avx512
#define GD_KERNELS_NAME "avx512"
#include "kernels_template.h"
#endif
