"""Cross-layer equalization: evens out the weight ranges of neighbouring channels, losslessly.

Between two linear layers with a positively homogeneous function f between them (Relu, pooling,
nothing) each channel can be scaled for free, since f(x / s) * s = f(x):

    W2 f(W1 x + b1)  =  (W2 S) f((W1 x + b1) / s)

s_i = sqrt(r1_i / r2_i) makes the largest weight of channel i the same in both layers, so that
one scale per tensor serves all channels (Nagel et al. 2019, arXiv:1906.04721, section 4.1).
Layers in a row influence one another: the pairs are swept until nothing moves. It helps
weights with one scale a tensor; with one scale a channel there is little left to win.

Left out: absorbing high biases (section 4.1.3), which is exact only where the activation is
never zero, and Clip at 6, whose limit would have to differ by channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, Result, Skip, Stage
from edgec.passes.linear import LINEAR_OPS, Linear, linear
from edgec.passes.matching import is_op, producer, scalar
from edgec.passes.weights import Array, Editor, Refused, check_skip, constant, label

_HOMOGENEOUS = ("Identity", "LeakyRelu", "Relu")
_GLOBAL_POOLS = ("GlobalAveragePool", "GlobalMaxPool")
_POOLS = ("AveragePool", "MaxPool", *_GLOBAL_POOLS)
_SWEEPS = 1000
_SETTLED = 1e-5  # natural logarithm of a scale below which a sweep counts as no change
_WORTH = 1e-2  # a pair whose scales all are nearer to 1 than this is left as it is


@dataclass(frozen=True)
class Equalize:
    """Scale the channels between two layers so that both have the same weight ranges.

    Cases: Conv (grouped, depthwise), Gemm, MatMul (+ Add), then nothing, Relu, LeakyRelu,
    PRelu, Clip from 0 without an upper limit, pooling or Flatten, then Conv, Gemm or MatMul.
    """

    name: ClassVar[str] = "equalize"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    lossless: ClassVar[bool] = True
    version: ClassVar[int] = 1

    skip: tuple[str, ...] = ()  # names of layers whose weights stay as they are

    def run(self, model: ir.Model, context: Context) -> Result:
        """Scale every pair; ``changed`` counts the pairs."""
        nodes = [n for n in model.graph if is_op(n, *LINEAR_OPS)]
        check_skip(self.name, self.skip, model.graph)
        layers: dict[ir.Node, Linear] = {}
        skipped: list[Skip] = []
        for node in nodes:
            try:
                if label(node) in self.skip:
                    raise Refused("named in skip")
                layers[node] = linear(node)
            except Refused as reason:
                skipped.append(Skip(label(node), str(reason)))
        pairs: list[_Pair] = []
        for layer in layers.values():
            try:
                pairs.append(_pair(layer, layers))
            except Refused as reason:
                skipped.append(Skip(label(layer.node), str(reason)))
        editor, changed = Editor(model), 0
        for pair, scale in zip(pairs, _scales(pairs), strict=True):
            if float(np.abs(np.log(scale)).max()) < _WORTH:
                skipped.append(Skip(label(pair.first.node), "its channels are even already"))
                continue
            pair.first.scale_outputs(1 / scale)
            pair.second.scale_inputs(scale)
            for value in pair.between:  # they no longer hold what the reference's values hold
                value.name = editor.fresh(f"{value.name}_equalized")
            changed += 1
        return Result(model, changed, tuple(skipped))


@dataclass(frozen=True)
class _Pair:
    """Two layers and the values between them, from the first one's result on."""

    first: Linear
    second: Linear
    between: tuple[ir.Value, ...]


