/*
 * layout.c - every buffer of a forward or training pass, in one arena.
 *
 * gd_workspace_lay_out() assigns all pointers by walking through the arena; it runs once without memory to
 * measure and once to assign. What is never needed at the same time shares a buffer in inference, and a
 * matrix that is its own input is normalised in place; training keeps what a backward reads, but for GELU's output
 * between two layers, which is computed again, as is most of the extractor in a long batch.
 */
#include "size.h"
#include "stages.h"

/* A tile of the extractor's backward is as long as so many of its forward: its operations are divided
 * among the threads, where a forward tile is one thread's. */
#define BACKWARD_TILES 4

/* Most bytes of float32 rows that the extractor keeps: 160 s of audio with the paper's sizes. Of more rows each is
 * computed again, to the same bits, which takes an eighth of a step. In bfloat16, where they are rounded and take half
 * as much, all are kept: whether they were would show in the gradient. */
#define KEPT_BYTES ((size_t)1 << 30)

struct arena {
    char *memory; /* NULL: only measure */
    size_t used;
};

static void *take(struct arena *arena, size_t bytes)
{
    void *place = arena->memory ? arena->memory + arena->used : NULL;
    arena->used = gd_plus(arena->used, gd_whole_lines(bytes));
    return place;
}

static float *take_floats(struct arena *arena, int64_t count)
{
    return take(arena, gd_times((size_t)count, sizeof(float)));
}

/* `count` floats for each slot. */
static float *take_slots(struct arena *arena, const gd_context *context, int64_t count)
{
    return take(arena, gd_times(gd_times((size_t)count, (size_t)gd_slots(context)), sizeof(float)));
}

static gd_mat take_rows(struct arena *arena, int64_t rows, int64_t width)
{
    const int64_t ld = gd_row_stride(width);
    return (gd_mat){take_floats(arena, rows * ld), ld};
}

/* What the backward finds of the forward's convolutions, of which a tile has `rows` rows. */
static void lay_out_kept_rows(gd_workspace *ws, const int64_t *rows, struct arena *arena)
{
    const gd_config *c = &ws->model->config;
    struct gd_extractor_gradients *e = &ws->extractor;
    const size_t element = ws->precision == GD_BFLOAT16 ? sizeof(uint16_t) : sizeof(float);
    size_t bytes[GD_MAX_CONV_LAYERS], total = 0;
    int64_t stride = c->conv_feature_layers[0].stride;
    for (int i = 1; i < c->num_conv_layers; i++) {
        const gd_conv_layer *conv = &c->conv_feature_layers[i];
        stride *= conv->stride;
        e->kept[i] = (struct gd_kept_rows){.ld = gd_row_stride(conv->dim), .stride = stride};
        bytes[i] = (size_t)((ws->sample_first[ws->rows.batch] / stride + ws->rows.batch) * e->kept[i].ld) * element;
        total += bytes[i];
    }
    e->keeps = ws->precision == GD_BFLOAT16 || total <= KEPT_BYTES;
    for (int i = 1; e->keeps && i < c->num_conv_layers; i++) {
        const int64_t size = rows[i] * gd_row_stride(c->conv_feature_layers[i].dim);
        e->kept[i].data = take(arena, bytes[i]);
        ws->tiles.pre_size = size > ws->tiles.pre_size ? size : ws->tiles.pre_size;
    }
}

