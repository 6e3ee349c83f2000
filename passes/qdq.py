"""Quantization parameters, and the QuantizeLinear / DequantizeLinear nodes that carry them.

The arithmetic follows the scheme of Jacob et al. 2018 (arXiv:1712.05877): real = scale *
(integer - zero_point), activations asymmetric per tensor, weights symmetric per output
channel, biases int32 at input_scale * weight_scale. Integers go into the model as new
initializers behind a DequantizeLinear; the float values keep their names.

Left out: blocked weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.passes.ranges import Range
from edgec.passes.weight_rounding import SHARES
from edgec.passes.weights import Editor, constant
from edgec.targets.schema import ActivationType, Int8

Array = np.ndarray[Any, Any]

_FEW_BITS = 4
_BIAS_LIMIT = 2**30  # int32 bias, with room for the products that are added to it


@dataclass(frozen=True)
class Parameters:
    """Scale (> 0, exact in float32) and zero point of a tensor quantized as a whole."""

    scale: float
    zero_point: int
    dtype: ActivationType


@dataclass(frozen=True)
class QuantizedWeight:
    """Integers, float32 scales (scalar or [channels]) and zero points of a weight."""

    integers: Array
    scale: Array
    zero_point: Array
    axis: int | None

    def real(self) -> Array:
        """The float32 weight that the integers stand for."""
        shape = [1] * self.integers.ndim
        if self.axis is not None:
            shape[self.axis] = self.scale.size
        zero_point = self.zero_point.reshape(shape).astype(np.float32)
        centred = self.integers.astype(np.float32) - zero_point
        return np.asarray(centred * self.scale.reshape(shape))


def activation_parameters(
    span: Range, dtype: ActivationType, *, inside: Range | None = None
) -> Parameters:
    """Scale and zero point by which an integer type spans a range; zero is exact.

    inside: bounds of an activation function (Relu, Clip) before the quantization; the
    dequantized limits are kept within them, so that the function becomes redundant.
    A range of no width gets scale 1.
    """
    least, greatest = limits(dtype)
    scale = np.float32((span.high - span.low) / (greatest - least))
    if scale < np.finfo(np.float32).tiny:
        scale = np.float32(1.0)
    zero_point = int(np.clip(np.rint(least - span.low / float(scale)), least, greatest))
    if inside is not None:
        for bound, steps in (
            (inside.high, greatest - zero_point),
            (-inside.low, zero_point - least),
        ):
            while steps and np.float32(steps) * scale > np.float32(bound) > 0:
                scale = min(np.nextafter(scale, np.float32(0)), np.float32(bound / steps))
    return Parameters(float(scale), zero_point, dtype)


def factor_parameters(span: Range, dtype: ActivationType) -> Parameters:
    """Scale and zero point of a factor of a product of two activations.

    Kernels take one operand as they take weights: signed, without a zero point; 8 bits of a
    range without negative numbers (attention's shares) stay unsigned, whose zero point is 0.
    """
    if dtype not in ("uint8", "int8"):
        return activation_parameters(span, dtype)
    if span.low >= 0.0:
        return activation_parameters(span, "uint8")
    scale = np.float32(max(-span.low, span.high) / limits("int8")[1])
    if scale < np.finfo(np.float32).tiny:
        scale = np.float32(1.0)
    return Parameters(float(scale), 0, "int8")


def fake_quantized(values: Array, parameters: Parameters) -> Array:
    """float32 values as they come back from a Q/DQ pair."""
    least, greatest = limits(parameters.dtype)
    zero_point = np.float32(parameters.zero_point)
    integers = values * np.float32(1.0 / parameters.scale)
    np.rint(integers, out=integers)
    np.clip(integers, least - zero_point, greatest - zero_point, out=integers)
    integers *= np.float32(parameters.scale)
    return integers


def limits(dtype: ActivationType) -> tuple[int, int]:
    """The least and the greatest integer of a type."""
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


def greatest(int8: Int8) -> int:
    """The largest magnitude of a weight's integers around their zero point.

    With reduce_range 7 bits, whose products with 8 bits do not saturate 16-bit sums.
    """
    if int8.weight_bits == _FEW_BITS:
        return 7
    return 64 if int8.reduce_range else 127


def weight_scale(
    weight: Array,
    int8: Int8,
    *,
    axis: int,
    least_scale: Array | None = None,
    shares: Array | None = None,
) -> Array:
    """float32 scale of a float32 weight, [channels] or a number; a channel of zeros gets 1.

    axis: dimension of the output channels. least_scale: lower bounds [channels], where a bias
    would overflow int32 otherwise. shares: uint8 [channels], which of ``weight_rounding.SHARES`` of
    its largest weight each channel spans.
    """
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    top = np.abs(rows).max(axis=1).astype(np.float32)
    if shares is not None:
        top = top * SHARES[shares].astype(np.float32)
    if least_scale is None:
        least_scale = np.zeros_like(top)
    scale = np.maximum(top / np.float32(greatest(int8)), least_scale.astype(np.float32))
    if not int8.per_channel:
        scale = scale.max()
    tiny = np.finfo(np.float32).tiny
    return np.asarray(np.where(scale < tiny, np.float32(1.0), scale), np.float32)


def quantize_weight(
    weight: Array, int8: Int8, scale: Array, *, axis: int, steps: Array | None = None
) -> QuantizedWeight:
    """Symmetric integers of a float32 weight at a given scale.

    steps: int8, shaped like the weight: how far each integer lies from the nearest one.
    """
    shape = [1] * weight.ndim
    if scale.ndim:
        shape[axis] = scale.size
    top = greatest(int8)
    integers = np.clip(np.rint(weight / scale.reshape(shape)), -top, top)
    if steps is not None:
        integers = np.clip(integers + steps, -top, top)
    few = int8.weight_bits == _FEW_BITS
    zero = 128 if int8.weight == "uint8" and not few else 0
    dtype = ir.DataType.INT4.numpy() if few else np.dtype(int8.weight)
    zero_point = np.full(scale.shape, zero, dtype)
    placed = (integers + zero).astype(dtype)
    return QuantizedWeight(placed, scale, zero_point, axis if scale.ndim else None)


def least_weight_scale(bias: Array, input_scale: float) -> Array:
    """The smallest weight scales for which the bias fits into int32: float32 [channels]."""
    return (np.abs(bias.astype(np.float64)) / (input_scale * _BIAS_LIMIT)).astype(np.float32)


def quantize_bias(bias: Array, scale: Array) -> Array:
    """int32 integers of a float bias [channels] at the given scales (scalar or [channels])."""
    return np.rint(bias.astype(np.float64) / scale).astype(np.int32)


class Writer:
    """Inserts Q/DQ nodes and their initializers into the main graph of a model."""

    def __init__(self, model: ir.Model) -> None:
        """Write into the main graph of the model."""
        self._graph = model.graph
        self._editor = Editor(model)
        self.name, self.drop = self._editor.fresh, self._editor.drop

    def initializer(self, wish: str, array: Array) -> ir.Value:
        """A new initializer with a unique name."""
        return self._editor.constant(self._graph, wish, array)

    def weight(self, wish: str, weight: QuantizedWeight, before: ir.Node) -> ir.Value:
        """Integers behind a DequantizeLinear that stands before the given node."""
        inputs = [
            self.initializer(f"{wish}_quantized", weight.integers),
            self.initializer(f"{wish}_scale", weight.scale),
            self.initializer(f"{wish}_zero_point", weight.zero_point),
        ]
        node = self._dequantize(wish, inputs, weight.axis, ir.Shape(weight.integers.shape))
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def bias(self, wish: str, place: tuple[ir.Node, int], bias: Array, scale: Array) -> None:
        """Put int32 integers behind a DequantizeLinear at a node's input.

        bias: float32 [channels]. scale: scalar or [channels].
        """
        node, index = place
        inputs = [
            self.initializer(f"{wish}_quantized", quantize_bias(bias, scale)),
            self.initializer(f"{wish}_scale", scale),
            self.initializer(f"{wish}_zero_point", np.zeros(scale.shape, np.int32)),
        ]
        axis = 0 if scale.ndim else None
        dequantize = self._dequantize(wish, inputs, axis, ir.Shape(bias.shape))
        self._graph.insert_before(node, dequantize)
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, dequantize.outputs[0])

    def pair(self, value: ir.Value, quantize: Parameters, dequantize: Parameters) -> ir.Value:
        """Q and DQ behind a value; what the DQ yields. The two may differ in their parameters.

        Same parameters share their initializers.
        """
        name = value.name or ""
        outer = self._constants(name, quantize)
        inner = outer if dequantize == quantize else self._constants(f"{name}_out", dequantize)
        node = ir.node("QuantizeLinear", [value, *outer])
        integers = node.outputs[0]
        integers.name = node.name = self.name(f"{name}_quantized")
        integers.shape, integers.type = value.shape, outer[1].type
        back = self._dequantize(name, [integers, *inner], None, value.shape)
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], [node, back])
        else:
            self._graph.insert_after(producer, [node, back])
        return back.outputs[0]

    def replace_output(self, value: ir.Value, parameters: Parameters) -> None:
        """Let every reader of a value read its Q/DQ pair instead.

        A graph output keeps its name: the dequantized value takes it over.
        """
        uses = list(value.uses())
        dequantized = self.pair(value, parameters, parameters)
        for consumer, index in uses:
            consumer.replace_input_with(index, dequantized)
        if value.is_graph_output():
            outputs, name = self._graph.outputs, value.name or ""
            for index in [i for i, output in enumerate(outputs) if output is value]:
                outputs[index] = dequantized
            value.name = self.name(f"{name}_float")
            dequantized.name = name

    def drop_chain(self, value: ir.Value, *, until: ir.Value) -> None:
        """Remove the nodes from a value that nothing reads back to another value."""
        while value is not until:
            node = value.producer()
            assert node is not None  # `until` lies before the value
            inputs = [i for i in node.inputs if i is not None]
            self._graph.remove(node, safe=True)
            for constant_input in [i for i in inputs if constant(i) is not None]:
                self.drop(constant_input)
            value = next(i for i in inputs if constant(i) is None)

    def _constants(self, wish: str, parameters: Parameters) -> tuple[ir.Value, ir.Value]:
        scale = np.array(parameters.scale, np.float32)
        zero_point = np.array(parameters.zero_point, np.dtype(parameters.dtype))
        return (
            self.initializer(f"{wish}_scale", scale),
            self.initializer(f"{wish}_zero_point", zero_point),
        )

    def _dequantize(
        self, wish: str, inputs: Sequence[ir.Value], axis: int | None, shape: ir.Shape | None
    ) -> ir.Node:
        attributes = {} if axis is None else {"axis": axis}
        node = ir.node("DequantizeLinear", inputs, attributes)
        value = node.outputs[0]
        value.name = node.name = self.name(f"{wish}_dequantized")
        value.shape, value.dtype = shape, ir.DataType.FLOAT
        return node
