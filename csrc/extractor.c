/*
 * extractor.c - the convolutional feature extractor: audio to (rows, C), one row every 320 samples.
 *
 *     x[i+1] = gelu(norm(conv_i(x[i])))        norm: GroupNorm after conv 0 only, or LayerNorm after each
 *
 * Both directions run in tiles of output frames, so that memory does not grow with the audio: a tile needs
 * rows t0 * stride .. of the layer below and recomputes the few rows that its neighbours need too, in whole
 * groups (GD_ROW_GROUP), so that no bit depends on the division into tiles. The backward recomputes conv 0's
 * activations tile by tile, and those of the layers above where the forward did not keep them before GELU (3,150 rows
 * of 512 numbers a second with the paper's sizes; conv 0 would have 3,200 more); every step is linear in the gradient,
 * so the rows that two tiles share simply receive a part of their gradient from each.
 */
#include "stages.h"

struct gd_weight gd_conv_weight(const gd_config *c, int layer, enum gd_precision precision)
{
    const gd_conv_layer *conv = &c->conv_feature_layers[layer];
    return (struct gd_weight){
        .out = conv->dim, .taps = conv->kernel, .in = layer ? c->conv_feature_layers[layer - 1].dim : 1,
        .stride = conv->stride, .precision = layer ? precision : GD_FLOAT32,
    };
}

/* Rows of a layer that may be computed together (GD_ROW_GROUP). */
static int64_t row_group(const gd_conv_layer *conv)
{
    return conv->kernel == 3 && conv->stride == 2 ? GD_ROW_GROUP : 1;
}

/* A tile starts at a multiple of so many frames, so that its groups of rows are the utterance's in every layer. */
int64_t gd_extractor_alignment(const gd_config *c)
{
    int64_t alignment = 1, rows_a_frame = 1;
    for (int i = c->num_conv_layers - 1; i >= 0; i--) {
        while (alignment * rows_a_frame % row_group(&c->conv_feature_layers[i]))
            alignment *= 2;
        rows_a_frame *= c->conv_feature_layers[i].stride;
    }
    return alignment;
}

/* Rows of layer i - 1, in whole groups, that `rows` rows of layer i are computed from. */
int64_t gd_extractor_rows_below(const gd_config *c, int i, int64_t rows)
{
    const gd_conv_layer *conv = &c->conv_feature_layers[i];
    return gd_round_up((rows - 1) * conv->stride + conv->kernel, row_group(conv - 1));
}

void gd_extractor_tile_rows(const gd_config *c, int64_t samples, int64_t t0, int64_t frames, int64_t *rows)
{
    const int last = c->num_conv_layers - 1;
    int64_t end[GD_MAX_CONV_LAYERS], first = t0;
    for (int i = 0; i < last; i++)
        end[i] = samples = (samples - c->conv_feature_layers[i].kernel) / c->conv_feature_layers[i].stride + 1;
    rows[last] = frames;
    for (int i = last - 1; i >= 0; i--) {
        first *= c->conv_feature_layers[i + 1].stride;
        rows[i] = gd_smaller(gd_extractor_rows_below(c, i + 1, rows[i + 1]), end[i] - first);
    }
}

/* First sample that output frame t0 depends on. */
static int64_t first_sample(const gd_config *c, int64_t t0)
{
    for (int i = 0; i < c->num_conv_layers; i++)
        t0 *= c->conv_feature_layers[i].stride;
    return t0;
}

/* ---- conv 0 with GroupNorm, as one affine map of each utterance ------------------------------------- */

static struct gd_norm_fold fold_of(const gd_workspace *ws, int64_t b)
{
    const gd_config *c = &ws->model->config;
    const gd_conv_layer *conv = &c->conv_feature_layers[0];
    const struct gd_conv_params *params = &ws->model->params.conv[0];
    return (struct gd_norm_fold){
        .dim = conv->dim, .kernel = conv->kernel, .eps = GD_LAYER_NORM_EPS,
        .moments = ws->moments + b * conv->kernel * (1 + conv->kernel),
        .w = params->weight, .gamma = params->group_norm_weight, .beta = params->group_norm_bias,
        .weight = ws->fold_weight, .bias = ws->fold_bias + b * conv->dim,
    };
}

