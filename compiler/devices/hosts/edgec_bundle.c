#ifndef _WIN32
#define _XOPEN_SOURCE 700 /* realpath, fseeko */
#define _FILE_OFFSET_BITS 64
#endif
#include "edgec_bundle.h"

#include "edgec_sha256.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32
#include <windows.h>
#endif

#define FIRST_OFFSET 65536u /* of the first member's data */
#define LIMIT 0xFFFFFFFFu   /* a value that does not fit below stands in a zip64 field */

enum {
    FORMAT_VERSION = 1,
    MAX_MEMBERS = 4096,
    MAX_NAME = 200,
    MAX_FILE_NAME = 255,
    MAX_MANIFEST_BYTES = 16 << 20,
    AUTO_FULL_BYTES = 64 << 20,
    READ_BYTES = 1 << 20,
    LOCAL_SIZE = 30, /* records of the zip, without names and extra fields */
    CENTRAL_SIZE = 46,
    END64_SIZE = 56,
    LOCATOR_SIZE = 20,
    END_SIZE = 22,
    ZIP64_MAX = 28, /* bytes of the largest zip64 field */
    LOCATION_BYTES = 257,
    ALIGNMENT = 64,
    MAX_DEPTH = 64
};

static const char WEIGHTS[] = "weights.bin", MANIFEST[] = "manifest.json";

typedef struct Member {
    char name[MAX_NAME + 1];
    char sha256[65]; /* of the manifest */
    uint32_t crc32;
    uint64_t size, header, offset;
} Member;

struct EdgecBundle {
    char *path, *folder;
    const char *file_name; /* inside of real_path */
    char *real_path;
    FILE *file;
    uint64_t size;
    Member *members;
    size_t count;
    EdgecJson *manifest;
};

/* Little-endian numbers of a record that is put together. */
typedef struct Record {
    unsigned char *at;
} Record;

static void put(Record *record, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        *record->at++ = (unsigned char)(value >> 8 * i);
}

static uint64_t get(const unsigned char *at, int bytes)
{
    uint64_t value = 0;
    for (int i = bytes; i--;)
        value = value << 8 | at[i];
    return value;
}

/* "bundle PATH: ..." */
static bool fail(const EdgecBundle *bundle, EdgecError *error, const char *what)
{
    return edgec_fail(error, "bundle %.200s: %s", bundle->path, what);
}

static bool fail_at(const EdgecBundle *bundle, EdgecError *error, const char *before,
                    const char *name, const char *behind)
{
    return edgec_fail(error, "bundle %.200s: %s'%.80s'%s", bundle->path, before, name, behind);
}

static char *copy_of(const char *text, size_t length)
{
    char *copy = malloc(length + 1);
    if (copy) {
        memcpy(copy, text, length);
        copy[length] = 0;
    }
    return copy;
}

/* ---- the file --------------------------------------------------------------------------- */

#ifdef _WIN32
static wchar_t *wide(const char *text)
{
    int length = MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, text, -1, NULL, 0);
    wchar_t *result = length > 0 ? malloc((size_t)length * sizeof *result) : NULL;
    if (result)
        MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, text, -1, result, length);
    return result;
}

static char *full_path(const char *path)
{
    wchar_t *given = wide(path), *full = given ? _wfullpath(NULL, given, 0) : NULL;
    int length = full ? WideCharToMultiByte(CP_UTF8, 0, full, -1, NULL, 0, NULL, NULL) : 0;
    char *result = length > 0 ? malloc((size_t)length) : NULL;
    if (result)
        WideCharToMultiByte(CP_UTF8, 0, full, -1, result, length, NULL, NULL);
    free(given);
    free(full);
    return result;
}

static FILE *open_file(const char *path)
{
    wchar_t *given = wide(path);
    FILE *file = given ? _wfopen(given, L"rb") : NULL;
    free(given);
    return file;
}

