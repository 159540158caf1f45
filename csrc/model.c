/* model.c - packed weights, a model's life. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

/* ---- Packed weights -------------------------------------------------------------------------------- */

/* Lays the packed weights out behind one another; only measures where `memory` is NULL. */
struct packer {
    gd_model *model;
    enum gd_precision precision;
    char *memory;
    size_t used;
    size_t most; /* bytes needed while packing, where more than `used` in the end */
};

static void *take(struct packer *p, size_t bytes)
{
    void *place = p->memory ? p->memory + p->used : NULL;
    p->used += (bytes + 63) / 64 * 64;
    return place;
}

/* w[o, t, c] by strides: rows of `in` for a linear layer, and taps for a convolution. */
static struct gd_weight pack(struct packer *p, struct gd_weight weight, const float *w, int64_t w_out, int64_t w_tap,
                             int64_t w_in)
{
    gd_context *context = p->model->context;
    const struct gd_backend *backend = context->backend;
    weight.precision = gd_is_reduced(weight.in) ? p->precision : GD_FLOAT32;
    void *packed = take(p, backend->packed_size(context, &weight));
    if (packed)
        backend->pack(context, &weight, w, w_out, w_tap, w_in, packed);
    weight.packed = packed;
    return weight;
}

static struct gd_weight pack_matrix(struct packer *p, int64_t out, int64_t in, const float *w)
{
    return pack(p, (struct gd_weight){.out = out, .taps = 1, .in = in, .stride = 1}, w, in, 0, 1);
}

static void pack_attention(struct packer *p, int64_t dim, const struct gd_attention_params *params,
                           struct gd_packed_attention *packed)
{
    packed->q = pack_matrix(p, dim, dim, params->q_weight);
    packed->k = pack_matrix(p, dim, dim, params->k_weight);
    packed->v = pack_matrix(p, dim, dim, params->v_weight);
    packed->out = pack_matrix(p, dim, dim, params->out_weight);
}

static void pack_all(struct packer *p)
{
    gd_model *model = p->model;
    gd_context *context = model->context;
    const struct gd_backend *backend = context->backend;
    const gd_config *c = &model->config;
    const struct gd_params *params = &model->params;
    struct gd_packed *packed = &model->packed;
    const int64_t D = c->encoder_embed_dim, F = c->encoder_ffn_embed_dim, group = D / c->conv_pos_groups;
    const struct gd_pos_conv pos_conv = gd_pos_conv_shape(c, p->precision, 0);

    int64_t in = 1;
    for (int i = 0; i < c->num_conv_layers; i++) {
        const gd_conv_layer *conv = &c->conv_feature_layers[i];
        if (i > 0 || c->extractor_mode == GD_EXTRACTOR_LAYER_NORM)
            packed->conv[i] = pack(p, gd_conv_weight(c, i, p->precision), params->conv[i].weight, in * conv->kernel, 1,
                                   conv->kernel);
        in = conv->dim;
    }
    if (params->proj_weight)
        packed->proj = pack_matrix(p, D, in, params->proj_weight);

    packed->pos_conv = take(p, backend->packed_pos_conv_size(context, &pos_conv));
    /* The normed weight (D, D / groups, K) stands where the weights that are packed after it will be. */
    struct packer behind = *p;
    float *pos_conv_weight = take(&behind, (size_t)(D * group * c->conv_pos) * sizeof(float));
    p->most = behind.used;
    if (packed->pos_conv) {
        backend->weight_norm(context, D, group, c->conv_pos, params->pos_conv_g, params->pos_conv_v, pos_conv_weight);
        backend->pack_pos_conv(context, &pos_conv, pos_conv_weight, packed->pos_conv);
    }
    for (int i = 0; i < c->encoder_layers; i++) {
        const struct gd_layer_params *layer = &params->layers[i];
        struct gd_packed_layer *to = &packed->layers[i];
        pack_attention(p, D, &layer->self_attn, &to->self_attn);
        if (c->cross_attention)
            pack_attention(p, D, &layer->cross_attn, &to->cross_attn);
        to->fc1 = pack_matrix(p, F, D, layer->fc1_weight);
        to->fc2 = pack_matrix(p, D, F, layer->fc2_weight);
    }
    if (params->output2_weight) {
        packed->output0 = pack_matrix(p, D, D, params->output0_weight);
        packed->output2 = pack_matrix(p, D, D, params->output2_weight);
    }
    if (params->heads_weight) {
        packed->output0 = pack_matrix(p, c->num_targets * D, D, params->output0_weight);
        for (int i = 0; i < c->num_targets; i++)
            packed->heads[i] = pack(p, (struct gd_weight){.out = D, .taps = 1, .in = D, .stride = 1},
                                    params->heads_weight + i * D * D, 1, 0, D);
    }
}

