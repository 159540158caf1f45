#define GD_ISA_AVX2
#include "isa.h"

#if defined(GD_TARGET)
GD_ISA_BEGIN
#define GD_KERNELS gd_kernels_avx2
#define GD_KERNELS_NAME "avx2"
#include "kernels_template.h"
GD_ISA_END
#endif
