"""Samples the inputs and outputs of a linear layer as rows of a matrix product.

A convolution is a product of input patches with its weight (im2col). Fitting a layer needs
no whole feature maps: a few random positions of each sample bound the memory, whatever the
resolution and the number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.passes.weights import Array


@dataclass(frozen=True)
class Rows:
    """inputs: float32 [groups, rows, weights of an output]; outputs: [groups, rows, outputs].

    outputs = inputs @ weight, plus the bias, for each group.
    """

    inputs: Array
    outputs: Array

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """All rows together."""
        return Rows(
            np.concatenate([part.inputs for part in parts], axis=1),
            np.concatenate([part.outputs for part in parts], axis=1),
        )


def sampled_rows(
    node: ir.Node,
    kernel: Sequence[int],
    groups: int,
    arrays: tuple[Array, Array],
    *,
    count: int,
    random: np.random.RandomState,
) -> Rows:
    """At most ``count`` random rows of one run of a Conv, Gemm or MatMul.

    kernel: spatial shape of a Conv's weight, empty for the products. arrays: the layer's
    input and output (of the float layer, for example), [N, C, ...] for a Conv, [..., C] for
    the products.
    """
    x, y = arrays
    if node.op_type != "Conv":
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        chosen = _chosen(len(flat_x), count, random)
        return Rows(flat_x[None, chosen], flat_y[None, chosen])
    windows = _windows(node, kernel, x)  # [N, C, *positions, *kernel]
    places = (y.shape[0], *y.shape[2:])
    chosen = _chosen(math.prod(places), count, random)
    sample, *position = np.unravel_index(chosen, places)
    where: Any = (sample, slice(None), *position)
    inputs = windows[where].reshape(len(chosen), groups, -1)  # C splits into group, channel
    outputs = y[where].reshape(len(chosen), groups, -1)
    return Rows(
        np.ascontiguousarray(inputs.transpose(1, 0, 2)),
        np.ascontiguousarray(outputs.transpose(1, 0, 2)),
    )


def _chosen(total: int, count: int, random: np.random.RandomState) -> Array:
    return np.sort(random.permutation(total)[:count])


def _windows(node: ir.Node, kernel: Sequence[int], x: Array) -> Array:
    """A view [N, C, *positions, *kernel] of the padded input: what each output position sees."""
    rank = len(kernel)
    strides, dilations = _ints(node, "strides", rank), _ints(node, "dilations", rank)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    before, after = _pads(node, x.shape[2:], strides, reach)
    padded = np.pad(x, [(0, 0), (0, 0), *zip(before, after, strict=True)])
    axes = tuple(range(2, 2 + rank))
    view = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=axes)
    thinned = tuple(slice(None, None, s) for s in (*strides, *dilations))
    return np.asarray(view[(slice(None), slice(None), *thinned)])


def _pads(
    node: ir.Node, sizes: Sequence[int], strides: Sequence[int], reach: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Zeros before and after each spatial axis."""
    rank, mode = len(sizes), node.attributes.get_string("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max((-(-size // s) - 1) * s + r - size, 0)
            for size, s, r in zip(sizes, strides, reach, strict=True)
        ]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        return (small, large) if mode == "SAME_UPPER" else (large, small)
    attribute = node.attributes.get("pads")
    pads = [0] * 2 * rank if attribute is None or mode == "VALID" else list(attribute.as_ints())
    return pads[:rank], pads[rank:]


def _ints(node: ir.Node, name: str, rank: int) -> list[int]:
    attribute = node.attributes.get(name)
    return [1] * rank if attribute is None else list(attribute.as_ints())
