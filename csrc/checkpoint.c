/* checkpoint.c - a model from a safetensors file. Nothing in the file is trusted. */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bfloat16.h"
#include "checkpoint.h"
#include "json.h"

#define MAX_METADATA 64 /* entries */

enum dtype { F32, BF16, F16, NUM_DTYPES };
static const char *const dtype_names[NUM_DTYPES] = {"F32", "BF16", "F16"};
static const int dtype_sizes[NUM_DTYPES] = {4, 2, 2};

static int is_big_endian(void)
{
    const uint16_t one = 1;
    unsigned char first;
    memcpy(&first, &one, 1);
    return first == 0;
}

/* What the header says of one tensor of the model. */
struct entry {
    int present;
    enum dtype dtype;
    int64_t begin, end; /* bytes, from the start of the data */
};

struct reader {
    gd_context *context;
    const char *path;
    int fd;
    int64_t data_start, data_size;
    char *header;
    size_t header_size;
    struct entry *entries; /* parallel to the model's tensors */
};

static gd_status damaged(struct reader *reader, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 2, 3)))
#endif
    ;

static gd_status damaged(struct reader *reader, const char *format, ...)
{
    char message[300];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return gd_fail(reader->context, GD_EFORMAT, "%s: %s", gd_shown_path(reader->path), message);
}

static gd_status read_bytes(struct reader *reader, void *to, size_t size, int64_t offset)
{
    char *at = to;
    while (size > 0) {
        ssize_t n =
            pread(reader->fd, at, size < GD_MAX_TRANSFER ? size : GD_MAX_TRANSFER, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return gd_fail_errno(reader->context, reader->path);
        if (n == 0)
            return damaged(reader, "the file became shorter while it was read");
        at += n;
        size -= (size_t)n;
        offset += n;
    }
    return GD_OK;
}

static gd_status read_header(struct reader *reader)
{
    struct stat info;
    unsigned char prefix[8];
    uint64_t length = 0;

    if (fstat(reader->fd, &info) != 0)
        return gd_fail_errno(reader->context, reader->path);
    if (S_ISDIR(info.st_mode)) {
        errno = EISDIR;
        return gd_fail_errno(reader->context, reader->path);
    }
    if (!S_ISREG(info.st_mode))
        return damaged(reader, "expected a file, got a device, pipe or socket");
    if (info.st_size < 8)
        return damaged(reader, "expected a safetensors file, got a file of %lld bytes",
                       (long long)info.st_size);
    gd_status status = read_bytes(reader, prefix, sizeof prefix, 0);
    if (status != GD_OK)
        return status;
    for (int i = 7; i >= 0; i--)
        length = length << 8 | prefix[i];
    if (length > GD_MAX_HEADER)
        return damaged(reader,
                       "expected a safetensors header of at most %d bytes, got a length of %llu",
                       GD_MAX_HEADER, (unsigned long long)length);
    if ((int64_t)length > info.st_size - 8)
        return damaged(reader, "expected a header of %d bytes, got %lld: the file is truncated",
                       (int)length, (long long)info.st_size - 8);
    reader->header_size = (size_t)length;
    reader->data_start = 8 + (int64_t)length;
    reader->data_size = info.st_size - reader->data_start;
    reader->header = malloc(reader->header_size + 1);
    if (!reader->header)
        return gd_fail(reader->context, GD_ENOMEM, "out of memory for a header of %zu bytes",
                       reader->header_size);
    status = read_bytes(reader, reader->header, reader->header_size, 8);
    if (status == GD_OK && (length == 0 || reader->header[0] != '{'))
        return damaged(reader, "expected a header that begins with '{'");
    return status;
}

/* The strings of "__metadata__"; those under our keys are kept. Returns 0 on failure. */
static int read_metadata(struct gd_json *json, struct gd_json_string *config,
                         struct gd_json_string *statistics)
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
                *config = value;
            else if (gd_json_equal(&keys[count], GD_STATISTICS_KEY))
                *statistics = value;
        }
        if (++count == MAX_METADATA)
            return gd_json_fail(json, "expected less than %d keys of metadata", MAX_METADATA);
    }
    return !json->failed;
}

/* Checks the whole header's syntax on the way. */
static gd_status read_config(struct reader *reader, gd_config *config,
                             struct gd_json_string *statistics)
{
    struct gd_json json;
    struct gd_json_string key, value = {NULL, 0};
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
                read_metadata(&json, &value, statistics);
        }
    }
    if (!gd_json_close(&json))
        return damaged(reader, "header: %s", json.error);
    if (!value.at)
        return damaged(reader, "expected a GenDistiller checkpoint, got a safetensors file without "
                               "metadata key \"" GD_METADATA_KEY "\"");

    char *text = malloc(value.length + 1);
    if (!text)
        return gd_fail(reader->context, GD_ENOMEM, "out of memory for a config of %zu bytes",
                       value.length);
    size_t length = gd_json_decode(&value, text);
    gd_status status = gd_config_from_json(text, length, config, message, sizeof message);
    free(text);
    return status == GD_OK ? GD_OK : damaged(reader, "config: %s", message);
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
            status = damaged(reader, "statistics: %s", json.error);
        else if (count != size)
            status = damaged(reader, "statistics: expected %zu numbers, got %zu", size, count);
        else if (gd_model_set_statistics(model, statistics) != GD_OK)
            status = damaged(reader, "statistics: expected those of audio");
    } else {
        status = gd_fail(reader->context, GD_ENOMEM, "out of memory for %zu statistics", size);
    }
    free(statistics);
    free(text);
    return status;
}

