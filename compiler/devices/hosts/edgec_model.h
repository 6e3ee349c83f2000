/* A bundle as a session of ONNX Runtime, set up as its manifest says; by onnxruntime's C API.
 *
 * The CPU execution provider is the only one here: a bundle for another one is refused.
 */
#ifndef EDGEC_MODEL_H
#define EDGEC_MODEL_H

#include "edgec_bundle.h"

#ifdef __MINGW32__
#include <specstrings.h>
#ifndef _Return_type_success_ /* an annotation that MinGW's headers lack */
#define _Return_type_success_(condition)
#endif
#endif
#include <onnxruntime_c_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* An input or output. shape: -1 where a dimension is dynamic. */
typedef struct EdgecValue {
    const char *name;
    ONNXTensorElementDataType type;
    size_t rank;
    int64_t shape[16];
} EdgecValue;

typedef struct EdgecModel {
    const OrtApi *api;
    OrtEnv *env;
    OrtSession *session;
    OrtMemoryInfo *memory; /* of tensors in main memory */
    size_t input_count, output_count;
    EdgecValue *inputs, *outputs;
} EdgecModel;

#define EDGEC_THREADS_OF_MANIFEST (-1)

/* threads: intra-op threads, 0 lets ONNX Runtime choose. any_target: also open a bundle that
 * was built for another instruction set, system or execution provider.
 * NULL and one sentence in error if it cannot be opened. The bundle must stay open. */
EdgecModel *edgec_model_open(const EdgecBundle *bundle, int threads, bool any_target,
                             EdgecError *error);
void edgec_model_close(EdgecModel *model);

/* A tensor over the caller's memory, which must stay; release with api->ReleaseValue. */
OrtValue *edgec_tensor(const EdgecModel *model, ONNXTensorElementDataType type,
                       const int64_t *shape, size_t rank, void *data, size_t size,
                       EdgecError *error);

/* Runs it: one value per input, in the order of model->inputs. outputs: room for
 * model->output_count values, to be released with api->ReleaseValue. */
bool edgec_model_run(const EdgecModel *model, const OrtValue *const *inputs, OrtValue **outputs,
                     EdgecError *error);

#ifdef __cplusplus
}
#endif
#endif
