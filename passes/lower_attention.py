"""Turns attention written in standard operators into com.microsoft MultiHeadAttention.

    Softmax(q k' * scale [+ mask]) v, heads split and merged by Reshape and Transpose
        -> MultiHeadAttention(query, key, value, attention_bias)

Every attention has a Softmax; from there the search walks through data movement (Reshape,
Transpose, Squeeze, Unsqueeze) and scalar factors back to the three projections of shape
[batch, sequence, heads * size], and forward to where the heads are merged again. The walk
is generous; the proof is strict: the rewritten model is run beside the original on single,
right-padded and left-padded batches and must agree. If it does not, every attention is
tried alone and those that differ stay as they are.

Left out: attention whose heads are no projection (rotary embeddings, packed QKV, caches)
and the Softmax that replaces the NaN of fully masked rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, Feeds, PassError, Result, Skip
from edgec.passes.equivalence import largest_error, padded_variants, proof_feeds
from edgec.passes.matching import (
    add_initializer,
    insert,
    is_op,
    producer,
    scalar,
    sole_user,
    take_over,
)
from edgec.passes.weights import label

KERNEL = "MultiHeadAttention"
TOLERANCE = 1e-4  # of the output's largest number: float noise of another summation order
_MOVEMENT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity")


@dataclass(frozen=True)
class _Attention:
    """One match. query, key, value: [batch, sequence, heads * size]; end: the merged heads."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value | None
    heads: int
    scale: float
    end: ir.Value


def lower_attention(model: ir.Model, context: Context) -> Result:
    """Rewrite every attention that is found and proven; ``changed`` counts them.

    Decisions: ``attention`` lists the rewritten attentions by the name of their result;
    a lock that has it is followed without a proof.
    """
    if KERNEL not in context.target.kernels:
        return Result(model, 0)
    found, skipped = _find(model)
    if not found:
        return Result(model, 0, tuple(skipped))
    names = [str(match.end.name) for match in found]
    if "attention" in context.lock:
        chosen = [name for name in names if name in context.lock["attention"]]
    else:
        chosen = _proven(model, context, names, skipped)
    if not chosen:
        return Result(model, 0, tuple(skipped), decisions={"attention": []})
    return Result(
        _rewritten(model, chosen), len(chosen), tuple(skipped), decisions={"attention": chosen}
    )


def _proven(model: ir.Model, context: Context, names: list[str], skipped: list[Skip]) -> list[str]:
    """The names whose rewriting leaves the outputs equal; the others join ``skipped``."""
    feeds = proof_feeds(model, context)
    if feeds is None:
        skipped.extend(Skip(n, "no feeds found to prove it; give calibration data") for n in names)
        return []
    samples = padded_variants(model, feeds)
    if _error(model, names, samples) <= TOLERANCE:
        return names
    chosen = []
    for name in names:
        error = _error(model, [name], samples)
        if error <= TOLERANCE:
            chosen.append(name)
        else:
            skipped.append(Skip(name, f"{KERNEL} differs by {error:.1e} of the largest output"))
    if chosen and _error(model, chosen, samples) > TOLERANCE:
        skipped.extend(Skip(n, f"{KERNEL} differs where several are rewritten") for n in chosen)
        return []
    return chosen


def _error(model: ir.Model, names: list[str], samples: list[Feeds]) -> float:
    try:
        return largest_error(model, _rewritten(model, names), samples)
    except PassError:
        return math.inf


def _rewritten(model: ir.Model, names: list[str]) -> ir.Model:
    """A copy of the model in which the attentions with these results are rewritten."""
    work = model.clone()
    expanded: dict[str, ir.Value] = {}
    for match in _find(work)[0]:
        if str(match.end.name) in names:
            _emit(match, expanded)
    work.opset_imports["com.microsoft"] = 1
    return work


def _emit(match: _Attention, expanded: dict[str, ir.Value]) -> None:
    anchor = match.end.producer()
    assert anchor is not None
    inputs: list[ir.Value | None] = [match.query, match.key, match.value]
    if match.mask is not None:
        bias = match.mask
        if not _is_square(bias, match):
            bias = expanded.get(str(bias.name)) or _expand(anchor, match)
            expanded[str(match.mask.name)] = bias
        inputs += [None, None, bias]  # no bias of the projections, no padding mask
    node = insert(
        anchor,
        KERNEL,
        inputs,
        domain="com.microsoft",
        num_heads=match.heads,
        scale=match.scale,
    )
    node.name = f"{match.end.name}_attention"
    take_over(match.end, node.outputs[0])


def _is_square(mask: ir.Value, match: _Attention) -> bool:
    """True if the mask surely has the size [.., .., query length, key length]."""
    if mask.shape is None or match.query.shape is None or match.key.shape is None:
        return False
    lengths = (match.query.shape[1], match.key.shape[1])
    known = all(isinstance(d, int) or d.value is not None for d in (*mask.shape[2:], *lengths))
    return known and tuple(mask.shape[2:]) == lengths


