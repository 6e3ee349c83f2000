"""How Reshape couples dimensions: joined axes are products, parted ones factors.

Input and output are parted into the smallest blocks of axes with equal products, from the front
and from the back; what sizes known at run time only leave in between is one block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from edgec.passes.couplings import Axes, Shape, is_same
from edgec.passes.dimensions import Dim, product
from edgec.passes.weights import Refused


def reshape(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    """Input and output are parted into blocks of equal products, from both ends."""
    x, entries = axes.of(node.inputs[0]), axes.entries(node, 1)
    wanted = _wanted(node, x, entries)
    result: list[Dim | None] = [None] * len(wanted)
    blocks, i, j = _blocks(x, wanted)
    behind, back_i, back_j = _blocks(x[i:][::-1], wanted[j:][::-1])
    stop_i, stop_j = len(x) - back_i, len(wanted) - back_j
    blocks.append((range(i, stop_i), range(j, stop_j)))  # what open sizes leave in between
    for ins, outs in behind:
        blocks.append((_mirrored(ins, len(x)), _mirrored(outs, len(wanted))))
    for ins, outs in blocks:
        _fill(axes, node, [x[k] for k in ins], outs, wanted, result)
    for position, (entry, dim) in enumerate(zip(entries, result, strict=True)):
        if dim is None:
            continue
        if entry is None:
            axes.freeze(node, dim, "its size is computed at run time")
        elif isinstance(entry, Dim):
            axes.tie(node, dim, entry)
        elif entry > 0:
            axes.number(node, 1, position, dim)
        elif entry == 0 and not is_same(dim, x[position]):
            axes.tie(node, dim, x[position])
    return [result]


def _wanted(
    node: ir.Node, x: Sequence[Dim], entries: Sequence[int | Dim | None]
) -> list[int | Dim | None]:
    """The output's sizes as far as they are known."""
    shape = node.outputs[0].shape
    if shape is not None and len(shape) != len(entries):
        raise Refused(f"its output was inferred with {len(shape)} dimensions")
    wanted: list[int | Dim | None] = []
    for position, entry in enumerate(entries):
        inferred = None if shape is None else shape[position]
        if entry == 0 and not node.attributes.get_int("allowzero", 0):
            entry = x[position]
        elif entry is None or entry == -1:
            entry = inferred if isinstance(inferred, int) else None
        wanted.append(entry)
    return wanted


def _size(entry: int | Dim | None) -> int | None:
    return entry.size if isinstance(entry, Dim) else entry


def _blocks(
    x: Sequence[Dim], wanted: Sequence[int | Dim | None]
) -> tuple[list[tuple[range, range]], int, int]:
    """Blocks of equal products from the front, as far as sizes are known; where they end."""
    found: list[tuple[range, range]] = []
    i = j = 0
    while i < len(x) and j < len(wanted):
        a, b = x[i].size, _size(wanted[j])
        entry = wanted[j]
        ends = i + 1, j + 1
        if not (a == b is not None or (isinstance(entry, Dim) and is_same(x[i], entry))):
            if a == 1 or b == 1:
                ends = (i + 1, j) if a == 1 else (i, j + 1)
            else:
                grown = _grown(x, wanted, i, j)
                if grown is None:
                    break
                ends = grown
        found.append((range(i, ends[0]), range(j, ends[1])))
        i, j = ends
    return found, i, j


def _grown(
    x: Sequence[Dim], wanted: Sequence[int | Dim | None], i: int, j: int
) -> tuple[int, int] | None:
    """The ends of the smallest block with equal products; None where sizes are not known."""
    left, right = x[i].size, _size(wanted[j])
    i, j = i + 1, j + 1
    while left is not None and right is not None:
        if left == right:
            return i, j
        if left < right and i < len(x):
            size = x[i].size
            left, i = None if size is None else left * size, i + 1
        elif left > right and j < len(wanted):
            size = _size(wanted[j])
            right, j = None if size is None else right * size, j + 1
        else:
            return None
    return None


def _mirrored(found: range, length: int) -> range:
    return range(length - found.stop, length - found.start)


def _fill(
    axes: Axes,
    node: ir.Node,
    dims: Sequence[Dim],
    outs: range,
    wanted: Sequence[int | Dim | None],
    result: list[Dim | None],
) -> None:
    """Let the outputs of one block consist of its inputs."""
    if len(outs) == 1:
        joined, size = product(dims), _size(wanted[outs[0]])
        if joined.size is None and size is not None:
            axes.freeze(node, joined, "it joins a size that is known at run time only")
            joined = Dim(size)
            axes.freeze(node, joined, "its factors are known at run time only")
        result[outs[0]] = joined
        return
    whole, sizes = product(dims).size, [_size(wanted[k]) for k in outs]
    share = None  # of the only open size of a block whose product is known
    if whole is not None and sizes.count(None) == 1:
        share = whole // max(math.prod(size for size in sizes if size is not None), 1)
    made = []
    for k in outs:
        entry = wanted[k]
        dim = entry if isinstance(entry, Dim) else Dim(share if entry is None else entry)
        if dim.size is None:
            axes.freeze(node, dim, "its size is known at run time only")
        result[k] = dim
        made.append(dim)
    axes.tie(node, product(dims), product(made))
