/*
 * workspace.c - every buffer of a forward or training pass, planned for a batch's shape in one arena.
 *
 * lay_out() assigns all pointers by walking through the arena; it runs once without memory to measure and
 * once to assign. What is never needed at the same time shares a buffer in inference, and a matrix that is
 * its own input is normalised in place; training keeps everything that a backward reads.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

/* Frames of a tile of the extractor's backward, whose operations are divided among the threads. */
#define BACKWARD_TILES 4

struct arena {
    char *memory; /* NULL: only measure */
    size_t used;
};

static void *take(struct arena *arena, size_t bytes)
{
    void *place = arena->memory ? arena->memory + arena->used : NULL;
    arena->used += (bytes + 63) / 64 * 64;
    return place;
}

static float *take_floats(struct arena *arena, int64_t count) { return take(arena, (size_t)count * sizeof(float)); }

static gd_mat take_rows(struct arena *arena, int64_t rows, int64_t width)
{
    const int64_t ld = gd_row_stride(width);
    return (gd_mat){take_floats(arena, rows * ld), ld};
}

/* ---- Shapes ----------------------------------------------------------------------------------------- */

/* Real frames of an utterance that was padded to `longest` samples, as S3PRL counts them: WavLM's encoder
 * takes a frame for padding where all of its longest / frames samples are (WavLM.forward_padding_mask),
 * the distiller counts through the convolutions. */
static int64_t s3prl_frames(const gd_config *c, int64_t samples, int64_t longest)
{
    if (c->architecture != GD_ENCODER)
        return gd_num_frames(c, samples);
    const int64_t frames = gd_num_frames(c, longest), chunk = (longest - longest % frames) / frames;
    const int64_t valid = (samples + chunk - 1) / chunk;
    return valid < frames ? valid : frames;
}

static int64_t longest_samples(const gd_batch *batch)
{
    int64_t longest = 0;
    for (int64_t b = 0; b < batch->batch; b++)
        longest = batch->lengths[b] > longest ? batch->lengths[b] : longest;
    return longest;
}

static void plan_rows(gd_workspace *ws, const gd_batch *batch)
{
    const gd_config *c = &ws->model->config;
    const int64_t stride = batch->batch + 1, longest = longest_samples(batch);
    const int64_t tile_frames = ws->model->context->backend->tile_frames, threads = ws->model->context->num_threads;
    int64_t *first = ws->arrays, *valid = first + stride;
    ws->sample_first = valid + stride;
    ws->tiles.first = ws->sample_first + stride;
    ws->tiles.frames = 0;
    ws->rows = (struct gd_rows){.batch = batch->batch, .first = first, .valid = valid};
    first[0] = ws->sample_first[0] = ws->tiles.first[0] = 0;
    for (int64_t b = 0; b < batch->batch; b++) {
        const int64_t samples = c->padding == GD_PADDING_S3PRL ? longest : batch->lengths[b];
        const int64_t rows = gd_num_frames(c, samples);
        valid[b] = c->padding == GD_PADDING_S3PRL ? s3prl_frames(c, batch->lengths[b], longest) : rows;
        first[b + 1] = first[b] + rows;
        ws->sample_first[b + 1] = ws->sample_first[b] + samples;
        ws->rows.longest = rows > ws->rows.longest ? rows : ws->rows.longest;

        /* As many tiles for each thread as for any other. */
        int64_t tiles = tile_frames ? (rows + tile_frames - 1) / tile_frames : 1;
        if (tile_frames)
            tiles = (tiles + threads - 1) / threads * threads;
        tiles = tiles < rows ? tiles : rows;
        ws->tiles.first[b + 1] = ws->tiles.first[b] + tiles;
        const int64_t frames = (rows + tiles - 1) / tiles;
        ws->tiles.frames = frames > ws->tiles.frames ? frames : ws->tiles.frames;
    }
    ws->rows.total = first[batch->batch];
}

/* ---- Layout ----------------------------------------------------------------------------------------- */

