"""Finds attention with a growing cache of keys and values, as decoders export it.

    keys = concat(past keys, new keys);  values = concat(past values, new values)
    Softmax(q keys' * scale + mask) values

The search starts at the Softmax. In front of it stands the product of queries and keys, behind
it the product with the values; through factors and data movement (the repetition of heads that
several queries share, transposes, reshapes) it walks from both to the Concat of an input of
the graph with what is new. From queries and new keys it goes on through a rotary embedding
to the projections [batch, sequence, heads * size].

As in ``match_attention`` the walk is generous: whoever rewrites a match proves it by running.
Numbers and sizes of heads come from the declared shapes of the past and of the projections.

Left out: caches of another layout than [batch, heads, positions, size], attention over the
past of an encoder, caches that do not grow.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgec.passes.contract import Skip
from edgec.passes.match_attention import split_mask, without_factors
from edgec.passes.match_rotary import Rotary, match_rotary
from edgec.passes.matching import is_op, producer, scalar, sole_user
from edgec.passes.weights import constant, label

_MOVEMENT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Expand")
_SPLIT = [0, 2, 1, 3]  # [batch, sequence, heads, size] <-> [batch, heads, sequence, size]


@dataclass(frozen=True)
class Heads:
    """One operand. value: [batch, heads, sequence, size].

    split, merged: the same numbers as [batch, sequence, heads, size] and as [batch, sequence,
    heads * size], where the graph has them.
    """

    value: ir.Value
    split: ir.Value | None = None
    merged: ir.Value | None = None


@dataclass(frozen=True)
class Cache:
    """past: an input of the graph, [batch, kv heads, positions, size]; present: an output."""

    past: ir.Value
    present: ir.Value


@dataclass(frozen=True)
class Mask:
    """What is added to the scores: ``shown`` and ``hidden`` where truth values choose.

    root: a boolean value, or numbers to add (shown and hidden are None then).
    """

    root: ir.Value
    shown: float | None = None
    hidden: float | None = None


@dataclass(frozen=True)
class CachedAttention:
    """One match.

    query, key, value: of the positions of this run, before the rotary embedding if there is
    one. heads, kv_heads, size: numbers of query heads and of key heads, numbers of a head.
    end: the result, [batch, sequence, heads * size] or still [batch, sequence, heads, size].
    """

    softmax: ir.Node
    query: Heads
    key: Heads
    value: Heads
    rotary: tuple[ir.Value, ir.Value] | None
    keys: Cache
    values: Cache
    mask: Mask | None
    scale: float
    heads: int
    kv_heads: int
    size: int
    end: ir.Value


def find_cached_attentions(
    model: ir.Model, *, rotary: bool
) -> tuple[list[CachedAttention], list[Skip]]:
    """All attentions over an input of the graph, and why others of them are no match.

    rotary: look through the rotary embedding of queries and keys.
    """
    found, skipped = [], []
    for node in model.graph:
        if not is_op(node, "Softmax") or model.opset_imports.get("", 0) < 15:
            continue
        match = _match(node, rotary=rotary)
        if isinstance(match, str):
            skipped.append(Skip(label(node), match))
        elif match is not None:
            found.append(match)
    return found, skipped


def _match(softmax: ir.Node, *, rotary: bool) -> CachedAttention | str | None:
    """The attention around a Softmax, or why it is no match; None if it has no cache."""
    product = sole_user(_guarded(softmax.outputs[0]))
    scores, mask = split_mask(softmax.inputs[0])
    query_keys = producer(without_factors(scores)[0], "MatMul")
    if product is None or not is_op(product, "MatMul") or query_keys is None:
        return None
    _, scale = without_factors(scores)
    query, query_factor = without_factors(query_keys.inputs[0])
    new_key, keys, key_factor = _cache(query_keys.inputs[1])
    new_value, values, value_factor = _cache(product.inputs[1])
    if keys is None or values is None or new_key is None or new_value is None or query is None:
        return None
    for cache in (keys, values):
        if not cache.present.is_graph_output():
            return f"its cache '{cache.present.name}' is no output of the graph"
    kv_heads, size = _dimension(keys.past, 1), _dimension(keys.past, 3)
    if kv_heads is None or size is None or _dimension(values.past, 3) != size:
        return f"number or size of the heads of '{keys.past.name}' is not known"
    scale *= query_factor * key_factor
    if scale <= 0 or value_factor != 1.0:
        return f"its scores are multiplied by {scale:g} and its values by {value_factor:g}"
    end = _end(product.outputs[0])
    if end is None:
        return "its heads are not merged behind a Transpose"
    rotations = _rotations(query, new_key) if rotary else None
    if rotations is not None:
        query, new_key = rotations[0].source, rotations[1].source
    operands = [_heads(v, size) for v in (query, new_key, new_value)]
    heads = _count(operands[0], end, size)
    if heads is None:
        return "number of its query heads is not known"
    return CachedAttention(
        softmax,
        operands[0],
        operands[1],
        operands[2],
        None if rotations is None else (rotations[0].cos, rotations[0].sin),
        keys,
        values,
        None if mask is None else _root(mask),
        scale,
        heads,
        kv_heads,
        size,
        end,
    )


def _guarded(weights: ir.Value) -> ir.Value:
    """The weights behind a guard that turns NaN (rows that are masked altogether) into 0."""
    users = {use.node for use in weights.uses()}
    guards = [node for node in users if is_op(node, "Where")]
    tests = [node for node in users if is_op(node, "IsNaN")]
    if len(users) != 2 or len(guards) != 1 or len(tests) != 1:
        return weights
    condition, replaced, kept = guards[0].inputs
    if condition is not tests[0].outputs[0] or kept is not weights or scalar(replaced) != 0.0:
        return weights
    return guards[0].outputs[0]


def _cache(value: ir.Value | None) -> tuple[ir.Value | None, Cache | None, float]:
    """Back to what is new in a cache, the cache, and the factors on the way."""
    factor = 1.0
    while value is not None:
        value, step = without_factors(value)
        factor *= step
        concat = producer(value, "Concat")
        if concat is not None:
            past, axis = concat.inputs[0], concat.attributes.get_int("axis", 0)
            if len(concat.inputs) != 2 or axis not in (2, -2):
                return None, None, factor
            if past is None or not past.is_graph_input() or len(past.shape or ()) != 4:
                return None, None, factor
            return concat.inputs[1], Cache(past, concat.outputs[0]), factor
        node = producer(value, *_MOVEMENT)
        value = None if node is None else node.inputs[0]
    return None, None, factor


def _rotations(query: ir.Value, key: ir.Value) -> tuple[Rotary, Rotary] | None:
    """The rotary embeddings of queries and keys, if both are made from the same angles."""
    first, second = match_rotary(query), match_rotary(key)
    if first is None or second is None:
        return None
    same = first.cos is second.cos and first.sin is second.sin
    return (first, second) if same else None


def _heads(value: ir.Value, size: int) -> Heads:
    """The operand, with the projection that it is split from."""
    transpose = producer(value, "Transpose")
    if transpose is None or _permutation(transpose) != _SPLIT:
        return Heads(value)
    split = transpose.inputs[0]
    reshape = producer(split, "Reshape")
    source = None if reshape is None else reshape.inputs[0]
    width = _width(source)
    return Heads(value, split, source if width is not None and width % size == 0 else None)


def _count(operand: Heads, end: ir.Value, size: int) -> int | None:
    """Number of the query heads, from the projection before or behind them."""
    reader = sole_user(end)
    weight = None if reader is None or not is_op(reader, "MatMul") else constant(reader.inputs[1])
    widths = [_width(operand.merged), _width(end)]
    if weight is not None:
        widths.append(weight.shape[0])
    elif reader is not None and reader.op_type == "MatMulNBits":
        widths.append(reader.attributes.get_int("K"))
    counts = [width // size for width in widths if width is not None]
    return counts[0] if counts else _dimension(operand.value, 1)


def _end(result: ir.Value) -> ir.Value | None:
    """[batch, heads, sequence, size] -> behind the Transpose, and behind a Reshape to three axes.

    That this Reshape merges the heads is seen by whoever compares shapes.
    """
    node = sole_user(result)
    if node is None or not is_op(node, "Transpose") or _permutation(node) != _SPLIT:
        return None
    turned = node.outputs[0]
    reshape = sole_user(turned)
    if reshape is None or not is_op(reshape, "Reshape") or len(reshape.outputs[0].shape or ()) != 3:
        return turned
    return reshape.outputs[0]


def _width(value: ir.Value | None) -> int | None:
    """The last size of a value [batch, sequence, width]."""
    if value is None or value.shape is None or len(value.shape) != 3:
        return None
    width = value.shape[2]
    return width if isinstance(width, int) else None


def _root(mask: ir.Value) -> Mask:
    """The mask behind cuts to the length of the keys and a choice between two numbers."""
    found = Mask(mask)
    while True:
        node = producer(found.root, "Where", "Slice", "Identity")
        if node is None or node.inputs[0] is None:
            return found
        if node.op_type == "Where":
            numbers = [scalar(value) for value in node.inputs[1:]]
            if found.shown is not None or None in numbers:
                return found
            found = Mask(node.inputs[0], numbers[0], numbers[1])
        elif node.op_type == "Slice" and not _cuts_keys(node):
            return found
        else:
            found = Mask(node.inputs[0], found.shown, found.hidden)


def _cuts_keys(node: ir.Node) -> bool:
    """True for a Slice of the last axis that begins at 0."""
    starts, axes = constant(node.inputs[1]), None
    if len(node.inputs) > 3:
        axes = constant(node.inputs[3])
    if starts is None or axes is None or len(node.inputs) > 4 and scalar(node.inputs[4]) != 1:
        return False
    return starts.tolist() == [0] and axes.tolist() in ([3], [-1])


def _permutation(transpose: ir.Node) -> list[int] | None:
    permutation = transpose.attributes.get("perm")
    return None if permutation is None else list(permutation.as_ints())


def _dimension(value: ir.Value, axis: int) -> int | None:
    if value.shape is None or len(value.shape) != 4:
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None