def _pair(first: Linear, layers: dict[ir.Node, Linear]) -> _Pair:
    """The layer with the one that alone reads its result. Raises Refused if there is none."""
    value, is_conv = first.output, first.is_conv
    between = [] if value is first.node.outputs[0] else [first.node.outputs[0]]
    while True:
        between.append(value)
        if value.is_graph_output():
            raise Refused("its result is an output of the model")
        uses = list(value.uses())
        if len(uses) != 1:
            raise Refused(f"its result is read by {len(uses)} nodes")
        node = uses[0].node
        if is_op(node, *LINEAR_OPS) and uses[0].idx == 0:
            break
        if uses[0].idx != 0 or node.graph is not first.node.graph:
            raise Refused(f"its result goes to {node.op_type}")
        is_conv = _after(node, is_conv)
        value = node.outputs[0]
    if node not in layers:
        raise Refused(f"'{label(node)}' behind it cannot be scaled")
    second = layers[node]
    if second.is_conv != is_conv or second.inputs != first.outputs:
        raise Refused(f"'{label(node)}' reads another axis than its channels")
    return _Pair(first, second, tuple(between))


def _after(node: ir.Node, is_conv: bool) -> bool:
    """Whether the channels are axis 1 behind a function that commutes with their scaling.

    is_conv: whether they are before it. Raises Refused for other functions.
    """
    if is_op(node, *_HOMOGENEOUS):
        return is_conv
    # a pool takes the last axis for space, whatever a product has there
    if is_conv and is_op(node, *_POOLS) and len(node.outputs) == 1:
        return True
    if is_op(node, "PRelu") and constant(node.inputs[1]) is not None:
        return is_conv
    if is_op(node, "Clip"):
        limits = [scalar(v) if v is not None else None for v in node.inputs[1:]]
        given = [v is not None for v in node.inputs[1:]]
        if limits[:1] == [0.0] and (limits[1:] == [np.inf] or not any(given[1:])):
            return is_conv
        raise Refused("its result is clipped to a limit, which no scaling commutes with")
    if is_op(node, "Flatten", "Reshape", "Squeeze") and is_conv and _is_column(node):
        return False
    raise Refused(f"its result goes to {node.op_type}, which no scaling commutes with")


def _is_column(node: ir.Node) -> bool:
    """True for [N, C, 1, ...] -> [N, C]."""
    if is_op(node, "Flatten") and producer(node.inputs[0], *_GLOBAL_POOLS) is not None:
        return node.attributes.get_int("axis", 1) == 1
    before, after = (None if v is None else v.shape for v in (node.inputs[0], node.outputs[0]))
    if before is None or after is None or len(before) < 3 or len(after) != 2:
        return False
    ones = all(size == 1 for size in before[2:])
    return ones and isinstance(before[1], int) and before[1] == after[1]


def _scales(pairs: Sequence[_Pair]) -> list[Array]:
    """s of each pair, float64 [channels], > 0: the first layer is divided by it.

    The largest weight of each output and input channel follows from the magnitudes and the
    factors of both sides, so the weights themselves are not touched while sweeping. A channel
    without weights on one side keeps scale 1.
    """
    sizes, rows, columns = {}, {}, {}
    for layer in (layer for pair in pairs for layer in (pair.first, pair.second)):
        size = np.abs(layer.blocks).max(axis=3).astype(np.float64)  # [groups, outputs, inputs]
        sizes[layer.node] = size
        rows[layer.node] = np.ones(size.shape[:2])
        columns[layer.node] = np.ones((size.shape[0], size.shape[2]))
    scales = [np.ones(pair.first.outputs) for pair in pairs]
    for _ in range(_SWEEPS):
        moved = 0.0
        for pair, scale in zip(pairs, scales, strict=True):
            one, two = pair.first.node, pair.second.node
            out = (sizes[one] * columns[one][:, None, :]).max(axis=2) * rows[one]
            into = (sizes[two] * rows[two][:, :, None]).max(axis=1) * columns[two]
            alive = (out.ravel() > 0) & (into.ravel() > 0)
            ratio = np.where(alive, out.ravel(), 1.0) / np.where(alive, into.ravel(), 1.0)
            step = np.sqrt(ratio)
            scale *= step
            rows[one] = rows[one] / step.reshape(rows[one].shape)
            columns[two] = columns[two] * step.reshape(columns[two].shape)
            moved = max(moved, float(np.abs(np.log(step)).max()))
        if moved < _SETTLED:
            break
    return scales
