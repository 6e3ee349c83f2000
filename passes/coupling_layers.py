"""How layers couple dimensions: convolutions, matrix products, norms, recurrent cells.

One rule an operator, named after what it does to its axes; the table is at the end. A weight's
axis that makes new channels produces, one that is summed over consumes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from edgec.passes.couplings import Axes, Rule, Shape
from edgec.passes.dimensions import Dim, product
from edgec.passes.matching import reduction_axes
from edgec.passes.weights import Refused, constant

_SPATIAL = "it moves along this axis"
_FLATTENED = ("Hardmax", "LogSoftmax", "Softmax")


def _elementwise(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    """Any number of operands that are broadcast to each other."""
    return [broadcast(axes, node, axes.inputs(node))] * len(node.outputs)


def broadcast(axes: Axes, node: ir.Node, shapes: Sequence[Sequence[Dim]]) -> list[Dim]:
    """The dimensions of shapes brought together from the last axis on."""
    rank = max((len(shape) for shape in shapes), default=0)
    result: list[Dim] = []
    for back in range(rank, 0, -1):
        dims = [shape[-back] for shape in shapes if len(shape) >= back]
        wide = [dim for dim in dims if dim.size != 1]
        known = [dim for dim in wide if dim.size is not None]
        if len({dim.size for dim in known}) > 1:
            raise Refused("its operands do not fit")
        if 0 < len(known) < len(wide):
            for dim in known:
                axes.freeze(node, dim, "it meets a size that is known at run time only")
        for dim in known[1:]:
            axes.tie(node, known[0], dim)
        for dim in wide if not known else ():
            axes.tie(node, wide[0], dim)
        result.append((known or wide or dims)[0])
    return result


def _conv(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    """x [batch, in, ...], weight [out, in / group, ...], bias [out] -> [batch, out, ...]."""
    x, weight = axes.of(node.inputs[0]), axes.of(node.inputs[1])
    _keep(axes, node, (*x[2:], *weight[2:]))
    out, group = weight[0], node.attributes.get_int("group", 1)
    if group == 1:
        axes.tie(node, x[1], weight[1])
    else:
        groups = _groups(axes, node, group)
        axes.tie(node, x[1], product([groups, weight[1]]))
        axes.tie(node, out, product([groups, _part(out, group)]))
    for operand in node.inputs[2:]:
        _along(axes, node, operand, out)
    axes.layer(node, 1, 0, "produces")
    axes.layer(node, 1, 1, "consumes")
    return [(x[0], out, *[None] * (len(x) - 2))]


def _conv_transpose(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    """x [batch, in, ...], weight [in, out / group, ...] -> [batch, out, ...]."""
    x, weight = axes.of(node.inputs[0]), axes.of(node.inputs[1])
    _keep(axes, node, (*x[2:], *weight[2:]))
    group = node.attributes.get_int("group", 1)
    axes.tie(node, x[1], weight[0])
    out = weight[1]
    if group > 1:
        groups = _groups(axes, node, group)
        axes.tie(node, weight[0], product([groups, _part(weight[0], group)]))
        out = product([groups, weight[1]])
    for operand in node.inputs[2:]:
        _along(axes, node, operand, out)
    axes.layer(node, 1, 1, "produces")
    axes.layer(node, 1, 0, "consumes")
    return [(x[0], out, *[None] * (len(x) - 2))]


def _groups(axes: Axes, node: ir.Node, count: int) -> Dim:
    groups = Dim(count)
    axes.number(node, "group", 0, groups)
    return groups


def _part(dim: Dim, group: int) -> Dim:
    if dim.size is None or dim.size % group:
        raise Refused(f"its channels are no multiple of {group}")
    return Dim(dim.size // group)


def _along(axes: Axes, node: ir.Node, value: ir.Value | None, dim: Dim) -> None:
    """A vector with one number for each position, or a scalar."""
    if value is not None:
        for own in axes.of(value):
            if own.size != 1 or dim.size == 1:
                axes.tie(node, own, dim)


def _keep(axes: Axes, node: ir.Node, dims: Sequence[Dim]) -> None:
    for dim in dims:
        axes.freeze(node, dim, _SPATIAL)


def _matmul(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    """[..., rows, inner] and [..., inner, columns]; a vector has no rows or no columns."""
    a, b = axes.of(node.inputs[0]), axes.of(node.inputs[1])
    if not (a and b):
        raise Refused("an operand is a scalar")
    axes.tie(node, a[-1], b[-2] if len(b) > 1 else b[0])
    if len(b) > 1:
        axes.layer(node, 1, -1, "produces")
        axes.layer(node, 1, -2, "consumes")
    if len(a) > 1:
        axes.layer(node, 0, -2, "produces")
        axes.layer(node, 0, -1, "consumes")
    batch = broadcast(axes, node, (a[:-2], b[:-2]))
    if not any(constant(value) is not None for value in node.inputs[:2]):
        for dim in batch:
            axes.heads(dim)
    result: Shape = [*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else ())]
    for operand in node.inputs[2:]:  # zero points of MatMulInteger: scalars, or one a column
        _along(axes, node, operand, b[-1])
    return [result]


def _gemm(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    """A [rows, inner] and B [inner, columns], either transposed, plus C broadcast to both."""
    a, b = axes.of(node.inputs[0]), axes.of(node.inputs[1])
    flip_a, flip_b = (bool(node.attributes.get_int(f"trans{x}", 0)) for x in "AB")
    rows, inner = (a[1], a[0]) if flip_a else (a[0], a[1])
    own, columns = (b[1], b[0]) if flip_b else (b[0], b[1])
    axes.tie(node, inner, own)
    axes.layer(node, 1, 0 if flip_b else 1, "produces")
    axes.layer(node, 1, 1 if flip_b else 0, "consumes")
    axes.layer(node, 0, 1 if flip_a else 0, "produces")
    axes.layer(node, 0, 0 if flip_a else 1, "consumes")
    shapes: list[Sequence[Dim]] = [(rows, columns)]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        shapes.append(axes.of(node.inputs[2]))
    return [broadcast(axes, node, shapes)]


def _channel_norm(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    """Batch and instance norm: vectors along axis 1."""
    x = axes.of(node.inputs[0])
    for value in node.inputs[1:]:
        _along(axes, node, value, x[1])
    axes.layer(node, 1, 0, "scales")
    if node.op_type == "InstanceNormalization":
        _keep(axes, node, x[2:])
    return [x, *[(x[1],)] * 4]


def _layer_norm(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    """Mean and variance over all axes from ``axis`` on."""
    x = axes.of(node.inputs[0])
    start = node.attributes.get_int("axis", -1) % len(x)
    broadcast(axes, node, axes.inputs(node))
    for dim in x[start:]:
        axes.mix(node, dim)
    return [x, *[[*x[:start], *[None] * (len(x) - start)]] * 2]


def _group_norm(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    """Mean and variance within each group of channels: whole groups can go."""
    x, scale = axes.of(node.inputs[0]), axes.of(node.inputs[1])
    count = node.attributes.get_int("num_groups", 0)
    inner = _part(x[1], max(count, 1))
    groups = Dim(count)
    axes.number(node, "num_groups", 0, groups)
    axes.mix(node, inner)
    axes.tie(node, x[1], product([groups, inner]))
    _keep(axes, node, x[2:])
    for value in node.inputs[1:]:
        # one number a group to opset 20, one a channel from 21
        _along(axes, node, value, groups if scale[0].size == count else x[1])
    axes.layer(node, 1, 0, "scales")
    return [x]


def _recurrent(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    """LSTM, GRU, RNN: gates of one hidden size behind each other; both directions share it."""
    if node.attributes.get_int("layout", 0):
        raise Refused("layout 1 is not followed")
    x, w, r = (axes.of(value) for value in node.inputs[:3])
    hidden, gates = r[2], _part(r[1], r[2].size or 1).size
    axes.number(node, "hidden_size", 0, hidden)
    axes.tie(node, x[2], w[2])
    for dim in (w[1], r[1]):
        axes.tie(node, dim, product([_fixed(axes, node, gates), hidden]))
    axes.layer(node, 1, 1, "produces")
    axes.layer(node, 1, 2, "consumes")
    axes.layer(node, 2, 1, "produces")
    axes.layer(node, 2, 2, "consumes")
    directions = w[0]
    axes.freeze(node, directions, "its directions")
    for value in node.inputs[3:]:
        if value is None or len(axes.of(value)) < 2:
            continue  # left out, or lengths of the sequences
        first, *inner, last = axes.of(value)
        axes.tie(node, first, directions)
        for dim in inner:
            axes.tie(node, dim, x[1])
        if hidden.size is None or last.size is None:
            raise Refused("its hidden size is known at run time only")
        times = _fixed(axes, node, last.size // hidden.size)
        axes.tie(node, last, product([times, hidden]))
    state = (directions, x[1], hidden)
    return [(x[0], *state), state, state]


def _fixed(axes: Axes, node: ir.Node, size: int | None) -> Dim:
    dim = Dim(size)
    axes.freeze(node, dim, "its gates")
    return dim


def _reduce(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    """Reduced axes become 1 or vanish; what a mean is taken over can only go with a change."""
    x = axes.of(node.inputs[0])
    chosen = reduction_axes(node)
    if chosen is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        raise Refused("its axes are computed at run time")
    empty = bool(node.attributes.get_int("noop_with_empty_axes", 0))
    reduced = {axis % len(x) for axis in chosen or (() if empty else range(len(x)))}
    for axis in reduced:
        if node.op_type == "ReduceMean":
            axes.mix(node, x[axis])
        else:
            axes.freeze(node, x[axis], "it reduces this axis")
    keep = node.attributes.get_int("keepdims", 1)
    kept = [Dim(1) if i in reduced else dim for i, dim in enumerate(x)]
    return [[dim for i, dim in enumerate(kept) if keep or i not in reduced]]


def _along_axis(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    """Softmax and the like: the axis is taken as a whole, the others are left alone.

    Below opset 13 the three of ``_FLATTENED`` take all axes from theirs on together.
    """
    x = axes.of(node.inputs[0])
    flattened = axes.opset < 13 and node.op_type in _FLATTENED
    least = 0 if node.op_type in ("ArgMax", "ArgMin") else 1 if flattened else -1
    axis = node.attributes.get_int("axis", least)
    if node.op_type == "CumSum":
        array = constant(node.inputs[1])
        if array is None:
            raise Refused("its axis is computed at run time")
        axis = int(array.item())
    whole = x[axis % len(x) :] if flattened else (x[axis],)
    for dim in whole:
        axes.freeze(node, dim, "it takes this axis as a whole")
    if node.op_type in ("ArgMax", "ArgMin", "TopK"):
        keep = node.attributes.get_int("keepdims", 1)
        result = [None if i == axis % len(x) else dim for i, dim in enumerate(x)]
        if not keep:
            del result[axis % len(x)]
        return [result] * len(node.outputs)
    return [x]


def _pool(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    """Batch and channels stay apart."""
    x = axes.of(node.inputs[0])
    _keep(axes, node, x[2:])
    kept = 1 if node.op_type.startswith("Global") else None
    rest = [None if kept is None else Dim(1) for _ in x[2:]]
    return [[x[0], x[1], *rest]] * len(node.outputs)


def _quantize(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    """QuantizeLinear, DequantizeLinear: one scale, or one for each position of an axis."""
    x = axes.of(node.inputs[0])
    if node.attributes.get_int("block_size", 0):
        raise Refused("its scales span blocks")
    for value in node.inputs[1:]:
        if value is not None and len(axes.of(value)) == 1:
            _along(axes, node, value, x[node.attributes.get_int("axis", 1)])
    return [x]


def _quantize_at_run_time(axes: Axes, node: ir.Node) -> Sequence[Shape]:
    x = axes.of(node.inputs[0])
    return [x, (), ()]


_ELEMENTWISE = (
    "Abs Add And BitShift Cast Ceil Celu Clip Cos Div Dropout Elu Equal Erf Exp Floor Gelu Greater "
    "GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max "
    "Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Sigmoid Sign Sin "
    "Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor"
).split()

LAYERS: Mapping[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(("Conv", "ConvInteger"), _conv),
    "ConvTranspose": _conv_transpose,
    **dict.fromkeys(("MatMul", "MatMulInteger"), _matmul),
    "Gemm": _gemm,
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), _channel_norm),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _layer_norm),
    "GroupNormalization": _group_norm,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
    **dict.fromkeys(
        "ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum "
        "ReduceLogSumExp ReduceSumSquare".split(),
        _reduce,
    ),
    **dict.fromkeys(
        "ArgMax ArgMin CumSum Hardmax LogSoftmax LpNormalization Softmax TopK".split(), _along_axis
    ),
    **dict.fromkeys(
        "AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool".split(), _pool
    ),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantize),
    "DynamicQuantizeLinear": _quantize_at_run_time,
}
