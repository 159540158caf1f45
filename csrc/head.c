/*
 * head.c - what follows the block: O, the output layer that every step shares, or the parallel heads.
 *
 *     generative   O(z) = W2 gelu(W1 z + b1) + b2; z is the block's output plus, with the skip connection, h[l-1]:
 *                  block.out holds the sum
 *     multi_head   prediction i = W2_i gelu(W1 x[L] + b1)_i + b2_i, the inner layer's columns i D .. (i + 1) D - 1
 */
#include "stages.h"

/* ---- O ---------------------------------------------------------------------------------------------- */

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
        gd_linear_forward(ws, part, z, &model->packed.output0, model->params.output0_bias, gd_product_activation(ws),
                          NULL, ws->training ? &pre : NULL, a->hidden);
        gd_linear_forward(ws, part, a->hidden, &model->packed.output2, model->params.output2_bias, GD_NONE, NULL, NULL,
                          out);
    }
}

void gd_head_backward(gd_workspace *ws, struct gd_step_activations *a, gd_mat dout, gd_mat dz)
{
    gd_model *model = ws->model;
    const int64_t D = model->config.encoder_embed_dim;
    const gd_mat d = ws->dhidden;
    if (!model->params.output2_weight) {
        gd_copy_rows(ws, D, 1, dout, dz);
        return;
    }
    for (struct gd_tile part = part_from(ws, 0); part.count > 0; part = part_from(ws, part.first + part.count)) {
        const gd_mat z = gd_mat_at(a->block.out, part.first), dout_part = gd_mat_at(dout, part.first);
        const gd_mat pre = gd_mat_at(a->hidden_pre, part.first), dz_part = gd_mat_at(dz, part.first);
        gd_activate(ws, part.count, D, pre, a->hidden);
        gd_linear_backward(ws, part, D, D, a->hidden, dout_part, model->params.output2_weight, d, 0,
                           ws->grads.output2_weight, ws->grads.output2_bias);
        gd_activate_backward(ws, part.count, D, pre, d, d);
        gd_linear_backward(ws, part, D, D, z, d, model->params.output0_weight, dz_part, 0,
                           ws->grads.output0_weight, ws->grads.output0_bias);
    }
}

/* ---- Parallel heads --------------------------------------------------------------------------------- */

static gd_mat columns_of(gd_mat heads, int i, int64_t width) { return (gd_mat){heads.data + i * width, heads.ld}; }

void gd_heads_forward(gd_workspace *ws, gd_mat x)
{
    const gd_model *model = ws->model;
    gd_linear_forward(ws, gd_all_rows(ws), x, &model->packed.output0, model->params.output0_bias,
                      gd_product_activation(ws), NULL, ws->training ? &ws->heads_pre : NULL, ws->heads);
}

void gd_prediction_forward(gd_workspace *ws, int i)
{
    const gd_model *model = ws->model;
    const int64_t D = model->config.encoder_embed_dim;
    gd_linear_forward(ws, gd_all_rows(ws), columns_of(ws->heads, i, D), &model->packed.heads[i],
                      model->params.heads_bias + i * D, GD_NONE, NULL, NULL, ws->predictions[i]);
}

/* heads_weight[i] is (in, out): dw += head^T dy, dhead = dy w^T. */
static void prediction_backward(gd_workspace *ws, int i, gd_mat dy)
{
    gd_context *context = ws->model->context;
    const struct gd_backend *backend = context->backend;
    const int64_t D = ws->model->config.encoder_embed_dim;
    const gd_mat head = columns_of(ws->heads, i, D), dhead = columns_of(ws->dheads, i, D);
    backend->gemm(context, &(struct gd_gemm){
        .m = D, .n = D, .k = ws->rows.total, .a = head.data, .a_row = 1, .a_col = head.ld,
        .b = dy.data, .b_row = dy.ld, .b_col = 1,
        .c = ws->grads.heads_weight + i * D * D, .ldc = D, .accumulate = 1, .precision = ws->precision,
    });
    backend->bias_backward(context, ws->rows.total, D, dy.data, dy.ld, ws->grads.heads_bias + i * D);
    backend->gemm(context, &(struct gd_gemm){
        .m = ws->rows.total, .n = D, .k = D, .a = dy.data, .a_row = dy.ld, .a_col = 1,
        .b = ws->model->params.heads_weight + i * D * D, .b_row = 1, .b_col = D, .c = dhead.data, .ldc = dhead.ld,
        .precision = ws->precision,
    });
}

void gd_heads_backward(gd_workspace *ws, gd_mat x, const gd_mat *dpredictions, gd_mat dx)
{
    const gd_model *model = ws->model;
    const int64_t D = model->config.encoder_embed_dim;
    const int targets = model->config.num_targets;
    for (int i = 0; i < targets; i++)
        prediction_backward(ws, i, dpredictions[i]);
    gd_activate_backward(ws, ws->rows.total, targets * D, ws->heads_pre, ws->dheads, ws->dheads);
    gd_linear_backward(ws, gd_all_rows(ws), targets * D, D, x, ws->dheads, model->params.output0_weight, dx, 1,
                       ws->grads.output0_weight, ws->grads.output0_bias);
}
