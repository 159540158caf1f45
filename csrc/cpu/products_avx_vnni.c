#define GD_ISA_AVX_VNNI
#include "isa.h"

#if defined(GD_TARGET)
GD_ISA_BEGIN
#include "gemm_tile_template.h"
#include "rounding_template.h"

GEMM_TILES(tile, GD_INT8)

const struct gd_gemm_kernels gd_int8_avx2 = {
    .elements = 4, .rows = GEMM_MR, .filtered = 1, .tile = tile,
    .convert = round_int8, .convert_within = round_int8_within,
};
GD_ISA_END
#endif