static void lay_out_extractor(gd_workspace *ws, struct arena *arena)
{
    gd_context *context = ws->model->context;
    const gd_config *c = &ws->model->config;
    const gd_conv_layer *conv0 = &c->conv_feature_layers[0];
    const int64_t batch = ws->rows.batch, kernel = conv0->kernel;

    ws->audio = take_floats(arena, ws->sample_first[batch]);
    if (c->extractor_mode == GD_EXTRACTOR_DEFAULT) {
        ws->moments = take(arena, gd_times((size_t)batch, (size_t)(kernel * (1 + kernel)) * sizeof(double)));
        ws->fold_weight = take_floats(arena, conv0->dim * kernel);
        ws->fold_bias = take_floats(arena, batch * conv0->dim);
        ws->fold = gd_conv_weight(c, 0, ws->precision);
        ws->fold_packed_size = gd_whole_lines(context->backend->packed_size(context, &ws->fold));
        ws->fold_packed = take(arena, gd_times((size_t)batch, ws->fold_packed_size));
    }
    int64_t rows[GD_MAX_CONV_LAYERS];
    gd_extractor_tile_rows(c, INT64_MAX, 0, ws->tiles.frames, rows);
    if (context->backend->block_rows && c->num_conv_layers > 1)
        rows[0] = gd_smaller(rows[0], gd_extractor_rows_below(c, 1, context->backend->block_rows));
    for (int parity = 0; parity < 2; parity++) {
        int64_t ld = 0, size = 0;
        for (int i = parity; i < c->num_conv_layers - 1; i += 2) {
            const int64_t layer_ld = gd_row_stride(c->conv_feature_layers[i].dim);
            ld = layer_ld > ld ? layer_ld : ld;
        }
        for (int i = parity; i < c->num_conv_layers - 1; i += 2) {
            const int64_t layer_size = rows[i] * ld;
            size = layer_size > size ? layer_size : size;
        }
        ws->tiles.ping_size[parity] = size;
        ws->tiles.ping[parity] = (gd_mat){take_slots(arena, context, size), ld};
    }
    ws->extractor.keeps = 0;
    ws->tiles.pre_size = 0;
    if (ws->training && c->extractor_mode == GD_EXTRACTOR_DEFAULT && c->feature_grad_mult > 0)
        lay_out_kept_rows(ws, rows, arena);
    ws->tiles.pre = take_slots(arena, context, ws->tiles.pre_size);
}

static void lay_out_extractor_gradients(gd_workspace *ws, struct arena *arena)
{
    const gd_config *c = &ws->model->config;
    struct gd_extractor_gradients *e = &ws->extractor;
    const int normed = c->extractor_mode == GD_EXTRACTOR_LAYER_NORM, last = c->num_conv_layers - 1;
    const struct gd_backend *backend = ws->model->context->backend;
    const int64_t alignment = gd_extractor_alignment(c);
    const int64_t tile_frames = gd_round_up(backend->tile_frames * BACKWARD_TILES, alignment);
    e->frames = tile_frames && tile_frames < ws->rows.longest ? tile_frames : ws->rows.longest;
    int64_t scratch = 0, most[2] = {0, 0}, ld[2] = {0, 0}, tile_rows[GD_MAX_CONV_LAYERS];
    gd_extractor_tile_rows(c, INT64_MAX, 0, e->frames, tile_rows);
    for (int i = 0; i <= last; i++) {
        const gd_conv_layer *conv = &c->conv_feature_layers[i];
        const int64_t rows = tile_rows[i], stride = gd_row_stride(conv->dim);
        if (i == 0 || !e->keeps || ws->precision != GD_FLOAT32)
            e->pre[i] = take_rows(arena, rows, conv->dim);
        e->act[i] = take_rows(arena, rows, conv->dim);
        if (normed) {
            e->raw[i] = take_rows(arena, rows, conv->dim);
            e->stats[i] = take_floats(arena, 2 * rows);
        }
        if (normed || i) {
            const struct gd_weight weight = gd_conv_weight(c, i, ws->precision);
            const int64_t size = (int64_t)backend->conv_taps_size(ws->model->context, &weight);
            const int64_t needed = (int64_t)backend->conv_backward_scratch(ws->model->context, &weight);
            e->w_taps[i] = take_floats(arena, size);
            e->dw_taps[i] = take_floats(arena, size);
            scratch = needed > scratch ? needed : scratch;
        } else {
            e->g = take_floats(arena, conv->dim * conv->kernel);
            e->s = take_floats(arena, conv->dim);
        }
        /* Conv i + 1's backward writes the gradient of this layer's output to d[(i + 1) & 1]. */
        int64_t *rows_most = &most[(i + 1) & 1], *ld_most = &ld[(i + 1) & 1];
        *rows_most = rows > *rows_most ? rows : *rows_most;
        *ld_most = stride > *ld_most ? stride : *ld_most;
    }
    for (int parity = 0; parity < 2; parity++)
        e->d[parity] = (gd_mat){take_floats(arena, most[parity] * ld[parity]), ld[parity]};
    e->scratch = take_floats(arena, scratch);
}

/* In inference h[l] takes the place of h[l-1], the attention's result that of q. k takes f's, unless a step reads f; v
 * takes the extractor's rows'. All else is as long as a tile. */
