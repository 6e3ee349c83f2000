"""Where quantization goes: which nodes run in integers, and which values get Q/DQ pairs.

ONNX Runtime turns DequantizeLinear -> op -> QuantizeLinear into an integer kernel. So a
computing op of the target with a constant weight is quantized on its inputs, and on its
output where the kernel needs that (Conv) or where the consumers are quantized anyway.
Where products of two activations pay, they are quantized on both inputs likewise. A Relu
or Clip behind an op stays between it and the QuantizeLinear, which makes it redundant. Ops that
merely have an integer kernel (residual Add, pooling, reshapes) join in where all their inputs
are quantized and their result reaches a computing op: so there are no Q/DQ pairs around float
islands (HardSwish, LayerNorm, Softmax).

Which ops those are is data of the target; this file knows only how each op kind behaves.
Left out: subgraphs and functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Skip
from edgec.passes.ranges import Range
from edgec.passes.weights import Array, constant, label
from edgec.targets.schema import Int8

# ops whose output has the scale of their input
_SAME_SCALE = frozenset({"Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_ACTIVATIONS = frozenset({"Clip", "Relu"})  # redundant before a QuantizeLinear that saturates alike
# number of leading float inputs that are data; the others are shapes and axes
_DATA_INPUTS = {"Add": 2, "MatMul": 2, "Mul": 2}
_COMPUTING = frozenset({"Conv", "Gemm", "MatMul"})
_OUTPUT_OPTIONAL = frozenset({"Gemm", "MatMul"})  # have an integer kernel with float output


@dataclass(frozen=True)
class Unit:
    """A node that runs in integers, with the activation function behind it, if any.

    output: the last value of the unit. computing: it has a constant weight. bounds: what the
    activation function limits its output to.
    """

    node: ir.Node
    output: ir.Value
    computing: bool
    bounds: Range | None = None

    @property
    def data(self) -> tuple[tuple[int, ir.Value], ...]:
        """The inputs that carry activations, with their positions."""
        if self.computing:
            return ((0, _input(self.node, 0)),)
        count = _DATA_INPUTS.get(self.node.op_type, 1)
        if self.node.op_type == "Concat":
            count = len(self.node.inputs)
        return tuple((i, _input(self.node, i)) for i in range(count))

    @property
    def multiplies_activations(self) -> bool:
        """True for a product without a weight, as attention has two."""
        return self.node.op_type == "MatMul" and not self.computing

    @property
    def bias(self) -> tuple[ir.Node, int] | None:
        """Where a computing node's bias is or could be: a node and the position of its input.

        For a MatMul that is the constant of an Add behind it; None if there is none.
        """
        if not self.computing:
            return None
        if self.node.op_type != "MatMul":
            return self.node, 2
        uses = list(self.node.outputs[0].uses())
        if len(uses) != 1 or uses[0][0].op_type != "Add" or self.node.outputs[0].is_graph_output():
            return None
        add, index = uses[0]
        bias = constant(add.inputs[1 - index])
        if bias is None or not _is_row(bias, channels(self.node)):
            return None
        return add, 1 - index

    @property
    def same_scale(self) -> bool:
        """True if the output must have the scale of the input."""
        return self.node.op_type in _SAME_SCALE


@dataclass(frozen=True)
class Placement:
    """The outcome: all values that are quantized, and the nodes that run in integers.

    units: in graph order. outputs: values of units whose consumers all read the Q/DQ pair.
    inputs: other values, with the uses that read the pair. scale_of: value -> the value whose
    scale it takes over, where it is not its own.
    """

    units: tuple[Unit, ...]
    outputs: tuple[ir.Value, ...]
    inputs: Mapping[ir.Value, tuple[tuple[ir.Node, int], ...]]
    scale_of: Mapping[ir.Value, ir.Value]
    skipped: tuple[Skip, ...]

    @property
    def multiplied(self) -> frozenset[ir.Value]:
        """The values whose scale products of two activations read."""
        products = (unit for unit in self.units if unit.multiplies_activations)
        read = (value for unit in products for _, value in unit.data)
        return frozenset(self.scale_of.get(value, value) for value in read)

    @property
    def calibrated(self) -> tuple[ir.Value, ...]:
        """The values whose range has to be known."""
        return tuple(v for v in (*self.inputs, *self.outputs) if v not in self.scale_of)


def place(graph: ir.Graph, int8: Int8, skip: Sequence[str]) -> Placement:
    """Decide what is quantized under a target's int8 scheme; changes nothing.

    skip: names of nodes that stay float.
    """
    candidates: dict[ir.Node, Unit] = {}
    reasons: dict[ir.Node, str] = {}
    # values that can be had in integers
    quantized = {
        n.inputs[0]
        for n in graph
        if _computes(n, int8, skip) and (int8.depthwise_pays or not _depthwise(n))
    }
    for node in graph:
        if _multiplies_activations(node, int8) and label(node) not in skip:
            quantized.update(node.inputs)
    inner: set[ir.Node] = set()  # activation functions inside units
    for node in graph:
        if node in inner:
            continue
        reason = "named in skip" if label(node) in skip else _refusal(node, int8, quantized)
        if reason:
            reasons[node] = reason
            continue
        unit = _unit(node, int8, skip)
        candidates[node] = unit
        inner.update(n for n in (unit.output.producer(),) if n is not None and n is not node)
        quantized.add(unit.output)

    kept = _reaching_a_computing_op(candidates)
    for node in candidates:
        if node not in kept:
            reasons[node] = "its result reaches no quantized op"
    units = tuple(candidates[node] for node in candidates if node in kept)
    outputs, inputs, scale_of = _values(units, int8)
    skipped = tuple(Skip(label(n), reasons[n]) for n in graph if n in reasons)
    return Placement(units, outputs, inputs, scale_of, skipped)


def _computes(node: ir.Node, int8: Int8, skip: Sequence[str]) -> bool:
    wanted = node.op_type in int8.static_ops and node.op_type in _COMPUTING
    wanted = wanted and node.domain in ("", "ai.onnx")
    return wanted and label(node) not in skip and not _computing_refusal(node, int8)


def _refusal(node: ir.Node, int8: Int8, quantized: set[ir.Value | None]) -> str:
    if node.domain not in ("", "ai.onnx"):
        return f"{node.domain}::{node.op_type}: not an op of standard ONNX"
    if _multiplies_activations(node, int8):
        return ""
    if node.op_type in int8.static_ops and node.op_type in _COMPUTING:
        reason = _computing_refusal(node, int8)
        if reason or int8.depthwise_pays or not _depthwise(node) or node.inputs[0] in quantized:
            return reason
        return "depthwise Conv of a float value: float is as fast on the target"
    if node.op_type not in int8.integer_ops:
        return f"{node.op_type}: not in static_ops of the target, or not in ops"
    if len([o for o in node.outputs if o.name]) > 1:
        return f"{node.op_type} with {len(node.outputs)} outputs"
    if node.op_type in _ACTIVATIONS:
        return f"{node.op_type}: not directly behind a quantized op that it could join"
    unit = Unit(node, node.outputs[0], computing=False)
    if any(node.inputs[i] is None or value not in quantized for i, value in unit.data):
        return f"{node.op_type}: not all of its inputs are quantized"
    return ""


def _multiplies_activations(node: ir.Node, int8: Int8) -> bool:
    wanted = int8.activation_products and node.op_type == "MatMul"
    wanted = wanted and "MatMul" in int8.static_ops and node.domain in ("", "ai.onnx")
    return wanted and all(constant(value) is None for value in node.inputs)


def _grouped(node: ir.Node) -> bool:
    group = node.attributes.get("group")
    return group is not None and group.as_int() > 1


def _depthwise(node: ir.Node) -> bool:
    weight = constant(node.inputs[1]) if node.op_type == "Conv" and _grouped(node) else None
    return weight is not None and weight.shape[1] == 1


def _computing_refusal(node: ir.Node, int8: Int8) -> str:
    weight = constant(node.inputs[1])
    if weight is None:
        return "weight is not constant"
    if weight.dtype != np.float32:
        return f"weight is {weight.dtype}, not float32"
    if not weight.size:
        return "weight is empty"
    if not np.isfinite(weight).all():
        return "weight contains NaN or infinity"
    if constant(node.inputs[0]) is not None:
        return "its input is constant"
    rank = weight.ndim
    if node.op_type == "Conv" and not 3 <= rank <= 5:
        return f"weight has {rank} dimensions"
    if node.op_type == "Conv" and not _grouped(node) and weight.shape[1] < int8.min_channels:
        return (
            f"Conv of {weight.shape[1]} input channels: float is faster below "
            f"{int8.min_channels} on the target"
        )
    if node.op_type in ("Gemm", "MatMul") and rank != 2:
        return f"weight has {rank} dimensions, an integer {node.op_type} needs 2"
    if node.op_type == "Gemm" and (_float(node, "alpha"), _float(node, "beta")) != (1.0, 1.0):
        return "Gemm with alpha or beta other than 1"
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = constant(node.inputs[2])
        if bias is None:
            return "bias is not constant"
        if not _is_row(bias, channels(node)):
            return f"bias has shape {list(bias.shape)} for {channels(node)} channels"
    return ""


def node_input(node: ir.Node, index: int) -> ir.Value | None:
    """The value at an input; None if it is absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def channel_axis(node: ir.Node) -> int:
    """The dimension of a computing node's weight that holds its output channels."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        attribute = node.attributes.get("transB")
        return 0 if attribute is not None and attribute.as_int() else 1
    return 1


def channels(node: ir.Node) -> int:
    """The number of output channels of a computing node."""
    weight = constant(node.inputs[1])
    assert weight is not None  # refused before
    return int(weight.shape[channel_axis(node)])


def _is_row(bias: Array, count: int) -> bool:
    """True for one number per channel along the last axis."""
    return bias.size == count and bias.shape[-1:] in ((), (count,))


def _unit(node: ir.Node, int8: Int8, skip: Sequence[str]) -> Unit:
    """The node with the activation function behind it, if it can join."""
    output = node.outputs[0]
    computing = node.op_type in _COMPUTING and not _multiplies_activations(node, int8)
    bounds = None
    if node.op_type not in _SAME_SCALE and not output.is_graph_output():
        uses = list(output.uses())
        if len(uses) == 1 and uses[0][1] == 0 and uses[0][0].graph is node.graph:
            follower = uses[0][0]
            joins = follower.op_type in int8.integer_ops and label(follower) not in skip
            bounds = _bounds(follower) if joins else None
            output = follower.outputs[0] if bounds is not None else output
    return Unit(node, output, computing, bounds)


def _bounds(node: ir.Node) -> Range | None:
    """What Relu or a constant Clip around zero limits its output to; None for other ops."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Relu":
        return Range(0.0, math.inf)
    if node.op_type != "Clip":
        return None
    limits = [-math.inf, math.inf]
    for i in (1, 2):
        if len(node.inputs) > i and node.inputs[i] is not None:
            tensor = constant(node.inputs[i])
            if tensor is None:
                return None
            limits[i - 1] = float(tensor.item())
    low, high = limits
    return Range(low, high) if low <= 0.0 < high else None