static bool seek(FILE *file, uint64_t position)
{
    return !_fseeki64(file, (int64_t)position, SEEK_SET);
}

static int64_t file_size(FILE *file)
{
    return _fseeki64(file, 0, SEEK_END) ? -1 : _ftelli64(file);
}

static bool is_separator(char c)
{
    return c == '/' || c == '\\';
}
#else
static char *full_path(const char *path)
{
    return realpath(path, NULL);
}

static FILE *open_file(const char *path)
{
    return fopen(path, "rb");
}

static bool seek(FILE *file, uint64_t position)
{
    return !fseeko(file, (off_t)position, SEEK_SET);
}

static int64_t file_size(FILE *file)
{
    return fseeko(file, 0, SEEK_END) ? -1 : (int64_t)ftello(file);
}

static bool is_separator(char c)
{
    return c == '/';
}
#endif

static bool open_bundle(EdgecBundle *bundle, EdgecError *error)
{
    bundle->real_path = full_path(bundle->path);
    bundle->file = bundle->real_path ? open_file(bundle->real_path) : NULL;
    if (!bundle->file)
        return fail(bundle, error, errno == ENOENT ? "there is no such file" : strerror(errno));
    size_t split = strlen(bundle->real_path);
    while (split && !is_separator(bundle->real_path[split - 1]))
        split--;
    bundle->file_name = bundle->real_path + split;
    bundle->folder = copy_of(bundle->real_path, split > 1 ? split - 1 : split);
    if (!bundle->folder)
        return fail(bundle, error, "there is no memory to read it");
    int64_t size = file_size(bundle->file);
    if (size <= 0)
        return fail(bundle, error, size ? "it cannot be read" : "it is empty");
    bundle->size = (uint64_t)size;
    return true;
}

static bool read_at(const EdgecBundle *bundle, uint64_t position, void *data, size_t size)
{
    return seek(bundle->file, position) && fread(data, 1, size, bundle->file) == size;
}

/* ---- the zip around: every header byte follows from the members (container.py) ------------ */

static bool is_letter(char c)
{
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_';
}

/* A relative path of letters, digits, '.', '_' and '-', no part of which starts with '.' or '-'. */
static bool is_allowed(const char *name)
{
    bool first = true;
    for (; *name; name++) {
        if (first ? !is_letter(*name) : !(is_letter(*name) || strchr("./-", *name)))
            return false;
        first = *name == '/';
    }
    return !first;
}

static uint64_t data_offset(const Member *member)
{
    if (!member->header)
        return FIRST_OFFSET;
    return member->header + LOCAL_SIZE + strlen(member->name) + (member->size >= LIMIT ? 20 : 0);
}

/* The local header of a member into `out`, as long as from its header to its data. */
static void put_local(const Member *member, unsigned char *out)
{
    bool large = member->size >= LIMIT;
    size_t name = strlen(member->name), zip64 = large ? 20 : 0;
    size_t padding = (size_t)(member->offset - member->header) - LOCAL_SIZE - name - zip64;
    uint64_t size = large ? LIMIT : member->size;
    Record record = {out};
    put(&record, 0x04034B50, 4);
    put(&record, large ? 45 : 20, 2);
    put(&record, 0, 6); /* flags, stored, time */
    put(&record, 0x21, 2);
    put(&record, member->crc32, 4);
    put(&record, size, 4);
    put(&record, size, 4);
    put(&record, name, 2);
    put(&record, zip64 + padding, 2);
    memcpy(record.at, member->name, name);
    record.at += name;
    if (large) {
        put(&record, 1 | 16 << 16, 4);
        put(&record, member->size, 8);
        put(&record, member->size, 8);
    }
    if (padding) {
        put(&record, 0x6465, 2);
        put(&record, padding - 4, 2);
        memset(record.at, 0, padding - 4);
    }
}

