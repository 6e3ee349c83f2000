/* For the tests: opens bundles and reads their graphs, one line for each.
 *
 *   open_bundles read PATH...   "ok SHA256-OF-GRAPH" or the error
 *   open_bundles flip PATH      flips a bit at every place of the file; "N of M refused"
 *   open_bundles cut PATH       every length of the file; "N of M refused"
 *   open_bundles json PATH...   "ok COUNT-OF-ROOT" or the error
 */
#include "edgec_bundle.h"
#include "edgec_sha256.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int opens(const char *path, char *line, size_t size)
{
    EdgecError error;
    size_t length;
    unsigned char *graph = NULL;
    EdgecBundle *bundle = edgec_bundle_open(path, EDGEC_CHECK_AUTO, &error);
    if (bundle)
        graph = edgec_bundle_graph(bundle, "main", &length, &error);
    if (graph) {
        EdgecSha256 hash;
        char hex[65];
        edgec_sha256_start(&hash);
        edgec_sha256_add(&hash, graph, length);
        edgec_sha256_end(&hash, hex);
        snprintf(line, size, "ok %s", hex);
    } else {
        snprintf(line, size, "%s", error.text);
    }
    edgec_bundle_close(bundle);
    free(graph);
    return graph != NULL;
}

static unsigned char *read_file(const char *path, size_t *size)
{
    FILE *file = fopen(path, "rb");
    fseek(file, 0, SEEK_END);
    *size = (size_t)ftell(file);
    rewind(file);
    unsigned char *data = malloc(*size + 1);
    *size = fread(data, 1, *size, file);
    fclose(file);
    return data;
}

static void write_file(const char *path, const unsigned char *data, size_t size)
{
    FILE *file = fopen(path, "wb");
    fwrite(data, 1, size, file);
    fclose(file);
}

static void damage(const char *path, int flip)
{
    size_t size, tried = 0, refused = 0;
    char line[600];
    unsigned char *data = read_file(path, &size);
    for (size_t i = 0; i < size; i++) {
        int padding = i >= 60 && i < 65536; /* zeros: a sample will do */
        if (padding && i % 509)
            continue;
        unsigned char kept = data[i];
        if (flip)
            data[i] ^= (unsigned char)(1 << i % 8);
        write_file(path, data, flip ? size : i);
        data[i] = kept;
        tried++;
        if (!opens(path, line, sizeof line) && !strncmp(line, "bundle ", 7))
            refused++;
        else
            printf("at %zu: %s\n", i, line);
    }
    write_file(path, data, size);
    free(data);
    printf("%zu of %zu refused\n", refused, tried);
}

static void parse(const char *path)
{
    size_t size;
    EdgecError error;
    unsigned char *text = read_file(path, &size);
    EdgecJson *root = edgec_json_parse(text, size, false, &error);
    if (root)
        printf("ok %zu\n", root->count);
    else
        printf("%s\n", error.text);
    edgec_json_free(root);
    free(text);
}

int main(int count, char **arguments)
{
    char line[600];
    for (int i = 2; i < count; i++) {
        if (!strcmp(arguments[1], "read")) {
            opens(arguments[i], line, sizeof line);
            puts(line);
        } else if (!strcmp(arguments[1], "json")) {
            parse(arguments[i]);
        } else {
            damage(arguments[i], !strcmp(arguments[1], "flip"));
        }
    }
    return 0;
}
