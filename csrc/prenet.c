/*
 * prenet.c - from the extractor's rows to the block's input.
 *
 *     f = post_extract_proj(layer_norm(cnn))                 the feature embedding
 *     position(x) = encoder_layer_norm(x + gelu(pos_conv(x)))   no norm here for pre-norm encoders
 */
#include "stages.h"

/* Zeros in an utterance's rows past its valid ones, of which there are some with S3PRL's padding. */
static void zero_padding(gd_workspace *ws, gd_mat x)
{
    gd_context *context = ws->model->context;
    for (int64_t b = 0; b < ws->rows.batch; b++) {
        const int64_t begin = ws->rows.first[b] + ws->rows.valid[b], end = ws->rows.first[b + 1];
        if (begin < end)
            context->backend->zero(context, x.data + begin * x.ld, (size_t)((end - begin) * x.ld) * sizeof(float));
    }
}

/* y += x in the valid rows. */
static void add_valid_rows(gd_workspace *ws, int64_t width, gd_mat x, gd_mat y)
{
    gd_context *context = ws->model->context;
    for (int64_t b = 0; b < ws->rows.batch; b++) {
        const int64_t first = ws->rows.first[b];
        context->backend->axpby(context, ws->rows.valid[b], width, 1, x.data + first * x.ld, x.ld, 1,
                                y.data + first * y.ld, y.ld);
    }
}

void gd_prenet_forward(gd_workspace *ws)
{
    gd_model *model = ws->model;
    gd_context *context = model->context;
    const gd_config *c = &model->config;
    const int64_t C = c->conv_feature_layers[c->num_conv_layers - 1].dim;
    if (c->feature_layer_norm)
        context->backend->layer_norm(context, &(struct gd_layer_norm){
            .rows = ws->rows.total, .width = C, .eps = GD_LAYER_NORM_EPS, .x = ws->cnn.data, .ldx = ws->cnn.ld,
            .gamma = model->params.layer_norm_weight, .beta = model->params.layer_norm_bias,
            .y = ws->cnn_normed.data, .ldy = ws->cnn_normed.ld, .stats = ws->cnn_stats,
        });
    if (model->params.proj_weight)
        gd_linear_forward(ws, gd_all_rows(ws), ws->cnn_normed, &model->packed.proj, model->params.proj_bias, GD_NONE,
                          NULL, NULL, ws->f);
    zero_padding(ws, ws->f);
}

/* df is used up; dcnn written, scaled by feature_grad_mult. */
void gd_prenet_backward(gd_workspace *ws, gd_mat df, gd_mat dcnn)
{
    gd_model *model = ws->model;
    gd_context *context = model->context;
    const gd_config *c = &model->config;
    const int64_t C = c->conv_feature_layers[c->num_conv_layers - 1].dim;
    gd_mat d = df;
    zero_padding(ws, df);
    if (model->params.proj_weight) {
        gd_linear_backward(ws, gd_all_rows(ws), c->encoder_embed_dim, C, ws->cnn_normed, df,
                           model->params.proj_weight, dcnn, 0, ws->grads.proj_weight, ws->grads.proj_bias);
        d = dcnn;
    }
    if (c->feature_layer_norm) {
        context->backend->layer_norm_backward(context, &(struct gd_layer_norm_backward){
            .rows = ws->rows.total, .width = C, .x = ws->cnn.data, .ldx = ws->cnn.ld, .dy = d.data, .lddy = d.ld,
            .gamma = model->params.layer_norm_weight, .stats = ws->cnn_stats, .dx = dcnn.data, .lddx = dcnn.ld,
            .dgamma = ws->grads.layer_norm_weight, .dbeta = ws->grads.layer_norm_bias,
        });
        d = dcnn;
    }
    if (d.data != dcnn.data || c->feature_grad_mult != 1)
        gd_copy_rows(ws, C, (float)c->feature_grad_mult, d, dcnn);
}

struct gd_pos_conv gd_pos_conv_shape(const gd_config *c, enum gd_precision precision, int transposed)
{
    const int64_t pad = c->conv_pos / 2;
    return (struct gd_pos_conv){
        .width = c->encoder_embed_dim, .groups = c->conv_pos_groups, .kernel = c->conv_pos,
        .pad = transposed ? c->conv_pos - 1 - pad : pad, .transposed = transposed, .precision = precision,
    };
}

static struct gd_pos_conv pos_conv_of(const gd_workspace *ws, gd_mat x, int transposed)
{
    struct gd_pos_conv conv = gd_pos_conv_shape(&ws->model->config, ws->precision, transposed);
    conv.rows = &ws->rows;
    conv.x = x.data, conv.ldx = x.ld;
    return conv;
}