/* The record of a member in the directory; returns its length. */
static size_t put_central(const Member *member, unsigned char *out)
{
    bool large = member->size >= LIMIT, far_off = member->header >= LIMIT;
    size_t name = strlen(member->name), numbers = (large ? 2u : 0u) + (far_off ? 1u : 0u);
    uint64_t needed = numbers ? 45 : 20, size = large ? LIMIT : member->size;
    Record record = {out};
    put(&record, 0x02014B50, 4);
    put(&record, 3 << 8 | needed, 2);
    put(&record, needed, 2);
    put(&record, 0, 6);
    put(&record, 0x21, 2);
    put(&record, member->crc32, 4);
    put(&record, size, 4);
    put(&record, size, 4);
    put(&record, name, 2);
    put(&record, numbers ? 4 + 8 * numbers : 0, 2);
    put(&record, 0, 6); /* comment, disk, internal attributes */
    put(&record, (uint64_t)0100644 << 16, 4);
    put(&record, far_off ? LIMIT : member->header, 4);
    memcpy(record.at, member->name, name);
    record.at += name;
    if (numbers)
        put(&record, 1 | 8 * numbers << 16, 4);
    for (int i = 0; large && i < 2; i++)
        put(&record, member->size, 8);
    if (far_off)
        put(&record, member->header, 8);
    return (size_t)(record.at - out);
}

/* The records behind the directory; returns their length. */
static size_t put_end(uint64_t start, uint64_t length, uint64_t count, unsigned char *out)
{
    Record record = {out};
    if (start >= LIMIT) {
        put(&record, 0x06064B50, 4);
        put(&record, 44, 8);
        put(&record, 3 << 8 | 45, 2);
        put(&record, 45, 2);
        put(&record, 0, 8);
        put(&record, count, 8);
        put(&record, count, 8);
        put(&record, length, 8);
        put(&record, start, 8);
        put(&record, 0x07064B50, 4);
        put(&record, 0, 4);
        put(&record, start + length, 8);
        put(&record, 1, 4);
    }
    put(&record, 0x06054B50, 4);
    put(&record, 0, 4);
    put(&record, count, 2);
    put(&record, count, 2);
    put(&record, length, 4);
    put(&record, start < LIMIT ? start : LIMIT, 4);
    put(&record, 0, 2);
    return (size_t)(record.at - out);
}

/* Size and header of a member, read from the zip64 field where the plain one is full. */
static void read_zip64(const unsigned char *extra, size_t length, Member *member)
{
    size_t numbers = length >= 4 ? (length - 4) / 8 : 0, used = 0;
    if (member->size == LIMIT && numbers >= 2) {
        member->size = get(extra + 4, 8);
        used = 2;
    }
    if (member->header == LIMIT && numbers > used)
        member->header = get(extra + 4 + 8 * used, 8);
}

/* One record of the directory: parsed, then derived again and compared. Returns its length, 0
 * for an error. */
static size_t read_central(const EdgecBundle *bundle, const unsigned char *raw, size_t left,
                           Member *member, EdgecError *error)
{
    unsigned char expected[CENTRAL_SIZE + MAX_NAME + ZIP64_MAX];
    if (left < CENTRAL_SIZE || get(raw, 4) != 0x02014B50) {
        fail(bundle, error, "its directory is altered");
        return 0;
    }
    size_t name = (size_t)get(raw + 28, 2), extra = (size_t)get(raw + 30, 2);
    if (name > MAX_NAME || extra > ZIP64_MAX || left < CENTRAL_SIZE + name + extra) {
        fail(bundle, error, "its directory is altered");
        return 0;
    }
    memcpy(member->name, raw + CENTRAL_SIZE, name);
    member->name[name] = 0;
    if (strlen(member->name) != name || !is_allowed(member->name)) {
        fail(bundle, error, "the name of an entry is not allowed");
        return 0;
    }
    if (get(raw + 10, 2) || get(raw + 20, 4) != get(raw + 24, 4)) {
        fail_at(bundle, error, "the entry ", member->name, " is compressed");
        return 0;
    }
    member->crc32 = (uint32_t)get(raw + 16, 4);
    member->size = get(raw + 24, 4);
    member->header = get(raw + 42, 4);
    read_zip64(raw + CENTRAL_SIZE + name, extra, member);
    member->offset = data_offset(member);
    size_t length = put_central(member, expected);
    if (length != CENTRAL_SIZE + name + extra || memcmp(raw, expected, length)) {
        fail(bundle, error, "its directory is altered");
        return 0;
    }
    return length;
}

