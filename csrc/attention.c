/*
 * attention.c - multi-head attention with WavLM's gated relative position bias.
 *
 *     logits = (q / sqrt(Dh)) k^T + gate * bias        bias by distance, gate by head and query
 *     y      = residual + out_proj(softmax(logits) v)
 *
 * Cross-attention takes keys and values from another sequence of the same rows, without gate and bias.
 */
#include <math.h>

#include "stages.h"

static const struct gd_attention_params *params_of(const gd_model *model, const struct gd_attention_stage *stage)
{
    const struct gd_layer_params *layer = &model->params.layers[stage->layer];
    return stage->cross ? &layer->cross_attn : &layer->self_attn;
}

static const struct gd_packed_attention *packed_of(const gd_model *model, const struct gd_attention_stage *stage)
{
    const struct gd_packed_layer *layer = &model->packed.layers[stage->layer];
    return stage->cross ? &layer->cross_attn : &layer->self_attn;
}

static struct gd_gate gate_of(const gd_workspace *ws, const struct gd_attention_stage *stage)
{
    const gd_config *c = &ws->model->config;
    const struct gd_layer_params *layer = &ws->model->params.layers[stage->layer];
    return (struct gd_gate){
        .rows = ws->rows.total, .heads = c->encoder_attention_heads,
        .head_dim = c->encoder_embed_dim / c->encoder_attention_heads,
        .x = stage->x.data, .ldx = stage->x.ld, .weight = layer->grep_weight, .bias = layer->grep_bias,
        .grep_a = layer->grep_a, .gate = stage->acts->gate,
    };
}

static struct gd_attention attention_of(const gd_workspace *ws, const struct gd_attention_stage *stage)
{
    const gd_config *c = &ws->model->config;
    const struct gd_attention_activations *a = stage->acts;
    const int64_t head_dim = c->encoder_embed_dim / c->encoder_attention_heads;
    return (struct gd_attention){
        .rows = &ws->rows, .heads = c->encoder_attention_heads, .head_dim = head_dim,
        .scale = 1 / sqrtf((float)head_dim),
        .q = a->q.data, .ldq = a->q.ld, .k = a->k.data, .ldk = a->k.ld, .v = a->v.data, .ldv = a->v.ld,
        .gate = !stage->cross && c->gru_rel_pos ? a->gate : NULL,
        .bias = !stage->cross && c->relative_position_embedding ? ws->bias : NULL,
        .out = a->context.data, .ldout = a->context.ld, .lse = ws->training ? a->lse : NULL,
        .precision = ws->training || ws->precision == GD_FLOAT32 ? GD_FLOAT32 : GD_BFLOAT16,
        .dropout = c->attention_dropout, .seed = gd_dropout_active(ws, c->attention_dropout) ? ws->dropout : NULL,
        .site = gd_dropout_place(stage->cross ? GD_SITE_CROSS_PROBS : GD_SITE_ATTENTION_PROBS, stage->step),
    };
}

void gd_attention_forward(gd_workspace *ws, const struct gd_attention_stage *stage)
{
    gd_model *model = ws->model;
    gd_context *context = model->context;
    const struct gd_attention_params *params = params_of(model, stage);
    const struct gd_packed_attention *packed = packed_of(model, stage);
    const struct gd_attention_activations *a = stage->acts;
    const struct gd_tile all = gd_all_rows(ws);

    gd_linear_forward(ws, all, stage->x, &packed->q, params->q_bias, GD_NONE, NULL, NULL, a->q);
    gd_linear_forward(ws, all, stage->source, &packed->k, params->k_bias, GD_NONE, NULL, NULL, a->k);
    gd_linear_forward(ws, all, stage->source, &packed->v, params->v_bias, GD_NONE, NULL, NULL, a->v);
    if (!stage->cross && model->config.gru_rel_pos) {
        struct gd_gate gate = gate_of(ws, stage);
        context->backend->gate(context, &gate);
    }
    struct gd_attention attention = attention_of(ws, stage);
    context->backend->attention(context, &attention);
}

void gd_attention_join(gd_workspace *ws, const struct gd_attention_stage *stage, struct gd_tile tile, gd_mat residual,
                       gd_mat y)
{
    const gd_model *model = ws->model;
    const gd_config *c = &model->config;
    const int64_t D = c->encoder_embed_dim;
    const int dropped = gd_dropout_active(ws, c->dropout);
    gd_linear_forward(ws, tile, gd_mat_at(stage->acts->context, tile.first), &packed_of(model, stage)->out,
                      params_of(model, stage)->out_bias, GD_NONE, dropped ? NULL : &residual, NULL, y);
    if (dropped) {
        gd_dropout_apply(ws, tile, D, y, c->dropout, stage->cross ? GD_SITE_CROSS : GD_SITE_ATTENTION, stage->step);
        gd_add_rows(ws, tile, D, residual, y);
    }
}

void gd_attention_backward(gd_workspace *ws, const struct gd_attention_stage *stage, gd_mat dy, gd_mat dx,
                           gd_mat dsource)
{
    gd_model *model = ws->model;
    gd_context *context = model->context;
    const struct gd_backend *backend = context->backend;
    const gd_config *c = &model->config;
    const int64_t D = c->encoder_embed_dim;
    const struct gd_attention_params *params = params_of(model, stage);
    struct gd_layer_params *dlayer = &ws->grads.layers[stage->layer];
    struct gd_attention_params *dparams = stage->cross ? &dlayer->cross_attn : &dlayer->self_attn;
    const struct gd_attention_activations *a = stage->acts;
    const gd_mat dcontext = ws->dcontext, dq = ws->dq, dk = ws->dk, dv = ws->dv;
    const struct gd_tile all = gd_all_rows(ws);

    gd_dropout_apply(ws, all, D, dy, c->dropout, stage->cross ? GD_SITE_CROSS : GD_SITE_ATTENTION, stage->step);
    gd_linear_backward(ws, all, D, D, a->context, dy, params->out_weight, dcontext, 0, dparams->out_weight,
                       dparams->out_bias);

    struct gd_attention_backward backward = {
        .forward = attention_of(ws, stage), .dout = dcontext.data, .lddout = dcontext.ld,
        .dq = dq.data, .lddq = dq.ld, .dk = dk.data, .lddk = dk.ld, .dv = dv.data, .lddv = dv.ld,
    };
    backward.dgate = backward.forward.gate ? ws->dgate : NULL;
    backward.dbias = backward.forward.bias ? ws->dbias : NULL;
    backend->attention_backward(context, &backward);
    if (backward.dgate)
        backend->gate_backward(context, &(struct gd_gate_backward){
            .forward = gate_of(ws, stage), .dgate = ws->dgate, .dx = dx.data, .lddx = dx.ld,
            .dweight = dlayer->grep_weight, .dbias = dlayer->grep_bias, .dgrep_a = dlayer->grep_a,
        });
    gd_linear_backward(ws, all, D, D, stage->x, dq, params->q_weight, dx, 1, dparams->q_weight, dparams->q_bias);
    gd_linear_backward(ws, all, D, D, stage->source, dk, params->k_weight, dsource, 1, dparams->k_weight,
                       dparams->k_bias);
    gd_linear_backward(ws, all, D, D, stage->source, dv, params->v_weight, dsource, 1, dparams->v_weight,
                       dparams->v_bias);
}
