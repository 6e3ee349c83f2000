#include "edgec_json.h"

#include <errno.h>
#include <locale.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_DEPTH = 64, MAX_NUMBER = 64 };

/* One allocation: the values, then a copy of the text, in which strings are decoded in place. */
typedef struct Parser {
    EdgecJson *values;
    size_t used;
    char *start, *at, *end; /* *end is a zero byte */
    bool canonical;
    EdgecError *error;
} Parser;

bool edgec_fail(EdgecError *error, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->text, sizeof error->text, format, arguments);
    va_end(arguments);
    return false;
}

static bool fail(Parser *parser, const char *what)
{
    return edgec_fail(parser->error, "not valid JSON: %s at byte %zu", what,
                      (size_t)(parser->at - parser->start));
}

static void skip_space(Parser *parser)
{
    while (*parser->at == ' ' || *parser->at == '\t' || *parser->at == '\n' ||
           *parser->at == '\r')
        parser->at++;
}

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/* The bytes of one UTF-8 character that starts at `at`, 0 if it is none. */
static size_t utf8_length(const unsigned char *at, const unsigned char *end)
{
    static const struct {
        unsigned char low, high;   /* first byte */
        size_t length;
        unsigned char low2, high2; /* second byte */
    } forms[] = {
        {0x00, 0x7F, 1, 0, 0},       {0xC2, 0xDF, 2, 0x80, 0xBF}, {0xE0, 0xE0, 3, 0xA0, 0xBF},
        {0xE1, 0xEC, 3, 0x80, 0xBF}, {0xED, 0xED, 3, 0x80, 0x9F}, {0xEE, 0xEF, 3, 0x80, 0xBF},
        {0xF0, 0xF0, 4, 0x90, 0xBF}, {0xF1, 0xF3, 4, 0x80, 0xBF}, {0xF4, 0xF4, 4, 0x80, 0x8F},
    };
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        if (*at < forms[i].low || *at > forms[i].high)
            continue;
        if (forms[i].length > (size_t)(end - at))
            return 0;
        if (forms[i].length > 1 && (at[1] < forms[i].low2 || at[1] > forms[i].high2))
            return 0;
        for (size_t k = 2; k < forms[i].length; k++)
            if ((at[k] & 0xC0) != 0x80)
                return 0;
        return forms[i].length;
    }
    return 0;
}

/* Four hexadecimal digits; -1 if they are not there. */
static long hex4(const char *at)
{
    long value = 0;
    for (int i = 0; i < 4; i++) { /* stops at the zero byte behind the text */
        char c = at[i];
        if (is_digit(c))
            value = value * 16 + (c - '0');
        else if ((c | 32) >= 'a' && (c | 32) <= 'f')
            value = value * 16 + ((c | 32) - 'a' + 10);
        else
            return -1;
    }
    return value;
}

static char *put_utf8(char *out, unsigned long code)
{
    if (code < 0x80) {
        *out++ = (char)code;
        return out;
    }
    if (code < 0x800) {
        *out++ = (char)(0xC0 | code >> 6);
    } else {
        if (code < 0x10000) {
            *out++ = (char)(0xE0 | code >> 12);
        } else {
            *out++ = (char)(0xF0 | code >> 18);
            *out++ = (char)(0x80 | (code >> 12 & 0x3F));
        }
        *out++ = (char)(0x80 | (code >> 6 & 0x3F));
    }
    *out++ = (char)(0x80 | (code & 0x3F));
    return out;
}

