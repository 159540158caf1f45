/* checkpoint_tensors.c - a safetensors file's tensors: their entries in the header, and their values. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bfloat16.h"
#include "checkpoint_tensors.h"
#include "json.h"

static const char *const dtype_names[NUM_DTYPES] = {"F32", "BF16", "F16", "I8"};
static const int dtype_sizes[NUM_DTYPES] = {4, 2, 2, 1};

static int is_big_endian(void)
{
    const uint16_t one = 1;
    unsigned char first;
    memcpy(&first, &one, 1);
    return first == 0;
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

/* What an entry has to be: of so many values, F32 alone or any dtype that its tensor may have. */
struct wanted {
    int ndim;
    const int64_t *shape;
    size_t size;
    int scale, int8; /* a scale; a tensor that may be I8 */
};

/* {"dtype": ..., "shape": [...], "data_offsets": [begin, end]} */
static int read_entry(struct gd_json *json, const struct wanted *wanted, struct entry *entry)
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
    if (type == NUM_DTYPES || (wanted->scale && type != F32) || (!wanted->int8 && type == I8))
        return gd_json_fail(json, "expected dtype %s, got %s",
                            wanted->scale ? "F32" : wanted->int8 ? "F32, BF16, F16 or I8" : "F32, BF16 or F16",
                            gd_json_show(&dtype, shown, sizeof shown));
    if (ndim != wanted->ndim || memcmp(shape, wanted->shape, (size_t)ndim * sizeof *shape))
        return gd_json_fail(json, "expected shape %s, got %s",
                            show_shape(expected, wanted->ndim, wanted->shape),
                            show_shape(got, ndim, shape));
    const int64_t bytes = (int64_t)wanted->size * dtype_sizes[type];
    if (offsets[0] < 0 || offsets[1] < offsets[0] || offsets[1] - offsets[0] != bytes)
        return gd_json_fail(json, "expected data_offsets %lld bytes apart, got [%lld, %lld]",
                            (long long)bytes, (long long)offsets[0], (long long)offsets[1]);
    *entry = (struct entry){1, (enum dtype)type, offsets[0], offsets[1]};
    return 1;
}

/* The tensor of that name, or num_tensors + the one whose scales it names; -1: neither. */
static int find_tensor(const struct gd_json_string *key, const gd_tensor *tensors, int num_tensors)
{
    char name[160];
    for (int i = 0; i < num_tensors; i++) {
        if (gd_json_equal(key, tensors[i].name))
            return i;
        snprintf(name, sizeof name, "%s" GD_SCALE_SUFFIX, tensors[i].name);
        if (gd_json_equal(key, name))
            return num_tensors + i;
    }
    return -1;
}

/* Every tensor is there, and scales stand beside those of int8 and no others. */
static gd_status check_complete(struct reader *reader, const gd_tensor *tensors, int num_tensors)
{
    const struct entry *entries = reader->entries;
    int missing = 0, first = 0;
    for (int i = num_tensors - 1; i >= 0; i--) {
        if (!entries[i].present)
            missing++, first = i;
    }
    if (missing > 1)
        return gd_damaged(reader, "%s and %d other tensors are missing", tensors[first].name,
                       missing - 1);
    if (missing)
        return gd_damaged(reader, "tensor %s is missing", tensors[first].name);
    for (int i = 0; i < num_tensors; i++) {
        const int scaled = entries[num_tensors + i].present;
        if (scaled != (entries[i].dtype == I8))
            return gd_damaged(reader, scaled ? "unexpected tensor \"%s" GD_SCALE_SUFFIX "\" beside one of dtype %s"
                                          : "tensor %s" GD_SCALE_SUFFIX " is missing beside one of dtype %s",
                           tensors[i].name, dtype_names[entries[i].dtype]);
    }
    return GD_OK;
}

static gd_status read_entries(struct reader *reader, const gd_model *model)
{
    struct gd_json json;
    struct gd_json_string key;
    char shown[100];
    int num_tensors;
    const gd_tensor *tensors = gd_model_tensors(model, &num_tensors);

    gd_json_open(&json, reader->header, reader->header_size);
    gd_json_enter(&json, '{');
    while (gd_json_member(&json, &key)) {
        if (gd_json_equal(&key, "__metadata__")) {
            gd_json_skip(&json);
            continue;
        }
        const int place = find_tensor(&key, tensors, num_tensors), scale = place >= num_tensors;
        const int i = scale ? place - num_tensors : place;
        const struct gd_channels channels = place < 0 ? (struct gd_channels){0} : gd_tensor_channels(model, i);
        gd_json_show(&key, shown, sizeof shown);
        if (place < 0 || (scale && channels.count == 0))
            return gd_damaged(reader, "unexpected tensor \"%s\"", shown);
        if (reader->entries[place].present)
            return gd_damaged(reader, "expected each tensor once, got %s again", shown);
        struct wanted wanted = {tensors[i].ndim, tensors[i].shape, tensors[i].size, 0, channels.count > 0};
        if (scale)
            wanted = (struct wanted){channels.ndim, channels.shape, channels.count, 1, 0};
        if (!read_entry(&json, &wanted, &reader->entries[place]))
            return gd_damaged(reader, "%s: %s", shown, json.error);
    }
    return check_complete(reader, tensors, num_tensors);
}