/* Members follow one another without a gap, from byte 0 to the directory, and their headers
 * are as they must be. */
static bool check_places(const EdgecBundle *bundle, uint64_t start, EdgecError *error)
{
    uint64_t position = 0;
    unsigned char *bytes = malloc(2 * FIRST_OFFSET);
    if (!bytes)
        return fail(bundle, error, "there is no memory to read it");
    bool right = true;
    for (size_t i = 0; right && i < bundle->count; i++) {
        const Member *member = &bundle->members[i];
        size_t length = (size_t)(member->offset - member->header);
        if (member->header != position || member->header > start || member->offset > start ||
            member->size > start - member->offset) {
            right = fail_at(bundle, error, "the entry ", member->name,
                            " overlaps another, leaves a gap or reaches outside of the file");
            break;
        }
        put_local(member, bytes);
        if (!read_at(bundle, member->header, bytes + FIRST_OFFSET, length) ||
            memcmp(bytes, bytes + FIRST_OFFSET, length))
            right = fail_at(bundle, error, "the header or padding of the entry ", member->name,
                            " is altered");
        position = member->offset + member->size;
    }
    if (right && position != start)
        right = fail(bundle, error, "unknown bytes stand before its directory");
    free(bytes);
    return right;
}

static bool parse_directory(EdgecBundle *bundle, const unsigned char *raw, size_t length,
                            EdgecError *error)
{
    size_t position = 0;
    for (size_t i = 0; i < bundle->count; i++) {
        Member *member = &bundle->members[i];
        size_t read = read_central(bundle, raw + position, length - position, member, error);
        if (!read)
            return false;
        position += read;
        for (size_t other = 0; other < i; other++)
            if (!strcmp(bundle->members[other].name, member->name))
                return fail_at(bundle, error, "the entry ", member->name, " is listed twice");
    }
    return position == length || fail(bundle, error, "its directory is altered");
}

static bool read_members(EdgecBundle *bundle, EdgecError *error)
{
    static const char truncated[] = "it is truncated or has bytes added at its end";
    unsigned char tail[END64_SIZE + LOCATOR_SIZE + END_SIZE], expected[sizeof tail];
    if (!read_at(bundle, 0, tail, 4) || get(tail, 4) != 0x04034B50)
        return fail(bundle, error, "it is not a bundle (a zip written by edgec)");
    size_t behind = END_SIZE;
    if (bundle->size < END_SIZE || !read_at(bundle, bundle->size - END_SIZE, tail, END_SIZE) ||
        get(tail, 4) != 0x06054B50)
        return fail(bundle, error, truncated);
    uint64_t count = get(tail + 10, 2), start = get(tail + 16, 4);
    if (start == LIMIT) {
        behind = sizeof tail;
        if (bundle->size < behind || !read_at(bundle, bundle->size - behind, tail, behind))
            return fail(bundle, error, truncated);
        count = get(tail + 32, 8);
        start = get(tail + 48, 8);
    }
    if (count > MAX_MEMBERS)
        return fail(bundle, error, "it lists more than 4096 entries");
    uint64_t largest = count * (CENTRAL_SIZE + MAX_NAME + ZIP64_MAX);
    if (start >= bundle->size - behind || bundle->size - behind - start > largest)
        return fail(bundle, error, "its directory does not lie inside the file");
    size_t length = (size_t)(bundle->size - behind - start);
    if (put_end(start, length, count, expected) != behind || memcmp(expected, tail, behind))
        return fail(bundle, error, truncated);
    bundle->count = (size_t)count;
    bundle->members = calloc(bundle->count, sizeof *bundle->members);
    unsigned char *raw = malloc(length);
    bool right = bundle->members && raw ? true : fail(bundle, error, "there is no memory");
    if (right && !read_at(bundle, start, raw, length))
        right = fail(bundle, error, truncated);
    right = right && parse_directory(bundle, raw, length, error);
    free(raw);
    return right && check_places(bundle, start, error);
}