static void lay_out_extractor(gd_workspace *ws, struct arena *arena)
{
    gd_context *context = ws->model->context;
    const gd_config *c = &ws->model->config;
    const gd_conv_layer *conv0 = &c->conv_feature_layers[0];
    const int64_t batch = ws->rows.batch, kernel = conv0->kernel;

    ws->audio = take_floats(arena, ws->sample_first[batch]);
    if (c->extractor_mode == GD_EXTRACTOR_DEFAULT) {
        ws->moments = take(arena, (size_t)(batch * kernel * (1 + kernel)) * sizeof(double));
        ws->fold_weight = take_floats(arena, conv0->dim * kernel);
        ws->fold_bias = take_floats(arena, batch * conv0->dim);
        ws->fold_packed_size = (context->backend->packed_size(context, conv0->dim, kernel, 1) + 63) / 64 * 64;
        ws->fold_packed = take(arena, (size_t)batch * ws->fold_packed_size);
    }
    for (int parity = 0; parity < 2; parity++) {
        int64_t ld = 0, size = 0;
        for (int i = parity; i < c->num_conv_layers - 1; i += 2) {
            const int64_t layer_ld = gd_row_stride(c->conv_feature_layers[i].dim);
            ld = layer_ld > ld ? layer_ld : ld;
        }
        for (int i = parity; i < c->num_conv_layers - 1; i += 2) {
            const int64_t layer_size = gd_extractor_tile_rows(c, i, ws->tiles.frames) * ld;
            size = layer_size > size ? layer_size : size;
        }
        ws->tiles.ping_size[parity] = size;
        ws->tiles.ping[parity] = (gd_mat){take_floats(arena, size * context->num_threads), ld};
    }
}