static int by_begin(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    return (x->begin > y->begin) - (x->begin < y->begin);
}

/* The tensors' bytes cover the data, each byte once. */
static gd_status check_cover(struct reader *reader, int num_tensors)
{
    struct entry *sorted = malloc(2 * (size_t)num_tensors * sizeof *sorted);
    int64_t end = 0;

    if (!sorted)
        return gd_fail(reader->context, GD_ENOMEM, "out of memory for %d tensors", num_tensors);
    int count = 0;
    for (int i = 0; i < 2 * num_tensors; i++) {
        if (reader->entries[i].present)
            sorted[count++] = reader->entries[i];
    }
    num_tensors = count;
    qsort(sorted, (size_t)num_tensors, sizeof *sorted, by_begin);
    gd_status status = GD_OK;
    for (int i = 0; i < num_tensors && status == GD_OK; end = sorted[i++].end) {
        if (sorted[i].begin != end)
            status = gd_damaged(
                reader,
                "expected data_offsets without gap or overlap, got %s at byte %lld of the data",
                sorted[i].begin > end ? "a gap" : "an overlap", (long long)end);
    }
    free(sorted);
    if (status == GD_OK && end != reader->data_size)
        status = gd_damaged(reader, "expected %lld bytes of data, got %lld%s", (long long)end,
                         (long long)reader->data_size,
                         end > reader->data_size ? ": the file is truncated" : "");
    return status;
}

static gd_status read_tensor(struct reader *reader, const struct entry *entry, float *values,
                             size_t count)
{
    int size = dtype_sizes[entry->dtype];
    /* Narrow values go to the end of their own place and are widened from the front, so that
     * what is written never overtakes what is still to be read. */
    unsigned char *bytes = (unsigned char *)values + count * (sizeof *values - (size_t)size);

    gd_status status =
        gd_read_bytes(reader, bytes, count * (size_t)size, reader->data_start + entry->begin);
    if (status != GD_OK || (entry->dtype == F32 && !is_big_endian()))
        return status;
    for (size_t i = 0; i < count && entry->dtype == I8; i++)
        values[i] = (float)(bytes[i] < 128 ? bytes[i] : bytes[i] - 256);
    for (size_t i = 0; i < count && entry->dtype != I8; i++, bytes += size) {
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

/* Multiplies an int8 tensor's values by their channels' scales. */
static gd_status apply_scales(struct reader *reader, const struct entry *entry, const struct gd_channels *channels,
                              float *values, size_t count)
{
    float *scales = malloc(channels->count * sizeof *scales);
    if (!scales)
        return gd_fail(reader->context, GD_ENOMEM, "out of memory for %zu scales", channels->count);
    gd_status status = read_tensor(reader, entry, scales, channels->count);
    const size_t inner = channels->inner;
    for (size_t e = 0; e < count && status == GD_OK; e += channels->outer)
        for (size_t c = 0; c < inner; c++) {
            const float scale = scales[e / channels->outer * inner + c];
            for (size_t i = e + c; i < e + channels->outer; i += inner)
                values[i] *= scale;
        }
    free(scales);
    return status;
}

gd_status gd_read_tensors(struct reader *reader, gd_model *model)
{
    int num_tensors;
    const gd_tensor *tensors = gd_model_tensors(model, &num_tensors);
    reader->entries = calloc(2 * (size_t)num_tensors, sizeof *reader->entries);
    if (!reader->entries)
        return gd_fail(reader->context, GD_ENOMEM, "out of memory for %d tensors", num_tensors);
    gd_status status = read_entries(reader, model);
    if (status == GD_OK)
        status = check_cover(reader, num_tensors);
    for (int i = 0; i < num_tensors && status == GD_OK; i++) {
        float *values = gd_model_params(model) + tensors[i].offset;
        const struct gd_channels channels = gd_tensor_channels(model, i);
        status = read_tensor(reader, &reader->entries[i], values, tensors[i].size);
        if (status == GD_OK && reader->entries[i].dtype == I8)
            status = apply_scales(reader, &reader->entries[num_tensors + i], &channels, values, tensors[i].size);
    }
    return status;
}
