"""Static int8: activation ranges from calibration data, integer kernels on the device.

The float model runs once over the calibration data, sample after sample, into histograms;
from them come the ranges, and with them Q/DQ pairs where `edgec.passes.placement` says that
the target's ONNX Runtime executes integers. Then the biases are corrected, and ONNX
Runtime's own optimizer is asked whether each pair really became an integer kernel.

Left out: 16-bit activations, mixed precision, cross-layer equalization.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from edgec.passes import bias_correction, placement, qdq, ranges
from edgec.passes.contract import Context, PassError, Result, Stage
from edgec.passes.execution import optimized_graph, run_values
from edgec.passes.placement import Placement, Unit, constant, node_input
from edgec.passes.ranges import Histogram, Range, RangeMethod
from edgec.targets.schema import Int8
from edgec_runtime.errors import suggestion

Array = np.ndarray[Any, Any]

_LEAST_OPSET = 13  # DequantizeLinear with an axis
_FLOAT_KERNELS = frozenset({"Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul"}) | {
    "MatMulNBits"
}


@dataclass(frozen=True)
class QuantizeStatic:
    """Quantize weights and activations to 8 bits with ranges measured beforehand.

    Cases: Conv (grouped, depthwise), Gemm and MatMul with a constant weight; a Relu or Clip
    behind them; residual Add, pooling, Concat and reshapes between them. Needs calibration
    data, or the decisions of an earlier run.
    """

    name: ClassVar[str] = "quantize-static"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    lossless: ClassVar[bool] = False
    version: ClassVar[int] = 1

    ranges: RangeMethod = "percentile"  # how the range of an activation is chosen
    percentile: float = 99.999  # share of values inside the range, for ranges = "percentile"
    skip: tuple[str, ...] = ()  # names of nodes that stay float
    bias_correction: bool = True  # give each channel the mean that it has in float

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.ranges not in ("minmax", "percentile", "mse"):
            near = suggestion(self.ranges, ("minmax", "percentile", "mse"))
            raise PassError(f"quantize-static: no ranges method '{self.ranges}'{near}")
        if not 50.0 < self.percentile <= 100.0:
            raise PassError(
                f"quantize-static: percentile is {self.percentile}, expected above 50 up to 100"
            )

    def run(self, model: ir.Model, context: Context) -> Result:
        """Insert Q/DQ pairs around everything that pays on the target in integers."""
        int8 = context.target.int8
        self._check(model)
        plan = placement.place(model.graph, int8, self.skip)
        if not plan.units:
            return Result(model, 0, skipped=plan.skipped)
        if context.lock:
            spans, corrections = _replayed(context.lock, plan, self.bias_correction)
        else:
            spans, corrections = self._measured(model, plan, context)
        decisions = {
            "ranges": {name: [s.low.hex(), s.high.hex()] for name, s in spans.items()},
            "bias": {
                name: shift.astype("<f4").tobytes().hex() for name, shift in corrections.items()
            },
        }
        touched = tuple(unit.output.name or "" for unit in plan.units)
        _emit(model, plan, spans, int8, corrections)
        findings = _unfused(model, plan)
        return Result(model, len(plan.units), plan.skipped, touched, decisions, findings)

    def _check(self, model: ir.Model) -> None:
        opset = model.opset_imports.get("", 0)
        if opset < _LEAST_OPSET:
            raise PassError(
                f"the model has opset {opset}; quantization per channel needs {_LEAST_OPSET}: "
                "convert the model, or run cleanup first"
            )
        names = {node.name for node in model.graph if node.name}
        for name in self.skip:
            if name not in names:
                near = suggestion(name, sorted(names))
                raise PassError(f"quantize-static: skip names no node '{name}'{near}")

    def _measured(
        self, model: ir.Model, plan: Placement, context: Context
    ) -> tuple[dict[str, Range], dict[str, Array]]:
        samples = context.calibration
        if samples is None or len(samples) == 0:
            raise PassError(
                "quantize-static needs calibration data: give some dozen typical inputs, or "
                "use a pass without data (quantize-dynamic, quantize-weights)"
            )
        histograms: dict[str, Histogram] = {}
        names = [_name(value) for value in plan.calibrated]
        for number, arrays in enumerate(run_values(model, names, samples)):
            for name in names:
                histogram = _histogram(arrays[name], name, number)
                known = histograms.get(name)
                histograms[name] = histogram if known is None else known.merge(histogram)
            context.progress("calibrate", number + 1, len(samples))
        spans = {name: self._span(histograms[name]) for name in names}
        if not self.bias_correction:
            return spans, {}
        int8 = context.target.int8
        beside, twins = _with_twins(model, spans, int8, self.skip)
        report = functools.partial(context.progress, "correct biases")
        return spans, bias_correction.bias_shifts(beside, twins, samples, progress=report)

    def _span(self, histogram: Histogram) -> Range:
        if self.ranges == "percentile":
            return ranges.percentile(histogram, self.percentile)
        if self.ranges == "mse":
            return ranges.least_squares(histogram, 255)
        return ranges.minmax(histogram)


def _replayed(
    lock: Mapping[str, Any], plan: Placement, bias_correction: bool
) -> tuple[dict[str, Range], dict[str, Array]]:
    """Ranges and bias corrections of an earlier run.

    Raises PassError if the run was made for another graph or with other parameters.
    """
    spans = {
        name: Range(float.fromhex(low), float.fromhex(high))
        for name, (low, high) in lock.get("ranges", {}).items()
    }
    corrections = {
        name: np.frombuffer(bytes.fromhex(text), "<f4").astype(np.float32)
        for name, text in lock.get("bias", {}).items()
    }
    needed = [_name(value) for value in plan.calibrated]
    missing = [n for n in needed if n not in spans]
    if bias_correction:
        sites = [_name(u.node.outputs[0]) for u in plan.units if u.bias]
        missing += [n for n in sites if n not in corrections]
    elif corrections:
        raise PassError("the lock holds bias corrections, but bias_correction is off: rebuild it")
    if missing:
        raise PassError(
            f"the lock knows nothing about value '{missing[0]}': it was made for another model "
            "or target; build without it"
        )
    return spans, corrections


def _histogram(values: Array, name: str, number: int) -> Histogram:
    try:
        return Histogram.of(values)
    except ValueError as error:
        raise PassError(
            f"calibration sample {number}: value '{name}' holds {error}; expected finite "
            "numbers: check the sample, or the model's weights"
        ) from error


def _emit(
    model: ir.Model,
    plan: Placement,
    spans: Mapping[str, Range],
    int8: Int8,
    corrections: Mapping[str, Array],
) -> None:
    """Write the quantization into the model.

    corrections: what is added to the biases, by name of the layer's output.
    """
    writer = qdq.Writer(model)
    parameters = _parameters(plan, spans, int8)
    written: dict[tuple[ir.Value, bytes], ir.Value] = {}
    # before the pairs go in: afterwards a layer's input is a dequantized value
    for unit in plan.units:
        if unit.computing:
            scale = parameters[unit.data[0][1]].scale
            shift = corrections.get(_name(unit.node.outputs[0]))
            _emit_weight(writer, unit, int8, scale, shift, written)
    for value, uses in plan.inputs.items():
        writer.quantize_inputs(value, uses, parameters[value])
    for value in plan.outputs:
        writer.quantize_output(value, parameters[value])


def _with_twins(
    model: ir.Model, spans: Mapping[str, Range], int8: Int8, skip: tuple[str, ...]
) -> tuple[ir.Model, list[bias_correction.Twins]]:
    """A copy of the float model where every layer with a bias has a quantized twin."""
    copy = model.clone()
    plan = placement.place(copy.graph, int8, skip)
    writer = qdq.Writer(copy)
    parameters = _parameters(plan, spans, int8)
    twins: list[bias_correction.Twins] = []
    uses: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    for unit in [u for u in plan.units if u.bias]:
        node, (_, source) = unit.node, unit.data[0]
        attributes = list(node.attributes.values())
        twin = ir.Node(node.domain, node.op_type, node.inputs, attributes)
        twin.outputs[0].name = writer.name(f"{_name(node.outputs[0])}_twin")
        copy.graph.insert_after(node, [twin])
        quantized = Unit(twin, twin.outputs[0], computing=True)
        _emit_weight(writer, quantized, int8, parameters[source].scale, None, {})
        uses.setdefault(source, []).append((twin, 0))
        axis = 1 if node.op_type == "Conv" else -1
        twins.append(bias_correction.Twins(_name(node.outputs[0]), _name(twin.outputs[0]), axis))
    for value, places in uses.items():
        writer.quantize_inputs(value, places, parameters[value])
    return copy, twins


def _parameters(
    plan: Placement, spans: Mapping[str, Range], int8: Int8
) -> dict[ir.Value, qdq.Parameters]:
    bounds = {unit.output: unit.bounds for unit in plan.units}
    parameters = {
        value: qdq.activation_parameters(
            spans[_name(value)], int8.activation, inside=bounds.get(value)
        )
        for value in plan.calibrated
    }
    for value, source in plan.scale_of.items():
        parameters[value] = parameters[source]
    return parameters


def _emit_weight(
    writer: qdq.Writer,
    unit: Unit,
    int8: Int8,
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
    bias = None if bias_value is None else _array(bias_value)
    if bias is None and place is not None and shift is not None:
        bias = np.zeros(placement.channels(node), np.float32)
    inside = place is not None and place[0] is node  # the kernel itself adds an int32 bias
    corrected = bias if bias is None or shift is None else bias + shift.reshape(bias.shape)

    least = None
    if bias is not None and inside:
        least = qdq.least_weight_scale(bias.reshape(-1), input_scale)
    weight = qdq.quantize_weight(
        _array(weight_value),
        int8.weight,
        axis=placement.channel_axis(node),
        per_channel=int8.per_channel,
        reduce_range=int8.reduce_range,
        least_scale=least,
    )
    shared = (weight_value, weight.scale.tobytes())
    if shared not in written:
        written[shared] = writer.dequantized_weight(_name(weight_value), weight, before=node)
    node.replace_input_with(1, written[shared])
    writer.drop(weight_value)
    if place is None or corrected is None:
        return
    wish = f"{_name(weight_value)}_bias" if bias_value is None else _name(bias_value)
    if inside:
        scale = np.float32(input_scale) * weight.scale
        writer.integer_bias(wish, place, corrected.reshape(-1), scale)
    elif shift is not None:
        place[0].replace_input_with(place[1], writer.initializer(f"{wish}_corrected", corrected))
    if bias_value is not None:
        writer.drop(bias_value)


def _unfused(model: ir.Model, plan: Placement) -> tuple[str, ...]:
    """One sentence for each quantized node that ONNX Runtime does not run in integers."""
    producers = {
        v.name: node.op_type for node in optimized_graph(model).graph for v in node.outputs
    }
    findings = []
    for unit in plan.units:
        quantizers = [n for n, _ in unit.output.uses() if n.op_type == "QuantizeLinear"]
        result = quantizers[0].outputs[0] if quantizers else unit.output
        kernel = producers.get(result.name)
        if kernel == "QuantizeLinear" or kernel in _FLOAT_KERNELS:
            findings.append(
                f"node '{placement.label(unit.node)}' ({unit.node.op_type}) is quantized, but "
                "ONNX Runtime runs it in float: add it to skip"
            )
    return tuple(findings)


def _array(value: ir.Value) -> Array:
    tensor = constant(value)
    assert tensor is not None  # placement took constants only
    return tensor.numpy()


def _name(value: ir.Value | None) -> str:
    assert value is not None and value.name is not None  # values of a graph have names
    return value.name
