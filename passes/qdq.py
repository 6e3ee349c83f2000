"""Quantization parameters, and the QuantizeLinear / DequantizeLinear nodes that carry them.

The arithmetic follows the scheme of Jacob et al. 2018 (arXiv:1712.05877): real = scale *
(integer - zero_point), activations asymmetric per tensor, weights symmetric per output
channel, biases int32 at input_scale * weight_scale. Integers go into the model as new
initializers behind a DequantizeLinear; the float values keep their names.

Left out: 16-bit activations and blocked weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.passes.ranges import Range
from edgec.passes.weights import Editor, constant
from edgec.targets.schema import IntegerType

Array = np.ndarray[Any, Any]

_LIMITS: dict[str, tuple[int, int]] = {"uint8": (0, 255), "int8": (-128, 127)}
_BIAS_LIMIT = 2**30  # int32 bias, with room for the products that are added to it


@dataclass(frozen=True)
class Parameters:
    """Scale (> 0, exact in float32) and zero point of a tensor quantized as a whole."""

    scale: float
    zero_point: int
    dtype: IntegerType


@dataclass(frozen=True)
class QuantizedWeight:
    """Integers, float32 scales (scalar or [channels]) and zero points of a weight."""

    integers: Array
    scale: Array
    zero_point: Array
    axis: int | None


def activation_parameters(
    span: Range, dtype: IntegerType, *, inside: Range | None = None
) -> Parameters:
    """Scale and zero point by which an 8-bit type spans a range; zero is exact.

    inside: bounds of an activation function (Relu, Clip) before the quantization; the
    dequantized limits are kept within them, so that the function becomes redundant.
    A range of no width gets scale 1.
    """
    least, greatest = _LIMITS[dtype]
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


def quantize_weight(
    weight: Array,
    dtype: IntegerType,
    *,
    axis: int,
    per_channel: bool = True,
    reduce_range: bool = False,
    keep_sums: bool = True,
    least_scale: Array | None = None,
) -> QuantizedWeight:
    """Symmetric integers of a float32 weight.

    axis: dimension of the output channels. per_channel: each has its own scale.
    reduce_range: 7 bits, -64..64, whose products with 8 bits do not saturate 16-bit sums.
    keep_sums: round so that each channel's sum changes by at most half a step. A filter's
    inputs have much in common (neighbouring pixels, positive activations); what is common
    meets the sum of the rounding errors, and nearest rounding lets that sum grow.
    least_scale: lower bound of the scales, where a bias would overflow int32 otherwise.
    A channel of zeros gets scale 1.
    """
    greatest = 64 if reduce_range else 127
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    top = np.abs(rows).max(axis=1 if per_channel else None).astype(np.float32)
    scale = np.asarray(top / np.float32(greatest), np.float32)
    if least_scale is not None:
        bound = least_scale if per_channel else least_scale.max()
        scale = np.maximum(scale, bound.astype(np.float32))
    scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1.0), scale)
    exact = rows.astype(np.float64) / (scale[:, None] if per_channel else scale)
    integers = np.clip(
        _rounded_with_sums(exact) if keep_sums else np.rint(exact), -greatest, greatest
    )
    zero = 128 if dtype == "uint8" else 0
    moved = np.moveaxis(weight, axis, 0).shape
    placed = np.moveaxis((integers + zero).astype(dtype).reshape(moved), 0, axis)
    zero_point = np.full(scale.shape, zero, dtype)
    return QuantizedWeight(placed, scale, zero_point, axis if per_channel else None)


def _rounded_with_sums(exact: Array) -> Array:
    """Integers next to [rows, n] reals whose row sums are as near as integers allow.

    Nearest rounding, then the entries that cost least go to their other neighbour.
    """
    nearest = np.rint(exact)
    left = exact - nearest
    missing = np.rint(left.sum(axis=1, keepdims=True))
    order = np.argsort(-left * np.sign(missing), axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(exact.shape[1])[None, :], axis=1)
    return nearest + np.where(rank < np.abs(missing), np.sign(missing), 0.0)


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
