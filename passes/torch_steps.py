"""What the twin runs: the nodes of a graph in order, checked, Q/DQ pairs as one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgec.passes.contract import PassError
from edgec.passes.torch_call import Operator
from edgec.passes.torch_ops import OPERATORS
from edgec.passes.torch_quantize import quantize_dequantize

_DATA_DEPENDENT = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})


@dataclass(frozen=True)
class Step:
    """What runs at once: a node, or two that make one operator."""

    node: ir.Node
    operator: Operator
    inputs: Sequence[ir.Value | None]
    outputs: Sequence[ir.Value]


def steps(model: ir.Model) -> tuple[Step, ...]:
    """The nodes in order; a QuantizeLinear with the DequantizeLinear behind it is one step.

    Raises PassError naming the first node that the twin does not run.
    """
    found: list[Step] = []
    for node in model.graph:
        _require_claimed(node)
        if node.op_type == "QuantizeLinear" and _pairs(node):
            continue
        quantizer = _quantizer(node)
        if quantizer is None:
            found.append(Step(node, OPERATORS[node.op_type], node.inputs, node.outputs))
            continue
        own = (*quantizer.inputs[:3], None)[:3]
        inputs = (*own, *node.inputs[1:3])
        found.append(Step(quantizer, quantize_dequantize, inputs, node.outputs))
    return tuple(found)


def last_uses(steps: Sequence[Step]) -> dict[int, tuple[str, ...]]:
    """Position of a step -> the values that nothing behind it reads."""
    last: dict[str, int] = {}
    for position, step in enumerate(steps):
        for value in step.inputs:
            if value is not None and value.producer() is not None:
                last[str(value.name)] = position
    at: dict[int, list[str]] = {}
    for name, position in last.items():
        at.setdefault(position, []).append(name)
    return {position: tuple(names) for position, names in at.items()}


def dequantizer(value: ir.Value) -> ir.Node | None:
    """The DequantizeLinear that reads an initializer as its data.

    None if something else reads it too, with another scale for example, or if its scale is no
    initializer: then it is no weight that one float value stands for.
    """
    uses = value.uses()
    nodes = [u.node for u in uses if u.node.op_type == "DequantizeLinear" and u.idx == 0]
    if not nodes or len(nodes) != len(uses):
        return None
    ways = {
        (*n.inputs[1:], *(n.attributes.get_int(a, d) for a, d in (("axis", 1), ("block_size", 0))))
        for n in nodes
    }
    fixed = all(v is None or v.const_value is not None for v in nodes[0].inputs[1:])
    return nodes[0] if fixed and len(ways) == 1 else None


def _require_claimed(node: ir.Node) -> None:
    ours = node.domain in ("", "ai.onnx")
    if ours and node.op_type in OPERATORS:
        return
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in _attributes(node)):
        why = "it is control flow; export the branch that the model needs, or unroll the loop"
    elif ours and node.op_type in _DATA_DEPENDENT:
        why = "the shape of its output depends on data; cut the graph before it"
    elif ours:
        why = "training works on the operators that docs/twin.md lists"
    else:
        why = (
            "training works on standard ONNX: give the file as it was before an optimizer fused it"
        )
    domain = "" if ours else f"{node.domain}::"
    raise PassError(
        f"node '{node.name}' ({domain}{node.op_type}) has no differentiable form: {why}"
    )


def _attributes(node: ir.Node) -> list[ir.Attr]:
    return list(node.attributes.values())


def _quantizer(node: ir.Node) -> ir.Node | None:
    """The QuantizeLinear that makes one step with a DequantizeLinear."""
    if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return None
    source = node.inputs[0].producer()
    return source if source is not None and _pairs(source) else None


def _pairs(node: ir.Node) -> bool:
    """True for a QuantizeLinear per tensor that nothing but such DequantizeLinear reads."""
    if node.op_type != "QuantizeLinear" or node.outputs[0].is_graph_output():
        return False
    readers = [use.node for use in node.outputs[0].uses()]
    scales = [n.inputs[1] for n in (node, *readers) if len(n.inputs) > 1]
    return all(n.op_type == "DequantizeLinear" for n in readers) and all(
        v is not None and v.const_value is not None and v.const_value.size == 1 for v in scales
    )
