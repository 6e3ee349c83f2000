"""Finds attention written in standard operators, whatever exporter wrote it.

    Softmax(q k' * scale [+ mask]) v

Every attention has a Softmax; the search starts there. Behind it stands a MatMul with the
values, in front of it a MatMul of queries and keys; between them scalar factors (Mul, Div,
before or after the product, also computed from static shapes at run time) and a mask that
is added, or put in by Where. From the three operands it walks through data movement to
projections [batch, sequence, heads * size], and from the result to the merged heads.

The walk is generous, since whoever rewrites a match proves it by running both models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from edgec.passes.contract import Skip
from edgec.passes.matching import is_op, producer, scalar, sole_user
from edgec.passes.weights import constant, label

_MOVEMENT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity")
_MASKED = -1e4  # a number at most this low stands for "do not attend"


@dataclass(frozen=True)
class Merged:
    """The attention seen from outside its heads.

    query, key, value: projections [batch, sequence, heads * size]; scale: of the products of
    these; end: the result with its heads merged, [batch, sequence, heads * size].
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    heads: int
    scale: float
    end: ir.Value


@dataclass(frozen=True)
class Attention:
    """One match.

    query [.., queries, size], key [.., size, keys], value [.., keys, size]: three or four
    axes, as the two products read them; result: of the second product. mask: added to the
    scores, or, if it is boolean, true where a key is attended to. merged: None where the
    heads are not made and merged in a way that is understood; why_not then says it.
    """

    softmax: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value | None
    scale: float
    result: ir.Value
    merged: Merged | None
    why_not: str

    @property
    def product(self) -> ir.Node:
        """The second product, which gives the result."""
        node = self.result.producer()
        assert node is not None  # it was matched
        return node


def find_attentions(model: ir.Model) -> tuple[list[Attention], list[Skip]]:
    """All attentions of the main graph, and why the other Softmaxes are none."""
    found, skipped = [], []
    for node in model.graph:
        if not is_op(node, "Softmax") or model.opset_imports.get("", 0) < 13:
            continue
        match = _match(node)
        if isinstance(match, str):
            skipped.append(Skip(label(node), match))
        else:
            found.append(match)
    return found, skipped


def _match(softmax: ir.Node) -> Attention | str:
    """The attention around a Softmax, or why it cannot be rewritten."""
    user = sole_user(softmax.outputs[0])
    if user is None or not is_op(user, "MatMul") or user.inputs[0] is not softmax.outputs[0]:
        return "its result is no left factor of a MatMul"
    scores, mask = split_mask(softmax.inputs[0])
    if scores is None:
        return "no product of queries and keys in front of it"
    scores, scale = without_factors(scores)
    product = producer(scores, "MatMul")
    if product is None:
        return "no product of queries and keys in front of it"
    query, query_factor = without_factors(product.inputs[0])
    key, key_factor = without_factors(product.inputs[1])
    value = user.inputs[1]
    ranks = {_rank(v) for v in (query, key, value)}
    if query is None or key is None or value is None or ranks not in ({3}, {4}):
        return "its operands are not known to have three or four axes"
    (axes,) = ranks
    if softmax.attributes.get_int("axis", -1) not in (-1, axes - 1):
        return "it does not normalise the last axis"
    if mask is not None and (mask.shape is None or not 1 <= len(mask.shape) <= axes):
        return f"its mask '{mask.name}' is not known to have at most {axes} axes"
    scale *= query_factor * key_factor
    if scale <= 0:
        return f"its scores are multiplied by {scale:g}, which is not positive"
    merged = _merged(query, key, value, scale, user.outputs[0])
    return Attention(
        softmax,
        query,
        key,
        value,
        mask,
        scale,
        user.outputs[0],
        merged if isinstance(merged, Merged) else None,
        merged if isinstance(merged, str) else "",
    )


def _merged(
    query4: ir.Value, key4: ir.Value, value4: ir.Value, scale: float, result: ir.Value
) -> Merged | str:
    """Projections and merged heads around operands of four axes, or why there are none."""
    heads, size, value_size = _dimension(query4, 1), _dimension(query4, 3), _dimension(value4, 3)
    if heads is None or size is None or value_size is None:
        return "number or size of the heads is not known"
    sides = (("queries", query4, size), ("keys", key4, size), ("values", value4, value_size))
    found = []
    for name, operand, each in sides:
        source, factor = _projection(operand, heads * each)
        if source is None:
            return f"its {name} come from no projection [batch, sequence, {heads} heads * size]"
        if name == "values" and factor != 1.0:
            return "its values are scaled"
        scale *= factor
        found.append(source)
    end = _end(result, heads * value_size)
    if end is None:
        return "its heads are not merged by Transpose and Reshape"
    return Merged(found[0], found[1], found[2], heads, scale, end)