static void fold_group_norm(gd_workspace *ws)
{
    gd_context *context = ws->model->context;
    const struct gd_backend *backend = context->backend;
    const gd_conv_layer *conv = &ws->model->config.conv_feature_layers[0];
    for (int64_t b = 0; b < ws->rows.batch; b++) {
        struct gd_norm_fold fold = fold_of(ws, b);
        int64_t samples = ws->sample_first[b + 1] - ws->sample_first[b];
        if (!ws->given_moments)
            backend->moments(context, &(struct gd_moments){
                .frames = (samples - conv->kernel) / conv->stride + 1, .kernel = conv->kernel, .stride = conv->stride,
                .x = ws->audio + ws->sample_first[b], .moments = ws->moments + b * conv->kernel * (1 + conv->kernel),
            });
        backend->norm_fold(context, &fold);
        backend->pack(context, &ws->fold, fold.weight, conv->kernel, 1, 1,
                      ws->fold_packed + (size_t)b * ws->fold_packed_size);
    }
}

/* ---- One convolution over a tile -------------------------------------------------------------------- */

/* y = act(conv_i(x)) over `rows` output rows; utterance b chooses conv 0's folded weights. */
static void convolve(gd_workspace *ws, int i, int64_t b, int64_t rows, gd_mat x, enum gd_activation activation,
                     const gd_mat *pre, gd_mat y)
{
    gd_model *model = ws->model;
    const gd_config *c = &model->config;
    const int folded = i == 0 && c->extractor_mode == GD_EXTRACTOR_DEFAULT;
    struct gd_weight weight = model->packed.conv[i];
    if (folded) {
        weight = ws->fold;
        weight.packed = ws->fold_packed + (size_t)b * ws->fold_packed_size;
    }
    model->context->backend->linear(model->context, &(struct gd_linear){
        .rows = rows, .weight = &weight, .x = x.data, .ldx = x.ld,
        .bias = folded ? ws->fold_bias + b * weight.out : model->params.conv[i].bias, .activation = activation,
        .pre = pre ? pre->data : NULL, .ldpre = pre ? pre->ld : 0, .y = y.data, .ldy = y.ld,
    });
}

/* y = LayerNorm of conv i's output x, in place or not. */
static void normalise(gd_workspace *ws, int i, int64_t rows, gd_mat x, gd_mat y, float *stats)
{
    gd_model *model = ws->model;
    model->context->backend->layer_norm(model->context, &(struct gd_layer_norm){
        .rows = rows, .width = model->config.conv_feature_layers[i].dim, .eps = GD_LAYER_NORM_EPS,
        .x = x.data, .ldx = x.ld,
        .gamma = model->params.conv[i].layer_norm_weight, .beta = model->params.conv[i].layer_norm_bias,
        .y = y.data, .ldy = y.ld, .stats = stats,
    });
}

/* ---- Rows kept for the backward --------------------------------------------------------------------- */

/* Index of conv i's kept row that frame t0 of utterance b begins with. */
static int64_t kept_index(const gd_workspace *ws, int i, int64_t b, int64_t t0)
{
    const struct gd_kept_rows *kept = &ws->extractor.kept[i];
    return ws->sample_first[b] / kept->stride + b + first_sample(&ws->model->config, t0) / kept->stride;
}

static uint16_t *rounded_row(const struct gd_kept_rows *kept, int64_t index)
{
    return (uint16_t *)kept->data + index * kept->ld;
}

static gd_mat exact_rows(const struct gd_kept_rows *kept, int64_t index)
{
    return (gd_mat){(float *)kept->data + index * kept->ld, kept->ld};
}

