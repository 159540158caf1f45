/* tensors.c - which parameter tensors a config's model has, from params.def, and where each stands. */
#include <stdio.h>
#include <string.h>

#include "model.h"
#include "size.h"

/* Sums shorter than this stay float32: conv 0, and little models. */
#define REDUCED_MIN_IN 16

struct list {
    gd_visit_tensor *visit;
    void *argument;
    size_t floats;
};

static int ends_with(const char *name, const char *end)
{
    size_t length = strlen(name), end_length = strlen(end);
    return length >= end_length && strcmp(name + length - end_length, end) == 0;
}

static void add(struct list *list, struct gd_slot slot, const char *format, int ndim, int64_t d0, int64_t d1,
                int64_t d2, int64_t d3)
{
    char name[128];
    snprintf(name, sizeof name, format, slot.index);
    const gd_tensor tensor = {
        .name = name, .ndim = ndim, .shape = {d0, d1, d2, d3}, .offset = list->floats,
        .size = gd_times(gd_times((size_t)d0, (size_t)d1), gd_times((size_t)d2, (size_t)d3)),
        .decay = ndim >= 2 && (ends_with(name, ".weight") || ends_with(name, ".weight_v")),
    };
    list->visit(list->argument, &tensor, &slot);
    list->floats = gd_plus(list->floats, tensor.size);
}

void gd_visit_tensors(const gd_config *c, gd_visit_tensor *visit, void *argument)
{
    struct list list = {visit, argument, 0};
    const int64_t D = c->encoder_embed_dim, F = c->encoder_ffn_embed_dim, H = c->encoder_attention_heads, Dh = D / H;
    const int64_t C = c->conv_feature_layers[c->num_conv_layers - 1].dim;
    const int GROUP_NORM = c->extractor_mode == GD_EXTRACTOR_DEFAULT;
    const int OUTPUT = c->architecture == GD_GENERATIVE && c->output_layer;
    const int64_t HEADS = c->architecture == GD_MULTI_HEAD ? c->num_targets : 0;

#define ADD(room, index, type, field, name, present, init, ...) \
    if (present)                                                \
        add(&list, (struct gd_slot){room, index, offsetof(struct type, field), init}, name, __VA_ARGS__);
    int64_t in = 1;
    for (int i = 0; i < c->num_conv_layers; i++) {
        const gd_conv_layer *conv = &c->conv_feature_layers[i];
#define GD_CONV(...) ADD(GD_IN_CONV, i, gd_conv_params, __VA_ARGS__)
#include "params.def"
        in = conv->dim;
    }
#define GD_MODEL(...) ADD(GD_IN_MODEL, 0, gd_params, __VA_ARGS__)
#include "params.def"
    for (int i = 0; i < c->encoder_layers; i++) {
#define GD_LAYER(...) ADD(GD_IN_LAYER, i, gd_layer_params, __VA_ARGS__)
#include "params.def"
    }
#define GD_OUTPUT(...) ADD(GD_IN_MODEL, 0, gd_params, __VA_ARGS__)
#include "params.def"
#undef ADD
}

struct listener {
    gd_tensor_function *function;
    void *argument;
};

static void tell(void *argument, const gd_tensor *tensor, const struct gd_slot *slot)
{
    const struct listener *listener = argument;
    (void)slot;
    listener->function(listener->argument, tensor);
}

void gd_config_tensors(const gd_config *config, gd_tensor_function *function, void *argument)
{
    gd_visit_tensors(config, tell, &(struct listener){function, argument});
}

static void count(void *argument, const gd_tensor *tensor)
{
    size_t *floats = argument;
    *floats = gd_plus(*floats, tensor->size);
}

int64_t gd_config_num_params(const gd_config *config)
{
    size_t floats = 0;
    gd_config_tensors(config, count, &floats);
    return floats > INT64_MAX ? INT64_MAX : (int64_t)floats;
}

void gd_params_bind(const gd_model *model, float *values, struct gd_params *params)
{
    struct gd_layer_params *layers = params->layers;
    memset(params, 0, sizeof *params);
    memset(layers, 0, (size_t)model->config.encoder_layers * sizeof *layers);
    params->layers = layers;
    for (int i = 0; i < model->num_tensors; i++) {
        const struct gd_slot *slot = &model->slots[i];
        char *room = slot->room == GD_IN_CONV    ? (char *)&params->conv[slot->index]
                     : slot->room == GD_IN_LAYER ? (char *)&layers[slot->index]
                                                 : (char *)params;
        float *tensor = values + model->tensors[i].offset;
        memcpy(room + slot->field, &tensor, sizeof tensor);
    }
}

int gd_is_reduced(int64_t in) { return in >= REDUCED_MIN_IN; }

struct gd_channels gd_tensor_channels(const gd_model *model, int i)
{
    const gd_tensor *tensor = &model->tensors[i];
    const struct gd_slot *slot = &model->slots[i];
    const size_t channels = (size_t)tensor->shape[0], each = tensor->size / channels;
    const int of_attention = slot->room == GD_IN_LAYER &&
                             (slot->field == offsetof(struct gd_layer_params, grep_weight) ||
                              slot->field == offsetof(struct gd_layer_params, relative_attention_bias));
    if (!tensor->decay || !gd_is_reduced((int64_t)each) || of_attention)
        return (struct gd_channels){0};
    /* (heads, in, out): the only weight whose outputs are its last dimension. */
    if (slot->room == GD_IN_MODEL && slot->field == offsetof(struct gd_params, heads_weight)) {
        const size_t out = (size_t)tensor->shape[2];
        return (struct gd_channels){channels * out, each, out, 2, {tensor->shape[0], tensor->shape[2]}};
    }
    return (struct gd_channels){channels, each, 1, 1, {tensor->shape[0]}};
}
