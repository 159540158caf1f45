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

double gd_cuda_sum_squares(gd_context *context, size_t count, const float *x)
{
    gd_cuda_keep_failure(context, GD_EUNSUPPORTED, "device: the CUDA backend has no sum_squares yet");
    return 0;
}
