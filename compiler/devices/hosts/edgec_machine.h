/* This machine in the words of a target file: instruction set, system, CPU features. */
#ifndef EDGEC_MACHINE_H
#define EDGEC_MACHINE_H

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

const char *edgec_arch(void); /* of this program: "x86_64", "arm64", ... */
const char *edgec_os(void);   /* "linux", "windows", "macos", "android", "ios" */

/* The features that this file can tell, NULL behind the last, and whether the CPU has one.
 * What it cannot tell counts as absent: the session's entries for CPUs without a feature are
 * right everywhere. */
extern const char *const edgec_features[];
bool edgec_has(const char *feature);

#ifdef __cplusplus
}
#endif
#endif
