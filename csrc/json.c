/* json.c - the pull reader of json.h. */
#define _POSIX_C_SOURCE 200809L

#include "c_locale.h"
#include "json.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_NUMBER 63

/* ---- Characters ---------------------------------------------------------------------------- */

static int hex4(const char *s, size_t n, uint32_t *value)
{
    if (n < 4)
        return 0;
    *value = 0;
    for (int i = 0; i < 4; i++) {
        char c = s[i];
        int lower = c | 0x20;
        if (c >= '0' && c <= '9')
            *value = *value * 16 + (uint32_t)(c - '0');
        else if (lower >= 'a' && lower <= 'f')
            *value = *value * 16 + (uint32_t)(lower - 'a' + 10);
        else
            return 0;
    }
    return 1;
}

static int encode_utf8(uint32_t code, char out[4])
{
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    int n = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (int i = n - 1; i > 0; i--, code >>= 6)
        out[i] = (char)(0x80 | (code & 0x3f));
    out[0] = (char)((0xf00 >> n) | code);
    return n;
}

/* An escape at s[0] == '\\'; returns as character() does. */
static int escape(const char *s, size_t n, char out[4], size_t *used)
{
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    uint32_t code, low;

    if (n < 2)
        return 0;
    *used = 2;
    const char *name = s[1] ? strchr(names, s[1]) : NULL;
    if (name) {
        out[0] = values[name - names];
        return 1;
    }
    if (s[1] != 'u' || !hex4(s + 2, n - 2, &code) || code == 0)
        return 0;
    *used = 6;
    if (code >= 0xd800 && code < 0xdc00) {
        if (n < 8 || s[6] != '\\' || s[7] != 'u' || !hex4(s + 8, n - 8, &low) || low < 0xdc00 ||
            low > 0xdfff)
            return 0;
        *used = 12;
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    } else if (code >= 0xdc00 && code < 0xe000)
        return 0;
    return encode_utf8(code, out);
}

/* The character at s, of n > 0 bytes, in UTF-8: returns its length and in *used that of its source.
 * 0: it may not stand in a JSON string (a quote, a control character, a wrong escape or byte). */
static int character(const char *s, size_t n, char out[4], size_t *used)
{
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    unsigned char c = (unsigned char)s[0];

    if (c == '\\')
        return escape(s, n, out, used);
    if (c < 0x80) {
        *used = 1;
        out[0] = (char)c;
        return c >= 0x20 && c != '"';
    }
    int length = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : 2;
    uint32_t code = c & (0x7fu >> length);
    if (c < 0xc0 || c > 0xf7 || n < (size_t)length)
        return 0;
    for (int i = 1; i < length; i++) {
        if ((s[i] & 0xc0) != 0x80)
            return 0;
        code = code << 6 | (s[i] & 0x3f);
    }
    if (code < least[length] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000))
        return 0;
    memcpy(out, s, (size_t)length);
    *used = (size_t)length;
    return length;
}

/* ---- Strings ------------------------------------------------------------------------------- */

int gd_json_same(const struct gd_json_string *a, const struct gd_json_string *b)
{
    char x[4], y[4];
    size_t i = 0, j = 0, used_x = 0, used_y = 0;

    while (i < a->length && j < b->length) {
        int n = character(a->at + i, a->length - i, x, &used_x);
        if (n != character(b->at + j, b->length - j, y, &used_y) || memcmp(x, y, (size_t)n))
            return 0;
        i += used_x;
        j += used_y;
    }
    return i == a->length && j == b->length;
}

int gd_json_equal(const struct gd_json_string *string, const char *text)
{
    char out[4];
    size_t used = 0, length = strlen(text);

    for (size_t i = 0; i < string->length; i += used) {
        size_t n = (size_t)character(string->at + i, string->length - i, out, &used);
        if (n == 0 || n > length || memcmp(out, text, n))
            return 0;
        text += n;
        length -= n;
    }
    return length == 0;
}

size_t gd_json_decode(const struct gd_json_string *string, char *text)
{
    char *end = text, out[4];
    size_t used = 0;

    for (size_t i = 0; i < string->length; i += used) {
        int n = character(string->at + i, string->length - i, out, &used);
        if (n == 0)
            break;
        memcpy(end, out, (size_t)n);
        end += n;
    }
    *end = '\0';
    return (size_t)(end - text);
}