static void lay_out_extractor_gradients(gd_workspace *ws, struct arena *arena)
{
    const gd_config *c = &ws->model->config;
    struct gd_extractor_gradients *e = &ws->extractor;
    const int normed = c->extractor_mode == GD_EXTRACTOR_LAYER_NORM, last = c->num_conv_layers - 1;
    const int64_t tile_frames = ws->model->context->backend->tile_frames * BACKWARD_TILES;
    e->frames = tile_frames && tile_frames < ws->rows.longest ? tile_frames : ws->rows.longest;
    int64_t in = 1, most[2] = {0, 0}, ld[2] = {0, 0};
    for (int i = 0; i <= last; in = c->conv_feature_layers[i++].dim) {
        const gd_conv_layer *conv = &c->conv_feature_layers[i];
        const int64_t rows = gd_extractor_tile_rows(c, i, e->frames), stride = gd_row_stride(conv->dim);
        e->pre[i] = take_rows(arena, rows, conv->dim);
        e->act[i] = take_rows(arena, rows, conv->dim);
        if (normed) {
            e->raw[i] = take_rows(arena, rows, conv->dim);
            e->stats[i] = take_floats(arena, 2 * rows);
        }
        if (normed || i) {
            e->w_taps[i] = take_floats(arena, conv->dim * conv->kernel * in);
            e->dw_taps[i] = take_floats(arena, conv->dim * conv->kernel * in);
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
}

static void lay_out_block_inference(gd_workspace *ws, struct arena *arena, struct gd_block_activations *a, gd_mat h)
{
    const gd_config *c = &ws->model->config;
    const int64_t rows = ws->rows.total, D = c->encoder_embed_dim;
    const int output = ws->model->host.output2_weight != NULL;
    struct gd_attention_activations *self = &a->self_attn;
    self->q = take_rows(arena, rows, D);
    self->k = take_rows(arena, rows, D);
    self->v = take_rows(arena, rows, D);
    self->context = take_rows(arena, rows, D);
    self->gate = take_floats(arena, rows * c->encoder_attention_heads);
    a->fc1 = take_rows(arena, rows, c->encoder_ffn_embed_dim);
    a->attn_sum = self->q;
    if (c->layer_norm_first) {
        a->normed = self->context; /* read by q, k and v before attention writes it */
        a->attn_out = self->k;
        a->out = h;
        return;
    }
    a->attn_out = a->attn_sum;
    if (c->cross_attention) {
        struct gd_attention_activations *cross = &a->cross_attn;
        cross->q = self->k;
        cross->k = self->v;
        cross->v = self->context;
        cross->context = take_rows(arena, rows, D);
        a->cross_sum = a->cross_out = cross->q;
    }
    a->ffn_sum = self->v;
    a->out = output ? a->ffn_sum : h;
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
    a->fc1 = take_rows(arena, rows, F);
    a->ffn_sum = take_rows(arena, rows, D);
    a->ffn_stats = take_floats(arena, 2 * rows);
    a->out = take_rows(arena, rows, D);
    step->out = a->out;
    if (ws->model->host.output2_weight) {
        step->hidden_pre = take_rows(arena, rows, D);
        step->hidden = take_rows(arena, rows, D);
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
    const int predictions = c->architecture == GD_GENERATIVE ? ws->num_layers : c->num_targets;
    for (int i = 0; i < predictions; i++)
        ws->targets[i] = take_rows(arena, rows, D);
    for (size_t i = 0; i < sizeof ws->d / sizeof *ws->d; i++)
        ws->d[i] = take_rows(arena, rows, D);
    ws->dffn = take_rows(arena, rows, c->encoder_ffn_embed_dim);
    if (c->architecture == GD_MULTI_HEAD)
        ws->dheads = take_rows(arena, rows, c->num_targets * D);
    ws->dcnn = take_rows(arena, rows, C);
    ws->dgate = take_floats(arena, rows * H);
    ws->dbias = take_floats(arena, H * (2 * ws->rows.longest - 1));
    ws->dpos_conv_weight = take_floats(arena, D * (D / c->conv_pos_groups) * c->conv_pos);
    ws->pos_conv_transposed = take(arena, context->backend->packed_pos_conv_size(context, D, c->conv_pos_groups, c->conv_pos));
    ws->terms = take(arena, (size_t)(3 * rows) * sizeof(double));
    lay_out_extractor_gradients(ws, arena);
}

static void lay_out(gd_workspace *ws, struct arena *arena)
{
    gd_model *model = ws->model;
    const gd_config *c = &model->config;
    const int64_t rows = ws->rows.total, D = c->encoder_embed_dim;
    const int64_t C = c->conv_feature_layers[c->num_conv_layers - 1].dim;

    ws->scratch = take(arena, ws->scratch_stride * (size_t)model->context->num_threads);
    lay_out_extractor(ws, arena);
    ws->cnn = take_rows(arena, rows, C);
    ws->cnn_normed = c->feature_layer_norm && ws->training ? take_rows(arena, rows, C) : ws->cnn;
    ws->cnn_stats = take_floats(arena, 2 * rows);
    ws->f = model->host.proj_weight ? take_rows(arena, rows, D) : ws->cnn_normed;
    ws->bias = take_floats(arena, c->encoder_attention_heads * (2 * ws->rows.longest - 1));

    if (ws->training) {
        if (c->position == GD_POSITION_ONCE)
            lay_out_position_training(ws, arena, &ws->position);
        for (int i = 0; i < ws->num_layers; i++)
            lay_out_step_training(ws, arena, &ws->steps[i]);
    } else {
        struct gd_step_activations step = {0};
        const gd_mat h = take_rows(arena, rows, D);
        ws->position = (struct gd_position_activations){.sum = h, .out = h};
        if (c->position == GD_POSITION_EVERY_STEP)
            step.position.sum = step.position.out = take_rows(arena, rows, D);
        lay_out_block_inference(ws, arena, &step.block, h);
        step.hidden = step.block.self_attn.context;
        step.out = h;
        for (int i = 0; i < ws->num_layers; i++)
            ws->steps[i] = step;
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
}

/* ---- Plan ------------------------------------------------------------------------------------------- */

static gd_status check_batch(gd_workspace *ws, const gd_batch *batch, int num_layers, int training)
{
    gd_context *context = ws->model->context;
    const gd_config *c = &ws->model->config;
    const int64_t shortest = gd_min_samples(c);
    if (batch->batch < 1)
        return gd_fail(context, GD_EINVAL, "wavs: expected at least one utterance, got %lld", (long long)batch->batch);
    for (int64_t b = 0; b < batch->batch; b++) {
        if (batch->lengths[b] < shortest)
            return gd_fail(context, GD_EINVAL, "wavs: expected at least %lld samples, got %lld in utterance %lld",
                           (long long)shortest, (long long)batch->lengths[b], (long long)b);
        if (batch->lengths[b] > (int64_t)1 << 40)
            return gd_fail(context, GD_EINVAL, "lengths: expected at most 2^40 samples, got %lld", (long long)batch->lengths[b]);
    }
    if (c->architecture == GD_GENERATIVE) {
        if (num_layers < 0 || num_layers > GD_MAX_TARGETS)
            return gd_fail(context, GD_EINVAL, "num_layers: expected 1 to %d layers to generate, got %d", GD_MAX_TARGETS, num_layers);
    } else if (c->architecture == GD_ENCODER) {
        if (num_layers < 0 || num_layers > c->encoder_layers)
            return gd_fail(context, GD_EINVAL, "num_layers: expected 1 to %d blocks, got %d", c->encoder_layers, num_layers);
    } else if (num_layers && num_layers != c->num_targets) {
        return gd_fail(context, GD_EINVAL, "num_layers: expected none with this architecture, got %d", num_layers);
    }
    if (training && c->architecture == GD_ENCODER)
        return gd_fail(context, GD_EUNSUPPORTED, "architecture \"encoder\" runs forward only: it cannot be trained");
    return GD_OK;
}

static gd_status reserve_arrays(gd_workspace *ws, int64_t batch, int num_layers)
{
    if (batch > ws->arrays_batch) {
        int64_t *arrays = realloc(ws->arrays, (size_t)(4 * (batch + 1)) * sizeof *arrays);
        if (!arrays)
            return GD_ENOMEM;
        ws->arrays = arrays;
        ws->arrays_batch = batch;
    }
    if (num_layers > ws->steps_capacity) {
        struct gd_step_activations *steps = realloc(ws->steps, (size_t)num_layers * sizeof *steps);
        if (!steps)
            return GD_ENOMEM;
        ws->steps = steps;
        ws->steps_capacity = num_layers;
    }
    memset(ws->steps, 0, (size_t)num_layers * sizeof *ws->steps);
    return GD_OK;
}

gd_status gd_workspace_plan(gd_workspace *ws, const gd_batch *batch, int num_layers, int training)
{
    gd_model *model = ws->model;
    gd_context *context = model->context;
    const gd_config *c = &model->config;
    gd_status status = check_batch(ws, batch, num_layers, training);
    if (status != GD_OK)
        return status;
    ws->planned = 0;
    if (c->architecture == GD_GENERATIVE)
        num_layers = num_layers ? num_layers : c->num_targets;
    else if (c->architecture != GD_ENCODER || !num_layers)
        num_layers = c->encoder_layers;
    status = reserve_arrays(ws, batch->batch, num_layers);
    if (status != GD_OK)
        return gd_fail(context, status, "out of memory for a batch of %lld", (long long)batch->batch);
    ws->training = training;
    ws->num_threads = context->num_threads;
    ws->num_layers = num_layers;
    ws->num_states = 1 + num_layers + (c->architecture == GD_MULTI_HEAD ? c->num_targets : 0);
    plan_rows(ws, batch);
    ws->scratch_stride = (context->backend->scratch_size(context, c, ws->rows.longest, training) + 63) / 64 * 64;

    struct arena arena = {NULL, 0};
    lay_out(ws, &arena);
    if (arena.used > ws->arena_size) {
        if (ws->arena)
            context->backend->release(context, ws->arena);
        ws->arena = NULL;
        ws->arena_size = 0;
        status = context->backend->allocate(context, arena.used, &ws->arena);
        if (status != GD_OK)
            return gd_fail(context, status, "out of memory for a workspace of %zu bytes", arena.used);
        ws->arena_size = arena.used;
    }
    arena = (struct arena){ws->arena, 0};
    lay_out(ws, &arena);
    status = gd_model_pack(model);
    ws->planned = status == GD_OK;
    return status;
}

gd_status gd_workspace_begin(gd_workspace *ws, const gd_batch *batch, const gd_dropout_seed *dropout)
{
    gd_context *context = ws->model->context;
    const struct gd_backend *backend = context->backend;
    const gd_config *c = &ws->model->config;
    int fits = ws->planned && context->num_threads == ws->num_threads && batch->batch == ws->rows.batch;
    for (int64_t b = 0; fits && b < batch->batch; b++)
        fits = c->padding == GD_PADDING_S3PRL ? batch->lengths[b] <= ws->sample_first[b + 1] - ws->sample_first[b]
                                              : batch->lengths[b] == ws->sample_first[b + 1] - ws->sample_first[b];
    if (!fits)
        return gd_fail(context, GD_EINVAL, "batch: expected the one, and the number of threads, that the workspace was planned for");
    if (dropout && ws->num_layers >= GD_DROPOUT_STEPS)
        return gd_fail(context, GD_EINVAL, "dropout_seed: expected none with %d layers or more, got %d layers",
                       GD_DROPOUT_STEPS, ws->num_layers);
    ws->dropout = dropout;
    context->scratch = ws->scratch;
    context->scratch_stride = ws->scratch_stride;
    for (int64_t b = 0; b < batch->batch; b++) {
        const int64_t padded = ws->sample_first[b + 1] - ws->sample_first[b];
        float *audio = ws->audio + ws->sample_first[b];
        backend->upload(context, audio, batch->wavs[b], (size_t)batch->lengths[b] * sizeof(float));
        if (c->normalize)
            backend->normalize(context, batch->lengths[b], audio, 1e-5f);
        if (padded > batch->lengths[b])
            backend->zero(context, audio + batch->lengths[b], (size_t)(padded - batch->lengths[b]) * sizeof(float));
    }
    return GD_OK;
}

gd_mat gd_workspace_state(const gd_workspace *ws, int s)
{
    if (s > ws->num_layers)
        return ws->predictions[s - ws->num_layers - 1];
    if (s > 0)
        return ws->steps[s - 1].out;
    return ws->model->config.architecture == GD_ENCODER ? ws->position.out : ws->f;
}

/* ---- Life ------------------------------------------------------------------------------------------- */

gd_status gd_workspace_create(gd_model *model, gd_workspace **workspace)
{
    *workspace = NULL;
    gd_workspace *created = calloc(1, sizeof *created);
    struct gd_layer_params *layers = calloc((size_t)model->config.encoder_layers, sizeof *layers);
    if (!created || !layers) {
        free(created);
        free(layers);
        return gd_fail(model->context, GD_ENOMEM, "out of memory for a workspace");
    }
    created->model = model;
    created->grads.layers = layers;
    *workspace = created;
    return GD_OK;
}

void gd_workspace_free(gd_workspace *ws)
{
    if (!ws)
        return;
    if (ws->arena)
        ws->model->context->backend->release(ws->model->context, ws->arena);
    free(ws->arrays);
    free(ws->steps);
    free(ws->grads.layers);
    free(ws);
}

int gd_workspace_num_states(const gd_workspace *ws) { return ws->num_states; }
int64_t gd_workspace_max_frames(const gd_workspace *ws) { return ws->rows.longest; }
const int64_t *gd_workspace_frames(const gd_workspace *ws) { return ws->rows.valid; }
size_t gd_workspace_bytes(const gd_workspace *ws) { return ws->arena_size; }