/* The character of an escape, behind its backslash; false if it is none. */
static bool read_escape(Parser *parser, char **out)
{
    static const char plain[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    char c = *parser->at;
    const char *found = c ? strchr(plain, c) : NULL;
    if (found) {
        *(*out)++ = meant[found - plain];
        parser->at++;
        return true;
    }
    long code = c == 'u' ? hex4(parser->at + 1) : -1;
    if (code <= 0)
        return fail(parser, "an escape that is not allowed");
    parser->at += 5;
    if (code >= 0xD800 && code <= 0xDFFF) {
        bool pair = code < 0xDC00 && parser->at[0] == '\\' && parser->at[1] == 'u';
        long low = pair ? hex4(parser->at + 2) : -1;
        if (low < 0xDC00 || low > 0xDFFF)
            return fail(parser, "half a character");
        code = 0x10000 + (code - 0xD800) * 0x400 + (low - 0xDC00);
        parser->at += 6;
    }
    *out = put_utf8(*out, (unsigned long)code);
    return true;
}

/* A string, decoded over its own place: it never gets longer. */
static const char *read_string(Parser *parser)
{
    if (*parser->at != '"') {
        fail(parser, "a string is expected");
        return NULL;
    }
    char *text = ++parser->at, *out = text;
    while (*parser->at != '"') {
        if ((unsigned char)*parser->at < 0x20) { /* the end of the text, too */
            fail(parser, "a string that does not end");
            return NULL;
        }
        if (*parser->at == '\\') {
            parser->at++;
            if (!read_escape(parser, &out))
                return NULL;
            continue;
        }
        size_t length =
            utf8_length((const unsigned char *)parser->at, (const unsigned char *)parser->end);
        if (!length) {
            fail(parser, "bytes that are no UTF-8");
            return NULL;
        }
        memmove(out, parser->at, length);
        out += length;
        parser->at += length;
    }
    parser->at++;
    *out = 0;
    return text;
}

static bool read_number(Parser *parser, EdgecJson *value)
{
    char copy[MAX_NUMBER + 1];
    const char *start = parser->at, *at = start;
    bool whole = true;
    if (*at == '-')
        at++;
    if (!is_digit(*at) || (*at == '0' && is_digit(at[1])))
        return fail(parser, "something that is no value");
    while (is_digit(*at))
        at++;
    if (*at == '.') {
        whole = false;
        if (!is_digit(*++at))
            return fail(parser, "a number without digits");
        while (is_digit(*at))
            at++;
    }
    if (*at == 'e' || *at == 'E') {
        whole = false;
        at++;
        if (*at == '+' || *at == '-')
            at++;
        if (!is_digit(*at))
            return fail(parser, "a number without digits");
        while (is_digit(*at))
            at++;
    }
    size_t length = (size_t)(at - start);
    if (length > MAX_NUMBER)
        return fail(parser, "a number that is too long");
    memcpy(copy, start, length);
    copy[length] = 0;
    char *point = strchr(copy, '.');
    if (point)
        *point = *localeconv()->decimal_point; /* what strtod expects */
    value->number = strtod(copy, NULL);
    value->kind = EDGEC_JSON_NUMBER;
    if (whole) {
        errno = 0;
        value->integer = strtoll(copy, NULL, 10);
        if (!errno)
            value->kind = EDGEC_JSON_INTEGER;
    }
    parser->at += length;
    return true;
}

static bool read_word(Parser *parser, EdgecJson *value, const char *word, EdgecJsonKind kind)
{
    size_t length = strlen(word);
    if ((size_t)(parser->end - parser->at) < length || memcmp(parser->at, word, length))
        return fail(parser, "something that is no value");
    parser->at += length;
    value->kind = kind;
    value->boolean = *word == 't';
    return true;
}

static bool read_value(Parser *parser, EdgecJson *value, int depth);

static bool read_items(Parser *parser, EdgecJson *value, int depth)
{
    bool object = *parser->at++ == '{';
    char close = object ? '}' : ']';
    EdgecJson *last = NULL;
    value->kind = object ? EDGEC_JSON_OBJECT : EDGEC_JSON_ARRAY;
    skip_space(parser);
    if (*parser->at == close) {
        parser->at++;
        return true;
    }
    if (depth == MAX_DEPTH)
        return fail(parser, "values that are nested too deeply");
    for (;;) {
        EdgecJson *item = &parser->values[parser->used++]; /* counted before, see count_values */
        skip_space(parser);
        if (object) {
            item->key = read_string(parser);
            if (!item->key)
                return false;
            if (parser->canonical && last && strcmp(last->key, item->key) >= 0)
                return fail(parser, "a key that is given twice or is not sorted");
            skip_space(parser);
            if (*parser->at != ':')
                return fail(parser, "a key without a value");
            parser->at++;
        }
        if (!read_value(parser, item, depth + 1))
            return false;
        if (last)
            last->next = item;
        else
            value->first = item;
        last = item;
        value->count++;
        if (*parser->at == close) {
            parser->at++;
            return true;
        }
        if (*parser->at != ',')
            return fail(parser, "a list that does not end");
        parser->at++;
    }
}

/* A value and the space around it. */
static bool read_value(Parser *parser, EdgecJson *value, int depth)
{
    bool read;
    skip_space(parser);
    switch (*parser->at) {
    case '{':
    case '[':
        read = read_items(parser, value, depth);
        break;
    case '"':
        value->kind = EDGEC_JSON_STRING;
        value->text = read_string(parser);
        read = value->text != NULL;
        break;
    case 't':
        read = read_word(parser, value, "true", EDGEC_JSON_BOOL);
        break;
    case 'f':
        read = read_word(parser, value, "false", EDGEC_JSON_BOOL);
        break;
    case 'n':
        read = read_word(parser, value, "null", EDGEC_JSON_NULL);
        break;
    default:
        read = read_number(parser, value);
    }
    if (read)
        skip_space(parser);
    return read;
}

/* No fewer than there are: each follows a bracket or a comma, or is the root. */
static size_t count_values(const char *text, size_t size)
{
    size_t count = 1;
    for (size_t i = 0; i < size; i++)
        count += text[i] == '[' || text[i] == '{' || text[i] == ',';
    return count;
}

EdgecJson *edgec_json_parse(const void *text, size_t size, bool canonical, EdgecError *error)
{
    size_t count = count_values(text, size);
    if (count > EDGEC_JSON_MAX_VALUES) {
        edgec_fail(error, "not read as JSON: more than %u values", EDGEC_JSON_MAX_VALUES);
        return NULL;
    }
    EdgecJson *root = calloc(1, count * sizeof *root + size + 1);
    if (!root) {
        edgec_fail(error, "there is no memory for %zu bytes of JSON", size);
        return NULL;
    }
    char *copy = (char *)(root + count);
    memcpy(copy, text, size);
    Parser parser = {root, 1, copy, copy, copy + size, canonical, error};
    bool read = read_value(&parser, root, 0);
    if (read && parser.at != parser.end)
        read = fail(&parser, "something behind the value");
    if (!read) {
        free(root);
        return NULL;
    }
    return root;
}

void edgec_json_free(EdgecJson *root)
{
    free(root);
}

const EdgecJson *edgec_json_find(const EdgecJson *object, const char *key)
{
    if (!object || object->kind != EDGEC_JSON_OBJECT)
        return NULL;
    for (const EdgecJson *item = object->first; item; item = item->next)
        if (!strcmp(item->key, key))
            return item;
    return NULL;
}