char *gd_json_show(const struct gd_json_string *string, char *text, size_t size)
{
    size_t n = string->length < size - 1 ? string->length : size - 1;

    for (size_t i = 0; i < n; i++)
        text[i] = string->at[i] >= 0x20 && string->at[i] < 0x7f ? string->at[i] : '?';
    text[n] = '\0';
    if (n < string->length && n >= 3)
        memcpy(text + n - 3, "...", 3);
    return text;
}

/* ---- Reading ------------------------------------------------------------------------------- */

void gd_json_open(struct gd_json *json, const char *text, size_t length)
{
    memset(json, 0, sizeof *json);
    json->text = text;
    json->length = length;
}

int gd_json_fail(struct gd_json *json, const char *format, ...)
{
    char message[sizeof json->error - 30];
    va_list arguments;

    if (json->failed)
        return 0;
    json->failed = 1;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    snprintf(json->error, sizeof json->error, "%s (byte %zu)", message, json->value);
    return 0;
}

/* "expected ..., got ...": what stands at json->at. */
static int unexpected(struct gd_json *json, const char *expected)
{
    const char *s = json->text + json->at, *end = json->text + json->length;
    char shown[40];
    size_t n = 0, limit = (size_t)(end - s);

    json->value = json->at;
    if (limit == 0)
        return gd_json_fail(json, "expected %s, got the end", expected);
    if (*s == '{' || *s == '[')
        return gd_json_fail(json, "expected %s, got %s", expected,
                            *s == '{' ? "an object" : "an array");
    if (*s == '"') {
        for (n = 1; n < limit && s[n] != '"'; n += s[n] == '\\' ? 2 : 1)
            ;
        n = n < limit ? n + 1 : limit;
    } else {
        while (n < limit && !strchr(" \t\r\n,]}", s[n] ? s[n] : ' '))
            n++;
        n += n == 0;
    }
    struct gd_json_string token = {s, n};
    return gd_json_fail(json, "expected %s, got %s", expected,
                        gd_json_show(&token, shown, sizeof shown));
}

/* The next byte that is no white space, or -1. */
static int peek(struct gd_json *json)
{
    while (json->at < json->length) {
        char c = json->text[json->at];
        if (c != ' ' && c != '\n' && c != '\r' && c != '\t')
            return (unsigned char)c;
        json->at++;
    }
    return -1;
}

int gd_json_close(struct gd_json *json)
{
    if (!json->failed && peek(json) >= 0)
        unexpected(json, "nothing more");
    return !json->failed;
}

int gd_json_enter(struct gd_json *json, char bracket)
{
    if (json->failed)
        return 0;
    if (peek(json) != bracket)
        return unexpected(json, bracket == '{' ? "an object" : "an array");
    json->value = json->at;
    if (json->depth == GD_JSON_DEPTH)
        return gd_json_fail(json, "expected at most %d levels of nesting", GD_JSON_DEPTH);
    json->open[json->depth] = bracket;
    json->some[json->depth++] = 0;
    json->at++;
    return 1;
}

int gd_json_element(struct gd_json *json)
{
    if (json->failed)
        return 0;
    int object = json->open[json->depth - 1] == '{', c = peek(json);
    if (c == (object ? '}' : ']')) {
        json->at++;
        json->depth--;
        return 0;
    }
    if (json->some[json->depth - 1]) {
        if (c != ',')
            return unexpected(json, object ? "',' or '}'" : "',' or ']'");
        json->at++;
    }
    json->some[json->depth - 1] = 1;
    return 1;
}

int gd_json_member(struct gd_json *json, struct gd_json_string *key)
{
    if (!gd_json_element(json))
        return 0;
    if (peek(json) != '"')
        return unexpected(json, "a key");
    if (!gd_json_string(json, key))
        return 0;
    size_t start = json->value;
    if (peek(json) != ':')
        return unexpected(json, "':'");
    json->at++;
    json->value = start;
    return 1;
}

int gd_json_string(struct gd_json *json, struct gd_json_string *value)
{
    char out[4];
    size_t used = 0;

    if (json->failed)
        return 0;
    if (peek(json) != '"')
        return unexpected(json, "a string");
    json->value = json->at;
    for (size_t i = json->at + 1; i < json->length; i += used) {
        if (json->text[i] == '"') {
            *value = (struct gd_json_string){json->text + json->at + 1, i - json->at - 1};
            json->at = i + 1;
            return 1;
        }
        if (!character(json->text + i, json->length - i, out, &used)) {
            json->value = i;
            return gd_json_fail(
                json, "a string holds a wrong escape, a control character or what is no UTF-8");
        }
    }
    return gd_json_fail(json, "a string has no end");
}