void gd_position_forward(gd_workspace *ws, gd_mat x, struct gd_position_activations *a, int step)
{
    gd_model *model = ws->model;
    gd_context *context = model->context;
    const gd_config *c = &model->config;
    struct gd_pos_conv conv = pos_conv_of(ws, x, 0);
    conv.weight = model->packed.pos_conv;
    conv.bias = model->params.pos_conv_bias;
    conv.activation = GD_ACTIVATION;
    conv.residual = x.data, conv.ldresidual = x.ld;
    conv.pre = ws->training ? a->pre.data : NULL, conv.ldpre = a->pre.ld;
    conv.y = a->sum.data, conv.ldy = a->sum.ld;
    context->backend->pos_conv(context, &conv);
    if (!c->layer_norm_first)
        context->backend->layer_norm(context, &(struct gd_layer_norm){
            .rows = ws->rows.total, .width = c->encoder_embed_dim, .eps = GD_LAYER_NORM_EPS,
            .x = a->sum.data, .ldx = a->sum.ld,
            .gamma = model->params.encoder_norm_weight, .beta = model->params.encoder_norm_bias,
            .y = a->out.data, .ldy = a->out.ld, .stats = a->stats,
        });
    gd_dropout_apply(ws, gd_all_rows(ws), c->encoder_embed_dim, a->out, c->dropout, GD_SITE_ENCODER, step);
}

void gd_position_prepare_backward(gd_workspace *ws)
{
    gd_model *model = ws->model;
    const struct gd_backend *backend = model->context->backend;
    const gd_config *c = &model->config;
    const int64_t D = c->encoder_embed_dim;
    const struct gd_pos_conv transposed = gd_pos_conv_shape(c, ws->precision, 1);
    backend->weight_norm(model->context, D, D / c->conv_pos_groups, c->conv_pos, model->params.pos_conv_g,
                         model->params.pos_conv_v, ws->pos_conv_weight);
    backend->pack_pos_conv(model->context, &transposed, ws->pos_conv_weight, ws->pos_conv_transposed);
}

void gd_position_backward(gd_workspace *ws, gd_mat x, const struct gd_position_activations *a, int step, gd_mat dout,
                          gd_mat dx)
{
    gd_model *model = ws->model;
    gd_context *context = model->context;
    const struct gd_backend *backend = context->backend;
    const gd_config *c = &model->config;
    const int64_t rows = ws->rows.total, D = c->encoder_embed_dim, group = D / c->conv_pos_groups;

    gd_dropout_apply(ws, gd_all_rows(ws), D, dout, c->dropout, GD_SITE_ENCODER, step);
    if (!c->layer_norm_first)
        backend->layer_norm_backward(context, &(struct gd_layer_norm_backward){
            .rows = rows, .width = D, .x = a->sum.data, .ldx = a->sum.ld, .dy = dout.data, .lddy = dout.ld,
            .gamma = model->params.encoder_norm_weight, .stats = a->stats, .dx = dout.data, .lddx = dout.ld,
            .dgamma = ws->grads.encoder_norm_weight, .dbeta = ws->grads.encoder_norm_bias,
        });
    /* x counts in its valid rows only. */
    if (dx.data)
        add_valid_rows(ws, D, dout, dx);

    /* Through gelu(pos_conv(x)): dx += correlation of dz with the transposed weights. */
    const gd_mat dz = dout;
    gd_activate_backward(ws, rows, D, a->pre, dout, dz);
    backend->bias_backward(context, rows, D, dz.data, dz.ld, ws->grads.pos_conv_bias);
    struct gd_pos_conv conv = pos_conv_of(ws, x, 0);
    backend->zero(context, ws->dpos_conv_weight, (size_t)(D * group * c->conv_pos) * sizeof(float));
    backend->pos_conv_backward_weight(context, &conv, dz.data, dz.ld, ws->dpos_conv_weight);
    backend->weight_norm_backward(context, D, group, c->conv_pos, model->params.pos_conv_g, model->params.pos_conv_v,
                                  ws->dpos_conv_weight, ws->grads.pos_conv_g, ws->grads.pos_conv_v);
    if (!dx.data)
        return;
    conv = pos_conv_of(ws, dz, 1);
    conv.weight = ws->pos_conv_transposed;
    conv.residual = dx.data, conv.ldresidual = dx.ld;
    conv.y = dx.data, conv.ldy = dx.ld;
    backend->pos_conv(context, &conv);
}
