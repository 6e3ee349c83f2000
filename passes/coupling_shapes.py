"""How operators that move, join and part axes couple dimensions.

One rule an operator; the table is at the end. Sizes written into the graph are noted where they
state a dimension that may be cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from edgec.passes.coupling_reshape import reshape
from edgec.passes.couplings import Axes, Rule, Shape, is_same
from edgec.passes.dimensions import Clash, Dim, product, split, total
from edgec.passes.weights import Refused, constant

_HUGE = 2**31 - 1  # "to the end" in a Slice


def _transpose(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    x = axes.of(node.inputs[0])
    order = node.attributes.get_ints("perm", range(len(x) - 1, -1, -1))
    return [[x[axis] for axis in order]]


def _unsqueeze(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    x = list(axes.of(node.inputs[0]))
    chosen = _chosen_axes(node)
    if chosen is None:
        raise Refused("its axes are computed at run time")
    for axis in sorted(axis % (len(x) + len(chosen)) for axis in chosen):
        x.insert(axis, Dim(1))
    return [x]


def _squeeze(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    x = axes.of(node.inputs[0])
    chosen = _chosen_axes(node)
    if chosen is None:
        if len(node.inputs) > 1 or any(dim.size is None for dim in x):
            raise Refused("its axes are known at run time only")
        chosen = [axis for axis, dim in enumerate(x) if dim.size == 1]
        for dim in x:
            axes.stays_an_axis(dim)
    gone = {axis % len(x) for axis in chosen}
    return [[dim for axis, dim in enumerate(x) if axis not in gone]]


def _chosen_axes(node: ir.Node) -> list[int] | None:
    if len(node.inputs) > 1:
        array = constant(node.inputs[1])
        return None if array is None else [int(axis) for axis in array.reshape(-1)]
    found = node.attributes.get("axes")
    return None if found is None else [int(axis) for axis in found.as_ints()]


def _concat(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    shapes = axes.inputs(node)
    axis = node.attributes.get_int("axis", 0) % len(shapes[0])
    result: list[Dim | None] = list(shapes[0])
    for shape in shapes[1:]:
        for i, (first, own) in enumerate(zip(shapes[0], shape, strict=True)):
            if i != axis:
                axes.tie(node, first, own)
    parts = [shape[axis] for shape in shapes]
    if any(part.size is None for part in parts):
        for part in parts:
            axes.freeze(node, part, "it is joined with a size that is known at run time only")
        result[axis] = None
    else:
        result[axis] = total(parts)
    return [result]


def _split(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    x = axes.of(node.inputs[0])
    axis = node.attributes.get_int("axis", 0) % len(x)
    count = len(node.outputs)
    index: int | str = "split" if "split" in node.attributes else 1
    if index == "split":
        sizes: Sequence[object] = node.attributes["split"].as_ints()
    else:
        sizes = axes.entries(node, 1) if len(node.inputs) > 1 and node.inputs[1] else ()
    size, parts = x[axis].size, list[Dim]()
    if not sizes and size is not None and size % count == 0:
        # equal shares are not written down: they have to stay equal
        parts = [Dim(size // count)] * count
        axes.tie(node, x[axis], total(parts))
    elif len(sizes) == count:
        parts = _cut(axes, node, x[axis], sizes)
        for position, part in enumerate(parts):
            axes.number(node, index, position, part)
    if not parts:
        axes.freeze(node, x[axis], "its shares are computed")
    shares: list[Dim | None] = [*parts] or [None] * count
    return [[*x[:axis], share, *x[axis + 1 :]] for share in shares]


def _cut(axes: Axes, node: ir.Node, dim: Dim, sizes: Sequence[object]) -> list[Dim]:
    """The dimension in parts of these sizes; none where it cannot be cut so."""
    parts = []
    rest = dim
    try:
        for size in sizes:
            if not isinstance(size, int) or size < 0:
                raise Clash("its shares are computed at run time")
            part, rest = split(rest, size)
            parts.append(part)
    except Clash as clash:
        axes.freeze(node, dim, clash.reason)
        return []
    return parts


def _slice(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    x = axes.of(node.inputs[0])
    if len(node.inputs) < 3:
        raise Refused("opset 9 is not followed")
    starts, ends = axes.entries(node, 1), axes.entries(node, 2)
    given = [v if len(node.inputs) > i and (v := node.inputs[i]) else None for i in (3, 4)]
    chosen, steps = (None if v is None else constant(v) for v in given)
    if given[0] is not None and chosen is None or len(starts) != len(ends):
        raise Refused("its axes are computed at run time")
    result: list[Dim | None] = list(x)
    for position, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = position if chosen is None else int(chosen.reshape(-1)[position])
        dim = x[axis]
        step = 1 if given[1] is None else None if steps is None else steps.reshape(-1)[position]
        if step != 1 or not isinstance(start, int) or not isinstance(end, int):
            axes.freeze(node, dim, "it takes positions that are computed, or only some of them")
            result[axis] = None
        else:
            result[axis] = _range(axes, node, position, dim, start, end)
    return [result]


def _range(axes: Axes, node: ir.Node, position: int, dim: Dim, start: int, end: int) -> Dim | None:
    """Positions start to end of a dimension."""
    if start == 0 and end >= (_HUGE if dim.size is None else dim.size):
        return dim
    if dim.size is None:
        axes.freeze(node, dim, "it takes a part of it")
        return None
    first, last = (min(max(i + dim.size if i < 0 else i, 0), dim.size) for i in (start, end))
    parts = _cut(axes, node, dim, [first, max(last - first, 0)])
    if not parts:
        return None
    if first:
        axes.number(node, 1, position, parts[0])
    if last < dim.size:
        axes.number(node, 2, position, total(parts))
    return parts[1]


def _gather(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    """Rows of a table: the table's other axes stay."""
    x, indices = axes.of(node.inputs[0]), axes.of(node.inputs[1])
    axis = node.attributes.get_int("axis", 0) % len(x)
    axes.freeze(node, x[axis], "it picks positions of this axis by their number")
    if axis < len(x) - 1:
        axes.layer(node, 0, -1, "produces")
    return [[*x[:axis], *indices, *x[axis + 1 :]]]


