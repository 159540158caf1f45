/*
 * plan.c - a workspace's life: the plan for a batch's shape, its arena, and the start of a call. What
 * stands where in the arena is layout.c's.
 */
#include <stdlib.h>
#include <string.h>

#include "pack.h"
#include "size.h"
#include "stages.h"

/* Most rows of a tile of the block in inference: its 3,072 + 3 x 768 floats a row are then 11 MB, near the cache, and a
 * matrix product over it is long enough to divide among threads. */
#define TILE_ROWS 512

/* ---- Shapes ----------------------------------------------------------------------------------------- */

/* Real frames of an utterance that was padded to `longest` samples, as S3PRL counts them: WavLM's encoder
 * takes a frame for padding where all of its longest / frames samples are (WavLM.forward_padding_mask),
 * the distiller counts through the convolutions. */
static int64_t s3prl_frames(const gd_config *c, int64_t samples, int64_t longest)
{
    if (c->architecture != GD_ENCODER)
        return gd_num_frames(c, samples);
    const int64_t frames = gd_num_frames(c, longest), chunk = (longest - longest % frames) / frames;
    const int64_t valid = gd_divide_up(samples, chunk);
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
    ws->lengths = ws->tiles.first + stride;
    ws->has_statistics = batch->statistics != NULL;
    ws->tiles.frames = 0;
    ws->rows = (struct gd_rows){.batch = batch->batch, .first = first, .valid = valid};
    first[0] = ws->sample_first[0] = ws->tiles.first[0] = 0;
    for (int64_t b = 0; b < batch->batch; b++) {
        const int64_t samples = c->padding == GD_PADDING_S3PRL ? longest : batch->lengths[b];
        const int64_t rows = gd_num_frames(c, samples);
        valid[b] = c->padding == GD_PADDING_S3PRL ? s3prl_frames(c, batch->lengths[b], longest) : rows;
        ws->lengths[b] = batch->lengths[b];
        first[b + 1] = first[b] + rows;
        ws->sample_first[b + 1] = ws->sample_first[b] + samples;
        ws->rows.longest = rows > ws->rows.longest ? rows : ws->rows.longest;

        /* As many tiles for each thread as for any other. */
        int64_t tiles = tile_frames ? gd_divide_up(rows, tile_frames) : 1;
        if (tile_frames)
            tiles = gd_round_up(tiles, threads);
        tiles = tiles < rows ? tiles : rows;
        ws->tiles.first[b + 1] = ws->tiles.first[b] + tiles;
        const int64_t frames = gd_divide_up(rows, tiles) + gd_extractor_alignment(c) - 1;
        ws->tiles.frames = frames > ws->tiles.frames ? frames : ws->tiles.frames;
    }
    ws->rows.total = first[batch->batch];
}

/* ---- Plan ------------------------------------------------------------------------------------------- */