def _expand(anchor: ir.Node, match: _Attention) -> ir.Value:
    """The mask at [batch or 1, heads or 1, query length, key length]: the kernel wants it whole."""
    mask, graph = match.mask, anchor.graph
    assert mask is not None and isinstance(graph, ir.Graph)
    lengths = []
    for value in (match.query, match.key):
        shape = insert(anchor, "Shape", [value], start=1, end=2)
        shape.outputs[0].name = f"{mask.name}_{'query' if value is match.query else 'key'}_length"
        shape.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        shape.outputs[0].shape = ir.Shape([1])
        lengths.append(shape.outputs[0])
    ones = add_initializer(graph, f"{mask.name}_ones", np.ones(2, np.int64))
    size = insert(anchor, "Concat", [ones, *lengths], axis=0)
    size.outputs[0].name = f"{mask.name}_size"
    result = insert(anchor, "Expand", [mask, size.outputs[0]])
    result.outputs[0].name = f"{mask.name}_expanded"
    result.outputs[0].type = mask.type
    return result.outputs[0]


def _find(model: ir.Model) -> tuple[list[_Attention], list[Skip]]:
    """All attentions of the main graph, and why the other Softmaxes are none."""
    found, skipped = [], []
    for node in model.graph:
        if not is_op(node, "Softmax") or model.opset_imports.get("", 0) < 13:
            continue
        match = _match(node)
        if isinstance(match, str):
            skipped.append(Skip(label(node), match))
        elif match is not None:
            found.append(match)
    return found, skipped


def _match(softmax: ir.Node) -> _Attention | str | None:
    """The attention around a Softmax, why it cannot be rewritten, or None if it is none."""
    user = sole_user(softmax.outputs[0])
    if user is None or not is_op(user, "MatMul") or user.inputs[0] is not softmax.outputs[0]:
        return "its result is no left factor of a MatMul"
    if softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return "it does not normalise the last of four axes"
    scores, mask = _split_mask(softmax.inputs[0])
    if scores is None:
        return "no product of queries and keys in front of it"
    scores, scale = _without_factors(scores)
    product = producer(scores, "MatMul")
    if product is None:
        return "no product of queries and keys in front of it"
    query4, key4, value4 = product.inputs[0], product.inputs[1], user.inputs[1]
    heads, size = _dimension(query4, 1), _dimension(query4, 3)
    value_size = _dimension(value4, 3)
    if heads is None or size is None or value_size is None:
        return "number or size of the heads is not known"
    query, query_factor = _projection(query4, heads * size)
    key, key_factor = _projection(key4, heads * size)
    value, value_factor = _projection(value4, heads * value_size)
    for name, found in (("queries", query), ("keys", key), ("values", value)):
        if found is None:
            return f"its {name} come from no projection [batch, sequence, {heads} heads * size]"
    end = _merged(user.outputs[0], heads * value_size)
    if end is None:
        return "its heads are not merged by Transpose and Reshape"
    if mask is not None and (mask.shape is None or len(mask.shape) != 4):
        return f"its mask '{mask.name}' is not known to have four axes"
    if value_factor != 1.0:
        return "its values are scaled"
    assert query is not None and key is not None and value is not None
    total = scale * query_factor * key_factor
    return _Attention(query, key, value, mask, heads, total, end)


def _split_mask(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """Scores and additive mask; the scores are the operand that leads to a MatMul."""
    add = producer(value, "Add")
    if add is None:
        return value, None
    for scores, mask in (add.inputs, reversed(add.inputs)):
        if scores is not None and producer(_without_factors(scores)[0], "MatMul") is not None:
            return scores, mask
    return None, None


def _without_factors(value: ir.Value) -> tuple[ir.Value, float]:
    """The value before multiplications by constant numbers, and their product."""
    factor = 1.0
    while (node := producer(value, "Mul", "Div")) is not None:
        step = _scalar_step(node)
        if step is None:
            break
        value, factor = step[0], factor * step[1]
    return value, factor


def _scalar_step(node: ir.Node) -> tuple[ir.Value, float] | None:
    """The other operand and the factor of a multiplication or division by a number."""
    first, second = node.inputs
    number = scalar(second)
    if first is not None and number:
        return first, number if node.op_type == "Mul" else 1.0 / number
    number = scalar(first)
    if node.op_type == "Mul" and second is not None and number is not None:
        return second, number
    return None


def _projection(value: ir.Value | None, width: int) -> tuple[ir.Value | None, float]:
    """Back through movement and factors to [batch, sequence, width]; and the factors."""
    factor = 1.0
    while value is not None:
        if value.shape is not None and len(value.shape) == 3 and value.shape[2] == width:
            return value, factor
        value, step = _without_factors(value)
        factor *= step
        node = producer(value, *_MOVEMENT)
        if node is None and step == 1.0:
            return None, factor
        if node is not None:
            value = node.inputs[0]
    return None, factor


def _merged(value: ir.Value, width: int) -> ir.Value | None:
    """Forward through movement to [batch, sequence, width]."""
    node = sole_user(value)
    while node is not None and is_op(node, *_MOVEMENT):
        result = node.outputs[0]
        if result.shape is not None and len(result.shape) == 3 and result.shape[2] == width:
            return result
        node = sole_user(result)
    return None


def _dimension(value: ir.Value | None, axis: int) -> int | None:
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None
