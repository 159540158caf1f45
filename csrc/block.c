/*
 * block.c - F, one transformer block of WavLM's kind.
 *
 *     post-norm:  x = LN1(x + attn(x));  [x = LNc(x + cross_attn(x, f))];  F = LN2(x + fc2(gelu(fc1 x)))
 *     pre-norm (layer_norm_first):  x = x + attn(LN1(x));                  F = x + fc2(gelu(fc1 LN2(x)))
 */
#include "stages.h"

static void norm_forward(gd_workspace *ws, struct gd_tile tile, gd_mat x, const float *gamma, const float *beta,
                         const gd_mat *add, gd_mat y, float *stats)
{
    gd_context *context = ws->model->context;
    context->backend->layer_norm(context, &(struct gd_layer_norm){
        .rows = tile.count, .width = ws->model->config.encoder_embed_dim, .eps = GD_LAYER_NORM_EPS,
        .x = x.data, .ldx = x.ld, .gamma = gamma, .beta = beta, .add = add ? add->data : NULL,
        .ldadd = add ? add->ld : 0,
        .y = y.data, .ldy = y.ld, .stats = stats,
    });
}

static void norm_backward(gd_workspace *ws, gd_mat x, const float *gamma, const float *stats, gd_mat dy, gd_mat dx,
                          float *dgamma, float *dbeta)
{
    gd_context *context = ws->model->context;
    context->backend->layer_norm_backward(context, &(struct gd_layer_norm_backward){
        .rows = ws->rows.total, .width = ws->model->config.encoder_embed_dim, .x = x.data, .ldx = x.ld,
        .dy = dy.data, .lddy = dy.ld, .gamma = gamma, .stats = stats, .dx = dx.data, .lddx = dx.ld,
        .dgamma = dgamma, .dbeta = dbeta,
    });
}

/* y = residual + drop(fc2(drop(gelu(fc1 x)))) */
static void feed_forward(gd_workspace *ws, struct gd_tile tile, int layer, int step, gd_mat x, gd_mat residual,
                         const struct gd_block_activations *a, gd_mat y)
{
    gd_model *model = ws->model;
    const gd_config *c = &model->config;
    const int64_t D = c->encoder_embed_dim, F = c->encoder_ffn_embed_dim;
    const struct gd_layer_params *params = &model->params.layers[layer];
    const struct gd_packed_layer *packed = &model->packed.layers[layer];
    const int dropped = gd_dropout_active(ws, c->dropout);
    for (int64_t r = 0; r < tile.count; r += GD_PART_ROWS) {
        const struct gd_tile part = gd_part_at(tile, r);
        const gd_mat x_part = gd_mat_at(x, r), residual_part = gd_mat_at(residual, r), y_part = gd_mat_at(y, r);
        const gd_mat pre = ws->training ? gd_mat_at(a->fc1_pre, r) : a->fc1_pre;
        gd_linear_forward(ws, part, x_part, &packed->fc1, params->fc1_bias, gd_product_activation(ws), NULL,
                          ws->training ? &pre : NULL, a->fc1);
        gd_dropout_apply(ws, part, F, a->fc1, c->activation_dropout, GD_SITE_ACTIVATION, step);
        gd_linear_forward(ws, part, a->fc1, &packed->fc2, params->fc2_bias, GD_NONE, dropped ? NULL : &residual_part,
                          NULL, y_part);
    }
    if (dropped) {
        gd_dropout_apply(ws, tile, D, y, c->dropout, GD_SITE_FFN, step);
        gd_add_rows(ws, tile, D, residual, y);
    }
}

