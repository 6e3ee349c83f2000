/* Runs one job on a device: run_bundle FOLDER. Does what guest.py does, without Python.
 *
 * FOLDER holds job.json, the bundle and feeds.tensors; outputs.tensors and outcome.json are
 * written into it. Exit code 1, and the reason in outcome.json, if the job cannot be run.
 *
 *     cc -std=c11 -O2 -I INCLUDE run_bundle.c edgec_*.c -o run_bundle -l:libonnxruntime.so.1
 */
#ifndef _WIN32
#define _XOPEN_SOURCE 700 /* clock_gettime, getpriority */
#endif
#include "edgec_bundle.h"
#include "edgec_machine.h"
#include "edgec_model.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32
#include <windows.h>
#else
#include <sys/resource.h>
#include <time.h>
#endif

enum { MAX_PATH_BYTES = 4096, MAX_RANK = 16, LEAST = 2, MARK = 0x0ED6E000 };

static const struct {
    const char *code; /* of safetensors */
    ONNXTensorElementDataType type;
    size_t size;
} CODES[] = {
    {"BOOL", ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, 1},
    {"F16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 2},
    {"F32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4},
    {"F64", ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, 8},
    {"I8", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, 1},
    {"I16", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16, 2},
    {"I32", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 4},
    {"I64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8},
    {"U8", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 1},
    {"U16", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16, 2},
    {"U32", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32, 4},
    {"U64", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64, 8},
};
enum { CODE_COUNT = sizeof CODES / sizeof *CODES };

/* A job while it runs. outputs: samples after one another, model->output_count each. */
typedef struct Run {
    const char *folder;
    EdgecJson *job, *header; /* of feeds.tensors */
    unsigned char *feeds;
    size_t start, size; /* of the data in feeds.tensors; of all of it */
    EdgecBundle *bundle;
    EdgecModel *model;
    size_t samples;
    OrtValue **inputs; /* of one sample at a time */
    void **input_data;
    OrtValue **outputs;
    double load_ms;
    double *latency_ms;
    size_t repeats;
} Run;

static double now_ms(void)
{
#ifdef _WIN32
    LARGE_INTEGER count, frequency;
    QueryPerformanceCounter(&count);
    QueryPerformanceFrequency(&frequency);
    return (double)count.QuadPart * 1e3 / (double)frequency.QuadPart;
#else
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e3 + (double)time.tv_nsec / 1e6;
#endif
}

/* A system call that a counter of executed instructions can see, and that does nothing. */
static void mark(unsigned label)
{
#ifdef __linux__
    getpriority(PRIO_PROCESS, MARK + label);
#else
    (void)label;
#endif
}

static FILE *open_in(const Run *run, const char *name, const char *mode, EdgecError *error)
{
    char path[MAX_PATH_BYTES];
    int length = snprintf(path, sizeof path, "%s/%s", run->folder, name);
    FILE *file = length > 0 && length < MAX_PATH_BYTES ? fopen(path, mode) : NULL;
    if (!file)
        edgec_fail(error, "%s: it cannot be opened in the job's folder", name);
    return file;
}

/* A whole file, to be freed; NULL for an error. */
static unsigned char *read_file(const Run *run, const char *name, size_t *size, EdgecError *error)
{
    FILE *file = open_in(run, name, "rb", error);
    unsigned char *data = NULL;
    size_t room = 0, used = 0;
    bool right = file != NULL;
    while (right && !feof(file)) {
        if (used == room) {
            unsigned char *larger = room < SIZE_MAX / 4 ? realloc(data, 2 * room + 4096) : NULL;
            right = larger != NULL;
            if (!right)
                break;
            data = larger;
            room = 2 * room + 4096;
        }
        used += fread(data + used, 1, room - used, file);
        right = !ferror(file);
    }
    if (file)
        fclose(file);
    if (!right) {
        if (file)
            edgec_fail(error, "%s: it cannot be read", name);
        free(data);
        return NULL;
    }
    *size = used;
    return data;
}

static bool number_of(const Run *run, const char *key, int64_t most, int64_t *value,
                      EdgecError *error)
{
    const EdgecJson *found = edgec_json_find(run->job, key);
    if (!found || found->kind != EDGEC_JSON_INTEGER || found->integer < 0 || found->integer > most)
        return edgec_fail(error, "job.json: '%s' must be a whole number, 0 to %" PRId64, key, most);
    *value = found->integer;
    return true;
}

static bool read_job(Run *run, EdgecError *error)
{
    size_t size;
    int64_t threads, samples, repeats;
    unsigned char *text = read_file(run, "job.json", &size, error);
    if (!text)
        return false;
    run->job = edgec_json_parse(text, size, false, error);
    free(text);
    if (!run->job || !number_of(run, "threads", 1024, &threads, error) ||
        !number_of(run, "samples", 1 << 20, &samples, error) ||
        !number_of(run, "repeats", 1 << 20, &repeats, error))
        return false;
    run->samples = (size_t)samples;
    run->repeats = (size_t)repeats;
    run->latency_ms = calloc(run->repeats + 1, sizeof *run->latency_ms);
    return run->latency_ms || edgec_fail(error, "there is no memory for the job");
}

static bool read_feeds(Run *run, EdgecError *error)
{
    run->feeds = read_file(run, "feeds.tensors", &run->size, error);
    if (!run->feeds)
        return false;
    uint64_t length = 0;
    for (int i = 8; run->size >= 8 && i--;)
        length = length << 8 | run->feeds[i];
    if (run->size < 8 || length > run->size - 8)
        return edgec_fail(error, "feeds.tensors: it is truncated");
    run->start = 8 + (size_t)length;
    run->header = edgec_json_parse(run->feeds + 8, (size_t)length, false, error);
    return run->header != NULL;
}

static bool open_model(Run *run, EdgecError *error)
{
    char path[MAX_PATH_BYTES];
    const EdgecJson *name = edgec_json_find(run->job, "bundle");
    int64_t threads;
    if (!name || name->kind != EDGEC_JSON_STRING || strchr(name->text, '/') ||
        snprintf(path, sizeof path, "%s/%s", run->folder, name->text) >= MAX_PATH_BYTES)
        return edgec_fail(error, "job.json: 'bundle' must be the name of a file in its folder");
    double before = now_ms();
    run->bundle = edgec_bundle_open(path, EDGEC_CHECK_AUTO, error);
    if (!run->bundle || !number_of(run, "threads", 1024, &threads, error))
        return false;
    run->model = edgec_model_open(run->bundle, (int)threads, true, error);
    run->load_ms = now_ms() - before;
    if (!run->model)
        return false;
    size_t values = run->samples * run->model->output_count;
    run->inputs = calloc(run->model->input_count + 1, sizeof *run->inputs);
    run->input_data = calloc(run->model->input_count + 1, sizeof *run->input_data);
    run->outputs = calloc(values + run->model->output_count + 1, sizeof *run->outputs);
    return (run->inputs && run->input_data && run->outputs) ||
           edgec_fail(error, "there is no memory for the job");
}

/* One array of feeds.tensors as a tensor over a copy of its bytes. */
static bool read_feed(Run *run, size_t sample, size_t input, EdgecError *error)
{
    const EdgecValue *wanted = &run->model->inputs[input];
    char key[1024];
    int64_t shape[MAX_RANK];
    size_t rank = 0, code = 0;
    if (snprintf(key, sizeof key, "%zu %s", sample, wanted->name) >= (int)sizeof key)
        return edgec_fail(error, "the name of input '%.60s' is too long", wanted->name);
    const EdgecJson *entry = edgec_json_find(run->header, key);
    const EdgecJson *dtype = edgec_json_find(entry, "dtype");
    const EdgecJson *sizes = edgec_json_find(entry, "shape");
    const EdgecJson *offsets = edgec_json_find(entry, "data_offsets");
    if (!dtype || dtype->kind != EDGEC_JSON_STRING || !sizes || sizes->kind != EDGEC_JSON_ARRAY ||
        sizes->count > MAX_RANK || !offsets || offsets->kind != EDGEC_JSON_ARRAY ||
        offsets->count != 2)
        return edgec_fail(error, "feeds.tensors: there is no array '%.80s'", key);
    while (code < CODE_COUNT && strcmp(dtype->text, CODES[code].code))
        code++;
    if (code == CODE_COUNT || CODES[code].type != wanted->type)
        return edgec_fail(error, "input '%.60s' is fed with dtype %.20s, which is another one",
                          wanted->name, dtype->text);
    uint64_t bytes = CODES[code].size, room = run->size - run->start;
    for (const EdgecJson *size = sizes->first; size; size = size->next) {
        if (size->kind != EDGEC_JSON_INTEGER || size->integer < 0 ||
            (size->integer && bytes > room / (uint64_t)size->integer))
            return edgec_fail(error, "feeds.tensors: '%.80s' has a wrong shape", key);
        bytes *= (uint64_t)size->integer;
        shape[rank++] = size->integer;
    }
    const EdgecJson *first = offsets->first, *last = first->next;
    if (first->kind != EDGEC_JSON_INTEGER || last->kind != EDGEC_JSON_INTEGER ||
        first->integer < 0 || last->integer < first->integer || (uint64_t)last->integer > room ||
        (uint64_t)(last->integer - first->integer) != bytes)
        return edgec_fail(error, "feeds.tensors: '%.80s' does not lie in the file", key);
    void *data = malloc((size_t)bytes + 1); /* aligned, which the file's bytes are not */
    if (!data)
        return edgec_fail(error, "there is no memory for '%.80s'", key);
    memcpy(data, run->feeds + run->start + first->integer, (size_t)bytes);
    run->input_data[input] = data;
    run->inputs[input] =
        edgec_tensor(run->model, wanted->type, shape, rank, data, (size_t)bytes, error);
    return run->inputs[input] != NULL;
}

static void drop_feeds(Run *run)
{
    for (size_t i = 0; run->inputs && i < run->model->input_count; i++) {
        if (run->inputs[i])
            run->model->api->ReleaseValue(run->inputs[i]);
        run->inputs[i] = NULL;
        free(run->input_data[i]);
        run->input_data[i] = NULL;
    }
}

static bool set_feeds(Run *run, size_t sample, EdgecError *error)
{
    drop_feeds(run);
    for (size_t i = 0; i < run->model->input_count; i++)
        if (!read_feed(run, sample, i, error))
            return false;
    return true;
}

/* A call with the present feeds, whose outputs are dropped. */
static bool call(Run *run, EdgecError *error)
{
    const EdgecModel *model = run->model;
    OrtValue **outputs = run->outputs + run->samples * model->output_count;
    bool right = edgec_model_run(model, (const OrtValue *const *)run->inputs, outputs, error);
    for (size_t i = 0; i < model->output_count; i++) {
        if (outputs[i])
            model->api->ReleaseValue(outputs[i]);
        outputs[i] = NULL;
    }
    return right;
}

/* Whether one more sample is likely to end behind the job's limit; LEAST are always run. */
static bool is_enough(const Run *run, size_t done, double spent_ms)
{
    const EdgecJson *limit = edgec_json_find(run->job, "limit_ms");
    if (done < LEAST || !limit || limit->kind != EDGEC_JSON_INTEGER)
        return false;
    return spent_ms / (double)done * (double)(done + 1) > (double)limit->integer;
}

static bool run_all(Run *run, EdgecError *error)
{
    const EdgecJson *count = edgec_json_find(run->job, "count");
    double start = now_ms();
    for (size_t i = 0; i < run->samples; i++) {
        if (!set_feeds(run, i, error) ||
            !edgec_model_run(run->model, (const OrtValue *const *)run->inputs,
                             run->outputs + i * run->model->output_count, error))
            return false;
        if (is_enough(run, i + 1, now_ms() - start))
            run->samples = i + 1; /* no others are written */
    }
    if (!run->samples)
        return true;
    if (!set_feeds(run, 0, error))
        return false;
    for (size_t i = 0; i < run->repeats; i++) {
        double before = now_ms();
        if (!call(run, error))
            return false;
        run->latency_ms[i] = now_ms() - before;
    }
    if (count && count->kind == EDGEC_JSON_BOOL && count->boolean) {
        mark(1);
        bool right = call(run, error);
        mark(2);
        return right;
    }
    return true;
}

/* ---- what is written ---------------------------------------------------------------------- */

static void write_text(FILE *file, const char *text)
{
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\')
            fprintf(file, "\\%c", c);
        else if (c < 0x20)
            fprintf(file, "\\u%04x", c);
        else
            fputc(c, file);
    }
}

typedef struct Output {
    size_t code, rank, bytes;
    int64_t shape[MAX_RANK];
    void *data;
} Output;

static bool describe(const Run *run, const OrtValue *value, Output *output)
{
    const OrtApi *api = run->model->api;
    OrtTensorTypeAndShapeInfo *info = NULL;
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    size_t elements = 0;
    OrtStatus *status = api->GetTensorTypeAndShape(value, &info);
    if (!status)
        status = api->GetTensorElementType(info, &type);
    if (!status)
        status = api->GetTensorShapeElementCount(info, &elements);
    if (!status)
        status = api->GetDimensionsCount(info, &output->rank);
    bool fits = !status && output->rank <= MAX_RANK;
    if (fits)
        status = api->GetDimensions(info, output->shape, output->rank);
    if (fits && !status)
        status = api->GetTensorMutableData((OrtValue *)value, &output->data);
    if (info)
        api->ReleaseTensorTypeAndShapeInfo(info);
    for (output->code = 0; output->code < CODE_COUNT; output->code++)
        if (CODES[output->code].type == type)
            break;
    if (status) {
        api->ReleaseStatus(status);
        return false;
    }
    if (!fits || output->code == CODE_COUNT)
        return false;
    output->bytes = elements * CODES[output->code].size;
    return true;
}

/* Header of outputs.tensors with room for the length before it; returns its length. */
static size_t write_header(const Run *run, FILE *file, const Output *outputs)
{
    size_t position = 0, count = run->model->output_count;
    fwrite("\0\0\0\0\0\0\0", 1, 8, file);
    fputc('{', file);
    for (size_t i = 0; i < run->samples * count; i++) {
        const Output *output = &outputs[i];
        fprintf(file, "%s\"%zu ", i ? "," : "", i / count);
        write_text(file, run->model->outputs[i % count].name);
        fprintf(file, "\":{\"dtype\":\"%s\",\"shape\":[", CODES[output->code].code);
        for (size_t k = 0; k < output->rank; k++)
            fprintf(file, "%s%" PRId64, k ? "," : "", output->shape[k]);
        fprintf(file, "],\"data_offsets\":[%zu,%zu]}", position, position + output->bytes);
        position += output->bytes;
    }
    fputc('}', file);
    while (ftell(file) % 8)
        fputc(' ', file);
    return (size_t)ftell(file) - 8;
}

static bool write_outputs(const Run *run, EdgecError *error)
{
    size_t total = run->samples * run->model->output_count;
    Output *outputs = calloc(total + 1, sizeof *outputs);
    bool right = outputs ? true : edgec_fail(error, "there is no memory for the outputs");
    for (size_t i = 0; right && i < total; i++)
        if (!describe(run, run->outputs[i], &outputs[i]))
            right = edgec_fail(error, "an output is of a dtype that no file of arrays can hold");
    FILE *file = right ? open_in(run, "outputs.tensors", "wb", error) : NULL;
    right = right && file;
    if (right) {
        size_t length = write_header(run, file, outputs);
        for (size_t i = 0; i < total; i++)
            if (outputs[i].bytes) /* the data of an empty array may be NULL */
                fwrite(outputs[i].data, 1, outputs[i].bytes, file);
        rewind(file);
        for (int i = 0; i < 8; i++)
            fputc((int)((uint64_t)length >> 8 * i & 0xFF), file);
        right = !ferror(file) || edgec_fail(error, "outputs.tensors: it cannot be written");
    }
    if (file && fclose(file))
        right = edgec_fail(error, "outputs.tensors: it cannot be written");
    free(outputs);
    return right;
}

static void write_outcome(const Run *run, FILE *file)
{
    bool first = true;
    fprintf(file, "{\"onnxruntime\":\"%s\",\"arch\":\"%s\",\"os\":\"%s\",\"features\":[",
            OrtGetApiBase()->GetVersionString(), edgec_arch(), edgec_os());
    for (const char *const *feature = edgec_features; *feature; feature++) {
        if (!edgec_has(*feature))
            continue;
        fprintf(file, "%s\"%s\"", first ? "" : ",", *feature);
        first = false;
    }
    fprintf(file, "],\"providers\":[\"CPUExecutionProvider\"],\"load_ms\":%.6f,\"latency_ms\":[",
            run->load_ms);
    for (size_t i = 0; i < run->repeats; i++)
        fprintf(file, "%s%.6f", i ? "," : "", run->latency_ms[i]);
    fputs("]}", file);
}

static void drop(Run *run)
{
    if (run->model) {
        drop_feeds(run);
        size_t total = (run->samples + 1) * run->model->output_count;
        for (size_t i = 0; run->outputs && i < total; i++)
            if (run->outputs[i])
                run->model->api->ReleaseValue(run->outputs[i]);
    }
    edgec_model_close(run->model);
    edgec_bundle_close(run->bundle);
    edgec_json_free(run->job);
    edgec_json_free(run->header);
    free(run->feeds);
    free(run->inputs);
    free(run->input_data);
    free(run->outputs);
    free(run->latency_ms);
}

int main(int count, char **arguments)
{
    EdgecError error = {{0}}, unwritten;
    Run run = {0};
    if (count != 2) {
        fputs("usage: run_bundle FOLDER\n", stderr);
        return 2;
    }
    run.folder = arguments[1];
    bool right = read_job(&run, &error) && read_feeds(&run, &error) && open_model(&run, &error) &&
                 run_all(&run, &error) && write_outputs(&run, &error);
    FILE *file = open_in(&run, "outcome.json", "wb", &unwritten);
    if (file && right) {
        write_outcome(&run, file);
    } else if (file) {
        fputs("{\"error\":\"", file);
        write_text(file, error.text);
        fputs("\"}", file);
    }
    if (!file || fclose(file)) {
        fputs("run_bundle: outcome.json cannot be written\n", stderr);
        right = false;
    }
    if (*error.text)
        fprintf(stderr, "run_bundle: %s\n", error.text);
    drop(&run);
    return !right;
}
