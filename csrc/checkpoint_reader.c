/* checkpoint_reader.c - a safetensors file's bytes and its header's text. Nothing in the file is trusted. */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checkpoint_reader.h"

gd_status gd_damaged(struct reader *reader, const char *format, ...)
{
    char message[300];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return gd_fail(reader->context, GD_EFORMAT, "%s: %s", gd_shown_path(reader->path), message);
}

gd_status gd_read_bytes(struct reader *reader, void *to, size_t size, int64_t offset)
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
            return gd_damaged(reader, "the file became shorter while it was read");
        at += n;
        size -= (size_t)n;
        offset += n;
    }
    return GD_OK;
}

/* What lies where weights should after a clone without Git LFS
 * (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md). */
static gd_status refuse_pointer(struct reader *reader, int64_t file_size)
{
    static const char first_line[] = "version https://git-lfs.github.com/spec/";
    char start[sizeof first_line - 1];

    if (file_size < (int64_t)sizeof start)
        return GD_OK;
    gd_status status = gd_read_bytes(reader, start, sizeof start, 0);
    if (status == GD_OK && memcmp(start, first_line, sizeof start) == 0)
        return gd_damaged(reader, "expected the file itself, got a Git LFS pointer: run `git lfs pull` in the folder "
                                  "that was cloned");
    return status;
}

gd_status gd_read_header(struct reader *reader)
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
        return gd_damaged(reader, "expected a file, got a device, pipe or socket");
    if (info.st_size < 8)
        return gd_damaged(reader, "expected a safetensors file, got a file of %lld bytes",
                       (long long)info.st_size);
    gd_status status = refuse_pointer(reader, info.st_size);
    if (status == GD_OK)
        status = gd_read_bytes(reader, prefix, sizeof prefix, 0);
    if (status != GD_OK)
        return status;
    for (int i = 7; i >= 0; i--)
        length = length << 8 | prefix[i];
    if (length > GD_MAX_HEADER)
        return gd_damaged(reader,
                       "expected a safetensors header of at most %d bytes, got a length of %llu",
                       GD_MAX_HEADER, (unsigned long long)length);
    if ((int64_t)length > info.st_size - 8)
        return gd_damaged(reader, "expected a header of %d bytes, got %lld: the file is truncated",
                       (int)length, (long long)info.st_size - 8);
    reader->header_size = (size_t)length;
    reader->data_start = 8 + (int64_t)length;
    reader->data_size = info.st_size - reader->data_start;
    reader->header = malloc(reader->header_size + 1);
    if (!reader->header)
        return gd_fail(reader->context, GD_ENOMEM, "out of memory for a header of %zu bytes",
                       reader->header_size);
    status = gd_read_bytes(reader, reader->header, reader->header_size, 8);
    if (status == GD_OK && (length == 0 || reader->header[0] != '{'))
        return gd_damaged(reader, "expected a header that begins with '{'");
    return status;
}