/* Of a tile's rows those that the next one, from frame t1 on, does not keep. */
static void keep_rows(gd_workspace *ws, int i, int64_t b, int64_t t0, int64_t t1, int64_t rows, gd_mat pre)
{
    gd_context *context = ws->model->context;
    const gd_config *c = &ws->model->config;
    const struct gd_kept_rows *kept = &ws->extractor.kept[i];
    const int64_t own = first_sample(c, t1 - t0) / kept->stride, width = c->conv_feature_layers[i].dim;
    const int64_t index = kept_index(ws, i, b, t0);
    const int is_last = t1 == ws->rows.first[b + 1] - ws->rows.first[b];
    rows = is_last || rows < own ? rows : own;
    if (ws->precision == GD_BFLOAT16) {
        context->backend->round_rows(context, rows, width, pre.data, pre.ld, rounded_row(kept, index), kept->ld);
    } else {
        const gd_mat to = exact_rows(kept, index);
        context->backend->axpby(context, rows, width, 1, pre.data, pre.ld, 0, to.data, to.ld);
    }
}

/* Conv i's kept rows from frame t0 on: pre, which in bfloat16 needs a place of its own, and act = gelu(pre), but
 * of the last layer. */
static void recall_rows(gd_workspace *ws, int i, int64_t b, int64_t t0, int64_t rows, gd_mat *pre, gd_mat act)
{
    gd_context *context = ws->model->context;
    const struct gd_kept_rows *kept = &ws->extractor.kept[i];
    const int64_t index = kept_index(ws, i, b, t0), width = ws->model->config.conv_feature_layers[i].dim;
    const int is_last = i == ws->model->config.num_conv_layers - 1;
    if (ws->precision == GD_BFLOAT16) {
        context->backend->widen_rows(context, GD_ACTIVATION, rows, width, rounded_row(kept, index), kept->ld,
                                     pre->data, pre->ld, is_last ? NULL : act.data, act.ld);
        return;
    }
    *pre = exact_rows(kept, index);
    if (!is_last)
        gd_activate(ws, rows, width, *pre, act);
}

/* ---- Forward ---------------------------------------------------------------------------------------- */

/* y = x[i + 1] of `rows` rows; pre: what GELU is taken of, with GroupNorm, or NULL. */
static void layer(gd_workspace *ws, int i, int64_t b, int64_t rows, gd_mat x, const gd_mat *pre, gd_mat y)
{
    const gd_config *c = &ws->model->config;
    if (c->extractor_mode == GD_EXTRACTOR_DEFAULT) {
        convolve(ws, i, b, rows, x, gd_product_activation(ws), pre, y);
        return;
    }
    convolve(ws, i, b, rows, x, GD_NONE, NULL, y);
    normalise(ws, i, rows, y, y, NULL);
    gd_activate(ws, rows, c->conv_feature_layers[i].dim, y, y);
}

/* Layers 0 and 1 of a tile: a block of the latter at a time, after the rows that it reads. Layer 0 has more rows than
 * all others together; so few of them at a time stay in a core's second cache until they are read. */
static void first_layers(gd_workspace *ws, int64_t b, const int64_t *rows, gd_mat audio, gd_mat x, const gd_mat *pre,
                         gd_mat y)
{
    const gd_conv_layer *conv = ws->model->config.conv_feature_layers;
    const int64_t block = ws->model->context->backend->block_rows ? ws->model->context->backend->block_rows : rows[1];
    for (int64_t r = 0; r < rows[1]; r += block) {
        const int64_t count = gd_smaller(rows[1] - r, block), first = r * conv[1].stride;
        const int64_t read = gd_smaller(gd_extractor_rows_below(&ws->model->config, 1, count), rows[0] - first);
        const gd_mat pre_rows = pre ? gd_mat_at(*pre, r) : (gd_mat){NULL, 0};
        layer(ws, 0, b, read, gd_mat_at(audio, first * conv[0].stride), NULL, x);
        layer(ws, 1, b, count, x, pre ? &pre_rows : NULL, gd_mat_at(y, r));
    }
}

