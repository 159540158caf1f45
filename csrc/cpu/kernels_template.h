/*
 * kernels_template.h - every kernel, instantiated with the flags of the file that includes it. That file
 * defines GD_KERNELS (the table's C name) and GD_KERNELS_NAME.
 */
#include "kernels.h"
#include "vec.h"

#include "attention_backward_template.h"
#include "attention_template.h"
#include "dropout_template.h"
#include "elementwise_template.h"
#include "fft_template.h"
#include "filter_template.h"
#include "gate_template.h"
#include "gemm_template.h"
#include "loss_template.h"
#include "moments_template.h"
#include "norm_template.h"
#include "rounding_template.h"

GEMM_TILES(gemm_int8_tile, GD_INT8)

const struct gd_kernels GD_KERNELS = {
    .name = GD_KERNELS_NAME,
    .vector = VL,

    .gemm_cols = GEMM_NR,
    .gemm_panel = gemm_panel,
    .gemm = {
        [GD_FLOAT32] = {.elements = 1, .rows = GEMM_MR, .filtered = 1,
                        .tile = gemm_float32_tile, .packed_tile = gemm_packed_tile,
                        .pack_b = gemm_pack_b, .pack_a = gemm_pack_a},
        [GD_BFLOAT16] = {.elements = 1, .rows = GEMM_MR, .filtered = 1,
                         .tile = gemm_float32_tile, .convert = round_bfloat16,
                         .packed_tile = gemm_packed_tile, .pack_b = pack_rounded_b, .pack_a = pack_rounded_a},
        [GD_INT8] = {.elements = 4, .rows = GEMM_MR, .filtered = 1, .tile = gemm_int8_tile, .convert = round_int8,
                     .convert_within = round_int8_within},
    },
    .gemm_column_sums = gemm_column_sums,

    .filter_input = filter_input,
    .filter_output_backward = filter_output_backward,
    .filter_weights = filter_weights,
    .filter_weights_backward = filter_weights_backward,
    .filter_panel = filter_panel,
    .filter_input_panel = filter_input_panel,

    .fft_forward = fft_forward,
    .fft_inverse = fft_inverse,
    .fft_multiply = fft_multiply,
    .fft_pack = fft_pack,

    .layer_norm = layer_norm,
    .layer_norm_backward = layer_norm_backward,
    .layer_norm_backward_params = layer_norm_backward_params,

    .activate = activate,
    .activate_backward = activate_backward,
    .round_row = round_row,
    .widen_row = widen_row,
    .axpby = axpby,
    .sum_squares = sum_squares,
    .adamw = adamw,
    .dropout = dropout,

    .moments = moments,
    .normalize = normalize,

    .gate = gate,
    .gate_backward = gate_backward,

    .attention_scratch = attention_scratch,
    .attention = attention,
    .attention_backward = attention_backward,

    .loss_row = loss_row,
};
