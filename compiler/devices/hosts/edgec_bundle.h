/* Opens a bundle of edgec (docs/bundle-format.md) and checks it as edgec_runtime does:
 * every header byte, name, size and place, the digests, the format version, and that each
 * external tensor of a graph lies in the bundle's own weights. C11 and nothing else.
 *
 * Left out on purpose: writing bundles, the golden sample, keys of the manifest that this
 * reader does not need (their types are not checked).
 */
#ifndef EDGEC_BUNDLE_H
#define EDGEC_BUNDLE_H

#include "edgec_json.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct EdgecBundle EdgecBundle;

typedef enum EdgecCheck {
    EDGEC_CHECK_AUTO, /* all digests below 64 MiB, else all but that of the weights */
    EDGEC_CHECK_FULL  /* all digests */
} EdgecCheck;

/* path: UTF-8. NULL and one sentence in error if the file is no intact bundle. */
EdgecBundle *edgec_bundle_open(const char *path, EdgecCheck check, EdgecError *error);
void edgec_bundle_close(EdgecBundle *bundle);

/* As given; the folder of the file itself, links resolved; and what the bundle says. */
const char *edgec_bundle_path(const EdgecBundle *bundle);
const char *edgec_bundle_folder(const EdgecBundle *bundle);
const EdgecJson *edgec_bundle_manifest(const EdgecBundle *bundle);

/* The bytes of an entry, checked against its digest; free() them. */
unsigned char *edgec_bundle_read(const EdgecBundle *bundle, const char *name, size_t *size,
                                 EdgecError *error);

/* The ONNX graph of a role, its external tensors naming this file; free() it. ONNX Runtime
 * finds them if edgec_bundle_folder is the session's external initializers' folder. */
unsigned char *edgec_bundle_graph(const EdgecBundle *bundle, const char *role, size_t *size,
                                  EdgecError *error);

#ifdef __cplusplus
}
#endif
#endif
