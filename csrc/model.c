/* model.c - a model's life. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

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
