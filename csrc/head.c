/*
 * head.c - O, the output layer that every step shares: O(z) = W2 gelu(W1 z + b1) + b2.
 *
 * z is the block's output plus, with the skip connection, h[l-1]: block.out holds the sum.
 */
#include "stages.h"

/* The rows that O takes at once, from row `first` on: at most a tile's, and GD_PART_ROWS. Empty at the end. */
static struct gd_tile part_from(const gd_workspace *ws, int64_t first) { return gd_part_at(gd_tile_at(ws, first), 0); }

void gd_head_forward(gd_workspace *ws, struct gd_step_activations *a)
{
    gd_model *model = ws->model;
    if (!model->params.output2_weight)
        return;
    for (struct gd_tile part = part_from(ws, 0); part.count > 0; part = part_from(ws, part.first + part.count)) {
        const gd_mat z = gd_mat_at(a->block.out, part.first), out = gd_mat_at(a->out, part.first);
        const gd_mat pre = ws->training ? gd_mat_at(a->hidden_pre, part.first) : a->hidden_pre;
        gd_linear_forward(ws, part, z, &model->packed.output0, model->params.output0_bias, gd_gelu_of(ws), NULL,
                          ws->training ? &pre : NULL, a->hidden);
        gd_linear_forward(ws, part, a->hidden, &model->packed.output2, model->params.output2_bias, GD_NONE, NULL, NULL,
                          out);
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
    for (struct gd_tile part = part_from(ws, 0); part.count > 0; part = part_from(ws, part.first + part.count)) {
        const gd_mat z = gd_mat_at(a->block.out, part.first), dout_part = gd_mat_at(dout, part.first);
        const gd_mat pre = gd_mat_at(a->hidden_pre, part.first), dz_part = gd_mat_at(dz, part.first);
        context->backend->gelu(context, part.count, D, pre.data, pre.ld, a->hidden.data, a->hidden.ld);
        gd_linear_backward(ws, part, D, D, a->hidden, dout_part, model->params.output2_weight, d, 0,
                           ws->grads.output2_weight, ws->grads.output2_bias);
        context->backend->gelu_backward(context, part.count, D, pre.data, pre.ld, d.data, d.ld, d.data, d.ld);
        gd_linear_backward(ws, part, D, D, z, d, model->params.output0_weight, dz_part, 0,
                           ws->grads.output0_weight, ws->grads.output0_bias);
    }
}
