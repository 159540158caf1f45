/*
 * json.h - a strict reader of JSON (RFC 8259) that allocates nothing, for headers and configs.
 *
 * The caller pulls values in the order of the text:
 *
 *     gd_json_open(&json, text, length);
 *     if (gd_json_enter(&json, '{'))
 *         while (gd_json_member(&json, &key))
 *             if (gd_json_equal(&key, "stride"))
 *                 gd_json_integer(&json, &stride);
 *             else
 *                 gd_json_skip(&json);
 *     if (!gd_json_close(&json))
 *         report json.error;
 *
 * The first error sticks: from then on every function returns 0 and leaves its outputs alone.
 * Stricter than RFC 8259: at most GD_JSON_DEPTH levels, no U+0000 in strings, no number of more
 * than 63 characters. The caller refuses repeated keys: it alone knows what keys there can be.
 */
#ifndef GD_JSON_H
#define GD_JSON_H

#include <stddef.h>
#include <stdint.h>

#define GD_JSON_DEPTH 16

/* A string as it stands between its quotes: valid UTF-8, escapes not yet resolved. */
struct gd_json_string {
    const char *at;
    size_t length;
};

struct gd_json {
    const char *text;
    size_t length, at;
    size_t value;             /* where the value or key read last begins */
    int depth;
    char open[GD_JSON_DEPTH]; /* '{' or '[' */
    char some[GD_JSON_DEPTH]; /* 1: an element was read */
    int failed;
    char error[240]; /* what was expected, what came and at which byte; printable ASCII */
};

void gd_json_open(struct gd_json *json, const char *text, size_t length);

/* Nothing but white space is left. Returns 0 after any error. */
int gd_json_close(struct gd_json *json);

/* bracket: '{' or '['. */
int gd_json_enter(struct gd_json *json, char bracket);

/* 1: an element follows and must be read; 0: the array or object has ended, or an error. */
int gd_json_element(struct gd_json *json);
int gd_json_member(struct gd_json *json, struct gd_json_string *key);

int gd_json_string(struct gd_json *json, struct gd_json_string *value);
int gd_json_integer(struct gd_json *json, int64_t *value); /* neither fraction nor exponent */
int gd_json_number(struct gd_json *json, double *value);   /* rounded correctly, in any locale */
int gd_json_bool(struct gd_json *json, int *value);
int gd_json_skip(struct gd_json *json); /* any value, checked all the same */

/* Sets the error, once: `format` as printf, then the position of the value read last. Returns 0. */
int gd_json_fail(struct gd_json *json, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 2, 3)))
#endif
    ;

/* The character at s, of n > 0 bytes, in UTF-8: returns its length and in *used that of its source.
 * 0: it may not stand in a JSON string (a quote, a control character, a wrong escape or byte). */
int gd_json_character(const char *s, size_t n, char out[4], size_t *used);

/* Compare what the strings mean: "a" equals "\u0061". */
int gd_json_equal(const struct gd_json_string *string, const char *text);
int gd_json_same(const struct gd_json_string *a, const struct gd_json_string *b);

/* Resolves the escapes into `text`, which has room for length + 1 bytes, and ends it by a NUL.
 * Returns its length. */
size_t gd_json_decode(const struct gd_json_string *string, char *text);

/* A string for a message: printable ASCII, others as '?', cut to size - 1. Returns `text`. */
char *gd_json_show(const struct gd_json_string *string, char *text, size_t size);

/* Text growing in a buffer of `size` bytes; `length` is what it would take, as snprintf's. */
struct gd_json_writer {
    char *text;
    size_t size, length;
};

void gd_json_put(struct gd_json_writer *writer, const char *text);
void gd_json_put_string(struct gd_json_writer *writer, const char *text); /* quoted and escaped */
void gd_json_put_integer(struct gd_json_writer *writer, int64_t value);
/* value: finite; it reads back the same. */
void gd_json_put_number(struct gd_json_writer *writer, double value);

#endif
