"""Which scales of a quantized graph can be learned, and which have to follow one.

A scale is free if QuantizeLinear and DequantizeLinear alone read it. Both ends of a pair, and
what lies before and behind a node that only moves numbers, follow one scale if they were
equal. An int32 bias lies on the product of its layer's other two scales, since ONNX Runtime's
integer kernels take that for granted: its scale is that product, whatever becomes of the two.

Left out: learned zero points, scales of float16, scales in Constant nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm"})  # with a bias as third input
_MOVERS = frozenset(
    "DepthToSpace Flatten MaxPool Pad Reshape Slice SpaceToDepth Squeeze Transpose "
    "Unsqueeze".split()
)


@dataclass(frozen=True)
class Scales:
    """Names of initializers.

    leaders: free scale -> the scale whose parameter it takes, itself in most cases.
    products: scale of an int32 bias -> scales of its layer's input and weight.
    """

    leaders: Mapping[str, str]
    products: Mapping[str, tuple[str, str]]


def learnable_scales(model: ir.Model) -> Scales:
    """The scales of a graph that a training may move."""
    graph = model.graph
    free = {name for name, value in graph.initializers.items() if _is_free(value)}
    leaders = {name: name for name in graph.initializers if name in free}
    fixed: set[str] = set()
    for first, second, required in _neighbours(model):
        names = str(first.name), str(second.name)
        if names[0] == names[1]:
            continue
        if free.issuperset(names) and _equal(first, second):
            old, new = leaders[names[1]], leaders[names[0]]
            leaders = {n: new if leader == old else leader for n, leader in leaders.items()}
        elif required:
            fixed.update(names)
    products: dict[str, tuple[str, ...]] = {}
    odd: set[str] = set()
    for bias, factors, agree in _bias_scales(model):
        if not agree or products.setdefault(bias, factors) != factors:
            odd.add(bias)
            fixed.update(factors)
    for bias in odd:  # it cannot follow, so its factors have to stay
        fixed.update(products.pop(bias, ()))
    bound = {leaders[name] for name in fixed if name in leaders}
    followers = products.keys() | odd
    leaders = {n: to for n, to in leaders.items() if to not in bound and n not in followers}
    kept = {n: (f[0], f[1]) for n, f in products.items() if leaders.keys() & set(f)}
    return Scales(leaders, kept)


def _is_free(value: ir.Value) -> bool:
    tensor, uses = value.const_value, value.uses()
    return (
        tensor is not None
        and tensor.dtype == ir.DataType.FLOAT
        and bool(uses)
        and all(u.node.op_type in _QUANTIZERS and u.idx == 1 for u in uses)
        and bool((tensor.numpy() > 0).all())
    )


def _neighbours(model: ir.Model) -> Iterator[tuple[ir.Value, ir.Value, bool]]:
    """Pairs of scales that stand next to each other; True if they are the ends of a Q/DQ pair."""
    for node in model.graph:
        scale = _scale(node)
        if scale is None or node.inputs[0] is None:
            continue
        source = node.inputs[0].producer()
        if source is None:
            continue
        if node.op_type == "DequantizeLinear":
            before = _scale(source)
            if before is not None and source.op_type == "QuantizeLinear":
                yield before, scale, True
        elif source.op_type in _MOVERS and source.inputs[0] is not None:
            origin = source.inputs[0].producer()
            before = None if origin is None else _scale(origin)
            if before is not None:
                yield before, scale, False


def _bias_scales(model: ir.Model) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """Scale of an int32 bias, scales of its layer, and True if it is the product of the two."""
    for node in model.graph:
        scale, data = _scale(node), node.inputs[0] if node.inputs else None
        if scale is None or data is None or node.op_type != "DequantizeLinear":
            continue
        if data.const_value is None or data.dtype != ir.DataType.INT32:
            continue
        for layer, index in node.outputs[0].uses():
            if layer.op_type in _LAYERS and index == 2:
                factors = [s for s in map(_source_scale, layer.inputs[:2]) if s is not None]
                names = tuple(str(s.name) for s in factors)
                yield str(scale.name), names, _is_product(scale, factors)


def _source_scale(value: ir.Value | None) -> ir.Value | None:
    source = None if value is None else value.producer()
    return None if source is None else _scale(source)


def _is_product(bias: ir.Value, factors: Sequence[ir.Value]) -> bool:
    numbers = [v.const_value.numpy().reshape(-1) for v in (bias, *factors) if v.const_value]
    if len(numbers) != 3:
        return False
    own, first, second = numbers
    if first.size != 1 or second.size not in (1, own.size):
        return False
    return bool(np.allclose(own, first * second, rtol=1e-5, atol=0))


def _scale(node: ir.Node) -> ir.Value | None:
    if node.op_type not in _QUANTIZERS or len(node.inputs) < 2:
        return None
    return node.inputs[1]


def _equal(first: ir.Value, second: ir.Value) -> bool:
    a, b = first.const_value, second.const_value
    return a is not None and b is not None and np.array_equal(a.numpy(), b.numpy())
