/* A strict reader of JSON (RFC 8259): text -> a tree that is read with edgec_json_find.
 *
 * Everything is bounded before memory is taken: EDGEC_JSON_MAX_VALUES values, 64 levels.
 * Left out on purpose: writing, numbers beyond int64_t and double, strings with a zero byte.
 */
#ifndef EDGEC_JSON_H
#define EDGEC_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define EDGEC_JSON_MAX_VALUES (1u << 20)

/* The one way in which these files fail: a function returns NULL or false and fills this in. */
typedef struct EdgecError {
    char text[512];
} EdgecError;

typedef enum EdgecJsonKind {
    EDGEC_JSON_NULL,
    EDGEC_JSON_BOOL,
    EDGEC_JSON_INTEGER, /* fits int64_t and has neither point nor exponent */
    EDGEC_JSON_NUMBER,  /* any other number */
    EDGEC_JSON_STRING,
    EDGEC_JSON_ARRAY,
    EDGEC_JSON_OBJECT
} EdgecJsonKind;

typedef struct EdgecJson {
    EdgecJsonKind kind;
    bool boolean;
    const char *key;               /* of a member of an object, else NULL */
    const char *text;              /* of a string: UTF-8, zero-terminated */
    int64_t integer;               /* of an integer */
    double number;                 /* of an integer or number */
    size_t count;                  /* of an array or object */
    const struct EdgecJson *first; /* of an array or object; the others follow by next */
    const struct EdgecJson *next;
} EdgecJson;

/* The value of a text of that many bytes, to be freed with edgec_json_free.
 * canonical: the keys of every object must be sorted, so that none stands there twice. */
EdgecJson *edgec_json_parse(const void *text, size_t size, bool canonical, EdgecError *error);
void edgec_json_free(EdgecJson *root);

/* The member of an object, NULL if there is none or if the value is no object. */
const EdgecJson *edgec_json_find(const EdgecJson *object, const char *key);

/* Fills in the error; always false. */
bool edgec_fail(EdgecError *error, const char *format, ...);

#ifdef __cplusplus
}
#endif
#endif