def _expand(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    x, wanted = axes.of(node.inputs[0]), axes.entries(node, 1)
    rank = max(len(x), len(wanted))
    x = (*[Dim(1)] * (rank - len(x)), *x)
    result: list[Dim | None] = list(x[: rank - len(wanted)])
    for position, (dim, entry) in enumerate(zip(x[len(result) :], wanted, strict=True)):
        if entry == 1 or (isinstance(entry, Dim) and is_same(entry, dim)):
            result.append(dim)
        elif entry is None or dim.size is None:
            for one in (dim, entry) if isinstance(entry, Dim) else (dim,):
                axes.freeze(node, one, "it is expanded to a computed size")
            result.append(dim if dim.size != 1 else None)
        elif isinstance(entry, Dim):
            if dim.size != 1:
                axes.tie(node, dim, entry)
            result.append(entry)
        else:
            result.append(Dim(entry) if dim.size == 1 else dim)
            axes.number(node, 1, position, result[-1] or dim)
    return [result]


def _tile(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    """The whole axis is repeated: copies are the outer factor."""
    x = axes.of(node.inputs[0])
    result: list[Dim | None] = []
    for dim, times in zip(x, axes.entries(node, 1), strict=True):
        if not isinstance(times, int):
            axes.freeze(node, dim, "it is repeated a computed number of times")
            result.append(None)
            continue
        copies = Dim(times)
        axes.freeze(node, copies, "its copies")
        result.append(product([copies, dim]))
    return [result]


def _pad(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    x = axes.of(node.inputs[0])
    pads = axes.entries(node, 1) if len(node.inputs) > 1 else None
    if pads is None:
        raise Refused("opset 10 is not followed")
    given = node.inputs[3] if len(node.inputs) > 3 else None
    chosen = range(len(x)) if given is None else constant(given)
    if chosen is None or len(pads) != 2 * len(chosen):
        raise Refused("its axes are computed at run time")
    result: list[Dim | None] = list(x)
    for position, axis in enumerate(chosen):
        if pads[position] != 0 or pads[position + len(chosen)] != 0:
            axes.freeze(node, x[axis], "it adds positions")
            result[axis] = None
    return [result]


def _resize(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    x = axes.of(node.inputs[0])
    chosen = node.attributes.get_ints("axes", range(len(x)))
    at = next((i for i in (2, 3) if len(node.inputs) > i and _is_given(node.inputs[i])), None)
    factors = constant(node.inputs[2]) if at == 2 else None
    sizes = axes.entries(node, 3) if at == 3 else [None] * len(x)
    result: list[Dim | None] = list(x)
    for position, axis in enumerate(chosen):
        dim, size = x[axis], sizes[position]
        if factors is not None and factors.reshape(-1)[position] == 1:
            continue
        if isinstance(size, Dim) and is_same(size, dim):
            continue
        if isinstance(size, int) and size == dim.size:
            axes.number(node, 3, position, dim)
            continue
        for one in (dim, size) if isinstance(size, Dim) else (dim,):
            axes.freeze(node, one, "it is resized")
        result[axis] = None
    return [result]


def _is_given(value: ir.Value | None) -> bool:
    return value is not None and (value.const_value is None or value.const_value.size > 0)


def _flatten(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    x = axes.of(node.inputs[0])
    axis = node.attributes.get_int("axis", 1)
    axis += len(x) if axis < 0 else 0
    return [[product(x[:axis]), product(x[axis:])]]


def _depth_to_space(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    """Channels are blocks of channels (DCR), or each channel is a block (CRD)."""
    x = axes.of(node.inputs[0])
    area = node.attributes.get_int("blocksize", 1) ** 2
    if x[1].size is None:
        raise Refused("its channels are known at run time only")
    block, channels = Dim(area), Dim(x[1].size // area)
    for dim in (block, *x[2:]):
        axes.freeze(node, dim, "it becomes an area")
    inner = node.attributes.get_string("mode", "DCR") == "CRD"
    axes.tie(node, x[1], product([channels, block] if inner else [block, channels]))
    return [[x[0], channels, None, None]]


def _space_to_depth(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    x = axes.of(node.inputs[0])
    block = Dim(node.attributes.get_int("blocksize", 1) ** 2)
    for dim in (block, *x[2:]):
        axes.freeze(node, dim, "it comes from an area")
    return [[x[0], product([block, x[1]]), None, None]]


def _filled(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    """ConstantOfShape: the sizes are written down, or taken from another value."""
    result: list[Dim | None] = []
    for position, entry in enumerate(axes.entries(node, 0)):
        if isinstance(entry, int):
            dim = Dim(entry)
            axes.number(node, 0, position, dim)
            result.append(dim)
        else:
            result.append(entry)
    return [result]


def _shape(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    """The list of sizes follows by itself; who reads it decides what it means."""
    if node.op_type == "Size":
        for dim in axes.of(node.inputs[0]):
            axes.freeze(node, dim, "its length is calculated with")
    return [[None] * (0 if node.op_type == "Size" else 1)]


SHAPES: Mapping[str, Rule] = {
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _pad,
    "Resize": _resize,
    "Flatten": _flatten,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "ConstantOfShape": _filled,
    **dict.fromkeys(("Range", "Shape", "Size"), _shape),
    "Reshape": reshape,
}
