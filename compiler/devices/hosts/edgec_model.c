#include "edgec_model.h"

#include "edgec_machine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Session options that a bundle may set (edgec_runtime.manifest.SESSION_CONFIG). */
static const char *const SESSION_CONFIG[] = {
    "mlas.disable_kleidiai",
    "mlas.enable_gemm_fastmath_arm64_bfloat16",
    "mlas.qnbit.force_fp32",
    "mlas.use_lut_gemm",
    "optimization.disable_specified_optimizers",
    "optimization.enable_cast_chain_elimination",
    "optimization.enable_gelu_approximation",
    "session.disable_double_qdq_remover",
    "session.disable_prepacking",
    "session.disable_qdq_constant_folding",
    "session.disable_quant_qdq",
    "session.dynamic_block_base",
    "session.enable_dq_matmulnbits_fusion",
    "session.enable_quant_qdq_cleanup",
    "session.force_spinning_stop",
    "session.graph_optimizations_loop_level",
    "session.inter_op.allow_spinning",
    "session.intra_op.allow_spinning",
    "session.qdq_matmulnbits_accuracy_level",
    "session.qdq_matmulnbits_block_size",
    "session.qdqisint8allowed",
    "session.set_denormal_as_zero",
    "session.use_deterministic_compute",
    "session.use_device_allocator_for_initializers",
    "session.use_env_allocators",
    "session.x64quantprecision",
};

static const char DISABLED[] = "optimization.disable_specified_optimizers";