static void forward_tile(void *argument, int64_t index, int slot)
{
    gd_workspace *ws = argument;
    const gd_config *c = &ws->model->config;
    const struct gd_extractor_tiles *tiles = &ws->tiles;

    int64_t b = 0;
    while (index >= tiles->first[b + 1])
        b++;
    const int64_t total = ws->rows.first[b + 1] - ws->rows.first[b], count = tiles->first[b + 1] - tiles->first[b];
    const int64_t tile = index - tiles->first[b], alignment = gd_extractor_alignment(c);
    const int64_t t0 = total * tile / count / alignment * alignment;
    const int64_t t1 = tile + 1 < count ? total * (tile + 1) / count / alignment * alignment : total;
    int64_t rows[GD_MAX_CONV_LAYERS];
    if (t0 == t1)
        return;
    gd_extractor_tile_rows(c, ws->sample_first[b + 1] - ws->sample_first[b], t0, t1 - t0, rows);

    const gd_mat ping[2] = {
        {tiles->ping[0].data + slot * tiles->ping_size[0], tiles->ping[0].ld},
        {tiles->ping[1].data + slot * tiles->ping_size[1], tiles->ping[1].ld},
    };
    gd_mat x = {ws->audio + ws->sample_first[b] + first_sample(c, t0), 1};
    for (int i = c->num_conv_layers > 1; i < c->num_conv_layers; i++) {
        gd_mat y = ping[i & 1];
        const gd_mat pre = {tiles->pre + slot * tiles->pre_size, gd_row_stride(c->conv_feature_layers[i].dim)};
        const int kept = ws->extractor.keeps && i > 0;
        if (i == c->num_conv_layers - 1)
            y = (gd_mat){ws->cnn.data + (ws->rows.first[b] + t0) * ws->cnn.ld, ws->cnn.ld};
        if (i == 1)
            first_layers(ws, b, rows, x, ping[0], kept ? &pre : NULL, y);
        else
            layer(ws, i, b, rows[i], x, kept ? &pre : NULL, y);
        if (kept)
            keep_rows(ws, i, b, t0, t1, rows[i], pre);
        x = y;
    }
}

void gd_extractor_forward(gd_workspace *ws)
{
    gd_context *context = ws->model->context;
    if (ws->model->config.extractor_mode == GD_EXTRACTOR_DEFAULT)
        fold_group_norm(ws);
    context->backend->for_each(context, ws->tiles.first[ws->rows.batch], forward_tile, ws);
}

/* ---- Backward --------------------------------------------------------------------------------------- */

