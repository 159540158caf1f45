/*
 * model.h - inside of gd_model: the parameters, their table of tensors, the packed weights.
 */
#ifndef GD_MODEL_H
#define GD_MODEL_H

#include "backend.h"

/* Pointers into a flat buffer of parameters or of gradients; NULL where the config has no such tensor. */
struct gd_attention_params {
    float *q_weight, *q_bias, *k_weight, *k_bias, *v_weight, *v_bias, *out_weight, *out_bias;
};

struct gd_conv_params {
    float *weight, *bias, *group_norm_weight, *group_norm_bias, *layer_norm_weight, *layer_norm_bias;
};

struct gd_layer_params {
    struct gd_attention_params self_attn, cross_attn;
    float *grep_weight, *grep_bias, *grep_a, *relative_attention_bias;
    float *self_attn_norm_weight, *self_attn_norm_bias, *cross_attn_norm_weight, *cross_attn_norm_bias;
    float *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias, *final_norm_weight, *final_norm_bias;
};

struct gd_params {
    struct gd_conv_params conv[GD_MAX_CONV_LAYERS];
    float *layer_norm_weight, *layer_norm_bias, *proj_weight, *proj_bias;
    float *pos_conv_g, *pos_conv_v, *pos_conv_bias, *encoder_norm_weight, *encoder_norm_bias;
    float *output0_weight, *output0_bias, *output2_weight, *output2_bias, *heads_weight, *heads_bias;
    struct gd_layer_params *layers; /* (encoder_layers) */
};

enum gd_init { GD_INIT_ZERO, GD_INIT_ONE, GD_INIT_NORMAL, GD_INIT_LINEAR,
              GD_INIT_KAIMING, GD_INIT_POS_CONV, GD_INIT_POS_CONV_G };

/* Where a tensor's pointer stands in struct gd_params: at `field` of the room's struct number `index`. */
struct gd_slot {
    enum { GD_IN_CONV, GD_IN_MODEL, GD_IN_LAYER } room;
    int index;
    size_t field;
    enum gd_init init;
};

/* Weights in linear()'s layout, rebuilt by pack.c when the parameters change. */
struct gd_packed_attention {
    struct gd_weight q, k, v, out;
};

struct gd_packed_layer {
    struct gd_packed_attention self_attn, cross_attn;
    struct gd_weight fc1, fc2;
};

struct gd_packed {
    /* conv[0] is not packed with GroupNorm: it is folded for each utterance */
    struct gd_weight conv[GD_MAX_CONV_LAYERS];
    struct gd_weight proj, output0, output2, heads[GD_MAX_TARGETS];
    void *pos_conv;
    struct gd_packed_layer *layers;
};

struct gd_model {
    gd_context *context;
    gd_config config;
    int num_tensors;
    gd_tensor *tensors;
    struct gd_slot *slots; /* parallel to tensors */
    char *names;
    size_t num_params;
    float *values;            /* flat, on the host */
    struct gd_params host;    /* into values */
    float *device_values;     /* flat, on the device: values itself where memory is shared */
    struct gd_params params;  /* into device_values */
    enum gd_precision precision; /* of the checkpoint */
    void *packed_memory;
    size_t packed_size;
    struct gd_packed packed;
    int64_t version, packed_version; /* of values; of the packed weights */
    enum gd_precision packed_precision;
    double *statistics; /* gd_model_statistics() */
};

/* By enum gd_architecture, then NULL. */
extern const char *const gd_architecture_names[];

/* Generation steps or blocks that run; num_layers as in gd_workspace_plan(). */
int gd_num_steps(const gd_config *, int num_layers);

/* Calls visit() for each tensor of a valid config's model, in the order of the flat buffer; its name lives as long as
 * the call. */
typedef void gd_visit_tensor(void *argument, const gd_tensor *, const struct gd_slot *);
void gd_visit_tensors(const gd_config *, gd_visit_tensor *visit, void *argument);

/* Whether products that sum over `in` values are ever reduced to bfloat16 or int8. */
int gd_is_reduced(int64_t in);

/* How int8 checkpoints store tensor i: value e as int8 times scale[(e / outer) * inner + e % inner], `count` scales
 * of the shape that is given. count is 0 for tensors that stay float32. */
struct gd_channels {
    size_t count, outer, inner;
    int ndim;
    int64_t shape[2];
};
struct gd_channels gd_tensor_channels(const gd_model *model, int i);

/* Points `params` (and its layers array, encoder_layers long) into a flat buffer. */
void gd_params_bind(const gd_model *model, float *values, struct gd_params *params);

/* GD_EINVAL for statistics that no audio can have. */
gd_status gd_statistics_check(gd_context *, const gd_config *, const double *statistics);
/* Mean and variance of the samples; struct gd_moments' moments of conv 0's frames in normalised samples. */
const double *gd_statistics_normalize(const double *statistics);
void gd_statistics_moments(const gd_config *, const double *statistics, double *moments);

#endif