static gd_status check_batch(gd_workspace *ws, const gd_batch *batch, int num_layers, int training,
                             enum gd_precision precision)
{
    gd_context *context = ws->model->context;
    const gd_config *c = &ws->model->config;
    const int64_t shortest = gd_min_samples(c);
    int64_t longest = 0;
    if (batch->batch < 1)
        return gd_fail(context, GD_EINVAL, "wavs: expected at least one utterance, got %lld", (long long)batch->batch);
    for (int64_t b = 0; b < batch->batch; b++) {
        if (batch->lengths[b] < shortest)
            return gd_fail(context, GD_EINVAL, "wavs: expected at least %lld samples, got %lld in utterance %lld",
                           (long long)shortest, (long long)batch->lengths[b], (long long)b);
        /* Padded to the longest, which S3PRL's padding does. */
        longest = batch->lengths[b] > longest ? batch->lengths[b] : longest;
        if (longest > GD_MAX_SAMPLES / batch->batch)
            return gd_fail(context, GD_EINVAL, "lengths: expected at most 2^40 samples in all, got %lld x %lld",
                           (long long)batch->batch, (long long)longest);
    }
    if (batch->statistics && !context->backend->shares_memory)
        return gd_fail(context, GD_EUNSUPPORTED, "statistics: expected a model on the CPU");
    if (batch->statistics && (training || c->padding != GD_PADDING_EXACT))
        return gd_fail(context, GD_EINVAL, "statistics: expected none %s",
                       training ? "in training" : "with padding \"s3prl\"");
    for (int64_t b = 0; batch->statistics && b < batch->batch; b++) {
        gd_status status = gd_statistics_check(context, c, batch->statistics[b]);
        if (status != GD_OK)
            return status;
    }
    if (c->architecture == GD_GENERATIVE) {
        if (num_layers < 0 || num_layers > GD_MAX_TARGETS)
            return gd_fail(context, GD_EINVAL, "num_layers: expected 1 to %d layers to generate, got %d",
                           GD_MAX_TARGETS, num_layers);
    } else if (c->architecture == GD_ENCODER) {
        if (num_layers < 0 || num_layers > c->encoder_layers)
            return gd_fail(context, GD_EINVAL, "num_layers: expected 1 to %d blocks, got %d",
                           c->encoder_layers, num_layers);
    } else if (num_layers && num_layers != c->num_targets) {
        return gd_fail(context, GD_EINVAL, "num_layers: expected none with this architecture, got %d", num_layers);
    }
    if (precision < GD_FLOAT32 || precision > GD_INT8)
        return gd_fail(context, GD_EINVAL, "precision: expected %d to %d, got %d", GD_FLOAT32, GD_INT8, (int)precision);
    if (!(context->backend->precisions >> precision & 1))
        return gd_fail(context, GD_EUNSUPPORTED, "precision: this device computes in float32%s, it has no %s kernels",
                       context->backend->precisions >> GD_BFLOAT16 & 1 ? " or bfloat16" : "",
                       gd_precision_name(precision));
    if (training && precision == GD_INT8)
        return gd_fail(context, GD_EUNSUPPORTED, "precision: training computes in float32 or bfloat16, not in int8");
    if (training && c->architecture == GD_ENCODER)
        return gd_fail(context, GD_EUNSUPPORTED, "architecture \"encoder\" runs forward only: it cannot be trained");
    return GD_OK;
}