gd_status gd_model_pack(gd_model *model, enum gd_precision precision)
{
    gd_context *context = model->context;
    const struct gd_backend *backend = context->backend;
    if (model->packed_version == model->version && model->packed_precision == precision)
        return GD_OK;
    model->packed_version = 0;
    struct packer measure = {.model = model, .precision = precision};
    pack_all(&measure);
    const size_t bytes = measure.used > measure.most ? measure.used : measure.most;
    if (model->packed_size != bytes) {
        if (model->packed_memory)
            backend->release(context, model->packed_memory);
        model->packed_memory = NULL;
        model->packed_size = 0;
        gd_status status = backend->allocate(context, bytes, &model->packed_memory);
        if (status != GD_OK)
            return gd_fail(context, status, "out of memory for %zu bytes of packed weights", bytes);
        model->packed_size = bytes;
    }
    if (!backend->shares_memory)
        backend->upload(context, model->device_values, model->values, model->num_params * sizeof(float));
    struct packer packer = {.model = model, .precision = precision, .memory = model->packed_memory};
    pack_all(&packer);
    model->packed_version = model->version;
    model->packed_precision = precision;
    return backend->synchronize(context);
}

/* ---- Life ------------------------------------------------------------------------------------------ */

struct listing {
    gd_model *model; /* NULL: only count */
    int count;
    size_t names, floats;
};

static void list(void *argument, const gd_tensor *tensor, const struct gd_slot *slot)
{
    struct listing *listing = argument;
    const size_t length = strlen(tensor->name) + 1;
    if (listing->model) {
        gd_tensor *listed = &listing->model->tensors[listing->count];
        *listed = *tensor;
        listed->name = memcpy(listing->model->names + listing->names, tensor->name, length);
        listing->model->slots[listing->count] = *slot;
    }
    listing->count++;
    listing->names += length;
    listing->floats = tensor->offset + tensor->size;
}

gd_status gd_model_create(gd_context *context, const gd_config *config, gd_model **model)
{
    *model = NULL;
    gd_status status = gd_config_validate(config, context->message, sizeof context->message);
    if (status != GD_OK)
        return status;
    struct listing measure = {0};
    gd_visit_tensors(config, list, &measure);

    gd_model *created = calloc(1, sizeof *created);
    if (!created)
        return gd_fail(context, GD_ENOMEM, "out of memory for a model");
    const size_t layers = (size_t)config->encoder_layers;
    created->context = context;
    created->config = *config;
    created->num_tensors = measure.count;
    created->num_params = measure.floats;
    created->version = 1;
    created->tensors = calloc((size_t)measure.count, sizeof *created->tensors);
    created->slots = calloc((size_t)measure.count, sizeof *created->slots);
    created->names = malloc(measure.names);
    created->values = calloc(measure.floats, sizeof *created->values);
    created->host.layers = calloc(layers, sizeof *created->host.layers);
    created->params.layers = calloc(layers, sizeof *created->params.layers);
    created->packed.layers = calloc(layers, sizeof *created->packed.layers);
    if (!created->tensors || !created->slots || !created->names || !created->values || !created->host.layers ||
        !created->params.layers || !created->packed.layers) {
        gd_model_free(created);
        return gd_fail(context, GD_ENOMEM, "out of memory for a model of %zu parameters", measure.floats);
    }
    struct listing listing = {.model = created};
    gd_visit_tensors(config, list, &listing);
    gd_params_bind(created, created->values, &created->host);

    created->device_values = created->values;
    if (!context->backend->shares_memory) {
        void *memory;
        status = context->backend->allocate(context, measure.floats * sizeof(float), &memory);
        if (status != GD_OK) {
            created->device_values = NULL;
            gd_model_free(created);
            return gd_fail(context, status, "out of memory for %zu parameters on the device", measure.floats);
        }
        created->device_values = memory;
    }
    gd_params_bind(created, created->device_values, &created->params);
    *model = created;
    return GD_OK;
}

void gd_model_free(gd_model *model)
{
    if (!model)
        return;
    const struct gd_backend *backend = model->context->backend;
    if (model->packed_memory)
        backend->release(model->context, model->packed_memory);
    if (model->device_values && model->device_values != model->values)
        backend->release(model->context, model->device_values);
    free(model->tensors);
    free(model->slots);
    free(model->names);
    free(model->values);
    free(model->host.layers);
    free(model->params.layers);
    free(model->packed.layers);
    free(model->statistics);
    free(model);
}

const gd_config *gd_model_config(const gd_model *model) { return &model->config; }
float *gd_model_params(gd_model *model) { return model->values; }
size_t gd_model_num_params(const gd_model *model) { return model->num_params; }

const char *gd_precision_name(enum gd_precision precision)
{
    static const char *const names[] = {"float32", "bfloat16", "int8"};
    return names[precision];
}

gd_status gd_model_set_precision(gd_model *model, enum gd_precision precision)
{
    if (precision < GD_FLOAT32 || precision > GD_INT8)
        return gd_fail(model->context, GD_EINVAL, "precision: expected %d to %d, got %d", GD_FLOAT32, GD_INT8,
                       (int)precision);
    model->precision = precision;
    return GD_OK;
}

enum gd_precision gd_model_precision(const gd_model *model) { return model->precision; }
void gd_model_touch(gd_model *model) { model->version++; }

const gd_tensor *gd_model_tensors(const gd_model *model, int *count)
{
    *count = model->num_tensors;
    return model->tensors;
}
