/* config.c - what the fields of a gd_config have to be, by themselves and together; what follows from them: how many
 * frames audio has, how many states there are. */
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

const char *const gd_architecture_names[] = {"generative", "self_hidden", "multi_head", "encoder", NULL};

/* From the last convolution to the first: samples that a frame sees, which are the least that an utterance needs, and
 * samples from frame to frame. Both stay at GD_MAX_SAMPLES + 1 where they are above GD_MAX_SAMPLES. */
static void frame_geometry(const gd_config *c, int64_t *receptive_field, int64_t *hop)
{
    *receptive_field = *hop = 1;
    for (int i = c->num_conv_layers - 1; i >= 0; i--) {
        const gd_conv_layer *conv = &c->conv_feature_layers[i];
        /* Below 2^41 x 2^12 + 2^12. */
        *receptive_field = gd_smaller((*receptive_field - 1) * conv->stride + conv->kernel, GD_MAX_SAMPLES + 1);
        *hop = gd_smaller(*hop * conv->stride, GD_MAX_SAMPLES + 1);
    }
}

static gd_status validate_conv_layers(const gd_config *c, char *message, size_t size)
{
    REQUIRE(c->num_conv_layers >= 1 && c->num_conv_layers <= GD_MAX_CONV_LAYERS,
            "conv_feature_layers: expected 1 to %d layers, got %d", GD_MAX_CONV_LAYERS, c->num_conv_layers);
    for (int i = 0; i < c->num_conv_layers; i++) {
        const gd_conv_layer *conv = &c->conv_feature_layers[i];
        const struct {
            const char *name;
            int value, high;
        } parts[] = {
            {"dim", conv->dim, MAX_WIDTH},
            {"kernel", conv->kernel, MAX_KERNEL},
            {"stride", conv->stride, MAX_KERNEL},
        };
        for (int p = 0; p < 3; p++)
            REQUIRE(parts[p].value >= 1 && parts[p].value <= parts[p].high,
                    "conv_feature_layers[%d].%s: expected 1 to %d, got %d", i, parts[p].name, parts[p].high,
                    parts[p].value);
    }
    int64_t receptive_field, hop;
    frame_geometry(c, &receptive_field, &hop);
    REQUIRE(receptive_field <= GD_MAX_SAMPLES && hop <= GD_MAX_SAMPLES,
            "conv_feature_layers: expected a frame of at most 2^40 samples, and as many to the next one, got more");
    REQUIRE(!c->conv_bias || c->extractor_mode == GD_EXTRACTOR_LAYER_NORM,
            "conv_bias: expected false with extractor_mode \"default\", whose GroupNorm takes it out again, got true");
    return GD_OK;
}

static const char *truth(int value) { return value ? "true" : "false"; }

/* What the architecture asks of the other fields. */
static gd_status validate_architecture(const gd_config *c, char *message, size_t size)
{
    const char *name = gd_architecture_names[c->architecture];
    const int generative = c->architecture == GD_GENERATIVE, encoder = c->architecture == GD_ENCODER;
    const int targets = c->num_targets;
    REQUIRE(!generative || c->encoder_layers == 1, "encoder_layers: expected 1 for architecture \"%s\", got %d",
            name, c->encoder_layers);
    REQUIRE(!c->layer_norm_first || encoder, "layer_norm_first: expected false for architecture \"%s\", got true",
            name);
    if (!generative) {
        const int heads = c->architecture == GD_MULTI_HEAD;
        REQUIRE(!c->skip_connection, "skip_connection: expected false for architecture \"%s\", got true", name);
        REQUIRE(!c->cross_attention, "cross_attention: expected false for architecture \"%s\", got true", name);
        REQUIRE(c->position == GD_POSITION_ONCE,
                "position: expected \"once\" for architecture \"%s\", got \"every_step\"", name);
        REQUIRE((c->output_layer != 0) == heads, "output_layer: expected %s for architecture \"%s\", got %s",
                truth(heads), name, truth(c->output_layer));
        REQUIRE(!heads || c->encoder_layers <= GD_MAX_TARGETS,
                "encoder_layers: expected at most %d for architecture \"%s\", got %d", GD_MAX_TARGETS, name,
                c->encoder_layers);
    }
    if (encoder)
        REQUIRE(targets == 0, "target_layers: expected none for architecture \"%s\", got %d", name, targets);
    else
        REQUIRE(targets >= 1 && targets <= GD_MAX_TARGETS,
                "target_layers: expected 1 to %d layers for architecture \"%s\", got %d", GD_MAX_TARGETS, name,
                targets);
    /* With f as the first prediction, one more than blocks. */
    REQUIRE(c->architecture != GD_SELF_HIDDEN || targets == c->encoder_layers || targets == c->encoder_layers + 1,
            "target_layers: expected %d or %d layers for architecture \"%s\" with %d encoder_layers, got %d",
            c->encoder_layers, c->encoder_layers + 1, name, c->encoder_layers, targets);
    return GD_OK;
}

