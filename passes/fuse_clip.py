"""Fuses two operators in a row that only bound their input by numbers.

    Relu | Clip | Max(x, c) | Min(x, c)   behind one of them   -> one Clip, or one Relu

Each of them is f(x) = min(max(x, low), high), where high wins if the two cross. Both are
monotone, so f2(f1(x)) is a clip between f2(f1's lower end) and f2(f1's upper end), crossing
bounds included. Left out: bounds per channel, integers, a lone Max or Min.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Skip
from edgec.passes.matching import (
    add_initializer,
    insert,
    is_op,
    producer,
    same_rank,
    sole_user,
    take_over,
)
from edgec.passes.weights import Array, constant

_BOUNDING = ("Clip", "Max", "Min", "Relu")


@dataclass(frozen=True)
class _Bounds:
    """min(max(data, low), high); dtype of the constants, None where there are none."""

    data: ir.Value
    low: float
    high: float
    dtype: np.dtype[np.floating] | None

    def clip(self, number: float) -> float:
        return min(max(number, self.low), self.high)


def fuse_clip(node: ir.Node, opset: int) -> bool | Skip | None:
    """A bounding node behind another one -> Clip or Relu (opset 11)."""
    outer = _bounds(node) if opset >= 11 else None
    before = None if outer is None else producer(outer.data, *_BOUNDING)
    inner = None if before is None else _bounds(before)
    if outer is None or before is None or inner is None or sole_user(outer.data) is None:
        return None
    if not same_rank(node.outputs[0], inner.data):
        return None
    low = outer.clip(min(inner.low, inner.high))
    high = outer.clip(inner.high)
    if (low, high) == (0.0, math.inf):
        new = insert(node, "Relu", [inner.data])
    else:
        dtype = outer.dtype or inner.dtype
        assert dtype is not None and node.graph is not None  # a Relu alone bounds from below
        numbers = [None if math.isinf(b) else np.array(b, dtype) for b in (low, high)]
        new = insert(node, "Clip", [inner.data, *_constants(node, numbers)])
    take_over(node.outputs[0], new.outputs[0])
    return True


def _constants(node: ir.Node, numbers: list[Array | None]) -> list[ir.Value | None]:
    graph, name = node.graph, node.outputs[0].name
    assert isinstance(graph, ir.Graph)
    return [
        None if number is None else add_initializer(graph, f"{name}_{side}", number)
        for side, number in zip(("low", "high"), numbers, strict=True)
    ]


def _bounds(node: ir.Node) -> _Bounds | None:
    if not is_op(node, *_BOUNDING) or node.inputs[0] is None:
        return None
    if node.op_type == "Relu":
        return _Bounds(node.inputs[0], 0.0, math.inf, None)
    if node.op_type == "Clip":
        if node.attributes:  # below opset 11
            return None
        limits = [*node.inputs[1:], None, None][:2]
        return _from_constants(node.inputs[0], limits[0], limits[1])
    if len(node.inputs) != 2:
        return None
    for data, bound in (node.inputs, reversed(node.inputs)):
        if data is None or constant(data) is not None or bound is None:
            continue
        low, high = (bound, None) if node.op_type == "Max" else (None, bound)
        return _from_constants(data, low, high)
    return None


def _from_constants(data: ir.Value, low: ir.Value | None, high: ir.Value | None) -> _Bounds | None:
    """The bounds; None if they are computed, no single float, or infinite or NaN."""
    numbers, dtype = [-math.inf, math.inf], None
    for side, value in enumerate((low, high)):
        if value is None:
            continue
        array = constant(value)
        if array is None or array.size != 1 or array.dtype.kind != "f":
            return None
        numbers[side], dtype = float(array.item()), array.dtype
        if not math.isfinite(numbers[side]):
            return None
    return _Bounds(data, numbers[0], numbers[1], dtype)
