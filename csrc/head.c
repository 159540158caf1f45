/*
 * head.c - O, the output layer that every step shares: O(z) = W2 gelu(W1 z + b1) + b2.
 *
 * z is the block's output plus, with the skip connection, h[l-1]: block.out holds the sum.
 */
#include "model.h"

void gd_head_forward(gd_workspace *ws, struct gd_step_activations *a)
{
    gd_model *model = ws->model;
    if (!model->params.output2_weight)
        return;
    for (struct gd_tile t = gd_tile_at(ws, 0); t.count > 0; t = gd_tile_at(ws, t.first + t.count)) {
        gd_linear_forward(ws, t, gd_mat_at(a->block.out, t.first), &model->packed.output0, model->params.output0_bias, gd_gelu_of(ws),
                          NULL, ws->training ? &a->hidden_pre : NULL, a->hidden);
        gd_linear_forward(ws, t, a->hidden, &model->packed.output2, model->params.output2_bias, GD_NONE, NULL, NULL,
                          gd_mat_at(a->out, t.first));
    }
}

/* dz written; the inner gradient stands in d[1]. */
void gd_head_backward(gd_workspace *ws, struct gd_step_activations *a, gd_mat dout, gd_mat dz)
{
    gd_model *model = ws->model;
    gd_context *context = model->context;
    const int64_t D = model->config.encoder_embed_dim;
    const gd_mat d = ws->d[1];
    if (!model->params.output2_weight) {
        gd_copy_rows(ws, D, 1, dout, dz);
        return;
    }
    gd_linear_backward(ws, D, D, a->hidden, dout, model->params.output2_weight, &d, 0, ws->grads.output2_weight,
                       ws->grads.output2_bias);
    context->backend->gelu_backward(context, ws->rows.total, D, a->hidden_pre.data, a->hidden_pre.ld, d.data, d.ld, d.data, d.ld);
    gd_linear_backward(ws, D, D, a->block.out, d, model->params.output0_weight, &dz, 0, ws->grads.output0_weight,
                       ws->grads.output0_bias);
}
