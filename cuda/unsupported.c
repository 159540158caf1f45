/*
 * unsupported.c - the operations that this backend does not have yet. They keep a failure that names them, which
 * synchronize() reports.
 */
#include "ops.h"

#pragma GCC diagnostic ignored "-Wunused-parameter"

#define UNSUPPORTED(operation, arguments) \
    void gd_cuda_##operation arguments \
    { \
        gd_cuda_keep_failure(context, GD_EUNSUPPORTED, "device: the CUDA backend has no %s yet", #operation); \
    }

UNSUPPORTED(dropout, (gd_context *context, const struct gd_rows *rows, int64_t first, int64_t count, int64_t width,
                      float *x, int64_t ldx, double p, const gd_dropout_seed *seed, uint32_t site))
UNSUPPORTED(round_rows, (gd_context *context, int64_t rows, int64_t width, const float *x, int64_t ldx, uint16_t *to,
                         int64_t ldto))
UNSUPPORTED(widen_gelu, (gd_context *context, int64_t rows, int64_t width, const uint16_t *from, int64_t ldfrom, float *z,
                         int64_t ldz, float *y, int64_t ldy))
UNSUPPORTED(moments, (gd_context *context, const struct gd_moments *op))
UNSUPPORTED(norm_fold, (gd_context *context, const struct gd_norm_fold *op))
UNSUPPORTED(norm_fold_backward, (gd_context *context, const struct gd_norm_fold_backward *op))
UNSUPPORTED(normalize, (gd_context *context, int64_t samples, float *x, const double *statistics, float eps))
UNSUPPORTED(split_taps, (gd_context *context, const struct gd_weight *weight, const float *w, float *w_taps))
UNSUPPORTED(merge_taps, (gd_context *context, const struct gd_weight *weight, const float *dw_taps, float *dw))
UNSUPPORTED(conv_backward, (gd_context *context, const struct gd_conv_backward *op))
UNSUPPORTED(weight_norm, (gd_context *context, int64_t out, int64_t in, int64_t kernel, const float *g, const float *v,
                          float *w))
UNSUPPORTED(weight_norm_backward, (gd_context *context, int64_t out, int64_t in, int64_t kernel, const float *g,
                                   const float *v, const float *dw, float *dg, float *dv))
UNSUPPORTED(pack_pos_conv, (gd_context *context, int64_t width, int64_t groups, int64_t kernel, const float *w,
                            int transposed, void *packed))
UNSUPPORTED(pos_conv, (gd_context *context, const struct gd_pos_conv *op))
UNSUPPORTED(pos_conv_backward_weight, (gd_context *context, const struct gd_pos_conv *op, const float *dz,
                                       int64_t lddz, float *dw))
UNSUPPORTED(position_bias, (gd_context *context, const gd_config *config, int64_t longest, const float *table,
                            float *bias))
UNSUPPORTED(position_bias_backward, (gd_context *context, const gd_config *config, int64_t longest, const float *dbias,
                                     float *dtable))
UNSUPPORTED(gate, (gd_context *context, const struct gd_gate *op))
UNSUPPORTED(gate_backward, (gd_context *context, const struct gd_gate_backward *op))
UNSUPPORTED(attention, (gd_context *context, const struct gd_attention *op))
UNSUPPORTED(attention_backward, (gd_context *context, const struct gd_attention_backward *op))
UNSUPPORTED(scatter_rows, (gd_context *context, const struct gd_rows *rows, int64_t width, const float *x, int64_t ldx,
                           int64_t frames_max, float *padded))
UNSUPPORTED(gather_rows, (gd_context *context, const struct gd_rows *rows, int64_t width, const float *padded,
                          int64_t frames_max, float *x, int64_t ldx))
UNSUPPORTED(loss_rows, (gd_context *context, const struct gd_loss_rows *op))
UNSUPPORTED(adamw, (gd_context *context, const struct gd_adamw_update *op))

size_t gd_cuda_conv_taps_size(const gd_context *context, const struct gd_weight *weight)
{
    return 0; /* split_taps() fails */
}

size_t gd_cuda_conv_backward_scratch(const gd_context *context, const struct gd_weight *weight)
{
    return 0;
}

size_t gd_cuda_packed_pos_conv_size(const gd_context *context, int64_t width, int64_t groups, int64_t kernel)
{
    return 0; /* pack_pos_conv() fails */
}

double gd_cuda_sum_squares(gd_context *context, size_t count, const float *x)
{
    gd_cuda_keep_failure(context, GD_EUNSUPPORTED, "device: the CUDA backend has no sum_squares yet");
    return 0;
}