static void lay_out_inference(gd_workspace *ws, struct arena *arena)
{
    const gd_config *c = &ws->model->config;
    const int64_t rows = ws->rows.total, tile = ws->tile_rows, D = c->encoder_embed_dim, H = c->encoder_attention_heads;
    const int every_step = c->position == GD_POSITION_EVERY_STEP;
    struct gd_step_activations step = {0};
    struct gd_block_activations *a = &step.block;
    const gd_mat h = take_rows(arena, rows, D), q = take_rows(arena, rows, D);
    const gd_mat k = every_step || c->cross_attention ? take_rows(arena, rows, D) : ws->f;
    const gd_mat v = ws->model->host.proj_weight ? ws->cnn : take_rows(arena, rows, D);
    a->self_attn = a->cross_attn = (struct gd_attention_activations){.q = q, .k = k, .v = v, .context = q};
    a->self_attn.gate = take_floats(arena, rows * H);
    ws->position = (struct gd_position_activations){.sum = h, .out = h};
    if (every_step)
        step.position.sum = step.position.out = take_rows(arena, rows, D);
    if (c->layer_norm_first)
        a->normed = take_rows(arena, rows, D);

    a->attn_sum = take_rows(arena, tile, D);
    a->attn_out = c->cross_attention ? take_rows(arena, rows, D)
                                     : c->layer_norm_first ? take_rows(arena, tile, D) : a->attn_sum;
    a->cross_sum = a->cross_out = a->attn_sum;
    a->fc1 = take_rows(arena, tile, c->encoder_ffn_embed_dim);
    a->ffn_sum = take_rows(arena, tile, D);
    step.hidden = a->attn_sum;
    a->out = step.out = h;
    for (int i = 0; i < ws->num_layers; i++)
        ws->steps[i] = step;
}

static void lay_out_attention_training(gd_workspace *ws, struct arena *arena, struct gd_attention_activations *a)
{
    const gd_config *c = &ws->model->config;
    const int64_t rows = ws->rows.total, D = c->encoder_embed_dim;
    a->q = take_rows(arena, rows, D);
    a->k = take_rows(arena, rows, D);
    a->v = take_rows(arena, rows, D);
    a->context = take_rows(arena, rows, D);
    a->gate = take_floats(arena, rows * c->encoder_attention_heads);
    a->lse = take_floats(arena, rows * c->encoder_attention_heads);
}

static void lay_out_position_training(gd_workspace *ws, struct arena *arena, struct gd_position_activations *a)
{
    const int64_t rows = ws->rows.total, D = ws->model->config.encoder_embed_dim;
    a->pre = take_rows(arena, rows, D);
    a->sum = take_rows(arena, rows, D);
    a->out = take_rows(arena, rows, D);
    a->stats = take_floats(arena, 2 * rows);
}

static void lay_out_step_training(gd_workspace *ws, struct arena *arena, struct gd_step_activations *step)
{
    const gd_config *c = &ws->model->config;
    const int64_t rows = ws->rows.total, D = c->encoder_embed_dim, F = c->encoder_ffn_embed_dim;
    struct gd_block_activations *a = &step->block;
    if (c->position == GD_POSITION_EVERY_STEP)
        lay_out_position_training(ws, arena, &step->position);
    lay_out_attention_training(ws, arena, &a->self_attn);
    a->attn_sum = take_rows(arena, rows, D);
    a->attn_out = take_rows(arena, rows, D);
    a->attn_stats = take_floats(arena, 2 * rows);
    if (c->cross_attention) {
        lay_out_attention_training(ws, arena, &a->cross_attn);
        a->cross_sum = take_rows(arena, rows, D);
        a->cross_out = take_rows(arena, rows, D);
        a->cross_stats = take_floats(arena, 2 * rows);
    }
    a->fc1_pre = take_rows(arena, rows, F);
    a->fc1 = ws->fc1;
    a->ffn_sum = take_rows(arena, rows, D);
    a->ffn_stats = take_floats(arena, 2 * rows);
    a->out = take_rows(arena, rows, D);
    step->out = a->out;
    if (ws->model->host.output2_weight) {
        step->hidden_pre = take_rows(arena, rows, D);
        step->hidden = ws->hidden;
        step->out = take_rows(arena, rows, D);
    }
}

