"""Computes long attention in int8, one head at a time.

    Softmax(q k * scale) v ->

        for each head:                                      Scan
            k8, v8 = k, v in int8, one scale each
            for each block of queries:                      Scan, where there are several
                q8 = DynamicQuantizeLinear(q)
                p = Softmax(MatMulInteger(q8, k8) * (their scales * scale))
                p8 = p in uint8, one scale a row
                MatMulInteger(p8, v8) * (their scales)

All of it is standard ONNX. With one scale for all rows, attention that is spread over many keys
would be lost: of 1,500 equal weights each is less than half of 1 / 255. Heads and blocks come one
after the other because the scores of all of them fill memory, and those of one stay in the cache.

Measured with ONNX Runtime 1.31 on x86-64 with VNNI, one thread, heads of 64, ms of CPU time beside
MultiHeadAttention and Attention in float32: 6 heads of 1,500 queries and keys 12.6 beside 20.3 and
23.1, 12 of 512 3.4 beside 5.2 and 5.1, 12 of 256 1.2 beside 1.5 and 1.4.

Left out: masks, and axes that are open, since it depends on the lengths whether it pays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.passes.match_attention import Attention, find_attentions
from edgec.passes.matching import remove_unused
from edgec.passes.weights import Array, Editor, graph_of

OPSET = 18  # ReduceMax takes its axes as an input
_BLOCK = 512  # queries at most: their scores stay in the cache of a core
_LEAST = 1e-20  # of a scale: what is all zeros is divided by it


@dataclass(frozen=True)
class Sizes:
    """Lengths of an attention's axes."""

    heads: int
    queries: int
    keys: int
    size: int
    value_size: int


def long_attentions(model: ir.Model, keys: int) -> list[Attention]:
    """The attentions of the main graph that can be computed in int8, with ``keys`` or more."""
    if model.opset_imports.get("", 0) < OPSET:
        return []
    found = ((match, _sizes(match)) for match in find_attentions(model)[0])
    return [match for match, sizes in found if sizes is not None and sizes.keys >= keys]


def in_integers(editor: Editor, match: Attention) -> ir.Value:
    """The result of an attention in int8, beside what gives it now.

    match: one of ``long_attentions``.
    """
    sizes, node = _sizes(match), match.product
    assert sizes is not None  # it was found
    stem = f"{match.result.name}_int8"
    flat = [
        _reshaped(editor, node, value, f"{stem}_{name}", [-1, *shape])
        for name, value, shape in (
            ("query", match.query, (sizes.queries, sizes.size)),
            ("key", match.key, (sizes.size, sizes.keys)),
            ("value", match.value, (sizes.keys, sizes.value_size)),
        )
    ]
    (heads,) = editor.before(
        node,
        "Scan",
        flat,
        {"body": _head(f"{stem}_head", sizes, match.scale), "num_scan_inputs": 3},
        wanted=f"{stem}_heads",
        shapes=[ir.Shape([None, sizes.queries, sizes.value_size])],
    )
    merged = [-1, sizes.heads, sizes.queries, sizes.value_size]
    result = _reshaped(editor, node, heads, stem, merged)
    result.shape = match.result.shape
    return result


def to_integers(editor: Editor, match: Attention) -> None:
    """Compute an attention in int8. match: one of ``long_attentions``."""
    editor.replace(match.product, [in_integers(editor, match)])
    remove_unused(match.softmax)


def _sizes(match: Attention) -> Sizes | None:
    """The lengths of its axes; None with a mask, and where one but the batch is open."""
    query, key, value = (tuple(v.shape or ()) for v in (match.query, match.key, match.value))
    if match.mask is not None or {len(query), len(key), len(value)} != {4}:
        return None
    known = [axis for axis in (*query[1:], key[3], value[3]) if isinstance(axis, int)]
    if len(known) < 5:
        return None
    heads, queries, size, keys, value_size = known
    batch = {axis if isinstance(axis, int) else axis.value for axis in (query[0], key[0], value[0])}
    fits = key[1:] == (heads, size, keys) and value[1:] == (heads, keys, value_size)
    if not fits or len(batch) > 1 or None in batch:
        return None
    return Sizes(heads, queries, keys, size, value_size)


def _reshaped(
    editor: Editor, anchor: ir.Node, value: ir.Value, wanted: str, shape: list[int]
) -> ir.Value:
    target = editor.constant(graph_of(anchor), f"{wanted}_shape", np.array(shape, np.int64))
    sizes = ir.Shape([None if size < 0 else size for size in shape])
    return editor.before(anchor, "Reshape", [value, target], wanted=wanted, shapes=[sizes])[0]


@dataclass
class _Body:
    """The nodes of a subgraph while it is written; names begin with ``stem``."""

    stem: str
    nodes: list[ir.Node] = field(default_factory=list)

    def value(self, name: str, dtype: ir.DataType, shape: list[int]) -> ir.Value:
        """A value of a name, to be an input."""
        return ir.Value(
            name=f"{self.stem}_{name}", type=ir.TensorType(dtype), shape=ir.Shape(shape)
        )

    def add(
        self,
        op_type: str,
        inputs: list[ir.Value],
        name: str,
        *dtypes: ir.DataType,
        **attributes: Any,
    ) -> list[ir.Value]:
        """The outputs of a new node, float32 by default."""
        kinds = dtypes or (ir.DataType.FLOAT,)
        node = ir.node(
            op_type, inputs, attributes, num_outputs=len(kinds), name=f"{self.stem}_{name}"
        )
        for index, (output, dtype) in enumerate(zip(node.outputs, kinds, strict=True)):
            output.name = f"{self.stem}_{name}_output" + (f"_{index}" if index else "")
            output.type = ir.TensorType(dtype)
        self.nodes.append(node)
        return list(node.outputs)

    def constant(self, name: str, array: Array) -> ir.Value:
        """A constant, as a node of the subgraph."""
        tensor = ir.tensor(array, name=f"{self.stem}_{name}_value")
        [value] = self.add("Constant", [], name, ir.DataType.from_numpy(array.dtype), value=tensor)
        value.shape = ir.Shape(array.shape)
        return value

    def graph(self, inputs: list[ir.Value], output: ir.Value, shape: list[int]) -> ir.Graph:
        """What was written, as a graph."""
        output.shape = ir.Shape(shape)
        return ir.Graph(inputs, [output], nodes=self.nodes, name=self.stem)


