/* checkpoint_save.c - a model to a safetensors file, which is replaced whole or not at all. */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bfloat16.h"
#include "checkpoint.h"
#include "int8.h"
#include "json.h"

#define PIECE 4096 /* floats converted at a time */

/* ---- A file written beside its destination ------------------------------------------------- */

struct output {
    int fd;
    size_t folder; /* bytes of the path that name its folder, the last '/' included */
    char *name;    /* the temporary file's */
};

/* These return 0, or -1 and errno. */

static int output_open(struct output *output, const char *path)
{
    static atomic_uint counter;
    const char *slash = strrchr(path, '/');
    size_t size;

    output->folder = slash ? (size_t)(slash + 1 - path) : 0;
    size = output->folder + 64;
    output->name = malloc(size);
    if (!output->name) {
        errno = ENOMEM;
        return -1;
    }
    /* EEXIST: a process of the same number crashed and left the name behind. */
    do
        snprintf(output->name, size, "%.*s.gendistiller-%ld-%u.tmp", (int)output->folder, path,
                 (long)getpid(), atomic_fetch_add(&counter, 1));
    while ((output->fd = open(output->name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666)) < 0 &&
           (errno == EEXIST || errno == EINTR));
    return output->fd < 0 ? -1 : 0;
}

static int output_write(struct output *output, const void *from, size_t size)
{
    const char *at = from;
    while (size > 0) {
        ssize_t n = write(output->fd, at, size < GD_MAX_TRANSFER ? size : GD_MAX_TRANSFER);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -1;
        at += n;
        size -= (size_t)n;
    }
    return 0;
}

/* Makes the rename last over a power failure. The file is whole and in place either way, and there
 * are folders that can't be read and file systems that can't sync one: so no error. */
static void sync_folder(struct output *output)
{
    output->name[output->folder] = '\0';
    int fd = open(output->folder ? output->name : ".", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    while (fsync(fd) != 0 && errno == EINTR)
        ;
    close(fd);
}

/* complete: everything was written. Else, and on failure, the temporary file is removed. */
static int output_close(struct output *output, const char *path, int complete)
{
    int result = complete ? 0 : -1, reason = errno;

    if (complete) {
        while ((result = fsync(output->fd)) != 0 && errno == EINTR)
            ;
        reason = errno;
    }
    /* Interrupted or not, close() has let go of the descriptor. */
    if (close(output->fd) != 0 && errno != EINTR && result == 0)
        result = -1, reason = errno;
    if (result == 0 && rename(output->name, path) != 0)
        result = -1, reason = errno;
    if (result == 0)
        sync_folder(output);
    else
        unlink(output->name);
    errno = reason;
    return result;
}

/* ---- The model ----------------------------------------------------------------------------- */

/* What is stored of tensor i in the first pass over the tensors (those of two bytes or more, and scales) or the
 * second. */
struct stored {
    const char *dtype;
    size_t size; /* bytes of a value */
    struct gd_channels scales; /* stored in the first pass, where the tensor itself is int8 */
};

static struct stored stored(const gd_model *model, int i, enum gd_precision dtype)
{
    if (dtype == GD_BFLOAT16)
        return (struct stored){.dtype = "BF16", .size = 2};
    struct gd_channels channels = gd_tensor_channels(model, i);
    if (dtype == GD_INT8 && channels.count > 0)
        return (struct stored){.dtype = "I8", .size = 1, .scales = channels};
    return (struct stored){.dtype = "F32", .size = 4};
}

static void put_entry(struct gd_json_writer *writer, const char *name, const char *dtype, int ndim,
                      const int64_t *shape, size_t bytes, int64_t *end)
{
    gd_json_put(writer, ",");
    gd_json_put_string(writer, name);
    gd_json_put(writer, ":{\"dtype\":");
    gd_json_put_string(writer, dtype);
    gd_json_put(writer, ",\"shape\":[");
    for (int j = 0; j < ndim; j++) {
        gd_json_put(writer, j ? "," : "");
        gd_json_put_integer(writer, shape[j]);
    }
    gd_json_put(writer, "],\"data_offsets\":[");
    gd_json_put_integer(writer, *end);
    gd_json_put(writer, ",");
    *end += (int64_t)bytes;
    gd_json_put_integer(writer, *end);
    gd_json_put(writer, "]}");
}

/* A string, as all metadata is. */
static void put_statistics(struct gd_json_writer *writer, const gd_model *model)
{
    const double *statistics = gd_model_statistics(model);
    const size_t size = gd_statistics_size(gd_model_config(model));

    if (!statistics)
        return;
    gd_json_put(writer, ",\"" GD_STATISTICS_KEY "\":\"[");
    for (size_t i = 0; i < size; i++) {
        gd_json_put(writer, i ? "," : "");
        gd_json_put_number(writer, statistics[i]);
    }
    gd_json_put(writer, "]\"");
}

/* The header, spaces included. Where writer->size is 0 it only counts. */
static void put_header(struct gd_json_writer *writer, const gd_model *model, const char *config,
                       enum gd_precision dtype)
{
    int num_tensors;
    const gd_tensor *tensors = gd_model_tensors(model, &num_tensors);
    int64_t end = 0;

    gd_json_put(writer, "{\"__metadata__\":{\"format\":\"pt\",\"" GD_METADATA_KEY "\":");
    gd_json_put_string(writer, config);
    put_statistics(writer, model);
    if (model->precision != GD_FLOAT32) {
        gd_json_put(writer, ",\"" GD_PRECISION_KEY "\":");
        gd_json_put_string(writer, gd_precision_name(model->precision));
    }
    gd_json_put(writer, "}");
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0; i < num_tensors; i++) {
            const struct stored as = stored(model, i, dtype);
            char name[160];
            if ((as.size == 1) == pass) {
                put_entry(writer, tensors[i].name, as.dtype, tensors[i].ndim, tensors[i].shape,
                          tensors[i].size * as.size, &end);
            } else if (pass == 0) {
                snprintf(name, sizeof name, "%s" GD_SCALE_SUFFIX, tensors[i].name);
                put_entry(writer, name, "F32", as.scales.ndim, as.scales.shape, as.scales.count * sizeof(float),
                          &end);
            }
        }
    gd_json_put(writer, "}");
    while (writer->length % 8)
        gd_json_put(writer, " ");
}