static char *show_shape(char text[100], int ndim, const int64_t *shape)
{
    int length = snprintf(text, 100, "(");
    for (int i = 0; i < ndim; i++)
        length += snprintf(text + length, (size_t)(100 - length), i ? ", %lld" : "%lld",
                           (long long)shape[i]);
    snprintf(text + length, (size_t)(100 - length), ndim == 1 ? ",)" : ")");
    return text;
}

/* {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}. *int8: its dtype is I8. */
static int read_entry(struct gd_json *json, const gd_tensor *tensor, struct entry *entry, int *int8)
{
    struct gd_json_string key, dtype;
    int64_t shape[4] = {0}, offsets[2] = {0};
    int seen = 0, ndim = 0, count = 0, bit;
    char shown[60], expected[100], got[100];

    if (!gd_json_enter(json, '{'))
        return 0;
    while (gd_json_member(json, &key)) {
        bit = gd_json_equal(&key, "dtype") | gd_json_equal(&key, "shape") << 1 |
              gd_json_equal(&key, "data_offsets") << 2;
        if (!bit || seen & bit)
            return gd_json_fail(json, "expected dtype, shape and data_offsets once, got \"%s\"",
                                gd_json_show(&key, shown, sizeof shown));
        seen |= bit;
        if (bit == 1) {
            gd_json_string(json, &dtype);
            continue;
        }
        if (!gd_json_enter(json, '['))
            return 0;
        while (gd_json_element(json)) {
            int *n = bit == 2 ? &ndim : &count, limit = bit == 2 ? 4 : 2;
            int64_t value;
            if (*n == limit)
                return gd_json_fail(json, "expected at most %d numbers, got more", limit);
            if (gd_json_integer(json, &value))
                (bit == 2 ? shape : offsets)[(*n)++] = value;
        }
    }
    if (json->failed)
        return 0;
    if (seen != 7 || count != 2)
        return gd_json_fail(json, "expected dtype, shape and two data_offsets");

    int type = 0;
    while (type < NUM_DTYPES && !gd_json_equal(&dtype, dtype_names[type]))
        type++;
    *int8 = gd_json_equal(&dtype, "I8");
    if (type == NUM_DTYPES)
        return gd_json_fail(json, "expected dtype F32, BF16 or F16, got %s",
                            gd_json_show(&dtype, shown, sizeof shown));
    if (ndim != tensor->ndim || memcmp(shape, tensor->shape, (size_t)ndim * sizeof *shape))
        return gd_json_fail(json, "expected shape %s, got %s",
                            show_shape(expected, tensor->ndim, tensor->shape),
                            show_shape(got, ndim, shape));
    if (offsets[0] < 0 || offsets[1] < offsets[0] ||
        offsets[1] - offsets[0] != (int64_t)tensor->size * dtype_sizes[type])
        return gd_json_fail(json, "expected data_offsets %lld bytes apart, got [%lld, %lld]",
                            (long long)tensor->size * dtype_sizes[type], (long long)offsets[0],
                            (long long)offsets[1]);
    *entry = (struct entry){1, (enum dtype)type, offsets[0], offsets[1]};
    return 1;
}

/* The F32 scales that stand beside an int8 tensor. */
static int is_scale(const struct gd_json_string *key, const gd_tensor *tensors, int num_tensors)
{
    char name[160];
    for (int i = 0; i < num_tensors; i++) {
        snprintf(name, sizeof name, "%s.scale", tensors[i].name);
        if (gd_json_equal(key, name))
            return 1;
    }
    return 0;
}

static gd_status int8_tensor(struct reader *reader, const char *name)
{
    return gd_fail(reader->context, GD_EUNSUPPORTED,
                   "%s: %s: int8 checkpoints can't be read by this version",
                   gd_shown_path(reader->path), name);
}

