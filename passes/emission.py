"""Writes a static quantization into a model: weights, biases and Q/DQ pairs.

Given where quantization goes (`edgec.passes.placement`) and the ranges, everything here
follows without data: so a lock of ranges and bias corrections reproduces the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.passes import placement, qdq
from edgec.passes.affine import Affine, affine_before, folded
from edgec.passes.bias_correction import Twins
from edgec.passes.placement import Placement, Unit, node_input
from edgec.passes.ranges import Range
from edgec.passes.weights import constant, label
from edgec.targets.schema import Int8

Array = np.ndarray[Any, Any]


def emit(
    model: ir.Model,
    plan: Placement,
    spans: Mapping[str, Range],
    int8: Int8,
    corrections: Mapping[str, Array],
) -> dict[ir.Node, str]:
    """Quantize a model in place as planned.

    spans: range of each calibrated value. corrections: what is added to the biases, by name
    of the layer's output. Returns the name of each computing node's dequantized weight.
    """
    writer = qdq.Writer(model)
    parameters = _parameters(plan, spans, int8)
    folds = _folds(plan, parameters)
    written: dict[tuple[ir.Value, bytes], ir.Value] = {}
    # before the pairs go in: afterwards a layer's input is a dequantized value
    for unit in plan.units:
        if unit.computing:
            scale = parameters[unit.data[0][1]].scale
            shift = corrections.get(name_of(unit.node.outputs[0]))
            _emit_weight(writer, unit, int8, input_scale=scale, shift=shift, written=written)
    for value, uses in plan.inputs.items():
        affine, before = folds.get(value, (Affine(value, 1.0, 0.0), parameters[value]))
        dequantized = writer.pair(affine.source, before, parameters[value])
        for node, index in uses:
            node.replace_input_with(index, dequantized)
        writer.drop_chain(value, until=affine.source)
    for value in plan.outputs:
        writer.replace_output(value, parameters[value])
    return {u.node: name_of(u.node.inputs[1]) for u in plan.units if u.computing}


def with_twins(
    model: ir.Model, spans: Mapping[str, Range], int8: Int8, skip: Sequence[str]
) -> tuple[ir.Model, list[Twins]]:
    """A copy of the float model where every computing layer has a quantized twin."""
    copy = model.clone()
    plan = placement.place(copy.graph, int8, skip)
    writer = qdq.Writer(copy)
    parameters = _parameters(plan, spans, int8)
    folds = _folds(plan, parameters)
    twins: list[Twins] = []
    readers: dict[ir.Value, list[ir.Node]] = {}
    for unit in [u for u in plan.units if u.computing]:
        node, (_, source) = unit.node, unit.data[0]
        twin = ir.Node(node.domain, node.op_type, node.inputs, list(node.attributes.values()))
        twin.outputs[0].name = writer.name(f"{name_of(node.outputs[0])}_twin")
        copy.graph.insert_after(node, [twin])
        quantized = Unit(twin, twin.outputs[0], computing=True)
        scale = parameters[source].scale
        _emit_weight(writer, quantized, int8, input_scale=scale, shift=None, written={})
        readers.setdefault(source, []).append(twin)
        axis = 1 if node.op_type == "Conv" else -1
        both = name_of(node.outputs[0]), name_of(twin.outputs[0])
        twins.append(Twins(label(node), *both, axis, corrected=unit.bias is not None))
    for value, nodes in readers.items():
        affine, before = folds.get(value, (Affine(value, 1.0, 0.0), parameters[value]))
        dequantized = writer.pair(affine.source, before, parameters[value])
        for twin in nodes:
            twin.replace_input_with(0, dequantized)
    return copy, twins


def name_of(value: ir.Value | None) -> str:
    """The name of a value of a graph."""
    assert value is not None and value.name is not None  # graphs name their values
    return value.name


def _parameters(
    plan: Placement, spans: Mapping[str, Range], int8: Int8
) -> dict[ir.Value, qdq.Parameters]:
    bounds = {unit.output: unit.bounds for unit in plan.units}
    return {
        value: qdq.activation_parameters(
            spans[name_of(value)], int8.activation, inside=bounds.get(value)
        )
        for value in plan.calibrated
    }


def _folds(
    plan: Placement, parameters: dict[ir.Value, qdq.Parameters]
) -> dict[ir.Value, tuple[Affine, qdq.Parameters]]:
    """Affine maps to fold into the pairs behind them, with the QuantizeLinear's parameters.

    Adapts `parameters` to them, and completes it by the values that take over a scale.
    """
    folds = {}
    for value, uses in plan.inputs.items():
        affine = affine_before(value) if set(value.uses()) == set(uses) else None
        both = None if affine is None else folded(affine, parameters[value])
        if affine is not None and both is not None:
            before, parameters[value] = both
            folds[value] = (affine, before)
    for value, source in plan.scale_of.items():
        parameters[value] = parameters[source]
    return folds


def _emit_weight(
    writer: qdq.Writer,
    unit: Unit,
    int8: Int8,
    *,
    input_scale: float,
    shift: Array | None,
    written: dict[tuple[ir.Value, bytes], ir.Value],
) -> None:
    """Put a layer's weight and bias behind DequantizeLinear.

    shift: added to the bias, which is created if there is none. written: dequantized
    weights by source and scale, so that a shared weight stays shared.
    """
    node, place, weight_value = unit.node, unit.bias, node_input(unit.node, 1)
    bias_value = None if place is None else node_input(*place)
    bias = constant(bias_value)
    if bias is None and place is not None and shift is not None:
        bias = np.zeros(placement.channels(node), np.float32)
    inside = place is not None and place[0] is node  # the kernel itself adds an int32 bias

    least = None
    if bias is not None and inside:
        least = qdq.least_weight_scale(bias.reshape(-1), input_scale)
    array = constant(weight_value)
    assert weight_value is not None and array is not None  # placement took no other
    weight = qdq.quantize_weight(
        array,
        int8.weight,
        axis=placement.channel_axis(node),
        per_channel=int8.per_channel,
        reduce_range=int8.reduce_range,
        least_scale=least,
    )
    shared = (weight_value, weight.scale.tobytes())
    if shared not in written:
        written[shared] = writer.weight(name_of(weight_value), weight, before=node)
    node.replace_input_with(1, written[shared])
    writer.drop(weight_value)
    if place is None or bias is None:
        return

    wish = f"{weight_value.name}_bias" if bias_value is None else name_of(bias_value)
    corrected = bias if shift is None else bias + shift.reshape(bias.shape)
    if inside:
        writer.bias(wish, place, corrected.reshape(-1), np.float32(input_scale) * weight.scale)
    else:
        # MatMul, Add -> MatMul, Sub: before ONNX Runtime looks at Q/DQ it would make a float
        # Gemm of MatMul and Add
        add = place[0]
        add.op_type = "Sub"
        add.replace_input_with(0, node.outputs[0])
        add.replace_input_with(1, writer.initializer(f"{wish}_negated", -corrected))
    if bias_value is not None:
        writer.drop(bias_value)
