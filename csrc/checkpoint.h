/*
 * checkpoint.h - what reading and writing of safetensors checkpoints share
 * (https://github.com/huggingface/safetensors, "Format"):
 *
 *     8 bytes   N, the header's length, little-endian
 *     N bytes   JSON, padded with spaces to a multiple of 8:
 *               {"__metadata__": {"gendistiller": config, and where the model has statistics
 *                                 "gendistiller.statistics": an array of numbers},
 *                name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
 *     the rest  the tensors, C order, little-endian; offsets count from here and leave no gap
 *
 * A tensor of dtype I8 has another one beside it, "<name>.scale", F32, with a scale for each output channel. Metadata
 * key "gendistiller.precision", where there is one, says what the model is meant to be run in.
 */
#ifndef GD_CHECKPOINT_H
#define GD_CHECKPOINT_H

#include <errno.h>
#include <string.h>

#include "model.h"

#define GD_METADATA_KEY "gendistiller"
#define GD_STATISTICS_KEY "gendistiller.statistics"
#define GD_PRECISION_KEY "gendistiller.precision"
#define GD_SCALE_SUFFIX ".scale"
#define GD_MAX_HEADER (1 << 20)
/* Darwin refuses to move more than INT_MAX bytes in one call. */
#define GD_MAX_TRANSFER (1 << 30)

/* The end of a path, as much of it as a message has room for. */
static inline const char *gd_shown_path(const char *path)
{
    size_t length = strlen(path);
    if (length <= 200)
        return path;
    path += length - 200;
    while ((*path & 0xc0) == 0x80) /* inside a UTF-8 character */
        path++;
    return path;
}

/* GD_EIO for errno, which stays what it is. */
static inline gd_status gd_fail_errno(gd_context *context, const char *path)
{
    int reason = errno;
    gd_fail(context, GD_EIO, "%s: %s", gd_shown_path(path), strerror(reason));
    errno = reason;
    return GD_EIO;
}

#endif
