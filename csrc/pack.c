/* pack.c - every weight of a model in the layout that its stage's products read. */
#include "pack.h"

#include "size.h"
#include "stages.h"

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
    p->used = gd_plus(p->used, gd_whole_lines(bytes));
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