static const struct {
    const char *name;
    ONNXTensorElementDataType type;
} DTYPES[] = {
    {"bool", ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL},
    {"float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
    {"float32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    {"float64", ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE},
    {"int16", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16},
    {"int32", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
    {"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},
    {"int8", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8},
    {"string", ONNX_TENSOR_ELEMENT_DATA_TYPE_STRING},
    {"uint16", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16},
    {"uint32", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32},
    {"uint64", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64},
    {"uint8", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8},
};

/* What is needed while a session is set up. */
typedef struct Setup {
    const EdgecBundle *bundle;
    const OrtApi *api;
    OrtSessionOptions *options;
    EdgecError *error;
} Setup;

static bool fail(const Setup *setup, const char *what, const char *detail)
{
    return edgec_fail(setup->error, "bundle %.200s: %s%.200s", edgec_bundle_path(setup->bundle),
                      what, detail);
}

/* True if a call succeeded; else its message, and the status is released. */
static bool succeeded(const OrtApi *api, OrtStatus *status, const char *what, EdgecError *error)
{
    if (!status)
        return true;
    edgec_fail(error, "%.220s: %.260s", what, api->GetErrorMessage(status));
    api->ReleaseStatus(status);
    return false;
}

static bool accepted(const Setup *setup, OrtStatus *status)
{
    char what[240];
    snprintf(what, sizeof what, "bundle %.200s: ONNX Runtime refuses it",
             edgec_bundle_path(setup->bundle));
    return succeeded(setup->api, status, what, setup->error);
}

/* ---- what the manifest demands ------------------------------------------------------------ */

static bool is_text(const EdgecJson *value, const char *text)
{
    return value && value->kind == EDGEC_JSON_STRING && !strcmp(value->text, text);
}

static bool has_item(const EdgecJson *array, const char *text)
{
    for (const EdgecJson *item = array ? array->first : NULL; item; item = item->next)
        if (is_text(item, text))
            return true;
    return false;
}

static bool check_target(const Setup *setup)
{
    const EdgecJson *target = edgec_json_find(edgec_bundle_manifest(setup->bundle), "target");
    if (is_text(edgec_json_find(target, "arch"), edgec_arch()) &&
        has_item(edgec_json_find(target, "os"), edgec_os()))
        return true;
    const EdgecJson *name = edgec_json_find(target, "name");
    return edgec_fail(setup->error,
                      "bundle %.200s: built for %.60s, this is %s on %s; build it for this device",
                      edgec_bundle_path(setup->bundle),
                      name && name->text ? name->text : "an unknown target", edgec_arch(),
                      edgec_os());
}

/* Reads "1.27.0" up to four numbers; the position behind, NULL if it is no version. */
static const char *read_version(const char *text, long numbers[4])
{
    char *end;
    memset(numbers, 0, 4 * sizeof *numbers);
    for (int i = 0; i < 4; i++) {
        if (*text < '0' || *text > '9')
            return NULL;
        numbers[i] = strtol(text, &end, 10);
        text = end;
        if (*text != '.' || text[1] < '0' || text[1] > '9')
            return text;
        text++;
    }
    return text;
}

static int compare_versions(const long a[4], const long b[4])
{
    for (int i = 0; i < 4; i++)
        if (a[i] != b[i])
            return a[i] < b[i] ? -1 : 1;
    return 0;
}

/* 1 if the version lies in a range such as ">=1.27,<2", 0 if not, -1 if it is no range. */
static int version_matches(const char *version, const char *range)
{
    static const struct {
        const char *sign;
        bool less, equal, greater;
    } operators[] = {{">=", false, true, true}, {"<=", true, true, false}, {"==", false, true, false},
                     {"!=", true, false, true}, {">", false, false, true}, {"<", true, false, false}};
    long present[4], limit[4];
    int matches = 1;
    if (!read_version(version, present))
        return -1;
    for (;;) {
        size_t i = 0, count = sizeof operators / sizeof *operators;
        range += strspn(range, " ");
        while (i < count && strncmp(range, operators[i].sign, strlen(operators[i].sign)))
            i++;
        if (i == count)
            return -1;
        range += strlen(operators[i].sign);
        range += strspn(range, " ");
        range = read_version(range, limit);
        if (!range)
            return -1;
        int order = compare_versions(present, limit);
        if (!(order < 0 ? operators[i].less : order ? operators[i].greater : operators[i].equal))
            matches = 0;
        range += strspn(range, " ");
        if (!*range)
            return matches;
        if (*range++ != ',')
            return -1;
    }
}

static bool check_version(const Setup *setup)
{
    const EdgecJson *range =
        edgec_json_find(edgec_bundle_manifest(setup->bundle), "onnxruntime");
    const char *version = OrtGetApiBase()->GetVersionString();
    const char *text = range && range->kind == EDGEC_JSON_STRING ? range->text : "";
    int matches = version_matches(version, text);
    if (matches < 0)
        return fail(setup, "this is no range of versions of ONNX Runtime: ", text);
    return matches || edgec_fail(setup->error,
                                 "bundle %.200s: it needs onnxruntime %.60s, this is %.60s",
                                 edgec_bundle_path(setup->bundle), text, version);
}

static bool check_providers(const Setup *setup, const EdgecJson *session, bool any_target)
{
    const EdgecJson *providers = edgec_json_find(session, "providers");
    if (!has_item(providers, "CPUExecutionProvider"))
        return fail(setup, "it does not run on the CPU execution provider", "");
    for (const EdgecJson *item = providers->first; item; item = item->next)
        if (!is_text(item, "CPUExecutionProvider") && !any_target)
            return fail(setup, "it needs an execution provider that this program lacks: ",
                        item->kind == EDGEC_JSON_STRING ? item->text : "");
    return true;
}

/* ---- the session -------------------------------------------------------------------------- */

static bool set(const Setup *setup, const char *key, const char *value)
{
    return accepted(setup, setup->api->AddSessionConfigEntry(setup->options, key, value));
}

/* Entries of the manifest, each of a key that is known to be harmless. */
static bool set_all(const Setup *setup, const EdgecJson *config)
{
    if (!config || config->kind != EDGEC_JSON_OBJECT)
        return fail(setup, "its session options are no table", "");
    for (const EdgecJson *item = config->first; item; item = item->next) {
        size_t i = 0, count = sizeof SESSION_CONFIG / sizeof *SESSION_CONFIG;
        while (i < count && strcmp(item->key, SESSION_CONFIG[i]))
            i++;
        if (i == count || item->kind != EDGEC_JSON_STRING)
            return fail(setup, "this session option is not allowed: ", item->key);
        if (!set(setup, item->key, item->text))
            return false;
    }
    return true;
}

/* The manifest's disabled optimizers, and those that its config names, as one entry. */
static bool disable_optimizers(const Setup *setup, const EdgecJson *session)
{
    const EdgecJson *names = edgec_json_find(session, "disabled_optimizers");
    const EdgecJson *more = edgec_json_find(edgec_json_find(session, "config"), DISABLED);
    size_t length = 0, room = 1 + (more && more->text ? strlen(more->text) : 0);
    if (!names || names->kind != EDGEC_JSON_ARRAY)
        return fail(setup, "its disabled optimizers are no list", "");
    for (const EdgecJson *item = names->first; item; item = item->next) {
        if (item->kind != EDGEC_JSON_STRING)
            return fail(setup, "its disabled optimizers are no names", "");
        room += strlen(item->text) + 1;
    }
    if (!names->count)
        return true;
    char *joined = malloc(room);
    if (!joined)
        return fail(setup, "there is no memory to open it", "");
    joined[0] = 0;
    if (more && more->text)
        length += (size_t)snprintf(joined, room, "%s", more->text);
    for (const EdgecJson *item = names->first; item; item = item->next)
        length += (size_t)snprintf(joined + length, room - length, "%s%s", length ? ";" : "",
                                   item->text);
    bool right = set(setup, DISABLED, joined);
    free(joined);
    return right;
}

static bool configure(const Setup *setup, int threads, bool any_target)
{
    const OrtApi *api = setup->api;
    const EdgecJson *session = edgec_json_find(edgec_bundle_manifest(setup->bundle), "session");
    const EdgecJson *stated = edgec_json_find(session, "threads");
    const EdgecJson *prepacking = edgec_json_find(session, "prepacking");
    const EdgecJson *without = edgec_json_find(session, "without");
    if (!stated || stated->kind != EDGEC_JSON_INTEGER || stated->integer < 0 ||
        stated->integer > 1024 || !prepacking || prepacking->kind != EDGEC_JSON_BOOL ||
        !without || without->kind != EDGEC_JSON_OBJECT)
        return fail(setup, "its manifest does not say how to set up a session", "");
    if (threads < 0)
        threads = (int)stated->integer;
    if (!check_providers(setup, session, any_target) ||
        !accepted(setup, api->SetSessionLogSeverityLevel(setup->options, ORT_LOGGING_LEVEL_FATAL)) ||
        !accepted(setup, api->SetIntraOpNumThreads(setup->options, threads)) ||
        !accepted(setup, api->SetInterOpNumThreads(setup->options, 1)) ||
        !set_all(setup, edgec_json_find(session, "config")) ||
        !disable_optimizers(setup, session))
        return false;
    for (const EdgecJson *item = without->first; item; item = item->next)
        if (!edgec_has(item->key) && !set_all(setup, item))
            return false;
    if (!prepacking->boolean && !set(setup, "session.disable_prepacking", "1"))
        return false;
    return set(setup, "session.model_external_initializers_file_folder_path",
               edgec_bundle_folder(setup->bundle));
}

/* ---- inputs and outputs ------------------------------------------------------------------- */

static bool read_value(const Setup *setup, const EdgecJson *stated, EdgecValue *value)
{
    const EdgecJson *name = edgec_json_find(stated, "name");
    const EdgecJson *dtype = edgec_json_find(stated, "dtype");
    const EdgecJson *shape = edgec_json_find(stated, "shape");
    size_t room = sizeof value->shape / sizeof *value->shape;
    if (!name || name->kind != EDGEC_JSON_STRING || !shape || shape->kind != EDGEC_JSON_ARRAY ||
        shape->count > room)
        return fail(setup, "its manifest does not state its inputs and outputs", "");
    value->name = name->text;
    for (size_t i = 0; i < sizeof DTYPES / sizeof *DTYPES; i++)
        if (is_text(dtype, DTYPES[i].name))
            value->type = DTYPES[i].type;
    if (value->type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED)
        return fail(setup, "its manifest has an unknown dtype for ", name->text);
    for (const EdgecJson *size = shape->first; size; size = size->next)
        value->shape[value->rank++] = size->kind == EDGEC_JSON_INTEGER ? size->integer : -1;
    return true;
}

/* The values of one side of the main graph; NULL for an error. */
static EdgecValue *read_values(const Setup *setup, const char *side, size_t *count)
{
    const EdgecJson *graphs = edgec_json_find(edgec_bundle_manifest(setup->bundle), "graphs");
    const EdgecJson *list = edgec_json_find(edgec_json_find(graphs, "main"), side);
    if (!list || list->kind != EDGEC_JSON_ARRAY) {
        fail(setup, "its manifest states no ", side);
        return NULL;
    }
    EdgecValue *values = calloc(list->count + 1, sizeof *values), *value = values;
    for (const EdgecJson *item = list->first; values && item; item = item->next, value++) {
        if (!read_value(setup, item, value)) {
            free(values);
            return NULL;
        }
    }
    if (!values)
        fail(setup, "there is no memory to open it", "");
    *count = list->count;
    return values;
}

/* The graph has the inputs or outputs that the manifest states. */
static bool check_side(const Setup *setup, const EdgecModel *model, const EdgecValue *values,
                       size_t count, bool input)
{
    const OrtApi *api = setup->api;
    OrtAllocator *allocator;
    size_t actual;
    OrtStatus *status = input ? api->SessionGetInputCount(model->session, &actual)
                              : api->SessionGetOutputCount(model->session, &actual);
    if (!accepted(setup, status) ||
        !accepted(setup, api->GetAllocatorWithDefaultOptions(&allocator)))
        return false;
    if (actual != count)
        return fail(setup, "its graph has another number of inputs or outputs than its manifest",
                    "");
    for (size_t i = 0; i < count; i++) {
        char *name = NULL;
        OrtTypeInfo *info = NULL;
        const OrtTensorTypeAndShapeInfo *tensor = NULL;
        ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        status = input ? api->SessionGetInputName(model->session, i, allocator, &name)
                       : api->SessionGetOutputName(model->session, i, allocator, &name);
        if (!accepted(setup, status))
            return false;
        status = input ? api->SessionGetInputTypeInfo(model->session, i, &info)
                       : api->SessionGetOutputTypeInfo(model->session, i, &info);
        bool read = accepted(setup, status) &&
                    accepted(setup, api->CastTypeInfoToTensorInfo(info, &tensor)) &&
                    (!tensor || accepted(setup, api->GetTensorElementType(tensor, &type)));
        bool same = read && !strcmp(name, values[i].name) && type == values[i].type;
        if (info)
            api->ReleaseTypeInfo(info);
        bool freed = accepted(setup, api->AllocatorFree(allocator, name));
        if (!read || !freed)
            return false;
        if (!same)
            return fail(setup, "its graph has another input or output than its manifest: ",
                        values[i].name);
    }
    return true;
}

static bool open_session(const Setup *setup, EdgecModel *model, int threads, bool any_target)
{
    const OrtApi *api = setup->api;
    size_t size;
    if (!accepted(setup, api->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "edgec", &model->env)) ||
        !accepted(setup, api->DisableTelemetryEvents(model->env)) ||
        !accepted(setup, api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault,
                                                  &model->memory)) ||
        !configure(setup, threads, any_target))
        return false;
    unsigned char *graph = edgec_bundle_graph(setup->bundle, "main", &size, setup->error);
    if (!graph)
        return false;
    OrtStatus *status =
        api->CreateSessionFromArray(model->env, graph, size, setup->options, &model->session);
    free(graph);
    if (!accepted(setup, status))
        return false;
    model->inputs = read_values(setup, "inputs", &model->input_count);
    model->outputs = model->inputs ? read_values(setup, "outputs", &model->output_count) : NULL;
    return model->outputs &&
           check_side(setup, model, model->inputs, model->input_count, true) &&
           check_side(setup, model, model->outputs, model->output_count, false);
}

EdgecModel *edgec_model_open(const EdgecBundle *bundle, int threads, bool any_target,
                             EdgecError *error)
{
    Setup setup = {bundle, OrtGetApiBase()->GetApi(ORT_API_VERSION), NULL, error};
    if (!setup.api) {
        edgec_fail(error, "this program was compiled for API %d of ONNX Runtime, %.60s is older",
                   ORT_API_VERSION, OrtGetApiBase()->GetVersionString());
        return NULL;
    }
    if ((!any_target && !check_target(&setup)) || !check_version(&setup) ||
        !accepted(&setup, setup.api->CreateSessionOptions(&setup.options)))
        return NULL;
    EdgecModel *model = calloc(1, sizeof *model);
    bool opened = model ? true : fail(&setup, "there is no memory to open it", "");
    if (opened) {
        model->api = setup.api;
        opened = open_session(&setup, model, threads, any_target);
    }
    setup.api->ReleaseSessionOptions(setup.options);
    if (!opened) {
        edgec_model_close(model);
        return NULL;
    }
    return model;
}

void edgec_model_close(EdgecModel *model)
{
    if (!model)
        return;
    if (model->session)
        model->api->ReleaseSession(model->session);
    if (model->memory)
        model->api->ReleaseMemoryInfo(model->memory);
    if (model->env)
        model->api->ReleaseEnv(model->env);
    free(model->inputs);
    free(model->outputs);
    free(model);
}

/* ---- running ------------------------------------------------------------------------------ */

OrtValue *edgec_tensor(const EdgecModel *model, ONNXTensorElementDataType type,
                       const int64_t *shape, size_t rank, void *data, size_t size,
                       EdgecError *error)
{
    OrtValue *value = NULL;
    OrtStatus *status = model->api->CreateTensorWithDataAsOrtValue(model->memory, data, size,
                                                                   shape, rank, type, &value);
    return succeeded(model->api, status, "no such tensor", error) ? value : NULL;
}

bool edgec_model_run(const EdgecModel *model, const OrtValue *const *inputs, OrtValue **outputs,
                     EdgecError *error)
{
    size_t count = model->input_count + model->output_count;
    const char **names = malloc((count + 1) * sizeof *names);
    if (!names)
        return edgec_fail(error, "there is no memory to run the model");
    for (size_t i = 0; i < model->input_count; i++)
        names[i] = model->inputs[i].name;
    for (size_t i = 0; i < model->output_count; i++) {
        names[model->input_count + i] = model->outputs[i].name;
        outputs[i] = NULL;
    }
    OrtStatus *status =
        model->api->Run(model->session, NULL, names, inputs, model->input_count,
                        names + model->input_count, model->output_count, outputs);
    free(names);
    return succeeded(model->api, status, "the model cannot run these inputs", error);
}