static void lay_out_gradients(gd_workspace *ws, struct arena *arena)
{
    gd_context *context = ws->model->context;
    const gd_config *c = &ws->model->config;
    const int64_t rows = ws->rows.total, D = c->encoder_embed_dim, H = c->encoder_attention_heads;
    const int64_t C = c->conv_feature_layers[c->num_conv_layers - 1].dim;
    for (int i = 0; i < ws->num_states; i++)
        ws->dstates[i] = take_rows(arena, rows, D);
    ws->dinput = ws->dstates[ws->num_layers]; /* its head's backward has read it before any block's begins */
    const int predictions = c->architecture == GD_GENERATIVE ? ws->num_layers : c->num_targets;
    for (int i = 0; i < predictions; i++)
        ws->targets[i] = take_rows(arena, rows, D);
    ws->dout = take_rows(arena, rows, D);
    ws->dresidual = take_rows(arena, rows, D);
    ws->dhidden = ws->dresidual; /* O's backward is over when the block's begins */
    ws->dbranch = take_rows(arena, rows, D);
    ws->dcontext = take_rows(arena, rows, D);
    ws->dq = take_rows(arena, rows, D);
    ws->dk = take_rows(arena, rows, D);
    ws->dv = take_rows(arena, rows, D);
    if (c->architecture == GD_MULTI_HEAD)
        ws->dheads = take_rows(arena, rows, c->num_targets * D);
    ws->dcnn = take_rows(arena, rows, C);
    ws->dgate = take_floats(arena, rows * H);
    ws->dbias = take_floats(arena, H * (2 * ws->rows.longest - 1));
    ws->pos_conv_weight = take_floats(arena, D * (D / c->conv_pos_groups) * c->conv_pos);
    ws->dpos_conv_weight = ws->pos_conv_weight; /* packed by then */
    const struct gd_pos_conv transposed = gd_pos_conv_shape(c, ws->precision, 1);
    ws->pos_conv_transposed = take(arena, context->backend->packed_pos_conv_size(context, &transposed));
    ws->terms = take(arena, (size_t)(3 * (GD_MAX_TARGETS + rows)) * sizeof(double));
    ws->flat_grads = context->backend->shares_memory ? NULL : take_floats(arena, (int64_t)ws->model->num_params);
    lay_out_extractor_gradients(ws, arena);
}

size_t gd_workspace_lay_out(gd_workspace *ws, void *memory)
{
    struct arena walk = {memory, 0}, *arena = &walk;
    gd_model *model = ws->model;
    const gd_config *c = &model->config;
    const int64_t rows = ws->rows.total, D = c->encoder_embed_dim;
    const int64_t C = c->conv_feature_layers[c->num_conv_layers - 1].dim;

    ws->scratch = take(arena, gd_times(ws->scratch_stride, (size_t)gd_slots(model->context)));
    lay_out_extractor(ws, arena);
    /* In inference with a projection, v too: see lay_out_inference(). */
    ws->cnn = take_rows(arena, rows, ws->training || !model->host.proj_weight || C > D ? C : D);
    ws->cnn_normed = c->feature_layer_norm && ws->training ? take_rows(arena, rows, C) : ws->cnn;
    ws->cnn_stats = take_floats(arena, 2 * rows);
    ws->f = model->host.proj_weight ? take_rows(arena, rows, D) : ws->cnn_normed;
    ws->bias = take_floats(arena, c->encoder_attention_heads * (2 * ws->rows.longest - 1));
    ws->padded = model->context->backend->shares_memory ? NULL
                                                        : take_floats(arena, ws->rows.batch * ws->rows.longest * D);

    if (ws->training) {
        const int64_t part = gd_part_at(gd_all_rows(ws), 0).count;
        ws->fc1 = take_rows(arena, part, c->encoder_ffn_embed_dim);
        ws->dfc1 = take_rows(arena, part, c->encoder_ffn_embed_dim);
        ws->hidden = take_rows(arena, part, D);
        if (c->position == GD_POSITION_ONCE)
            lay_out_position_training(ws, arena, &ws->position);
        for (int i = 0; i < ws->num_layers; i++)
            lay_out_step_training(ws, arena, &ws->steps[i]);
    } else {
        lay_out_inference(ws, arena);
    }
    if (c->architecture == GD_MULTI_HEAD) {
        ws->heads = take_rows(arena, rows, c->num_targets * D);
        ws->heads_pre = ws->training ? take_rows(arena, rows, c->num_targets * D) : ws->heads;
        const gd_mat prediction = ws->training ? (gd_mat){NULL, 0} : take_rows(arena, rows, D);
        for (int i = 0; i < c->num_targets; i++)
            ws->predictions[i] = ws->training ? take_rows(arena, rows, D) : prediction;
    }
    if (ws->training)
        lay_out_gradients(ws, arena);
    return walk.used;
}
