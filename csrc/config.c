/* config.c - gd_config: to and from JSON by a table of every field's name, kind, place and default; what fields have to
 * be; how many frames audio has. */
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "json.h"
#include "model.h"

enum kind { CHOICE, BOOLEAN, INTEGER, NUMBER, CONV_LAYERS, TARGET_LAYERS };

struct field {
    const char *name;
    enum kind kind;
    size_t offset;
    const char *const *choices; /* CHOICE: the enum's names in its order, then NULL */
    const char *preset;         /* default, as JSON: the `gendistiller` preset's value */
};

static const char *const architectures[] = {"generative", "self_hidden", "multi_head",
                                            "encoder", NULL};
static const char *const extractor_modes[] = {"default", "layer_norm", NULL};
static const char *const positions[] = {"once", "every_step", NULL};
static const char *const paddings[] = {"exact", "s3prl", NULL};

#define FIELD(name, kind, choices, preset) {#name, kind, offsetof(gd_config, name), choices, preset}

static const struct field fields[] = {
    FIELD(architecture, CHOICE, architectures, "\"generative\""),
    FIELD(extractor_mode, CHOICE, extractor_modes, "\"default\""),
    FIELD(conv_feature_layers, CONV_LAYERS, NULL,
          "[[512,10,5],[512,3,2],[512,3,2],[512,3,2],[512,3,2],[512,2,2],[512,2,2]]"),
    FIELD(conv_bias, BOOLEAN, NULL, "false"),
    FIELD(feature_layer_norm, BOOLEAN, NULL, "true"),
    FIELD(encoder_layers, INTEGER, NULL, "1"),
    FIELD(encoder_embed_dim, INTEGER, NULL, "768"),
    FIELD(encoder_ffn_embed_dim, INTEGER, NULL, "3072"),
    FIELD(encoder_attention_heads, INTEGER, NULL, "12"),
    FIELD(layer_norm_first, BOOLEAN, NULL, "false"),
    FIELD(conv_pos, INTEGER, NULL, "128"),
    FIELD(conv_pos_groups, INTEGER, NULL, "16"),
    FIELD(relative_position_embedding, BOOLEAN, NULL, "true"),
    FIELD(gru_rel_pos, BOOLEAN, NULL, "true"),
    FIELD(num_buckets, INTEGER, NULL, "320"),
    FIELD(max_distance, INTEGER, NULL, "800"),
    FIELD(normalize, BOOLEAN, NULL, "false"),
    FIELD(dropout, NUMBER, NULL, "0.1"),
    FIELD(attention_dropout, NUMBER, NULL, "0.1"),
    FIELD(activation_dropout, NUMBER, NULL, "0.1"),
    FIELD(feature_grad_mult, NUMBER, NULL, "0.1"),
    FIELD(skip_connection, BOOLEAN, NULL, "true"),
    FIELD(output_layer, BOOLEAN, NULL, "true"),
    FIELD(cross_attention, BOOLEAN, NULL, "false"),
    FIELD(position, CHOICE, positions, "\"once\""),
    FIELD(target_layers, TARGET_LAYERS, NULL, "[4,8]"),
    FIELD(padding, CHOICE, paddings, "\"exact\""),
};

enum { NUM_FIELDS = sizeof fields / sizeof *fields };

/* ---- Reading ------------------------------------------------------------------------------- */

static void read_integer(struct gd_json *json, int *value)
{
    int64_t wide;
    if (!gd_json_integer(json, &wide))
        return;
    if (wide < INT_MIN || wide > INT_MAX)
        gd_json_fail(json, "expected an integer of 32 bits, got %lld", (long long)wide);
    else
        *value = (int)wide;
}

static void read_choice(struct gd_json *json, const char *const *choices, int *value)
{
    struct gd_json_string string;
    char expected[100], shown[40];
    size_t length = 0;

    if (!gd_json_string(json, &string))
        return;
    for (int i = 0; choices[i]; i++) {
        if (gd_json_equal(&string, choices[i])) {
            *value = i;
            return;
        }
        length += (size_t)snprintf(expected + length, sizeof expected - length, "%s\"%s\"",
                                   i ? ", " : "", choices[i]);
    }
    gd_json_fail(json, "expected one of %s, got \"%s\"", expected,
                 gd_json_show(&string, shown, sizeof shown));
}

/* [[dim, kernel, stride], ...] */
static void read_conv_layers(struct gd_json *json, gd_config *config)
{
    int count = 0;

    if (!gd_json_enter(json, '['))
        return;
    while (gd_json_element(json)) {
        int triple[3] = {0}, n = 0;
        if (count == GD_MAX_CONV_LAYERS) {
            gd_json_fail(json, "expected at most %d layers, got more", GD_MAX_CONV_LAYERS);
            return;
        }
        if (!gd_json_enter(json, '['))
            return;
        while (gd_json_element(json)) {
            if (n == 3) {
                gd_json_fail(json,
                             "expected [dim, kernel, stride], got more than 3 numbers in layer %d",
                             count);
                return;
            }
            read_integer(json, &triple[n++]);
        }
        if (!json->failed && n < 3)
            gd_json_fail(json, "expected [dim, kernel, stride], got %d numbers in layer %d", n,
                         count);
        config->conv_feature_layers[count++] = (gd_conv_layer){triple[0], triple[1], triple[2]};
    }
    config->num_conv_layers = count;
}