static int digit(const struct gd_json *json, size_t at)
{
    return at < json->length && json->text[at] >= '0' && json->text[at] <= '9';
}

static size_t digits(const struct gd_json *json, size_t at)
{
    while (digit(json, at))
        at++;
    return at;
}

/* Copies a number in JSON's grammar and says whether it has neither fraction nor exponent. */
static int number(struct gd_json *json, const char *expected, char text[MAX_NUMBER + 1], int *whole)
{
    if (json->failed)
        return 0;
    int c = peek(json);
    size_t at = json->at + (c == '-'), end;

    if (!digit(json, at))
        return unexpected(json, expected);
    end = json->text[at] == '0' ? at + 1 : digits(json, at);
    *whole = 1;
    if (end < json->length && json->text[end] == '.') {
        *whole = 0;
        if (!digit(json, end + 1))
            return unexpected(json, expected);
        end = digits(json, end + 1);
    }
    if (end < json->length && (json->text[end] | 0x20) == 'e') {
        *whole = 0;
        at = end + 1;
        at += at < json->length && (json->text[at] == '+' || json->text[at] == '-');
        if (!digit(json, at))
            return unexpected(json, expected);
        end = digits(json, at);
    }
    if (end - json->at > MAX_NUMBER)
        return unexpected(json, "a number of at most 63 characters");
    memcpy(text, json->text + json->at, end - json->at);
    text[end - json->at] = '\0';
    json->value = json->at;
    json->at = end;
    return 1;
}

int gd_json_integer(struct gd_json *json, int64_t *value)
{
    char text[MAX_NUMBER + 1];
    int whole;

    if (!number(json, "an integer", text, &whole))
        return 0;
    int64_t sum = 0, sign = text[0] == '-' ? -1 : 1;
    if (!whole)
        return gd_json_fail(json, "expected an integer, got %s", text);
    for (const char *s = text + (sign < 0); *s; s++) {
        if (__builtin_mul_overflow(sum, 10, &sum) ||
            __builtin_add_overflow(sum, sign * (*s - '0'), &sum))
            return gd_json_fail(json, "expected an integer of 64 bits, got %s", text);
    }
    *value = sum;
    return 1;
}

int gd_json_number(struct gd_json *json, double *value)
{
    char text[MAX_NUMBER + 1];
    int whole;

    if (!number(json, "a number", text, &whole))
        return 0;
    struct gd_c_locale locale = gd_c_locale_enter();
    double parsed = strtod(text, NULL);
    gd_c_locale_leave(locale);
    if (!isfinite(parsed))
        return gd_json_fail(json, "expected a number within float64's range, got %s", text);
    *value = parsed;
    return 1;
}

static int word(struct gd_json *json, const char *text)
{
    size_t n = strlen(text);
    if (json->length - json->at < n || memcmp(json->text + json->at, text, n))
        return 0;
    json->value = json->at;
    json->at += n;
    return 1;
}

int gd_json_bool(struct gd_json *json, int *value)
{
    if (json->failed)
        return 0;
    peek(json);
    if (word(json, "true"))
        *value = 1;
    else if (word(json, "false"))
        *value = 0;
    else
        return unexpected(json, "true or false");
    return 1;
}

int gd_json_skip(struct gd_json *json)
{
    struct gd_json_string string;
    char text[MAX_NUMBER + 1];
    int base = json->depth, whole;

    /* One value, then what is left of the arrays and objects that it opened. */
    do {
        if (json->failed)
            return 0;
        int c = peek(json);
        if (c == '{' || c == '[')
            gd_json_enter(json, (char)c);
        else if (c == '"')
            gd_json_string(json, &string);
        else if (c == '-' || (c >= '0' && c <= '9'))
            number(json, "a number", text, &whole);
        else if (!word(json, "true") && !word(json, "false") && !word(json, "null"))
            unexpected(json, "a value");
        while (json->depth > base && !json->failed) {
            if (json->open[json->depth - 1] == '{' ? gd_json_member(json, &string)
                                                   : gd_json_element(json))
                break;
        }
    } while (json->depth > base);
    return !json->failed;
}
