/*
 * json_string.c - the strings of json.h: their characters, and what they mean.
 */
#include "json.h"

#include <string.h>

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

/* An escape at s[0] == '\\'; returns as gd_json_character() does. */
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

int gd_json_character(const char *s, size_t n, char out[4], size_t *used)
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
        int n = gd_json_character(a->at + i, a->length - i, x, &used_x);
        if (n != gd_json_character(b->at + j, b->length - j, y, &used_y) || memcmp(x, y, (size_t)n))
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
        size_t n = (size_t)gd_json_character(string->at + i, string->length - i, out, &used);
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
        int n = gd_json_character(string->at + i, string->length - i, out, &used);
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