static gd_status reserve_arrays(gd_workspace *ws, int64_t batch, int num_layers)
{
    if (batch > ws->arrays_batch) {
        int64_t *arrays = realloc(ws->arrays, (size_t)(5 * (batch + 1)) * sizeof *arrays);
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

gd_status gd_workspace_plan(gd_workspace *ws, const gd_batch *batch, int num_layers, int training,
                            enum gd_precision precision)
{
    gd_model *model = ws->model;
    gd_context *context = model->context;
    const gd_config *c = &model->config;
    gd_status status = check_batch(ws, batch, num_layers, training, precision);
    if (status != GD_OK)
        return status;
    ws->planned = 0;
    const int steps = gd_num_steps(c, num_layers);
    status = reserve_arrays(ws, batch->batch, steps);
    if (status != GD_OK)
        return gd_fail(context, status, "out of memory for a batch of %lld", (long long)batch->batch);
    ws->training = training;
    ws->precision = precision;
    ws->num_threads = context->num_threads;
    ws->num_layers = steps;
    ws->num_states = gd_num_states(c, num_layers);
    plan_rows(ws, batch);
    const int64_t tiles = training ? 1 : gd_divide_up(ws->rows.total, TILE_ROWS);
    ws->tile_rows = gd_divide_up(ws->rows.total, tiles);
    ws->scratch_stride = gd_whole_lines(context->backend->scratch_size(context, c, ws->rows.longest, training));

    const size_t needed = gd_workspace_lay_out(ws, NULL);
    if (needed > ws->arena_size) {
        if (ws->arena)
            context->backend->release(context, ws->arena);
        ws->arena = NULL;
        ws->arena_size = 0;
        status = context->backend->allocate(context, needed, &ws->arena);
        if (status != GD_OK)
            return gd_fail(context, status, "out of memory for a workspace of %zu bytes", needed);
        ws->arena_size = needed;
    }
    gd_workspace_lay_out(ws, ws->arena);
    status = gd_model_pack(model, precision);
    ws->planned = status == GD_OK;
    return status;
}

/* A batch of another shape would be computed by the plan's masks. */
static gd_status check_planned(const gd_workspace *ws, const gd_batch *batch)
{
    gd_context *context = ws->model->context;
    if (!ws->planned)
        return gd_fail(context, GD_EINVAL, "workspace: expected one that is planned");
    if (ws->model->packed_precision != ws->precision)
        return gd_fail(context, GD_EINVAL, "precision: expected weights packed in %s as planned, got %s",
                       gd_precision_name(ws->precision), gd_precision_name(ws->model->packed_precision));
    if (context->num_threads != ws->num_threads)
        return gd_fail(context, GD_EINVAL, "num_threads: expected %d as planned, got %d", ws->num_threads,
                       context->num_threads);
    if (batch->batch != ws->rows.batch)
        return gd_fail(context, GD_EINVAL, "wavs: expected %lld utterances as planned, got %lld",
                       (long long)ws->rows.batch, (long long)batch->batch);
    for (int64_t b = 0; b < batch->batch; b++)
        if (batch->lengths[b] != ws->lengths[b])
            return gd_fail(context, GD_EINVAL, "lengths: expected %lld samples in utterance %lld as planned, got %lld",
                           (long long)ws->lengths[b], (long long)b, (long long)batch->lengths[b]);
    if (ws->has_statistics != (batch->statistics != NULL))
        return gd_fail(context, GD_EINVAL, "statistics: expected %s as planned, got %s",
                       ws->has_statistics ? "some" : "none", ws->has_statistics ? "none" : "some");
    return GD_OK;
}

gd_status gd_workspace_begin(gd_workspace *ws, const gd_batch *batch, const gd_dropout_seed *dropout)
{
    gd_context *context = ws->model->context;
    const struct gd_backend *backend = context->backend;
    const gd_config *c = &ws->model->config;
    const gd_status status = check_planned(ws, batch);
    if (status != GD_OK)
        return status;
    if (dropout && ws->num_layers >= GD_DROPOUT_STEPS)
        return gd_fail(context, GD_EINVAL, "dropout_seed: expected none with %d layers or more, got %d layers",
                       GD_DROPOUT_STEPS, ws->num_layers);
    ws->dropout = dropout;
    const int64_t kernel = c->conv_feature_layers[0].kernel;
    ws->given_moments = batch->statistics && c->extractor_mode == GD_EXTRACTOR_DEFAULT;
    context->scratch = ws->scratch;
    context->scratch_stride = ws->scratch_stride;
    for (int64_t b = 0; b < batch->batch; b++) {
        const int64_t padded = ws->sample_first[b + 1] - ws->sample_first[b];
        float *audio = ws->audio + ws->sample_first[b];
        backend->upload(context, audio, batch->wavs[b], (size_t)batch->lengths[b] * sizeof(float));
        if (c->normalize)
            backend->normalize(context, batch->lengths[b], audio,
                               batch->statistics ? gd_statistics_normalize(batch->statistics[b]) : NULL,
                               (float)c->normalize_eps);
        if (padded > batch->lengths[b])
            backend->zero(context, audio + batch->lengths[b], (size_t)(padded - batch->lengths[b]) * sizeof(float));
        if (ws->given_moments)
            gd_statistics_moments(c, batch->statistics[b], ws->moments + b * kernel * (1 + kernel));
    }
    return GD_OK;
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