/* Frames t0 .. t0 + frames - 1 of utterance b: recompute, then back through the layers. */
static void backward_tile(gd_workspace *ws, int64_t b, int64_t t0, int64_t frames, gd_mat dcnn)
{
    gd_model *model = ws->model;
    gd_context *context = model->context;
    const struct gd_backend *backend = context->backend;
    const gd_config *c = &model->config;
    struct gd_extractor_gradients *e = &ws->extractor;
    const int last = c->num_conv_layers - 1, normed = c->extractor_mode == GD_EXTRACTOR_LAYER_NORM;
    const gd_mat audio = {ws->audio + ws->sample_first[b] + first_sample(c, t0), 1};
    int64_t tile_rows[GD_MAX_CONV_LAYERS];
    gd_extractor_tile_rows(c, ws->sample_first[b + 1] - ws->sample_first[b], t0, frames, tile_rows);

    gd_mat pre[GD_MAX_CONV_LAYERS];
    for (int i = 0; i <= last; i++) {
        const int64_t rows = tile_rows[i];
        const gd_mat x = i ? e->act[i - 1] : audio, act = e->act[i];
        pre[i] = e->pre[i];
        if (normed) {
            convolve(ws, i, b, rows, x, GD_NONE, NULL, e->raw[i]);
            normalise(ws, i, rows, e->raw[i], pre[i], e->stats[i]);
            gd_activate(ws, rows, c->conv_feature_layers[i].dim, pre[i], act);
        } else if (e->keeps && i > 0) {
            recall_rows(ws, i, b, t0, rows, &pre[i], act);
        } else {
            convolve(ws, i, b, rows, x, gd_product_activation(ws), &pre[i], act);
        }
    }

    gd_mat dy = {dcnn.data + (ws->rows.first[b] + t0) * dcnn.ld, dcnn.ld};
    for (int i = last; i >= 0; i--) {
        const gd_conv_layer *conv = &c->conv_feature_layers[i];
        const int64_t rows = tile_rows[i];
        const gd_mat x = i ? e->act[i - 1] : audio;
        gd_mat dz = dy;
        gd_activate_backward(ws, rows, conv->dim, pre[i], dy, dz);
        if (normed)
            backend->layer_norm_backward(context, &(struct gd_layer_norm_backward){
                .rows = rows, .width = conv->dim, .x = e->raw[i].data, .ldx = e->raw[i].ld,
                .dy = dz.data, .lddy = dz.ld,
                .gamma = model->params.conv[i].layer_norm_weight, .stats = e->stats[i], .dx = dz.data, .lddx = dz.ld,
                .dgamma = ws->grads.conv[i].layer_norm_weight, .dbeta = ws->grads.conv[i].layer_norm_bias,
            });
        const int folded = i == 0 && !normed;
        if (folded)
            backend->bias_backward(context, rows, conv->dim, dz.data, dz.ld, e->s);
        else if (ws->grads.conv[i].bias)
            backend->bias_backward(context, rows, conv->dim, dz.data, dz.ld, ws->grads.conv[i].bias);
        const gd_mat dx = i ? e->d[i & 1] : (gd_mat){NULL, 0};
        const struct gd_weight weight = gd_conv_weight(c, i, ws->precision);
        backend->conv_backward(context, &(struct gd_conv_backward){
            .rows = rows, .weight = &weight, .x = x.data, .ldx = x.ld, .dz = dz.data, .lddz = dz.ld,
            .w_taps = e->w_taps[i], .dw_taps = folded ? e->g : e->dw_taps[i],
            .dx = dx.data, .lddx = dx.ld, .dx_rows = i ? tile_rows[i - 1] : 0, .scratch = e->scratch,
        });
        dy = dx;
    }
}

void gd_extractor_backward(gd_workspace *ws, gd_mat dcnn)
{
    gd_model *model = ws->model;
    gd_context *context = model->context;
    const struct gd_backend *backend = context->backend;
    const gd_config *c = &model->config;
    struct gd_extractor_gradients *e = &ws->extractor;
    const int normed = c->extractor_mode == GD_EXTRACTOR_LAYER_NORM;
    const gd_conv_layer *conv0 = &c->conv_feature_layers[0];

    for (int i = normed ? 0 : 1; i < c->num_conv_layers; i++) {
        const struct gd_weight weight = gd_conv_weight(c, i, ws->precision);
        backend->split_taps(context, &weight, model->params.conv[i].weight, e->w_taps[i]);
        backend->zero(context, e->dw_taps[i], backend->conv_taps_size(context, &weight) * sizeof(float));
    }
    for (int64_t b = 0; b < ws->rows.batch; b++) {
        const int64_t total = ws->rows.first[b + 1] - ws->rows.first[b];
        if (!normed) {
            backend->zero(context, e->g, (size_t)(conv0->dim * conv0->kernel) * sizeof(float));
            backend->zero(context, e->s, (size_t)conv0->dim * sizeof(float));
        }
        for (int64_t t0 = 0; t0 < total; t0 += e->frames)
            backward_tile(ws, b, t0, total - t0 < e->frames ? total - t0 : e->frames, dcnn);
        if (!normed)
            backend->norm_fold_backward(context, &(struct gd_norm_fold_backward){
                .forward = fold_of(ws, b), .g = e->g, .s = e->s, .dw = ws->grads.conv[0].weight,
                .dgamma = ws->grads.conv[0].group_norm_weight, .dbeta = ws->grads.conv[0].group_norm_bias,
            });
    }
    for (int i = normed ? 0 : 1; i < c->num_conv_layers; i++) {
        const struct gd_weight weight = gd_conv_weight(c, i, ws->precision);
        backend->merge_taps(context, &weight, e->dw_taps[i], ws->grads.conv[i].weight);
    }
}
