#define GD_ISA_AVX512
#include "isa.h"

#if defined(GD_TARGET)
GD_ISA_BEGIN
#define GD_KERNELS gd_kernels_avx512
#define GD_KERNELS_NAME "avx512"
#include "kernels_template.h"
GD_ISA_END
#endif
