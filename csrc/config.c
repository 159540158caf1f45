/* config.c - what the fields of a gd_config have to be, by themselves and together; how many frames audio has. */
#include <math.h>
#include <stdio.h>

#include "model.h"

#define REQUIRE(condition, ...)                      \
    do {                                             \
        if (!(condition)) {                          \
            snprintf(message, size, __VA_ARGS__);    \
            return GD_EINVAL;                        \
        }                                            \
    } while (0)

#define MAX_WIDTH 65536
#define MAX_LAYERS 1024
#define MAX_KERNEL 4096
#define MAX_DISTANCE (1 << 20)

static gd_status validate_range(const char *name, int value, int low, int high, char *message, size_t size)
{
    REQUIRE(value >= low && value <= high, "%s: expected %d to %d, got %d", name, low, high, value);
    return GD_OK;
}

static gd_status validate_probability(const char *name, double value, char *message, size_t size)
{
    REQUIRE(value >= 0 && value < 1, "%s: expected at least 0 and below 1, got %g", name, value);
    return GD_OK;
}

gd_status gd_config_validate(const gd_config *c, char *message, size_t size)
{
    const struct {
        const char *name;
        int value, low, high;
    } ranges[] = {
        {"architecture", c->architecture, GD_GENERATIVE, GD_ENCODER},
        {"extractor_mode", c->extractor_mode, GD_EXTRACTOR_DEFAULT, GD_EXTRACTOR_LAYER_NORM},
        {"position", c->position, GD_POSITION_ONCE, GD_POSITION_EVERY_STEP},
        {"padding", c->padding, GD_PADDING_EXACT, GD_PADDING_S3PRL},
        {"conv_feature_layers", c->num_conv_layers, 1, GD_MAX_CONV_LAYERS},
        {"encoder_layers", c->encoder_layers, 1, MAX_LAYERS},
        {"encoder_embed_dim", c->encoder_embed_dim, 1, MAX_WIDTH},
        {"encoder_ffn_embed_dim", c->encoder_ffn_embed_dim, 1, MAX_WIDTH},
        {"encoder_attention_heads", c->encoder_attention_heads, 1, MAX_WIDTH},
        {"conv_pos", c->conv_pos, 1, MAX_WIDTH},
        {"conv_pos_groups", c->conv_pos_groups, 1, MAX_WIDTH},
        {"num_buckets", c->num_buckets, 4, MAX_WIDTH},
        {"max_distance", c->max_distance, 2, MAX_DISTANCE},
        {"target_layers", c->num_targets, c->architecture == GD_ENCODER ? 0 : 1,
         c->architecture == GD_ENCODER ? 0 : GD_MAX_TARGETS},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
        gd_status status = validate_range(ranges[i].name, ranges[i].value, ranges[i].low, ranges[i].high, message,
                                          size);
        if (status != GD_OK)
            return status;
    }
    for (int i = 0; i < c->num_conv_layers; i++) {
        const gd_conv_layer *conv = &c->conv_feature_layers[i];
        REQUIRE(conv->dim >= 1 && conv->dim <= MAX_WIDTH && conv->kernel >= 1 && conv->kernel <= MAX_KERNEL &&
                    conv->stride >= 1 && conv->stride <= MAX_KERNEL,
                "conv_feature_layers: expected positive (dim, kernel, stride), got (%d, %d, %d) in layer %d", conv->dim,
                conv->kernel, conv->stride, i);
    }
    REQUIRE(c->encoder_embed_dim % c->encoder_attention_heads == 0,
            "encoder_attention_heads: expected a divisor of encoder_embed_dim %d, got %d", c->encoder_embed_dim,
            c->encoder_attention_heads);
    REQUIRE(c->encoder_embed_dim % c->conv_pos_groups == 0,
            "conv_pos_groups: expected a divisor of encoder_embed_dim %d, got %d", c->encoder_embed_dim,
            c->conv_pos_groups);
    REQUIRE(!c->gru_rel_pos || c->relative_position_embedding,
            "gru_rel_pos: expected relative_position_embedding to be on with it");
    REQUIRE(!c->relative_position_embedding || c->max_distance > c->num_buckets / 4,
            "max_distance: expected more than num_buckets / 4 = %d, got %d", c->num_buckets / 4, c->max_distance);
    REQUIRE(!c->conv_bias || c->extractor_mode == GD_EXTRACTOR_LAYER_NORM,
            "conv_bias: expected false with extractor_mode \"default\", whose GroupNorm takes it out again");
    REQUIRE(c->architecture != GD_GENERATIVE || c->encoder_layers == 1,
            "encoder_layers: expected 1 with architecture \"generative\", got %d", c->encoder_layers);
    REQUIRE(!c->layer_norm_first || c->architecture == GD_ENCODER,
            "layer_norm_first: expected false but for architecture \"encoder\"");
    REQUIRE(c->architecture == GD_GENERATIVE || (!c->cross_attention && c->position == GD_POSITION_ONCE),
            "cross_attention, position: expected false and \"once\" but for architecture \"generative\"");
    REQUIRE(c->architecture == GD_GENERATIVE || !c->skip_connection,
            "skip_connection: expected false but for architecture \"generative\"");
    REQUIRE(c->architecture == GD_GENERATIVE || (c->output_layer != 0) == (c->architecture == GD_MULTI_HEAD),
            "output_layer: expected true with architecture \"multi_head\", false with \"self_hidden\" and \"encoder\"");
    REQUIRE(c->architecture != GD_MULTI_HEAD || c->encoder_layers <= GD_MAX_TARGETS,
            "encoder_layers: expected at most %d with architecture \"multi_head\", got %d", GD_MAX_TARGETS,
            c->encoder_layers);
    REQUIRE(c->architecture != GD_SELF_HIDDEN || c->encoder_layers == c->num_targets ||
                c->encoder_layers == c->num_targets - 1,
            "encoder_layers: expected %d or, with f as the first prediction, %d for %d targets, got %d", c->num_targets,
            c->num_targets - 1, c->num_targets, c->encoder_layers);
    for (int i = 0; i < c->num_targets; i++)
        REQUIRE(c->target_layers[i] >= (i ? c->target_layers[i - 1] + 1 : 0) && c->target_layers[i] <= MAX_LAYERS,
                "target_layers: expected rising layer numbers, got %d in place %d", c->target_layers[i], i);
    REQUIRE(c->feature_grad_mult >= 0 && isfinite(c->feature_grad_mult),
            "feature_grad_mult: expected 0 or more, got %g", c->feature_grad_mult);
    gd_status status = validate_probability("dropout", c->dropout, message, size);
    if (status == GD_OK)
        status = validate_probability("attention_dropout", c->attention_dropout, message, size);
    if (status == GD_OK)
        status = validate_probability("activation_dropout", c->activation_dropout, message, size);
    return status;
}

int64_t gd_num_frames(const gd_config *config, int64_t samples)
{
    for (int i = 0; i < config->num_conv_layers; i++) {
        const gd_conv_layer *conv = &config->conv_feature_layers[i];
        if (samples < conv->kernel)
            return 0;
        samples = (samples - conv->kernel) / conv->stride + 1;
    }
    return samples;
}

int64_t gd_min_samples(const gd_config *config)
{
    int64_t samples = 1;
    for (int i = config->num_conv_layers - 1; i >= 0; i--)
        samples = (samples - 1) * config->conv_feature_layers[i].stride + config->conv_feature_layers[i].kernel;
    return samples;
}
