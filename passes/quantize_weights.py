"""Stores weights as 8- or 4-bit integers; activations stay float32 (weight-only).

Matrix products get one scale for each block along the input dimension, in the standard form
DequantizeLinear(axis, block_size); `lower` makes com.microsoft.MatMulNBits of it where the
target's kernel pays. Convolutions, recurrent layers and embedding tables get int8 with one
scale a channel, row or gate unit: their runtime has no weight-only kernel, so `lower` lets
the runtime expand them once at load (small file, float speed).

Rounding is to the nearest level, without calibration. Left out on purpose: error-driven
rounding (GPTQ, AWQ, AdaRound), which is a pass of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from edgec.passes.contract import Context, PassError, Result, Skip, Stage
from edgec.passes.weight_storage import (
    CHANNEL_OPS,
    PRODUCT_OPS,
    RECURRENT_OPS,
    WeightStore,
    is_candidate,
    opset_of,
)
from edgec.passes.weights import (
    Editor,
    Refused,
    check_skip,
    float_weight,
    is_float_constant,
    label,
    required,
)


@dataclass(frozen=True)
class QuantizeWeights:
    """Weights as integers, activations in float32."""

    name: ClassVar[str] = "quantize-weights"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    lossless: ClassVar[bool] = False
    version: ClassVar[int] = 1

    bits: int = 8  # of matrix products, 8 or 4; other layers are stored in 8
    scheme: Literal["symmetric", "asymmetric"] = "symmetric"  # of matrix products
    block_size: int = 0  # weights that share a scale; 0 takes the target's
    min_weights: int = 1024  # smaller weights stay float32
    skip: tuple[str, ...] = ()  # names of nodes to leave alone

    def __post_init__(self) -> None:
        """Raise PassError for parameters out of range."""
        if self.bits not in (4, 8):
            raise PassError(f"quantize-weights: bits is {self.bits}, expected 8 or 4")
        if self.scheme not in ("symmetric", "asymmetric"):
            raise PassError(
                f"quantize-weights: scheme is '{self.scheme}', expected 'symmetric' or 'asymmetric'"
            )
        size = self.block_size
        if size and (size < 16 or size & (size - 1)):
            raise PassError(
                f"quantize-weights: block_size is {size}, expected a power of two from 16, or "
                "0 for the target's"
            )
        if self.min_weights < 0:
            raise PassError(f"quantize-weights: min_weights is {self.min_weights}, expected >= 0")

    def run(self, model: ir.Model, context: Context) -> Result:
        """Quantize; ``changed`` counts the nodes that read integer weights afterwards."""
        nodes = list(model.graph.all_nodes())
        check_skip(self.name, self.skip, nodes)
        store = WeightStore(Editor(model), opset_of(model))
        # tables last: a tied output layer has its own copy by then
        nodes.sort(key=lambda node: node.op_type == "Gather")
        skipped: list[Skip] = []
        touched: list[str] = []
        for node in nodes:
            if not is_candidate(node):
                continue
            try:
                self._convert(store, node, context)
            except Refused as reason:
                skipped.append(Skip(label(node), str(reason)))
            else:
                touched.append(node.outputs[0].name or "")
        return Result(model, len(touched), tuple(skipped), tuple(touched))

    def _convert(self, store: WeightStore, node: ir.Node, context: Context) -> None:
        if label(node) in self.skip:
            raise Refused("named in skip")
        index = 0 if node.op_type == "Gather" else 1
        if node.op_type not in PRODUCT_OPS or is_float_constant(node.inputs[index]):
            weight = float_weight(required(node, index))
            if weight.size < self.min_weights:
                raise Refused(f"it has {weight.size} weights, fewer than min_weights")
        if node.op_type == "Gather":
            store.table(node)
        elif node.op_type in CHANNEL_OPS:
            store.channels(node)
        elif node.op_type in RECURRENT_OPS:
            store.recurrent(node)
        else:
            store.blocks(
                node,
                block_size=self.block_size or context.target.int4.block_size,
                bits=self.bits,
                symmetric=self.scheme == "symmetric",
            )