static gd_status validate_together(const gd_config *c, char *message, size_t size)
{
    REQUIRE(c->encoder_embed_dim % c->encoder_attention_heads == 0,
            "encoder_attention_heads: expected a divisor of encoder_embed_dim %d, got %d", c->encoder_embed_dim,
            c->encoder_attention_heads);
    REQUIRE(c->encoder_embed_dim % c->conv_pos_groups == 0,
            "conv_pos_groups: expected a divisor of encoder_embed_dim %d, got %d", c->encoder_embed_dim,
            c->conv_pos_groups);
    REQUIRE(!c->gru_rel_pos || c->relative_position_embedding,
            "gru_rel_pos: expected false without relative_position_embedding, got true");
    REQUIRE(!c->relative_position_embedding || c->max_distance > c->num_buckets / 4,
            "max_distance: expected more than num_buckets / 4 = %d, got %d", c->num_buckets / 4, c->max_distance);
    for (int i = 0; i < c->num_targets; i++) {
        REQUIRE(c->target_layers[i] >= 0 && c->target_layers[i] <= MAX_LAYERS,
                "target_layers[%d]: expected 0 to %d, got %d", i, MAX_LAYERS, c->target_layers[i]);
        REQUIRE(i == 0 || c->target_layers[i] > c->target_layers[i - 1],
                "target_layers: expected rising layers, got %d after %d", c->target_layers[i], c->target_layers[i - 1]);
    }
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
        {"encoder_layers", c->encoder_layers, 1, MAX_LAYERS},
        {"encoder_embed_dim", c->encoder_embed_dim, 1, MAX_WIDTH},
        {"encoder_ffn_embed_dim", c->encoder_ffn_embed_dim, 1, MAX_WIDTH},
        {"encoder_attention_heads", c->encoder_attention_heads, 1, MAX_WIDTH},
        {"conv_pos", c->conv_pos, 1, MAX_WIDTH},
        {"conv_pos_groups", c->conv_pos_groups, 1, MAX_WIDTH},
        {"num_buckets", c->num_buckets, 4, MAX_WIDTH},
        {"max_distance", c->max_distance, 2, MAX_DISTANCE},
    };
    const struct {
        const char *name;
        double value;
    } probabilities[] = {
        {"dropout", c->dropout},
        {"attention_dropout", c->attention_dropout},
        {"activation_dropout", c->activation_dropout},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
        REQUIRE(ranges[i].value >= ranges[i].low && ranges[i].value <= ranges[i].high, "%s: expected %d to %d, got %d",
                ranges[i].name, ranges[i].low, ranges[i].high, ranges[i].value);
    for (size_t i = 0; i < sizeof probabilities / sizeof *probabilities; i++)
        REQUIRE(probabilities[i].value >= 0 && probabilities[i].value < 1,
                "%s: expected at least 0 and below 1, got %g", probabilities[i].name, probabilities[i].value);
    REQUIRE(c->feature_grad_mult >= 0 && isfinite(c->feature_grad_mult),
            "feature_grad_mult: expected 0 or more, got %g", c->feature_grad_mult);
    REQUIRE(c->normalize_eps > 0 && c->normalize_eps <= 1, "normalize_eps: expected above 0 to 1, got %g",
            c->normalize_eps);

    gd_status status = validate_conv_layers(c, message, size);
    if (status == GD_OK)
        status = validate_architecture(c, message, size);
    if (status == GD_OK)
        status = validate_together(c, message, size);
    if (status != GD_OK)
        return status;
    const int64_t params = gd_config_num_params(c);
    REQUIRE(params <= GD_MAX_PARAMS,
            "conv_feature_layers, encoder_layers, encoder_embed_dim: expected at most 2^36 parameters, got %lld",
            (long long)params);
    return GD_OK;
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
    int64_t receptive_field, hop;
    frame_geometry(config, &receptive_field, &hop);
    return receptive_field;
}

int64_t gd_hop(const gd_config *config)
{
    int64_t receptive_field, hop;
    frame_geometry(config, &receptive_field, &hop);
    return hop;
}

int gd_num_steps(const gd_config *config, int num_layers)
{
    if (config->architecture == GD_GENERATIVE)
        return num_layers ? num_layers : config->num_targets;
    return config->architecture == GD_ENCODER && num_layers ? num_layers : config->encoder_layers;
}

int gd_num_states(const gd_config *config, int num_layers)
{
    return 1 + gd_num_steps(config, num_layers) + (config->architecture == GD_MULTI_HEAD ? config->num_targets : 0);
}
