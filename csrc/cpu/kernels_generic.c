/* Compiled with the compiler's default flags: runs on every processor it targets. */
#define GD_KERNELS gd_kernels_generic
#define GD_KERNELS_NAME "generic"
#include "kernels_template.h"