/* ---- manifest and digests ----------------------------------------------------------------- */

/* Compare the checksums of a member's data; sha256 only if the manifest was read. */
static bool check_data(const EdgecBundle *bundle, const Member *member, EdgecError *error)
{
    unsigned char *data = malloc(READ_BYTES);
    EdgecSha256 hash;
    char hex[65];
    uint32_t crc = 0;
    uint64_t left = member->size;
    bool read = data && seek(bundle->file, member->offset);
    edgec_sha256_start(&hash);
    while (read && left) {
        size_t part = left < READ_BYTES ? (size_t)left : READ_BYTES;
        read = fread(data, 1, part, bundle->file) == part;
        if (read) {
            edgec_sha256_add(&hash, data, part);
            crc = edgec_crc32(crc, data, part);
            left -= part;
        }
    }
    free(data);
    edgec_sha256_end(&hash, hex);
    if (!read || crc != member->crc32 || (*member->sha256 && strcmp(hex, member->sha256)))
        return fail_at(bundle, error, "the entry ", member->name,
                       " is altered: its checksum differs");
    return true;
}

/* The data of a member, with one more byte, which is zero. */
static unsigned char *read_data(const EdgecBundle *bundle, const Member *member,
                                EdgecError *error)
{
    unsigned char *data = member->size < SIZE_MAX ? malloc((size_t)member->size + 1) : NULL;
    if (!data || !read_at(bundle, member->offset, data, (size_t)member->size)) {
        fail_at(bundle, error, "the entry ", member->name, " cannot be read");
        free(data);
        return NULL;
    }
    data[member->size] = 0;
    return data;
}

static bool is_integer(const EdgecJson *value, uint64_t expected)
{
    return value && value->kind == EDGEC_JSON_INTEGER && value->integer >= 0 &&
           (uint64_t)value->integer == expected;
}

/* The manifest lists what the zip holds, in the same order. */
static bool check_entries(EdgecBundle *bundle, EdgecError *error)
{
    const EdgecJson *entries = edgec_json_find(bundle->manifest, "entries");
    if (!entries || entries->kind != EDGEC_JSON_ARRAY || entries->count != bundle->count - 1)
        return fail(bundle, error, "manifest.json lists other entries than the file has");
    const EdgecJson *entry = entries->first;
    for (size_t i = 0; i < entries->count; i++, entry = entry->next) {
        Member *member = &bundle->members[i];
        const EdgecJson *name = edgec_json_find(entry, "name");
        const EdgecJson *sha256 = edgec_json_find(entry, "sha256");
        bool texts = name && name->kind == EDGEC_JSON_STRING && sha256 &&
                     sha256->kind == EDGEC_JSON_STRING && strlen(sha256->text) == 64;
        if (!texts || strcmp(name->text, member->name) ||
            !is_integer(edgec_json_find(entry, "size"), member->size) ||
            !is_integer(edgec_json_find(entry, "offset"), member->offset))
            return fail_at(bundle, error, "the entry ", member->name,
                           " differs from what manifest.json says");
        memcpy(member->sha256, sha256->text, sizeof member->sha256);
    }
    if (strcmp(bundle->members[0].name, WEIGHTS))
        return fail(bundle, error, "its first entry is not weights.bin");
    return true;
}

