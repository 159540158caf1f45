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
