/* json_write.c - the writer of json.h. */
#define _POSIX_C_SOURCE 200809L

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "c_locale.h"
#include "json.h"

static void put(struct gd_json_writer *writer, const char *text, size_t n)
{
    for (size_t i = 0; i < n; i++, writer->length++) {
        if (writer->length + 1 < writer->size)
            writer->text[writer->length] = text[i];
    }
    if (writer->size)
        writer->text[writer->length < writer->size ? writer->length : writer->size - 1] = '\0';
}

void gd_json_put(struct gd_json_writer *writer, const char *text)
{
    put(writer, text, strlen(text));
}

void gd_json_put_string(struct gd_json_writer *writer, const char *text)
{
    char code[8];

    put(writer, "\"", 1);
    for (; *text; text++) {
        if (*text == '"' || *text == '\\')
            put(writer, "\\", 1);
        if ((unsigned char)*text < 0x20) {
            snprintf(code, sizeof code, "\\u%04x", (unsigned)*text);
            put(writer, code, 6);
        } else
            put(writer, text, 1);
    }
    put(writer, "\"", 1);
}

void gd_json_put_integer(struct gd_json_writer *writer, int64_t value)
{
    char text[24];
    put(writer, text, (size_t)snprintf(text, sizeof text, "%" PRId64, value));
}

void gd_json_put_number(struct gd_json_writer *writer, double value)
{
    char text[40];
    struct gd_c_locale locale = gd_c_locale_enter();

    for (int precision = 15; precision <= 17; precision++) {
        snprintf(text, sizeof text, "%.*g", precision, value);
        if (strtod(text, NULL) == value)
            break;
    }
    gd_c_locale_leave(locale);
    put(writer, text, strlen(text));
    /* A float stays a float for readers that tell 1 from 1.0. */
    if (!strpbrk(text, ".e"))
        put(writer, ".0", 2);
}
