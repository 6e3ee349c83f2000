"""AWQ: scales the inputs of products so that the weights which matter are rounded finely.

Lin et al. 2023 (arXiv:2306.00978), section 3.2: weights behind strong input channels are
multiplied by s before they are rounded, and the channel is divided by s where it is made,

    W x  =  (W S) (x / s),      s = (root mean square of x) ^ a,

with a in 0..1 chosen by the error of the product's output. The division costs nothing: it
goes into the row that made x last, which is a normalisation's gamma and beta, a constant
factor (RMS norm), or a layer in front, directly, through Relu, or as one factor of a gate.

Left out: an extra Mul where nothing takes the division (behind GELU, or where x is also
read by a residual connection), and the weights' own size in s.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgec.passes import gptq
from edgec.passes.grids import Scheme, fit
from edgec.passes.linear import Linear, is_row, linear, scale_row
from edgec.passes.matching import is_op, sole_user
from edgec.passes.weights import Array, Refused, constant, label

_EXPONENTS = np.linspace(0.0, 1.0, 21)[1:]


def channel_scales(weights: Sequence[Array], scheme: Scheme, moments: Array) -> Array:
    """The factor of each input channel of products that read the same x; 1 where none helps.

    weights: float32 [rows, n] each. moments: mean of x x^T [n, n]. Returns float32 [n], > 0.
    """
    moments = moments.astype(np.float32)
    power = np.sqrt(np.maximum(np.diag(moments), np.finfo(np.float32).tiny))
    best = np.ones_like(power)
    least = _error(weights, scheme, moments, best)
    for exponent in _EXPONENTS:
        scales = np.maximum(power ** np.float32(exponent), np.float32(1e-4))
        scales = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
        error = _error(weights, scheme, moments, scales)
        if error < least:
            best, least = scales, error
    return best


@dataclass(frozen=True)
class Source:
    """What makes a value last: constant rows of a node, or a linear layer.

    rows: inputs of the node. values: those that hold other numbers once it is divided.
    """

    node: ir.Node
    values: tuple[ir.Value, ...]
    rows: tuple[int, ...] = ()
    layer: Linear | None = None

    def divide(self, scales: Array) -> None:
        """Divide the channels of the value by float32 [n]."""
        if self.layer is not None:
            self.layer.scale_outputs(np.float32(1) / scales)
        for index in self.rows:
            scale_row(self.node, index, np.float32(1) / scales)


def source_of(value: ir.Value, readers: Collection[ir.Node], width: int) -> Source:
    """Where the ``width`` channels of a value can be divided by a scale each.

    readers: the products whose weights take the multiplication. Raises Refused with the
    reason, for example that something else reads the value.
    """
    if value.is_graph_output():
        raise Refused(f"'{value.name}' is an output of the model")
    for user, index in value.uses():
        if index != 0 or user not in readers:
            raise Refused(f"'{value.name}' is also read by {user.op_type} '{label(user)}'")
    node = value.producer()
    rows = _rows(node, width)
    if node is not None and rows:
        return Source(node, (value,), rows)
    for path in _in_front(value):
        layer = _layer(path[-1])
        if layer is not None and layer.outputs == width:
            values = dict.fromkeys((*path, layer.node.outputs[0]))
            return Source(layer.node, tuple(values), layer=layer)
    kind = "an input of the model" if node is None else f"made by {node.op_type}"
    raise Refused(f"'{value.name}' is {kind}, where no scale can be folded in")


def _rows(node: ir.Node | None, width: int) -> tuple[int, ...]:
    """The inputs of a node that scale and shift its output by channel."""
    if is_op(node, "LayerNormalization") and node is not None and len(node.outputs) == 1:
        rows = tuple(i for i in (1, 2) if i < len(node.inputs) and node.inputs[i] is not None)
        return rows if all(is_row(node.inputs[i], width) for i in rows) else ()
    if is_op(node, "Mul") and node is not None:
        for index in (0, 1):
            row = constant(node.inputs[index])
            if row is not None and row.size == width and is_row(node.inputs[index], width):
                return (index,)
    return ()


def _in_front(value: ir.Value) -> list[tuple[ir.Value, ...]]:
    """Ways from a value to one that may be divided instead of it, both included."""
    node = value.producer()
    if is_op(node, "Relu", "Mul") and node is not None:
        # a Relu lets a positive factor through; a gate takes it in either operand
        inner = [v for v in node.inputs if v is not None and sole_user(v) is node]
        return [(value, *path) for v in inner for path in _in_front(v)]
    return [(value,)]


def _layer(value: ir.Value) -> Linear | None:
    """The product, with its bias, that makes a value."""
    node = value.producer()
    if is_op(node, "Add") and node is not None:
        made = (v.producer() for v in node.inputs if v is not None)
        node = next((n for n in made if is_op(n, "MatMul")), None)
    if node is None or not is_op(node, "Gemm", "MatMul"):
        return None
    try:
        layer = linear(node)
    except Refused:
        return None
    return layer if layer.output is value else None


def _error(weights: Sequence[Array], scheme: Scheme, moments: Array, scales: Array) -> float:
    total = 0.0
    for weight in weights:
        scaled = weight * scales
        grid = fit(scaled, scheme, "rtn")
        change = grid.weight(grid.nearest(scaled)) / scales - weight
        total += gptq.output_error(change, moments)
    return total