/* dx written, the residual's part left to the caller; dy is used up by its dropout. */
static void feed_forward_backward(gd_workspace *ws, int layer, int step, gd_mat x, struct gd_block_activations *a,
                                  gd_mat dy, gd_mat dx, int accumulate)
{
    gd_model *model = ws->model;
    const gd_config *c = &model->config;
    const int64_t D = c->encoder_embed_dim, F = c->encoder_ffn_embed_dim;
    const struct gd_layer_params *params = &model->params.layers[layer];
    struct gd_layer_params *dparams = &ws->grads.layers[layer];
    const struct gd_tile all = gd_all_rows(ws);
    const gd_mat d = ws->dfc1;
    gd_dropout_apply(ws, all, D, dy, c->dropout, GD_SITE_FFN, step);
    for (int64_t r = 0; r < all.count; r += GD_PART_ROWS) {
        const struct gd_tile part = gd_part_at(all, r);
        const gd_mat x_part = gd_mat_at(x, r), dx_part = gd_mat_at(dx, r), dy_part = gd_mat_at(dy, r);
        const gd_mat pre = gd_mat_at(a->fc1_pre, r);
        gd_activate(ws, part.count, F, pre, a->fc1);
        gd_dropout_apply(ws, part, F, a->fc1, c->activation_dropout, GD_SITE_ACTIVATION, step);
        gd_linear_backward(ws, part, D, F, a->fc1, dy_part, params->fc2_weight, d, 0, dparams->fc2_weight,
                           dparams->fc2_bias);
        gd_dropout_apply(ws, part, F, d, c->activation_dropout, GD_SITE_ACTIVATION, step);
        gd_activate_backward(ws, part.count, F, pre, d, d);
        gd_linear_backward(ws, part, F, D, x_part, d, params->fc1_weight, dx_part, accumulate,
                           dparams->fc1_weight, dparams->fc1_bias);
    }
}

static struct gd_attention_stage self_attention(int layer, int step, gd_mat x, struct gd_block_activations *a)
{
    return (struct gd_attention_stage){.layer = layer, .step = step, .x = x, .source = x, .acts = &a->self_attn};
}

static struct gd_attention_stage cross_attention(gd_workspace *ws, int layer, int step, gd_mat x,
                                                 struct gd_block_activations *a)
{
    return (struct gd_attention_stage){.layer = layer, .step = step, .cross = 1, .x = x, .source = ws->f,
                                       .acts = &a->cross_attn};
}

/* sum = x + attention's output; y = LayerNorm(sum), for a tile. */
static void attention_out(gd_workspace *ws, struct gd_tile tile, const struct gd_attention_stage *stage, gd_mat x,
                          gd_mat sum, const float *gamma, const float *beta, float *stats, gd_mat y)
{
    gd_attention_join(ws, stage, tile, x, sum);
    norm_forward(ws, tile, sum, gamma, beta, NULL, y, stats);
}

/* Attention sees all rows; the rest goes by in tiles. x, the attentions' contexts, out, and before cross-attention
 * attn_out are matrices of all rows. The others begin anew with each tile. */
static void pre_norm_forward(gd_workspace *ws, int layer, int step, gd_mat x, struct gd_block_activations *a)
{
    const struct gd_layer_params *p = &ws->model->params.layers[layer];
    const struct gd_attention_stage self = self_attention(layer, step, a->normed, a);
    norm_forward(ws, gd_all_rows(ws), x, p->self_attn_norm_weight, p->self_attn_norm_bias, NULL, a->normed,
                 a->attn_stats);
    gd_attention_forward(ws, &self);
    for (struct gd_tile t = gd_tile_at(ws, 0); t.count > 0; t = gd_tile_at(ws, t.first + t.count)) {
        attention_out(ws, t, &self, gd_mat_at(x, t.first), a->attn_sum, p->final_norm_weight, p->final_norm_bias,
                      a->ffn_stats, a->attn_out);
        feed_forward(ws, t, layer, step, a->attn_out, a->attn_sum, a, gd_mat_at(a->out, t.first));
    }
}