/* The length and the header, ready to write; NULL where memory is short. */
static char *make_header(const gd_model *model, enum gd_precision dtype, size_t *size)
{
    size_t config_size = gd_config_to_json(gd_model_config(model), NULL, 0) + 1;
    char *config = malloc(config_size), *header = NULL;

    if (config) {
        struct gd_json_writer writer = {NULL, 0, 0};
        gd_config_to_json(gd_model_config(model), config, config_size);
        put_header(&writer, model, config, dtype);
        *size = 8 + writer.length;
        header = malloc(*size + 1);
    }
    if (header) {
        struct gd_json_writer writer = {header + 8, *size - 8 + 1, 0};
        put_header(&writer, model, config, dtype);
        for (int i = 0; i < 8; i++)
            header[i] = (char)((uint64_t)writer.length >> 8 * i & 0xff);
    }
    free(config);
    return header;
}

static int write_values(struct output *output, const float *values, size_t count, int bfloat16)
{
    unsigned char bytes[PIECE * 4];

    while (count > 0) {
        size_t n = count < PIECE ? count : PIECE;
        unsigned char *to = bytes;
        for (size_t i = 0; i < n; i++) {
            uint32_t bits =
                bfloat16 ? gd_bfloat16_from_float(values[i]) : gd_bits_from_float(values[i]);
            *to++ = (unsigned char)bits;
            *to++ = (unsigned char)(bits >> 8);
            if (!bfloat16) {
                *to++ = (unsigned char)(bits >> 16);
                *to++ = (unsigned char)(bits >> 24);
            }
        }
        if (output_write(output, bytes, (size_t)(to - bytes)) != 0)
            return -1;
        values += n;
        count -= n;
    }
    return 0;
}

/* Of one channel's `count` values, `step` floats apart. */
static float scale_of(const float *values, size_t count, size_t step)
{
    float largest = 0, unfinite = 0;
    for (size_t i = 0; i < count; i++) {
        const float value = values[i * step];
        largest = fabsf(value) > largest ? fabsf(value) : largest;
        unfinite += value * 0;
    }
    return isnan(unfinite) ? NAN : gd_int8_scale(largest);
}

