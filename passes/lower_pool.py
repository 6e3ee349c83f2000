"""Goes back to opset 18 where that gives a float AveragePool its fast kernel.

Opset 19 gave AveragePool dilations, and ONNX Runtime's kernel for it is a plain loop: four
times slower than the kernel of opset 18 (measured with 1.31: four pools of a ShuffleNet
took 1.27 ms instead of 0.32). A model that uses nothing of a later opset says the same
with opset 18. The checker of ONNX decides whether it does, running both proves it.

Left out on purpose: GlobalAveragePool, which has one kernel for all opsets, and pools of
8-bit numbers, which run as QLinearAveragePool.
"""

from __future__ import annotations

import onnx_ir as ir

from edgec.passes.contract import Context, PassError, Result, Skip
from edgec.passes.equivalence import largest_error, proof_feeds
from edgec.passes.execution import graph_bytes
from edgec.passes.matching import is_op

_FAST_OPSET = 18
_TOLERANCE = 1e-5  # of the output's largest number: the pools sum in another order


def lower_pool(model: ir.Model, context: Context) -> Result:
    """Lower the model's opset if it has such a pool; ``changed`` counts the pools."""
    current = model.opset_imports.get("", 0)
    pools = [node for node in model.graph if is_op(node, "AveragePool") and not _is_8_bit(node)]
    if current <= _FAST_OPSET or not pools:
        return Result(model, 0)
    lowered = model.clone()
    lowered.opset_imports[""] = _FAST_OPSET
    reason = _why_not(model, lowered, context)
    if reason:
        where = f"{pools[0].name or pools[0].outputs[0].name}"
        return Result(model, 0, (Skip(where, f"it keeps the slow kernel of opset 19: {reason}"),))
    return Result(lowered, len(pools))


def _is_8_bit(pool: ir.Node) -> bool:
    """Whether it stands between DequantizeLinear and QuantizeLinear alone."""
    data, result = pool.inputs[0], pool.outputs[0]
    source = data.producer() if data is not None else None
    readers = result.consumers()
    return (
        source is not None
        and is_op(source, "DequantizeLinear")
        and bool(readers)
        and all(is_op(reader, "QuantizeLinear") for reader in readers)
    )


def _why_not(model: ir.Model, lowered: ir.Model, context: Context) -> str:
    import onnx

    try:
        proto = onnx.load_from_string(graph_bytes(lowered))
        onnx.checker.check_model(proto, full_check=True)
    except (PassError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return f"opset {_FAST_OPSET} cannot say it ({str(error).strip().splitlines()[0]})"
    feeds = proof_feeds(model, context)
    if feeds is None:
        return f"no feeds found to prove opset {_FAST_OPSET}; give calibration data"
    try:
        difference = largest_error(model, lowered, [feeds])
    except PassError as error:
        return f"with opset {_FAST_OPSET}, {error}"
    if difference > _TOLERANCE:
        return f"with opset {_FAST_OPSET} outputs differ by {difference:.1e} of their largest"
    return ""