def _head(stem: str, sizes: Sizes, scale: float) -> ir.Graph:
    """[queries, size], [size, keys], [keys, value size] -> [queries, value size]."""
    body = _Body(stem)
    shapes = ([sizes.queries, sizes.size], [sizes.size, sizes.keys], [sizes.keys, sizes.value_size])
    query, key, value = inputs = [
        body.value(name, ir.DataType.FLOAT, shape)
        for name, shape in zip(("query", "key", "value"), shapes, strict=True)
    ]
    keys, key_scale = _symmetric(body, key, "key")
    values, value_scale = _symmetric(body, value, "value")
    factor = body.constant("factor", np.array(scale, np.float32))
    [key_unit] = body.add("Mul", [key_scale, factor], "key_unit")
    block = _block(sizes.queries)
    captured = (keys, key_unit, values, value_scale)
    if block == sizes.queries:
        result = _attend(body, query, captured, block)
        return body.graph(inputs, result, [sizes.queries, sizes.value_size])
    count = sizes.queries // block
    blocks = body.constant("blocks", np.array([count, block, sizes.size], np.int64))
    [cut] = body.add("Reshape", [query, blocks], "cut")
    inner = _Body(f"{stem}_block")
    some = inner.value("query", ir.DataType.FLOAT, [block, sizes.size])
    made = _attend(inner, some, captured, block)
    each = inner.graph([some], made, [block, sizes.value_size])
    [parts] = body.add("Scan", [cut], "blocks_done", body=each, num_scan_inputs=1)
    whole = body.constant("whole", np.array([sizes.queries, sizes.value_size], np.int64))
    [result] = body.add("Reshape", [parts, whole], "result")
    return body.graph(inputs, result, [sizes.queries, sizes.value_size])


def _block(queries: int) -> int:
    """How many queries to take at once: a divisor of them near ``_BLOCK``, or all."""
    sizes = (queries // parts for parts in range(1, queries + 1) if queries % parts == 0)
    size = next(size for size in sizes if size <= _BLOCK)
    return size if 4 * size >= _BLOCK else queries


def _symmetric(body: _Body, value: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
    """A value in int8 around 0, and its scale, a number."""
    [size] = body.add("Abs", [value], f"{name}_size")
    [top] = body.add("ReduceMax", [size], f"{name}_top", keepdims=0)
    step = body.constant(f"{name}_step", np.array(1 / 127, np.float32))
    [exact] = body.add("Mul", [top, step], f"{name}_exact")
    least = body.constant(f"{name}_least", np.array(_LEAST, np.float32))
    [scale] = body.add("Max", [exact, least], f"{name}_scale")
    zero = body.constant(f"{name}_zero", np.array(0, np.int8))
    [integers] = body.add(
        "QuantizeLinear", [value, scale, zero], f"{name}_integers", ir.DataType.INT8
    )
    return integers, scale


def _attend(
    body: _Body,
    query: ir.Value,
    captured: tuple[ir.Value, ir.Value, ir.Value, ir.Value],
    queries: int,
) -> ir.Value:
    """The attention of one head for some queries."""
    keys, key_unit, values, value_scale = captured
    integer, number = ir.DataType.INT32, ir.DataType.FLOAT.value
    uint8 = ir.DataType.UINT8
    q8, q_scale, q_zero = body.add(
        "DynamicQuantizeLinear", [query], "quantize", uint8, ir.DataType.FLOAT, uint8
    )
    [sums] = body.add("MatMulInteger", [q8, keys, q_zero], "sums", integer)
    [cast] = body.add("Cast", [sums], "cast", to=number)
    [unit] = body.add("Mul", [q_scale, key_unit], "unit")
    [scores] = body.add("Mul", [cast, unit], "scores")
    [shares] = body.add("Softmax", [scores], "shares", axis=-1)
    last = body.constant("last", np.array([-1], np.int64))
    [top] = body.add("ReduceMax", [shares, last], "top", keepdims=1)
    step = body.constant("step", np.array(1 / 255, np.float32))
    [row_scale] = body.add("Mul", [top, step], "row_scale")  # [queries, 1]
    [flat] = body.add("Squeeze", [row_scale, last], "row_scales")
    zeros = body.constant("zeros", np.zeros(queries, np.uint8))
    [p8] = body.add("QuantizeLinear", [shares, flat, zeros], "share_integers", uint8, axis=0)
    [weighted] = body.add("MatMulInteger", [p8, values], "weighted", integer)
    [weighted_cast] = body.add("Cast", [weighted], "weighted_cast", to=number)
    [units] = body.add("Mul", [row_scale, value_scale], "units")
    [result] = body.add("Mul", [weighted_cast, units], "attended")
    return result
