/*
 * checkpoint_load.c - a model from a safetensors file: its config, statistics and tensors. Nothing in the file is
 * trusted.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checkpoint_tensors.h"
#include "json.h"

#define MAX_METADATA 64 /* entries */

/* The strings of "__metadata__" under our keys. */
struct metadata {
    struct gd_json_string config, precision, statistics;
};

/* Returns 0 on failure. */
static int read_metadata(struct gd_json *json, struct metadata *metadata)
{
    struct gd_json_string keys[MAX_METADATA], value;
    char shown[60];
    int count = 0;

    if (!gd_json_enter(json, '{'))
        return 0;
    while (gd_json_member(json, &keys[count])) {
        for (int i = 0; i < count; i++) {
            if (gd_json_same(&keys[i], &keys[count]))
                return gd_json_fail(json, "expected each key once, got \"%s\" again",
                                    gd_json_show(&keys[i], shown, sizeof shown));
        }
        if (gd_json_string(json, &value)) {
            if (gd_json_equal(&keys[count], GD_METADATA_KEY))
                metadata->config = value;
            else if (gd_json_equal(&keys[count], GD_PRECISION_KEY))
                metadata->precision = value;
            else if (gd_json_equal(&keys[count], GD_STATISTICS_KEY))
                metadata->statistics = value;
        }
        if (++count == MAX_METADATA)
            return gd_json_fail(json, "expected less than %d keys of metadata", MAX_METADATA);
    }
    return !json->failed;
}

/* What other programs wrote under that key is none of ours. */
static enum gd_precision precision_named(const struct gd_json_string *name)
{
    for (int i = GD_BFLOAT16; name->at && i <= GD_INT8; i++)
        if (gd_json_equal(name, gd_precision_name((enum gd_precision)i)))
            return (enum gd_precision)i;
    return GD_FLOAT32;
}

/* Checks the whole header's syntax on the way. */
static gd_status read_config(struct reader *reader, gd_config *config, struct metadata *metadata)
{
    struct gd_json json;
    struct gd_json_string key;
    char message[240];
    int seen = 0;

    gd_json_open(&json, reader->header, reader->header_size);
    if (gd_json_enter(&json, '{')) {
        while (gd_json_member(&json, &key)) {
            if (!gd_json_equal(&key, "__metadata__"))
                gd_json_skip(&json);
            else if (seen++)
                gd_json_fail(&json, "expected \"__metadata__\" once");
            else
                read_metadata(&json, metadata);
        }
    }
    if (!gd_json_close(&json))
        return gd_damaged(reader, "header: %s", json.error);
    if (!metadata->config.at)
        return gd_damaged(reader, "expected a GenDistiller checkpoint, got a safetensors file without "
                               "metadata key \"" GD_METADATA_KEY "\"");

    char *text = malloc(metadata->config.length + 1);
    if (!text)
        return gd_fail(reader->context, GD_ENOMEM, "out of memory for a config of %zu bytes",
                       metadata->config.length);
    size_t length = gd_json_decode(&metadata->config, text);
    gd_status status = gd_config_from_json(text, length, config, message, sizeof message);
    free(text);
    return status == GD_OK ? GD_OK : gd_damaged(reader, "config: %s", message);
}

/* The model's statistics from their text in the metadata. */
static gd_status read_statistics(struct reader *reader, const struct gd_json_string *given,
                                 gd_model *model)
{
    const size_t size = gd_statistics_size(gd_model_config(model));
    double *statistics = malloc(size * sizeof *statistics);
    char *text = malloc(given->length + 1);
    size_t count = 0;
    struct gd_json json;
    gd_status status = GD_OK;

    if (statistics && text) {
        double number = 0;
        gd_json_open(&json, text, gd_json_decode(given, text));
        if (gd_json_enter(&json, '['))
            for (; gd_json_element(&json) && gd_json_number(&json, &number); count++)
                if (count < size)
                    statistics[count] = number;
        if (!gd_json_close(&json))
            status = gd_damaged(reader, "statistics: %s", json.error);
        else if (count != size)
            status = gd_damaged(reader, "statistics: expected %zu numbers, got %zu", size, count);
        else if (gd_model_set_statistics(model, statistics) != GD_OK)
            status = gd_damaged(reader, "statistics: expected those of audio");
    } else {
        status = gd_fail(reader->context, GD_ENOMEM, "out of memory for %zu statistics", size);
    }
    free(statistics);
    free(text);
    return status;
}

static gd_status read_model(struct reader *reader, gd_model **model)
{
    gd_config config;
    struct metadata metadata = {0};

    gd_status status = gd_read_header(reader);
    if (status == GD_OK)
        status = read_config(reader, &config, &metadata);
    /* A damaged config must not take memory that the file could not fill. */
    if (status == GD_OK && gd_config_num_params(&config) > reader->data_size)
        return gd_damaged(
            reader,
            "expected %zu parameters for its config, got %lld bytes of data: the file is truncated",
            gd_config_num_params(&config), (long long)reader->data_size);
    if (status == GD_OK)
        status = gd_model_create(reader->context, &config, model);
    if (status != GD_OK)
        return status;
    if (metadata.statistics.at)
        status = read_statistics(reader, &metadata.statistics, *model);
    if (status == GD_OK)
        status = gd_read_tensors(reader, *model);
    if (status == GD_OK)
        status = gd_model_set_precision(*model, precision_named(&metadata.precision));
    return status;
}

gd_status gd_model_load(gd_context *context, const char *path, gd_model **model)
{
    struct reader reader = {.context = context, .path = path};
    gd_model *loaded = NULL;

    *model = NULL;
    /* O_NONBLOCK: a pipe without a writer must not hold the caller. */
    do
        reader.fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    while (reader.fd < 0 && errno == EINTR);
    if (reader.fd < 0)
        return gd_fail_errno(context, path);
    gd_status status = read_model(&reader, &loaded);
    int reason = errno;
    close(reader.fd);
    free(reader.header);
    free(reader.entries);
    if (status == GD_OK) {
        gd_model_touch(loaded);
        *model = loaded;
    } else
        gd_model_free(loaded);
    errno = reason;
    return status;
}