def split_mask(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """Scores and mask; the scores are the operand that leads to a MatMul."""
    node = producer(value, "Add", "Where")
    if node is None:
        return value, None
    if node.op_type == "Where":
        condition, kept, filled = node.inputs
        number = scalar(filled)
        if number is None or number > _MASKED or not _leads_to_product(kept):
            return None, None
        return kept, condition
    for scores, mask in (node.inputs, reversed(node.inputs)):
        if scores is not None and _leads_to_product(scores):
            return scores, mask
    return None, None


def _leads_to_product(value: ir.Value | None) -> bool:
    return value is not None and producer(without_factors(value)[0], "MatMul") is not None


def without_factors(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """The value before multiplications by numbers, and their product."""
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
    number = _number(second)
    if first is not None and number:
        return first, number if node.op_type == "Mul" else 1.0 / number
    number = _number(first)
    if node.op_type == "Mul" and second is not None and number is not None:
        return second, number
    return None


def _number(value: ir.Value | None) -> float | None:
    """A number that is constant, or computed at run time from a size that is known.

    TorchScript's exporter writes the scale of attention as 1 / sqrt(size of a head) with
    the size taken out of Shape.
    """
    number = scalar(value)
    node = producer(value, "Cast", "Sqrt", "Mul", "Div", "Slice", "Gather", "Squeeze", "Reshape")
    if number is not None or node is None:
        return number
    if node.op_type in ("Slice", "Gather"):
        return _size_out_of_shape(node)
    first = _number(node.inputs[0])
    if first is None:
        return None
    if node.op_type == "Sqrt":
        return math.sqrt(first) if first >= 0 else None
    if node.op_type in ("Mul", "Div"):
        second = _number(node.inputs[1])
        if not second:
            return None
        return first * second if node.op_type == "Mul" else first / second
    return first


def _size_out_of_shape(node: ir.Node) -> float | None:
    """The number that a Slice or Gather takes out of a Shape, if that size is known."""
    shape = producer(node.inputs[0], "Shape")
    if shape is None or shape.inputs[0] is None or shape.inputs[0].shape is None:
        return None
    last = len(shape.inputs[0].shape)
    start, end = shape.attributes.get_int("start", 0), shape.attributes.get_int("end", last)
    indices = [constant(value) for value in node.inputs[1:]]
    if any(index is None or index.size != 1 for index in indices):
        return None
    sizes = list(shape.inputs[0].shape)[start:end]
    numbers = [int(index.item()) for index in indices if index is not None]
    if node.op_type == "Slice":
        taken = sizes[numbers[0] : numbers[1]] if len(numbers) < 4 else []
    else:
        taken = sizes[numbers[0] :][:1]
    return float(taken[0]) if len(taken) == 1 and isinstance(taken[0], int) else None


def _projection(value: ir.Value | None, width: int) -> tuple[ir.Value | None, float]:
    """Back through movement and factors to [batch, sequence, width]; and the factors."""
    factor = 1.0
    while value is not None:
        if value.shape is not None and len(value.shape) == 3 and value.shape[2] == width:
            return value, factor
        value, step = without_factors(value)
        factor *= step
        node = producer(value, *_MOVEMENT)
        if node is None and step == 1.0:
            return None, factor
        if node is not None:
            value = node.inputs[0]
    return None, factor


def _end(value: ir.Value, width: int) -> ir.Value | None:
    """Forward through movement to [batch, sequence, width]."""
    node = sole_user(value)
    while node is not None and is_op(node, *_MOVEMENT):
        result = node.outputs[0]
        if result.shape is not None and len(result.shape) == 3 and result.shape[2] == width:
            return result
        node = sole_user(result)
    return None


def _rank(value: ir.Value | None) -> int:
    return 0 if value is None or value.shape is None else len(value.shape)


def _dimension(value: ir.Value, axis: int) -> int | None:
    if value.shape is None or len(value.shape) != 4:
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None