static bool read_manifest(EdgecBundle *bundle, EdgecError *error)
{
    const Member *last = &bundle->members[bundle->count - 1];
    if (strcmp(last->name, MANIFEST))
        return fail(bundle, error, "its last entry is not manifest.json");
    if (last->size > MAX_MANIFEST_BYTES)
        return fail(bundle, error, "its manifest.json has more than 16 MiB");
    if (!check_data(bundle, last, error))
        return false;
    unsigned char *text = read_data(bundle, last, error);
    if (!text)
        return false;
    EdgecError reason;
    bundle->manifest = edgec_json_parse(text, (size_t)last->size, true, &reason);
    free(text);
    if (!bundle->manifest)
        return edgec_fail(error, "bundle %.200s: its manifest.json is %.200s", bundle->path,
                          reason.text);
    if (!is_integer(edgec_json_find(bundle->manifest, "format_version"), FORMAT_VERSION))
        return fail(bundle, error,
                    "it has another format version than 1, which this program reads; "
                    "update the program or build the bundle again");
    return check_entries(bundle, error);
}

static bool read_all(EdgecBundle *bundle, EdgecCheck check, EdgecError *error)
{
    if (!open_bundle(bundle, error) || !read_members(bundle, error) ||
        !read_manifest(bundle, error))
        return false;
    bool full = check == EDGEC_CHECK_FULL || bundle->size < AUTO_FULL_BYTES;
    for (size_t i = 0; i + 1 < bundle->count; i++)
        if ((full || i > 0) && !check_data(bundle, &bundle->members[i], error))
            return false;
    return true;
}

EdgecBundle *edgec_bundle_open(const char *path, EdgecCheck check, EdgecError *error)
{
    EdgecBundle *bundle = calloc(1, sizeof *bundle);
    if (bundle)
        bundle->path = copy_of(path, strlen(path));
    if (!bundle || !bundle->path) {
        edgec_fail(error, "there is no memory to open a bundle");
        free(bundle);
        return NULL;
    }
    if (!read_all(bundle, check, error)) {
        edgec_bundle_close(bundle);
        return NULL;
    }
    return bundle;
}

void edgec_bundle_close(EdgecBundle *bundle)
{
    if (!bundle)
        return;
    if (bundle->file)
        fclose(bundle->file);
    edgec_json_free(bundle->manifest);
    free(bundle->members);
    free(bundle->real_path);
    free(bundle->folder);
    free(bundle->path);
    free(bundle);
}

const char *edgec_bundle_path(const EdgecBundle *bundle)
{
    return bundle->path;
}

const char *edgec_bundle_folder(const EdgecBundle *bundle)
{
    return bundle->folder;
}

const EdgecJson *edgec_bundle_manifest(const EdgecBundle *bundle)
{
    return bundle->manifest;
}

unsigned char *edgec_bundle_read(const EdgecBundle *bundle, const char *name, size_t *size,
                                 EdgecError *error)
{
    for (size_t i = 0; i < bundle->count; i++) {
        const Member *member = &bundle->members[i];
        if (strcmp(member->name, name))
            continue;
        unsigned char *data = read_data(bundle, member, error);
        EdgecSha256 hash;
        char hex[65];
        if (!data)
            return NULL;
        edgec_sha256_start(&hash);
        edgec_sha256_add(&hash, data, (size_t)member->size);
        edgec_sha256_end(&hash, hex);
        if (*member->sha256 && strcmp(hex, member->sha256)) {
            fail_at(bundle, error, "the entry ", name, " changed since it was opened");
            free(data);
            return NULL;
        }
        *size = (size_t)member->size;
        return data;
    }
    fail_at(bundle, error, "it has no entry ", name, "");
    return NULL;
}

/* ---- the graph: its external tensors (graph.py) ------------------------------------------- */

typedef enum Message {
    NONE,
    MODEL,
    GRAPH,
    NODE,
    ATTRIBUTE,
    TENSOR,
    SPARSE_TENSOR,
    FUNCTION,
    TRAINING
} Message;

