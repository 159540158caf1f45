/*
 * checkpoint_reader.h - a safetensors file that is being read: what checkpoint_load.c and checkpoint_tensors.c share.
 */
#ifndef GD_CHECKPOINT_READER_H
#define GD_CHECKPOINT_READER_H

#include "checkpoint.h"

enum dtype { F32, BF16, F16, I8, NUM_DTYPES };

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
    struct entry *entries; /* parallel to the model's tensors, and behind them their scales */
};

/* GD_EFORMAT with the path and a message (printf format). */
gd_status gd_damaged(struct reader *reader, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 2, 3)))
#endif
    ;

gd_status gd_read_bytes(struct reader *reader, void *to, size_t size, int64_t offset);

/* The header's text into reader->header, from the open file; the caller frees it. */
gd_status gd_read_header(struct reader *reader);

#endif
