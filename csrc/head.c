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
        for (int64_t r = 0; r < t.count; r += GD_PART_ROWS) {
            const struct gd_tile part = gd_part_at(t, r);
            const gd_mat pre = ws->training ? gd_mat_at(a->hidden_pre, part.first) : a->hidden_pre;
            gd_linear_forward(ws, part, gd_mat_at(a->block.out, part.first), &model->packed.output0, model->params.output0_bias, gd_gelu_of(ws),
                              NULL, ws->training ? &pre : NULL, a->hidden);
            gd_linear_forward(ws, part, a->hidden, &model->packed.output2, model->params.output2_bias, GD_NONE, NULL, NULL,
                              gd_mat_at(a->out, part.first));
        }
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
    for (int64_t r = 0; r < ws->rows.total; r += GD_PART_ROWS) {
        const int64_t rows = gd_part_at(gd_all_rows(ws), r).count;
        const gd_mat pre = gd_mat_at(a->hidden_pre, r), dz_part = gd_mat_at(dz, r);
        context->backend->gelu(context, rows, D, pre.data, pre.ld, a->hidden.data, a->hidden.ld);
        gd_linear_backward_part(ws, rows, D, D, a->hidden, gd_mat_at(dout, r), model->params.output2_weight, &d, 0, ws->grads.output2_weight,
                                ws->grads.output2_bias);
        context->backend->gelu_backward(context, rows, D, pre.data, pre.ld, d.data, d.ld, d.data, d.ld);
        gd_linear_backward_part(ws, rows, D, D, gd_mat_at(a->block.out, r), d, model->params.output0_weight, &dz_part, 0,
                                ws->grads.output0_weight, ws->grads.output0_bias);
    }
}