static void post_norm_forward(gd_workspace *ws, int layer, int step, gd_mat x, int skip, struct gd_block_activations *a)
{
    const struct gd_layer_params *p = &ws->model->params.layers[layer];
    const int crossed = ws->model->config.cross_attention;
    const struct gd_attention_stage self = self_attention(layer, step, x, a);
    const struct gd_attention_stage cross = cross_attention(ws, layer, step, a->attn_out, a);
    gd_attention_forward(ws, &self);
    if (crossed) {
        for (struct gd_tile t = gd_tile_at(ws, 0); t.count > 0; t = gd_tile_at(ws, t.first + t.count))
            attention_out(ws, t, &self, gd_mat_at(x, t.first), a->attn_sum, p->self_attn_norm_weight,
                          p->self_attn_norm_bias, a->attn_stats, gd_mat_at(a->attn_out, t.first));
        gd_attention_forward(ws, &cross);
    }
    for (struct gd_tile t = gd_tile_at(ws, 0); t.count > 0; t = gd_tile_at(ws, t.first + t.count)) {
        const gd_mat input = gd_mat_at(x, t.first), y = crossed ? a->cross_out : a->attn_out;
        if (crossed)
            attention_out(ws, t, &cross, gd_mat_at(a->attn_out, t.first), a->cross_sum, p->cross_attn_norm_weight,
                          p->cross_attn_norm_bias, a->cross_stats, y);
        else
            attention_out(ws, t, &self, input, a->attn_sum, p->self_attn_norm_weight, p->self_attn_norm_bias,
                          a->attn_stats, y);
        feed_forward(ws, t, layer, step, y, y, a, a->ffn_sum);
        norm_forward(ws, t, a->ffn_sum, p->final_norm_weight, p->final_norm_bias, skip ? &input : NULL,
                     gd_mat_at(a->out, t.first), a->ffn_stats);
    }
}

void gd_block_forward(gd_workspace *ws, int layer, int step, gd_mat x, int skip, struct gd_block_activations *a)
{
    if (ws->model->config.layer_norm_first)
        pre_norm_forward(ws, layer, step, x, a);
    else
        post_norm_forward(ws, layer, step, x, skip, a);
}

/* Post-norm only: encoders, the only ones that may be pre-norm, are not trained. */
void gd_block_backward(gd_workspace *ws, int layer, int step, gd_mat x, struct gd_block_activations *a, gd_mat dout,
                       gd_mat dx, gd_mat df)
{
    const gd_config *c = &ws->model->config;
    const int64_t D = c->encoder_embed_dim;
    const struct gd_layer_params *p = &ws->model->params.layers[layer];
    struct gd_layer_params *d = &ws->grads.layers[layer];
    const gd_mat dresidual = ws->dresidual, dbranch = ws->dbranch;
    norm_backward(ws, a->ffn_sum, p->final_norm_weight, a->ffn_stats, dout, dresidual, d->final_norm_weight,
                  d->final_norm_bias);
    gd_copy_rows(ws, D, 1, dresidual, dbranch);
    feed_forward_backward(ws, layer, step, c->cross_attention ? a->cross_out : a->attn_out, a, dbranch, dresidual, 1);
    if (c->cross_attention) {
        norm_backward(ws, a->cross_sum, p->cross_attn_norm_weight, a->cross_stats, dresidual, dresidual,
                      d->cross_attn_norm_weight, d->cross_attn_norm_bias);
        gd_copy_rows(ws, D, 1, dresidual, dbranch);
        struct gd_attention_stage cross = cross_attention(ws, layer, step, a->attn_out, a);
        gd_attention_backward(ws, &cross, dbranch, dresidual, df);
    }
    norm_backward(ws, a->attn_sum, p->self_attn_norm_weight, a->attn_stats, dresidual, dresidual,
                  d->self_attn_norm_weight, d->self_attn_norm_bias);
    gd_add_rows(ws, gd_all_rows(ws), D, dresidual, dx);
    struct gd_attention_stage stage = self_attention(layer, step, x, a);
    gd_attention_backward(ws, &stage, dresidual, dx, dx);
}
