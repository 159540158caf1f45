/* config_json.c - gd_config to and from JSON, by a table of every field's name, kind, place and default. */
#include <limits.h>
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

static const char *const extractor_modes[] = {"default", "layer_norm", NULL};
static const char *const positions[] = {"once", "every_step", NULL};
static const char *const paddings[] = {"exact", "s3prl", NULL};

#define FIELD(name, kind, choices, preset) {#name, kind, offsetof(gd_config, name), choices, preset}

static const struct field fields[] = {
    FIELD(architecture, CHOICE, gd_architecture_names, "\"generative\""),
    FIELD(extractor_mode, CHOICE, extractor_modes, "\"default\""),
    FIELD(conv_feature_layers, CONV_LAYERS, NULL,
          "[[512,10,5],[512,3,2],[512,3,2],[512,3,2],[512,3,2],[512,2,2],[512,2,2]]"),
    FIELD(conv_bias, BOOLEAN, NULL, "false"),
    FIELD(feature_layer_norm, BOOLEAN, NULL, "true"),
    FIELD(feature_projection, BOOLEAN, NULL, "false"),
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
    FIELD(normalize_eps, NUMBER, NULL, "1e-05"),
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