static void read_target_layers(struct gd_json *json, gd_config *config)
{
    int count = 0;

    if (!gd_json_enter(json, '['))
        return;
    while (gd_json_element(json)) {
        if (count == GD_MAX_TARGETS) {
            gd_json_fail(json, "expected at most %d layers, got more", GD_MAX_TARGETS);
            return;
        }
        read_integer(json, &config->target_layers[count++]);
    }
    config->num_targets = count;
}

static void read_field(struct gd_json *json, const struct field *field, gd_config *config)
{
    void *value = (char *)config + field->offset;

    switch (field->kind) {
    case CHOICE:
        read_choice(json, field->choices, value);
        break;
    case BOOLEAN:
        gd_json_bool(json, value);
        break;
    case INTEGER:
        read_integer(json, value);
        break;
    case NUMBER:
        gd_json_number(json, value);
        break;
    case CONV_LAYERS:
        memset(config->conv_feature_layers, 0, sizeof config->conv_feature_layers);
        read_conv_layers(json, config);
        break;
    case TARGET_LAYERS:
        memset(config->target_layers, 0, sizeof config->target_layers);
        read_target_layers(json, config);
        break;
    }
}

gd_status gd_config_from_json(const char *text, size_t length, gd_config *config, char *message,
                              size_t size)
{
    struct gd_json json;
    struct gd_json_string key;
    gd_config read;
    char seen[NUM_FIELDS] = {0}, shown[60];
    const char *name = "config";

    memset(&read, 0, sizeof read);
    for (int i = 0; i < NUM_FIELDS; i++) {
        gd_json_open(&json, fields[i].preset, strlen(fields[i].preset));
        read_field(&json, &fields[i], &read);
    }

    gd_json_open(&json, text, length);
    if (gd_json_enter(&json, '{')) {
        while (gd_json_member(&json, &key)) {
            int i = 0;
            while (i < NUM_FIELDS && !gd_json_equal(&key, fields[i].name))
                i++;
            if (i == NUM_FIELDS)
                gd_json_fail(&json, "unknown field \"%s\"",
                             gd_json_show(&key, shown, sizeof shown));
            else if (seen[i])
                gd_json_fail(&json, "expected each field once, got \"%s\" again", fields[i].name);
            else {
                seen[i] = 1;
                read_field(&json, &fields[i], &read);
                if (json.failed)
                    name = fields[i].name;
            }
        }
    }
    if (!gd_json_close(&json)) {
        snprintf(message, size, "%s: %s", name, json.error);
        return GD_EINVAL;
    }
    gd_status status = gd_config_validate(&read, message, size);
    if (status == GD_OK)
        *config = read;
    return status;
}

/* ---- Writing ------------------------------------------------------------------------------- */

static void write_field(struct gd_json_writer *writer, const struct field *field,
                        const gd_config *config)
{
    const void *value = (const char *)config + field->offset;

    switch (field->kind) {
    case CHOICE:
        gd_json_put_string(writer, field->choices[*(const int *)value]);
        break;
    case BOOLEAN:
        gd_json_put(writer, *(const int *)value ? "true" : "false");
        break;
    case INTEGER:
        gd_json_put_integer(writer, *(const int *)value);
        break;
    case NUMBER:
        gd_json_put_number(writer, *(const double *)value);
        break;
    case CONV_LAYERS:
        for (int i = 0; i < config->num_conv_layers; i++) {
            const gd_conv_layer *conv = &config->conv_feature_layers[i];
            const int triple[3] = {conv->dim, conv->kernel, conv->stride};
            for (int j = 0; j < 3; j++) {
                gd_json_put(writer, j ? ", " : i ? ", [" : "[[");
                gd_json_put_integer(writer, triple[j]);
            }
            gd_json_put(writer, "]");
        }
        gd_json_put(writer, "]");
        break;
    case TARGET_LAYERS:
        gd_json_put(writer, "[");
        for (int i = 0; i < config->num_targets; i++) {
            gd_json_put(writer, i ? ", " : "");
            gd_json_put_integer(writer, config->target_layers[i]);
        }
        gd_json_put(writer, "]");
        break;
    }
}

size_t gd_config_to_json(const gd_config *config, char *text, size_t size)
{
    struct gd_json_writer writer = {text, size, 0};

    for (int i = 0; i < NUM_FIELDS; i++) {
        gd_json_put(&writer, i ? ", " : "{");
        gd_json_put_string(&writer, fields[i].name);
        gd_json_put(&writer, ": ");
        write_field(&writer, &fields[i], config);
    }
    gd_json_put(&writer, "}");
    return writer.length;
}

/* ---- Rules, and lengths ------------------------------------------------------------------------------ */

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