/* Fields of onnx.proto3 that can lead to a tensor. */
static Message inside(Message message, uint64_t field)
{
    switch (message) {
    case MODEL:
        return field == 7 ? GRAPH : field == 20 ? TRAINING : field == 25 ? FUNCTION : NONE;
    case GRAPH:
        return field == 1 ? NODE : field == 5 ? TENSOR : field == 15 ? SPARSE_TENSOR : NONE;
    case NODE:
        return field == 5 ? ATTRIBUTE : NONE;
    case ATTRIBUTE:
        return field == 5 || field == 10    ? TENSOR
               : field == 6 || field == 11  ? GRAPH
               : field == 22 || field == 23 ? SPARSE_TENSOR
                                            : NONE;
    case SPARSE_TENSOR:
        return field == 1 || field == 2 ? TENSOR : NONE;
    case FUNCTION:
        return field == 7 ? NODE : field == 11 ? ATTRIBUTE : NONE;
    case TRAINING:
        return field == 1 || field == 2 ? GRAPH : NONE;
    default:
        return NONE;
    }
}

typedef struct Span {
    unsigned char *at, *end;
} Span;

typedef struct Relocation {
    const EdgecBundle *bundle;
    EdgecError *error;
    unsigned char location[LOCATION_BYTES];
} Relocation;

static bool damaged(const Relocation *relocation)
{
    return fail(relocation->bundle, relocation->error, "its graph is damaged: no protobuf");
}

static bool read_varint(Span *span, uint64_t *value)
{
    *value = 0;
    for (int shift = 0; span->at < span->end && shift < 70; shift += 7) {
        unsigned char byte = *span->at++;
        if (shift < 64)
            *value |= (uint64_t)(byte & 0x7F) << shift;
        if (byte < 0x80)
            return true;
    }
    return false;
}

/* The next field of a message whose value is bytes; *field is 0 at its end. False if the
 * message is damaged. */
static bool next_field(Span *message, uint64_t *field, Span *value)
{
    uint64_t tag, number;
    *field = 0;
    while (message->at < message->end) {
        if (!read_varint(message, &tag))
            return false;
        uint64_t left = (uint64_t)(message->end - message->at), skipped;
        switch (tag & 7) {
        case 0:
            if (!read_varint(message, &number))
                return false;
            break;
        case 1:
        case 5:
            skipped = (tag & 7) == 1 ? 8 : 4;
            if (skipped > left)
                return false;
            message->at += skipped;
            break;
        case 2:
            if (!read_varint(message, &number) || number > (uint64_t)(message->end - message->at))
                return false;
            value->at = message->at;
            value->end = message->at += number;
            *field = tag >> 3;
            if (*field)
                return true;
            return false;
        default:
            return false;
        }
    }
    return true;
}

static bool equals(Span span, const char *text)
{
    size_t length = strlen(text);
    return (size_t)(span.end - span.at) == length && !memcmp(span.at, text, length);
}

/* Digits; UINT64_MAX where there are none or too many. */
static uint64_t number_of(Span digits)
{
    uint64_t value = 0;
    if (digits.at == digits.end || digits.end - digits.at > 18)
        return UINT64_MAX;
    for (; digits.at < digits.end; digits.at++) {
        if (*digits.at < '0' || *digits.at > '9')
            return UINT64_MAX;
        value = value * 10 + (uint64_t)(*digits.at - '0');
    }
    return value;
}

static bool is_placeholder(Span location)
{
    static const char name[] = "weights";
    size_t padding = LOCATION_BYTES - (sizeof name - 1);
    if (location.end - location.at != LOCATION_BYTES)
        return false;
    for (size_t i = 0; i < padding; i++)
        if (location.at[i] != "./"[i % 2])
            return false;
    return !memcmp(location.at + padding, name, sizeof name - 1);
}

