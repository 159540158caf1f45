#define GD_ISA_NEON
#include "isa.h"

#if defined(GD_TARGET)
GD_ISA_BEGIN
#define GD_KERNELS gd_kernels_neon
#define GD_KERNELS_NAME "neon"
#include "kernels_template.h"
GD_ISA_END
#endif
