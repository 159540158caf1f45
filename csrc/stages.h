/*
 * stages.h - the stages, in the order in which data walks through them, forward beside backward, and what they share.
 */
#ifndef GD_STAGES_H
#define GD_STAGES_H

#include "workspace.h"

#define GD_LAYER_NORM_EPS 1e-5f

/* The activation of every stage, forward and backward. */
#define GD_ACTIVATION GD_GELU

/* It between products of the workspace's precision. Training keeps to the one that its backward computes again. */
static inline enum gd_activation gd_product_activation(const gd_workspace *ws)
{
    return ws->precision == GD_FLOAT32 || ws->training ? GD_ACTIVATION : GD_GELU_REDUCED;
}

/* y = act(x W^T + bias) (+ residual) for a tile, at whose first rows the matrices are; pre and residual may be NULL. */
void gd_linear_forward(gd_workspace *, struct gd_tile, gd_mat x, const struct gd_weight *, const float *bias,
                       enum gd_activation, const gd_mat *residual, const gd_mat *pre, gd_mat y);
/* dw += dy^T x, dbias += sum dy, dx = or += dy W, likewise. */
void gd_linear_backward(gd_workspace *, struct gd_tile, int64_t out, int64_t in, gd_mat x, gd_mat dy,
                        const float *weight, gd_mat dx, int accumulate, float *dweight, float *dbias);
/* y = scale x for all rows; y += x for a tile's. */
void gd_copy_rows(gd_workspace *, int64_t width, float scale, gd_mat x, gd_mat y);
void gd_add_rows(gd_workspace *, struct gd_tile, int64_t width, gd_mat x, gd_mat y);
/* y = act(z), dz = dy act'(z) of so many rows. */
void gd_activate(gd_workspace *, int64_t rows, int64_t width, gd_mat z, gd_mat y);
void gd_activate_backward(gd_workspace *, int64_t rows, int64_t width, gd_mat z, gd_mat dy, gd_mat dz);
/* In-place dropout of a tile, and its backward: nothing in evaluation or at p = 0. */
int gd_dropout_active(const gd_workspace *, double p);
void gd_dropout_apply(gd_workspace *, struct gd_tile, int64_t width, gd_mat x, double p,
                      enum gd_dropout_site, int step);

/* A convolution's weight as products in this precision read it; conv 0's are float32. */
struct gd_weight gd_conv_weight(const gd_config *, int layer, enum gd_precision);
int64_t gd_extractor_alignment(const gd_config *);
int64_t gd_extractor_rows_below(const gd_config *, int layer, int64_t rows);
/* rows[i]: rows of convolution i that frames t0 .. t0 + frames - 1 of an utterance of `samples` are computed from. */
void gd_extractor_tile_rows(const gd_config *, int64_t samples, int64_t t0, int64_t frames, int64_t *rows);
void gd_extractor_forward(gd_workspace *);
void gd_extractor_backward(gd_workspace *, gd_mat dcnn);

void gd_prenet_forward(gd_workspace *);
void gd_prenet_backward(gd_workspace *, gd_mat df, gd_mat dcnn);
/* What packing looks at, and the padding. */
struct gd_pos_conv gd_pos_conv_shape(const gd_config *, enum gd_precision, int transposed);
void gd_position_forward(gd_workspace *, gd_mat x, struct gd_position_activations *, int step);
/* Packs the transposed weight that gd_position_backward() reads, once a pass. */
void gd_position_prepare_backward(gd_workspace *);
/* dx, if there is one, += ; dout is used up. */
void gd_position_backward(gd_workspace *, gd_mat x, const struct gd_position_activations *, int step, gd_mat dout,
                          gd_mat dx);

/* context = attention(q from x, k and v from source), with gate and bias where it isn't cross-attention. */
struct gd_attention_stage {
    int layer, step, cross;
    gd_mat x, source;
    struct gd_attention_activations *acts;
};
void gd_attention_forward(gd_workspace *, const struct gd_attention_stage *);
/* y = residual + out_proj(context) for a tile, at whose first row residual and y are. */
void gd_attention_join(gd_workspace *, const struct gd_attention_stage *, struct gd_tile, gd_mat residual, gd_mat y);
/* dx +=, dsource += (the same matrix in self-attention). */
void gd_attention_backward(gd_workspace *, const struct gd_attention_stage *, gd_mat dy, gd_mat dx, gd_mat dsource);

/* out = F(x), plus x where `skip` is 1. In inference out may be x. */
void gd_block_forward(gd_workspace *, int layer, int step, gd_mat x, int skip, struct gd_block_activations *);
/* dx +=, with cross-attention df +=; dout is used up. */
void gd_block_backward(gd_workspace *, int layer, int step, gd_mat x, struct gd_block_activations *, gd_mat dout,
                       gd_mat dx, gd_mat df);

/* h[l] = O(z), z the block's output plus h[l-1]. */
void gd_head_forward(gd_workspace *, struct gd_step_activations *);
/* dz written. */
void gd_head_backward(gd_workspace *, struct gd_step_activations *, gd_mat dout, gd_mat dz);
/* The parallel heads' inner layer of x, the last block's output; then, one at a time, their predictions. */
void gd_heads_forward(gd_workspace *, gd_mat x);
void gd_prediction_forward(gd_workspace *, int i);
/* dx += */
void gd_heads_backward(gd_workspace *, gd_mat x, const gd_mat *dpredictions, gd_mat dx);

/* Between the caller's arrays on the host and the device: a state's ragged rows and its (B, T, D); the flat gradient,
 * which ws->grads then points into. */
void gd_state_out(gd_workspace *, gd_mat state, float *padded);
void gd_state_in(gd_workspace *, const float *padded, gd_mat state);
void gd_gradient_in(gd_workspace *, float *grads);
void gd_gradient_out(gd_workspace *, float *grads);

/* The loss over the rows of `layers` predictions; dpred written in counted rows, or NULL. terms: scratch,
 * (layers + longest, 3). */
void gd_loss_rows(gd_context *, int layers, int64_t dim, const struct gd_rows *,
                  const gd_mat *pred, const gd_mat *target, const gd_loss_options *, double *terms, gd_loss *,
                  const gd_mat *dpred);
/* Adds the feature penalty to the loss, and its gradient to dcnn, which is scaled by feature_grad_mult already. */
void gd_feature_penalty(gd_workspace *, const gd_loss_options *, gd_loss *);
void gd_feature_penalty_backward(gd_workspace *, const gd_loss_options *, gd_mat dcnn);

#endif