/* Where one tensor says that its data is; overwritten if that is in the weights. */
static bool relocate_tensor(const Relocation *relocation, Span tensor)
{
    static const char *const keys[3] = {"location", "offset", "length"};
    Span found[3] = {{NULL, NULL}, {NULL, NULL}, {NULL, NULL}};
    Span value, part;
    uint64_t field, inner;
    for (;;) {
        if (!next_field(&tensor, &field, &value))
            return damaged(relocation);
        if (!field)
            break;
        if (field != 13) /* external_data */
            continue;
        Span key = {NULL, NULL}, text = {value.at, value.at};
        for (;;) {
            if (!next_field(&value, &inner, &part))
                return damaged(relocation);
            if (!inner)
                break;
            if (inner == 1)
                key = part;
            if (inner == 2)
                text = part;
        }
        for (int i = 0; i < 3; i++) {
            if (!key.at || !equals(key, keys[i]))
                continue;
            if (found[i].at)
                return fail(relocation->bundle, relocation->error,
                            "one of its tensors states where its data is twice");
            found[i] = text;
        }
    }
    if (!found[0].at)
        return true;
    if (!is_placeholder(found[0]))
        return fail(relocation->bundle, relocation->error,
                    "one of its tensors lies in another file; expected the bundle itself");
    const Member *weights = &relocation->bundle->members[0];
    uint64_t offset = found[1].at ? number_of(found[1]) : UINT64_MAX;
    uint64_t length = found[2].at ? number_of(found[2]) : UINT64_MAX;
    uint64_t end = weights->offset + weights->size;
    if (offset < weights->offset || offset > end || length > end - offset || offset % ALIGNMENT)
        return fail(relocation->bundle, relocation->error,
                    "one of its tensors does not lie in the weights at a multiple of 64 bytes");
    memcpy(found[0].at, relocation->location, LOCATION_BYTES);
    return true;
}

static bool relocate(const Relocation *relocation, Span span, Message message, int depth)
{
    Span value;
    uint64_t field;
    if (message == TENSOR)
        return relocate_tensor(relocation, span);
    if (depth > MAX_DEPTH)
        return fail(relocation->bundle, relocation->error, "its graph is nested too deeply");
    for (;;) {
        if (!next_field(&span, &field, &value))
            return damaged(relocation);
        if (!field)
            return true;
        Message below = inside(message, field);
        if (below != NONE && !relocate(relocation, value, below, depth + 1))
            return false;
    }
}

/* The file's name behind as many "./" as give LOCATION_BYTES; a double "/" for odd rests. */
static bool pad_location(Relocation *relocation)
{
    const char *name = relocation->bundle->file_name;
    size_t length = strlen(name);
    if (length > MAX_FILE_NAME)
        return fail(relocation->bundle, relocation->error,
                    "its file name has more than 255 bytes; rename it");
    size_t padding = LOCATION_BYTES - length;
    for (size_t i = 0; i < padding; i++)
        relocation->location[i] = (unsigned char)"./"[i % 2];
    if (padding % 2)
        relocation->location[padding - 1] = '/';
    memcpy(relocation->location + padding, name, length);
    return true;
}

unsigned char *edgec_bundle_graph(const EdgecBundle *bundle, const char *role, size_t *size,
                                  EdgecError *error)
{
    const EdgecJson *graphs = edgec_json_find(bundle->manifest, "graphs");
    const EdgecJson *file = edgec_json_find(edgec_json_find(graphs, role), "file");
    Relocation relocation = {bundle, error, {0}};
    if (!file || file->kind != EDGEC_JSON_STRING || !strcmp(file->text, WEIGHTS)) {
        fail_at(bundle, error, "it has no graph ", role, "");
        return NULL;
    }
    if (!pad_location(&relocation))
        return NULL;
    unsigned char *graph = edgec_bundle_read(bundle, file->text, size, error);
    if (!graph)
        return NULL;
    Span whole = {graph, graph + *size};
    if (!relocate(&relocation, whole, MODEL, 0)) {
        free(graph);
        return NULL;
    }
    return graph;
}
