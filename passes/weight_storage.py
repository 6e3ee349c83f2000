"""Stores weights as integers behind a DequantizeLinear; the layer itself stays float.

The standard form, which training passes can differentiate and `lower` turns into what the
target's runtime executes. One scale for each output channel (convolutions), row (embedding
tables), gate unit (LSTM, GRU), or block along the input dimension (matrix products).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from edgec.passes.weight_choices import Choice, Matrix
from edgec.passes.weight_rounding import sums_kept
from edgec.passes.weights import (
    BLOCK_OPSET,
    Array,
    Editor,
    Quantized,
    Refused,
    constant,
    float_weight,
    home,
    is_float_constant,
    label,
    quantize_channels,
    required,
)
from edgec_runtime.golden import sqnr_db

CHANNEL_OPS = ("Conv", "ConvTranspose")
PRODUCT_OPS = ("Gemm", "MatMul")
RECURRENT_OPS = ("GRU", "LSTM", "RNN")
_ENOUGH_DB = 35.0  # of rounded recurrent weights: about that of the states that they multiply


@dataclass
class WeightStore:
    """Converts nodes of one model; a weight that several nodes share is stored once.

    Every method raises Refused, with the node untouched, where it cannot convert.
    """

    editor: Editor
    opset: int
    _stored: dict[tuple[ir.Value, str], tuple[ir.Value, ...]] = field(default_factory=dict)

    def table(self, node: ir.Node) -> None:
        """Gather: float32 [rows, n] -> int8 with one scale a row."""
        value = required(node, 0)
        weight = float_weight(value, rank=2)
        if node.attributes.get_int("axis", 0) != 0:
            raise Refused("it gathers columns; one scale a row needs axis 0")
        for user, index in value.uses():
            if user.op_type != "Gather" or index != 0:
                raise Refused(f"its table is also used in float32 by '{label(user)}'")
        self._channels(node, 0, weight, axis=0, bits=8)

    def channels(self, node: ir.Node) -> None:
        """Conv or ConvTranspose: int8 with one scale for each output channel.

        A Conv's integers keep each filter's sum, since its inputs have a mean in common
        (measured on EfficientNet-Lite0: outputs of 24.7 dB instead of 19.9).
        """
        value = required(node, 1)
        weight = float_weight(value)
        # Conv [out, in / groups, kernel...]; ConvTranspose [in, out / groups, kernel...]
        if node.op_type == "ConvTranspose":
            self._channels(node, 1, weight, axis=1, bits=8)
            return
        key = "filters"
        stored = self._stored.get((value, key))
        if stored is None:
            quantized = quantize_channels(weight, (0,))
            rows = weight.reshape(len(weight), -1) / quantized.scale[:, None].astype(np.float64)
            values = np.clip(sums_kept(rows), -127, 127).astype(np.int8)
            stored = self._store(
                value, key, replace(quantized, values=values.reshape(weight.shape))
            )
        self._feed(node, 1, stored, {"axis": 0})

    def recurrent(self, node: ir.Node, *, bits: int = 8, few_scales: bool = False) -> None:
        """LSTM, GRU or RNN: W and R as int8 with one scale for each row of a gate.

        W: [directions, gates * hidden, input], R: [directions, gates * hidden, hidden].
        few_scales: one for all rows of R, by which an int8 kernel runs faster, where that
        rounds well enough.
        """
        weights = {index: float_weight(required(node, index), rank=3) for index in (1, 2)}
        directions = weights[1].shape[0]
        if directions > 1 and self.opset < BLOCK_OPSET:
            raise Refused(f"two directions need opset {BLOCK_OPSET}, the model has {self.opset}")
        if few_scales:
            quantized = quantize_channels(weights[2], (0,), bits=bits)
            rounded = quantized.values * quantized.scale[:, None, None]
            if min(map(sqnr_db, weights[2], rounded)) >= _ENOUGH_DB:
                self._channels(node, 2, weights.pop(2), axis=0, bits=bits)
        if directions == 1:
            for index, weight in weights.items():
                self._channels(node, index, weight, axis=1, bits=bits)
            return
        # one scale for each (direction, row): a block that spans the whole last axis
        for index, weight in weights.items():
            key = f"rows {bits}"
            stored = self._stored.get((required(node, index), key))
            if stored is None:
                quantized = quantize_channels(weight, (0, 1), bits=bits)
                quantized = Quantized(quantized.values, quantized.scale[..., None])
                stored = self._store(required(node, index), key, quantized)
            self._feed(node, index, stored, {"axis": 2, "block_size": weight.shape[2]})

    def matrix(self, matrix: Matrix, choice: Choice) -> None:
        """MatMul, Gemm and Gather: the chosen integers, stored once for all of them."""
        grid, scheme = choice.grid, matrix.scheme
        layers = [choice.values, grid.scale]
        if not scheme.symmetric:
            layers.append(grid.zero_point.astype(np.uint8))
        if matrix.axis == 0:
            layers = [np.ascontiguousarray(layer.T) for layer in layers]
        dtype = None
        if scheme.bits < 8:
            dtype = ir.DataType.INT4 if scheme.symmetric else ir.DataType.UINT4
        key = f"blocks {matrix.axis}"
        stored = self._store(matrix.value, key, Quantized(*layers), dtype=dtype)
        attributes = {"axis": matrix.axis, "block_size": scheme.block_size}
        for node in matrix.products:
            self._feed(node, 1, stored, attributes, of=matrix.value)
        for node in matrix.tables:
            self._feed(node, 0, stored, attributes)

    def _channels(self, node: ir.Node, index: int, weight: Array, *, axis: int, bits: int) -> None:
        key = f"channels {axis} {bits}"
        value = required(node, index)
        stored = self._stored.get((value, key))
        if stored is None:
            stored = self._store(value, key, quantize_channels(weight, (axis,), bits=bits))
        self._feed(node, index, stored, {"axis": axis})

    def _store(
        self, value: ir.Value, key: str, quantized: Quantized, *, dtype: ir.DataType | None = None
    ) -> tuple[ir.Value, ...]:
        graph, name = home(value), value.name
        stored = [
            self.editor.constant(graph, f"{name}_quantized", quantized.values, dtype=dtype),
            self.editor.constant(graph, f"{name}_scale", quantized.scale),
        ]
        if quantized.zero_point is not None:
            stored.append(
                self.editor.constant(graph, f"{name}_zero_point", quantized.zero_point, dtype=dtype)
            )
        self._stored[value, key] = tuple(stored)
        return tuple(stored)

    def _feed(
        self,
        node: ir.Node,
        index: int,
        stored: tuple[ir.Value, ...],
        attributes: Mapping[str, int],
        *,
        of: ir.Value | None = None,
    ) -> None:
        """Let an input be the dequantized weight, or its transpose if the input was that."""
        value = required(node, index)
        source = value if of is None else of
        (weight,) = self.editor.before(
            node,
            "DequantizeLinear",
            stored,
            attributes,
            wanted=f"{source.name}_dequantize",
            shapes=[source.shape],
        )
        if source is not value:
            (weight,) = self.editor.before(
                node,
                "Transpose",
                [weight],
                {"perm": [1, 0]},
                wanted=f"{source.name}_transpose",
                shapes=[value.shape],
            )
        self.editor.rewire(node, index, weight)


def is_candidate(node: ir.Node) -> bool:
    """True for a layer that still has a float weight.

    Products of two activations are none, and neither are Gathers from integer constants.
    """
    if node.domain:
        return False
    if node.op_type == "Gather":
        return is_float_constant(node.inputs[0])
    if node.op_type in CHANNEL_OPS + RECURRENT_OPS:
        producer = None if node.inputs[1] is None else node.inputs[1].producer()
        return producer is None or producer.op_type != "DequantizeLinear"
    if node.op_type in PRODUCT_OPS:
        return is_float_constant(node.inputs[1]) or is_float_constant(node.inputs[0])
    return False


def product_weight(node: ir.Node) -> tuple[Array, int]:
    """The float32 matrix of a MatMul or Gemm and the axis that is summed over.

    MatMul [in, out]: axis 0; Gemm with transB [out, in]: axis 1. Raises Refused.
    """
    if node.op_type == "MatMul" and constant(required(node, 1)) is None:
        if constant(required(node, 0)) is not None:
            raise Refused("its constant is the left operand")
        raise Refused("both operands are computed at run time")
    weight = float_weight(required(node, 1), rank=2)
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    return weight, 1 if transposed else 0


def opset_of(model: ir.Model) -> int:
    """The version of the standard operators that the model imports."""
    return model.opset_imports.get("", 1)