def _reaching_a_computing_op(candidates: Mapping[ir.Node, Unit]) -> set[ir.Node]:
    kept: set[ir.Node] = set()
    for node, unit in reversed(list(candidates.items())):
        starts = unit.computing or unit.multiplies_activations
        if starts or any(consumer in kept for consumer, _ in unit.output.uses()):
            kept.add(node)
    return kept


def _values(
    units: Sequence[Unit],
    int8: Int8,
) -> tuple[
    tuple[ir.Value, ...],
    dict[ir.Value, tuple[tuple[ir.Node, int], ...]],
    dict[ir.Value, ir.Value],
]:
    kept = {unit.node for unit in units}
    outputs: list[ir.Value] = []
    for unit in units:
        consumed = any(consumer in kept for consumer, _ in unit.output.uses())
        optional = int8.float_outputs and unit.node.op_type in _OUTPUT_OPTIONAL
        if consumed or not optional:
            outputs.append(unit.output)
    known = set(outputs)
    inputs: dict[ir.Value, tuple[tuple[ir.Node, int], ...]] = {}
    scale_of: dict[ir.Value, ir.Value] = {}
    for unit in units:
        for index, value in unit.data:
            if value not in known:
                inputs[value] = (*inputs.get(value, ()), (unit.node, index))
        if unit.same_scale:
            source = unit.data[0][1]
            scale_of[unit.output] = scale_of.get(source, source)
    return tuple(outputs), inputs, scale_of


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node_input(node, index)
    assert value is not None  # computing and integer ops have all their data inputs
    return value


def _float(node: ir.Node, name: str) -> float:
    attribute = node.attributes.get(name)
    return 1.0 if attribute is None else attribute.as_float()
