"""What computing layers read, as rows of a matrix product, sampled while the model runs.

Conv, Gemm and MatMul are products of input rows (for Conv: patches) with the rows of their
weight. Some rows of every calibration sample are kept, about a thousand a layer in all: more
samples give fewer rows each. So one run of the float model tells, for every layer, what
rounding its weights and inputs will do to its output.

Left out: second moments over more rows; four times as many changed no figure.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.passes.weights import constant

Array = np.ndarray[Any, Any]

_KEPT = 1024  # rows kept of a layer, over all samples
_KEPT_NUMBERS = 1 << 20  # of a layer with long rows: at most 4 MB
_LEAST_KEPT = 128


class LayerInputs:
    """Rows read by one layer, collected sample by sample."""

    def __init__(self, node: ir.Node, samples: int) -> None:
        """samples: number of samples among which the rows are shared out."""
        self.node = node
        self._samples = samples
        weight = weight_of(node)
        self._kernel = weight.shape[2:] if node.op_type == "Conv" else ()
        numbers = groups(node) * weight_rows(node, weight).shape[2]
        self._most = min(_KEPT, max(_LEAST_KEPT, _KEPT_NUMBERS // numbers))
        self._rows: list[Array] = []

    def add(self, values: Array, number: int, rng: np.random.Generator) -> None:
        """Keep a sample's share of the rows. number: of the sample, from 0."""
        share = self._most * (number + 1) // self._samples - self._most * number // self._samples
        if share:
            self._rows.append(input_rows(self.node, self._kernel, values, share, rng))

    @property
    def rows(self) -> Array:
        """All kept rows: float32 [groups, kept, n]."""
        if len(self._rows) > 1:
            self._rows = [np.concatenate(self._rows, axis=1)]
        return self._rows[0]


def groups(node: ir.Node) -> int:
    """The number of independent products that a computing node makes."""
    attribute = node.attributes.get("group")
    return 1 if attribute is None else int(attribute.as_int())


def weight_of(node: ir.Node) -> Array:
    """The constant weight of a computing node."""
    weight = constant(node.inputs[1])
    assert weight is not None  # placement took no other
    return weight


def weight_rows(node: ir.Node, weight: Array) -> Array:
    """The weight [out, in / groups, ...] or [in, out] as [groups, out / groups, n]."""
    if node.op_type == "Conv":
        return weight.reshape(groups(node), weight.shape[0] // groups(node), -1)
    return (weight if _transposed(node, "transB") else weight.T)[None]


def from_rows(node: ir.Node, rows: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of ``weight_rows``."""
    if node.op_type == "Conv":
        return rows.reshape(shape)
    return np.ascontiguousarray(rows[0] if _transposed(node, "transB") else rows[0].T)


def input_rows(
    node: ir.Node,
    kernel: tuple[int, ...],
    values: Array,
    count: int,
    rng: np.random.Generator,
) -> Array:
    """About ``count`` of the rows that a layer multiplies with its weight, spread evenly.

    kernel: spatial shape of a Conv's weight. values: the layer's input. Returns float32
    [groups, rows, n]; padding is zero, as in the layer. Fewer than ``count`` where there are
    not more.
    """
    if node.op_type != "Conv":
        flat = values.T if _transposed(node, "transA") else values
        flat = flat.reshape(-1, flat.shape[-1])
        return flat[_positions(len(flat), count, rng)][None]
    items = values[_positions(len(values), count, rng)]
    parts = [_patches(node, kernel, item, -(-count // len(items)), rng) for item in items]
    return np.concatenate(parts, axis=1)[:, :count]


def _patches(
    node: ir.Node,
    kernel: tuple[int, ...],
    item: Array,
    count: int,
    rng: np.random.Generator,
) -> Array:
    """About ``count`` patches [groups, rows, n] of one input [channels, *spatial] of a Conv."""
    total = math.prod(_steps(node, kernel, item.shape[1:])[1])
    return patches_at(node, kernel, item, _positions(total, count, rng))


def _steps(
    node: ir.Node, kernel: tuple[int, ...], spatial: tuple[int, ...]
) -> tuple[list[int], list[int], list[int], list[tuple[int, int]]]:
    """Strides, spatial shape of the output, dilations and pads of a Conv."""
    strides = _ints(node, "strides", [1] * len(kernel))
    dilations = _ints(node, "dilations", [1] * len(kernel))
    pads = _pads(node, spatial, kernel, strides, dilations)
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    output = [
        (size + sum(pad) - r) // stride + 1
        for size, pad, r, stride in zip(spatial, pads, reach, strides, strict=True)
    ]
    return strides, output, dilations, pads


def patches_at(node: ir.Node, kernel: tuple[int, ...], item: Array, places: Array) -> Array:
    """Patches [groups, rows, n] of one input [channels, *spatial] of a Conv.

    places: positions of its output, counted in row-major order.
    """
    spatial = item.shape[1:]
    strides, output, dilations, pads = _steps(node, kernel, spatial)
    chosen = np.unravel_index(places, output)
    flat = np.zeros((len(chosen[0]), *[1] * len(kernel)), np.intp)
    inside: Array = np.ones(flat.shape, bool)
    for axis, size in enumerate(spatial):
        taps = np.arange(kernel[axis]) * dilations[axis] - pads[axis][0]
        index = chosen[axis][:, None] * strides[axis] + taps
        shape = [len(index), *[1] * axis, kernel[axis], *[1] * (len(kernel) - axis - 1)]
        index = index.reshape(shape)
        inside = inside & (index >= 0) & (index < size)
        flat = flat * size + np.clip(index, 0, size - 1)
    channels = len(item)
    taken = item.reshape(channels, -1)[:, flat.ravel()].reshape(channels, len(flat), -1)
    if not inside.all():
        taken *= inside.reshape(1, len(flat), -1)
    split = taken.reshape(groups(node), channels // groups(node), len(flat), -1)
    return np.ascontiguousarray(split.transpose(0, 2, 1, 3)).reshape(groups(node), len(flat), -1)


def _pads(
    node: ir.Node,
    spatial: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: list[int],
    dilations: list[int],
) -> list[tuple[int, int]]:
    """Zeros before and behind each spatial dimension."""
    attribute = node.attributes.get("auto_pad")
    automatic = "NOTSET" if attribute is None else attribute.as_string()
    rank = len(kernel)
    if automatic in ("NOTSET", ""):
        pads = _ints(node, "pads", [0] * 2 * rank)
        return list(zip(pads[:rank], pads[rank:], strict=True))
    if automatic == "VALID":
        return [(0, 0)] * rank
    found = []
    for size, k, stride, dilation in zip(spatial, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + dilation * (k - 1) + 1 - size, 0)
        less, more = total // 2, total - total // 2
        found.append((less, more) if automatic == "SAME_UPPER" else (more, less))
    return found


def _positions(total: int, count: int, rng: np.random.Generator) -> Array:
    """``count`` of 0 .. total - 1, one from each of as many equal parts."""
    if count >= total:
        return np.arange(total)
    return np.minimum(
        ((np.arange(count) + rng.random(count)) * total / count).astype(np.intp), total - 1
    )


def _transposed(node: ir.Node, name: str) -> bool:
    attribute = node.attributes.get(name)
    return attribute is not None and bool(attribute.as_int())


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    attribute = node.attributes.get(name)
    return default if attribute is None else list(attribute.as_ints())
