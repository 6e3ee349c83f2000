"""Writes a static quantization into a model: weights, biases and Q/DQ pairs.

Given where quantization goes (`edgec.passes.placement`) and the ranges, everything here
follows without data: so a lock of ranges and bias corrections reproduces the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.passes import placement, qdq
from edgec.passes.affine import Affine, affine_before, folded
from edgec.passes.gates import quantize_gates
from edgec.passes.placement import Placement, Unit, node_input
from edgec.passes.ranges import Range
from edgec.passes.static_decisions import Decisions, WeightChoice, weight_key
from edgec.passes.weights import constant
from edgec.targets.schema import Int8

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Scheme:
    """Parameters of every quantized value, and affine maps that go into a pair.

    folds: the map before a value with the parameters of the QuantizeLinear of its source.
    """

    parameters: Mapping[ir.Value, qdq.Parameters]
    folds: Mapping[ir.Value, tuple[Affine, qdq.Parameters]]

    def read(self, value: ir.Value, rows: Array) -> Array:
        """What a layer reads behind the Q/DQ pair of a value, from float32 rows of it."""
        after = self.parameters[value]
        if value not in self.folds:
            return qdq.fake_quantized(rows, after)
        # the source gives the same integers as the value less what the fold left over
        affine, before = self.folds[value]
        kept = np.float32((before.zero_point - after.zero_point) * after.scale)
        return qdq.fake_quantized(rows + (kept - np.float32(affine.offset)), after)

    def least_weight_scale(self, units: Sequence[Unit]) -> Array | None:
        """The smallest scales of a weight of these units for which all biases fit: float32."""
        bounds = []
        for unit in units:
            place = unit.bias
            bias = None if place is None else constant(node_input(*place))
            if bias is not None and place is not None and place[0] is unit.node:
                scale = self.parameters[unit.data[0][1]].scale
                bounds.append(qdq.least_weight_scale(bias.reshape(-1), scale))
        return np.max(bounds, axis=0) if bounds else None


def scheme_of(plan: Placement, spans: Mapping[str, Range], int8: Int8) -> Scheme:
    """Scales and zero points that follow from the ranges."""
    parameters = _parameters(plan, spans, int8)
    return Scheme(parameters, _folds(plan, parameters, int8))


def weight_layers(plan: Placement) -> dict[tuple[ir.Value, int], list[Unit]]:
    """The computing units of each weight, by the weight and the axis of its channels."""
    found: dict[tuple[ir.Value, int], list[Unit]] = {}
    for unit in plan.units:
        value = node_input(unit.node, 1) if unit.computing else None
        if value is not None:
            found.setdefault((value, placement.channel_axis(unit.node)), []).append(unit)
    return found


def quantized_weights(
    plan: Placement, scheme: Scheme, choices: Mapping[str, WeightChoice], int8: Int8
) -> dict[ir.Node, qdq.QuantizedWeight]:
    """The integers of every computing node's weight; shared where the weight is shared."""
    found = {}
    for (value, axis), units in weight_layers(plan).items():
        weight = constant(value)
        assert weight is not None  # placement took no other
        choice = choices.get(weight_key(value, axis), WeightChoice())
        least = scheme.least_weight_scale(units)
        scale = qdq.weight_scale(weight, int8, axis=axis, least_scale=least, shares=choice.shares)
        quantized = qdq.quantize_weight(weight, int8, scale, axis=axis, steps=choice.steps)
        found.update({unit.node: quantized for unit in units})
    return found


def emit(model: ir.Model, plan: Placement, decided: Decisions, int8: Int8) -> dict[ir.Node, str]:
    """Quantize a model in place as planned and decided.

    Returns the name of each computing node's dequantized weight.
    """
    writer = qdq.Writer(model)
    scheme = scheme_of(plan, decided.ranges, int8)
    weights = quantized_weights(plan, scheme, decided.weights, int8)
    written: dict[int, ir.Value] = {}
    # before the pairs go in: afterwards a layer's input is a dequantized value
    for unit in plan.units:
        if unit.computing:
            scale = scheme.parameters[unit.data[0][1]].scale
            shift = decided.shifts.get(name_of(unit.node.outputs[0]))
            weight = weights[unit.node]
            _emit_weight(writer, unit, weight, input_scale=scale, shift=shift, written=written)
    for value, uses in plan.inputs.items():
        parameters = scheme.parameters[value]
        affine, before = scheme.folds.get(value, (Affine(value, 1.0, 0.0), parameters))
        dequantized = writer.pair(affine.source, before, parameters)
        for node, index in uses:
            node.replace_input_with(index, dequantized)
        writer.drop_chain(value, until=affine.source)
    for value in plan.outputs:
        writer.replace_output(value, scheme.parameters[value])
    if "HardSwish" in int8.integer_ops:
        quantize_gates(unit.node for unit in plan.units)
    return {u.node: name_of(u.node.inputs[1]) for u in plan.units if u.computing}


def name_of(value: ir.Value | None) -> str:
    """The name of a value of a graph."""
    assert value is not None and value.name is not None  # graphs name their values
    return value.name


def _parameters(
    plan: Placement, spans: Mapping[str, Range], int8: Int8
) -> dict[ir.Value, qdq.Parameters]:
    bounds = {unit.output: unit.bounds for unit in plan.units}
    factors = plan.multiplied
    found = {}
    for value in plan.calibrated:
        span, dtype = spans[name_of(value)], int8.activation
        if value in factors:
            found[value] = qdq.factor_parameters(span, dtype)
        else:
            found[value] = qdq.activation_parameters(span, dtype, inside=bounds.get(value))
    return found


def _folds(
    plan: Placement, parameters: dict[ir.Value, qdq.Parameters], int8: Int8
) -> dict[ir.Value, tuple[Affine, qdq.Parameters]]:
    """Affine maps to fold into the pairs behind them, with the QuantizeLinear's parameters.

    Adapts `parameters` to them, and completes it by the values that take over a scale. None
    where a pair must have one scale: an engine that keeps one scale per tensor drops the map.
    """
    folds = {}
    for value, uses in plan.inputs.items():
        alone = int8.two_scales and set(value.uses()) == set(uses)
        affine = affine_before(value) if alone else None
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
    weight: qdq.QuantizedWeight,
    *,
    input_scale: float,
    shift: Array | None,
    written: dict[int, ir.Value],
) -> None:
    """Put a layer's weight and bias behind DequantizeLinear.

    shift: added to the bias, which is created if there is none. written: dequantized
    weights by identity of the quantized ones, so that a shared weight stays shared.
    """
    node, place, weight_value = unit.node, unit.bias, node_input(unit.node, 1)
    bias_value = None if place is None else node_input(*place)
    bias = constant(bias_value)
    if bias is None and place is not None and shift is not None:
        bias = np.zeros(placement.channels(node), np.float32)
    inside = place is not None and place[0] is node  # the kernel itself adds an int32 bias

    assert weight_value is not None  # placement took no other
    if id(weight) not in written:
        written[id(weight)] = writer.weight(name_of(weight_value), weight, before=node)
    node.replace_input_with(1, written[id(weight)])
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