static gd_status read_entries(struct reader *reader, const gd_tensor *tensors, int num_tensors)
{
    struct gd_json json;
    struct gd_json_string key;
    char shown[100];

    gd_json_open(&json, reader->header, reader->header_size);
    gd_json_enter(&json, '{');
    while (gd_json_member(&json, &key)) {
        int i = 0, int8 = 0;
        if (gd_json_equal(&key, "__metadata__")) {
            gd_json_skip(&json);
            continue;
        }
        while (i < num_tensors && !gd_json_equal(&key, tensors[i].name))
            i++;
        if (i == num_tensors) {
            gd_json_show(&key, shown, sizeof shown);
            return is_scale(&key, tensors, num_tensors)
                       ? int8_tensor(reader, shown)
                       : damaged(reader, "unexpected tensor \"%s\"", shown);
        }
        if (reader->entries[i].present)
            return damaged(reader, "expected each tensor once, got %s again", tensors[i].name);
        if (!read_entry(&json, &tensors[i], &reader->entries[i], &int8))
            return int8 ? int8_tensor(reader, tensors[i].name)
                        : damaged(reader, "%s: %s", tensors[i].name, json.error);
    }

    int missing = 0, first = 0;
    for (int i = num_tensors - 1; i >= 0; i--) {
        if (!reader->entries[i].present)
            missing++, first = i;
    }
    if (missing > 1)
        return damaged(reader, "%s and %d other tensors are missing", tensors[first].name,
                       missing - 1);
    return missing ? damaged(reader, "tensor %s is missing", tensors[first].name) : GD_OK;
}

static int by_begin(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    return (x->begin > y->begin) - (x->begin < y->begin);
}

/* The tensors' bytes cover the data, each byte once. */
static gd_status check_cover(struct reader *reader, int num_tensors)
{
    struct entry *sorted = malloc((size_t)num_tensors * sizeof *sorted);
    int64_t end = 0;

    if (!sorted)
        return gd_fail(reader->context, GD_ENOMEM, "out of memory for %d tensors", num_tensors);
    memcpy(sorted, reader->entries, (size_t)num_tensors * sizeof *sorted);
    qsort(sorted, (size_t)num_tensors, sizeof *sorted, by_begin);
    gd_status status = GD_OK;
    for (int i = 0; i < num_tensors && status == GD_OK; end = sorted[i++].end) {
        if (sorted[i].begin != end)
            status = damaged(
                reader,
                "expected data_offsets without gap or overlap, got %s at byte %lld of the data",
                sorted[i].begin > end ? "a gap" : "an overlap", (long long)end);
    }
    free(sorted);
    if (status == GD_OK && end != reader->data_size)
        status = damaged(reader, "expected %lld bytes of data, got %lld%s", (long long)end,
                         (long long)reader->data_size,
                         end > reader->data_size ? ": the file is truncated" : "");
    return status;
}

static gd_status read_tensor(struct reader *reader, const struct entry *entry, float *values,
                             size_t count)
{
    int size = dtype_sizes[entry->dtype];
    /* 16-bit values go to the upper half of their own place and are widened from the front, so that
     * what is written never overtakes what is still to be read. */
    unsigned char *bytes = (unsigned char *)values + count * (sizeof *values - (size_t)size);

    gd_status status =
        read_bytes(reader, bytes, count * (size_t)size, reader->data_start + entry->begin);
    if (status != GD_OK || (entry->dtype == F32 && !is_big_endian()))
        return status;
    for (size_t i = 0; i < count; i++, bytes += size) {
        uint16_t low = (uint16_t)(bytes[0] | bytes[1] << 8);
        float value;
        if (entry->dtype == F32)
            value = gd_float_from_bits((uint32_t)bytes[3] << 24 | (uint32_t)bytes[2] << 16 | low);
        else
            value = entry->dtype == BF16 ? gd_float_from_bfloat16(low) : gd_float_from_float16(low);
        memcpy(&values[i], &value, sizeof value);
    }
    return GD_OK;
}

static gd_status read_model(struct reader *reader, gd_model **model)
{
    gd_config config;
    struct gd_json_string statistics = {NULL, 0};
    int num_tensors;

    gd_status status = read_header(reader);
    if (status == GD_OK)
        status = read_config(reader, &config, &statistics);
    /* A damaged config must not take memory that the file could not fill. */
    if (status == GD_OK && (int64_t)gd_config_num_params(&config) > reader->data_size)
        return damaged(
            reader,
            "expected %zu parameters for its config, got %lld bytes of data: the file is truncated",
            gd_config_num_params(&config), (long long)reader->data_size);
    if (status == GD_OK)
        status = gd_model_create(reader->context, &config, model);
    if (status != GD_OK)
        return status;
    if (statistics.at)
        status = read_statistics(reader, &statistics, *model);
    if (status != GD_OK)
        return status;
    const gd_tensor *tensors = gd_model_tensors(*model, &num_tensors);
    reader->entries = calloc((size_t)num_tensors, sizeof *reader->entries);
    if (!reader->entries)
        return gd_fail(reader->context, GD_ENOMEM, "out of memory for %d tensors", num_tensors);
    status = read_entries(reader, tensors, num_tensors);
    if (status == GD_OK)
        status = check_cover(reader, num_tensors);
    for (int i = 0; i < num_tensors && status == GD_OK; i++)
        status = read_tensor(reader, &reader->entries[i],
                             gd_model_params(*model) + tensors[i].offset, tensors[i].size);
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
