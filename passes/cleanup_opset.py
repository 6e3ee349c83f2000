"""Raises a model to the target's opset, if the result is proven to compute the same.

From 18 up onnxscript's converter does it, below 18 ONNX's own one. Both change semantics
now and then and know nothing of operators in subgraphs; so the result is loaded and run
beside the original on the first calibration sample or on random feeds, and dropped if it
fails or differs.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from edgec.passes.contract import Context, PassError, Skip
from edgec.passes.equivalence import largest_error, proof_feeds
from edgec.passes.execution import graph_bytes

TOLERANCE = 1e-4  # of the output's largest number: float noise of other kernels, no more
_FIRST_NATIVE = 18  # lowest opset that onnxscript's converter reads
_IR_VERSIONS = ((21, 10), (19, 9), (15, 8))  # opset -> the IR version it came with


def raise_opset(model: ir.Model, context: Context) -> tuple[ir.Model, Skip | None]:
    """The model at the target's opset, or the model as it is and the reason."""
    current, wanted = model.opset_imports.get("", 0), context.target.opset
    if current == wanted or current == 0:
        return model, None
    step = f"opset {current} to {wanted}"
    if current > wanted:
        return model, Skip("graph", f"{step}: a model cannot be lowered to an older opset")
    feeds = proof_feeds(model, context)
    if feeds is None:
        return model, Skip("graph", f"{step}: no feeds found to check it; give calibration data")
    reason = ""
    # straight to the target, or as far as ONNX's converter is needed and natively from there
    for halt in (_FIRST_NATIVE, wanted) if current < _FIRST_NATIVE else (current,):
        try:
            converted = _convert(model, halt, wanted)
            error = largest_error(model, converted, [feeds])
        except PassError as problem:
            reason = str(problem)
            continue
        if error <= TOLERANCE:
            return converted, None
        reason = f"outputs differ by {error:.1e} of their largest number"
    return model, Skip("graph", f"{step}: {reason}")


def _convert(model: ir.Model, halt: int, wanted: int) -> ir.Model:
    """ONNX's converter up to opset ``halt``, onnxscript's from there to ``wanted``."""
    from onnxscript.version_converter import convert_version

    work = model.clone()
    if work.opset_imports[""] < halt:
        work = _convert_by_onnx(work, halt)
    try:
        if work.opset_imports[""] < wanted:
            convert_version(work, target_version=wanted)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise PassError(f"the converter failed: {_one_line(error)}") from error
    newest = next((version for opset, version in _IR_VERSIONS if wanted >= opset), 8)
    work.ir_version = max(work.ir_version or 0, newest)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(work)
    common.LiftSubgraphInitializersToMainGraphPass()(work)
    common.NameFixPass()(work)
    return work


def _convert_by_onnx(model: ir.Model, wanted: int) -> ir.Model:
    import onnx
    import onnx.version_converter

    proto = onnx.load_from_string(graph_bytes(model))
    try:
        return ir.from_proto(onnx.version_converter.convert_version(proto, wanted))
    except (RuntimeError, ValueError) as error:
        raise PassError(f"the converter failed: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