/* values (count / outer, outer / inner, inner) to scales (count / outer, inner). */
static void find_scales(const struct gd_channels *channels, const float *values, float *scales)
{
    for (size_t c = 0; c < channels->count; c++) {
        const float *first = values + c / channels->inner * channels->outer + c % channels->inner;
        scales[c] = scale_of(first, channels->outer / channels->inner, channels->inner);
    }
}

static int write_int8(struct output *output, const struct gd_channels *channels, const float *values, size_t count,
                      const float *scales)
{
    int8_t bytes[PIECE];
    for (size_t e = 0; e < count; e += PIECE) {
        const size_t n = count - e < PIECE ? count - e : PIECE;
        for (size_t i = 0; i < n; i++) {
            const float scale = scales[(e + i) / channels->outer * channels->inner + (e + i) % channels->inner];
            bytes[i] = gd_int8_from_float(values[e + i], scale > 0 ? 1 / scale : 0);
        }
        if (output_write(output, bytes, n) != 0)
            return -1;
    }
    return 0;
}

static int write_model(struct output *output, gd_model *model, const char *header,
                       size_t header_size, enum gd_precision dtype, float *scales)
{
    int num_tensors;
    const gd_tensor *tensors = gd_model_tensors(model, &num_tensors);

    if (output_write(output, header, header_size) != 0)
        return -1;
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0; i < num_tensors; i++) {
            const struct stored as = stored(model, i, dtype);
            const float *values = gd_model_params(model) + tensors[i].offset;
            int result = 0;
            if (as.size == 1)
                find_scales(&as.scales, values, scales);
            if (as.size == 1 && pass == 0)
                result = write_values(output, scales, as.scales.count, 0);
            else if (as.size == 1)
                result = write_int8(output, &as.scales, values, tensors[i].size, scales);
            else if (pass == 0)
                result = write_values(output, values, tensors[i].size, as.size == 2);
            if (result != 0)
                return -1;
        }
    return 0;
}

/* Scales of the tensor that has most. */
static size_t most_scales(const gd_model *model)
{
    size_t most = 1;
    for (int i = 0; i < model->num_tensors; i++) {
        const size_t count = gd_tensor_channels(model, i).count;
        most = count > most ? count : most;
    }
    return most;
}

gd_status gd_model_save(gd_model *model, const char *path, const char *dtype)
{
    gd_context *context = model->context;
    struct output output;
    struct stat info;
    size_t header_size = 0;
    int stored_as = GD_FLOAT32;

    while (stored_as <= GD_INT8 && strcmp(dtype, gd_precision_name((enum gd_precision)stored_as)) != 0)
        stored_as++;
    if (stored_as > GD_INT8)
        return gd_fail(context, GD_EINVAL,
                       "dtype: expected \"float32\", \"bfloat16\" or \"int8\", got \"%.40s\"", dtype);
    /* rename() would put the file in place of a device. */
    int exists = stat(path, &info) == 0;
    if (exists && S_ISDIR(info.st_mode)) {
        errno = EISDIR;
        return gd_fail_errno(context, path);
    }
    if (exists && !S_ISREG(info.st_mode))
        return gd_fail(context, GD_EINVAL, "%s: expected a file, got a device, pipe or socket",
                       gd_shown_path(path));
    float *scales = malloc(most_scales(model) * sizeof *scales);
    char *header = make_header(model, (enum gd_precision)stored_as, &header_size);
    if (!header || !scales) {
        free(header);
        free(scales);
        return gd_fail(context, GD_ENOMEM, "out of memory for a header of %zu bytes", header_size);
    }
    if (header_size - 8 > GD_MAX_HEADER) {
        free(header);
        free(scales);
        return gd_fail(context, GD_EUNSUPPORTED,
                       "%s: expected a model whose header takes at most %d bytes, got %zu",
                       gd_shown_path(path), GD_MAX_HEADER, header_size - 8);
    }

    int result = output_open(&output, path);
    if (result == 0) {
        result = write_model(&output, model, header, header_size, (enum gd_precision)stored_as, scales);
        result = output_close(&output, path, result == 0);
    }
    int reason = errno;
    free(output.name);
    free(header);
    free(scales);
    errno = reason;
    return result == 0 ? GD_OK : gd_fail_errno(context, path);
}
