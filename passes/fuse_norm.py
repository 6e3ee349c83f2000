"""Recognises normalisations over the last axis written out in primitive operators.

    d = x - mean(x);  d / sqrt(mean(d^2) + eps) * gamma [+ beta]   -> LayerNormalization
    x / sqrt(mean(x^2) + eps) * gamma                              -> ``match_rms`` finds it;
                                                                      ``lower_norm`` emits it

Both start at the Sqrt. A division may be written as Reciprocal and Mul, a square as Pow
or Mul. Left out: axes other than the last, and chains without a constant gamma.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgec.passes.contract import Skip
from edgec.passes.matching import (
    add_initializer,
    insert,
    is_close,
    is_op,
    other_input,
    producer,
    rank,
    reduction_axes,
    same_rank,
    scalar,
    shared_reason,
    sole_user,
    take_over,
)
from edgec.passes.weights import constant, label


@dataclass(frozen=True)
class Normalization:
    """x divided by the root of its mean square, times gamma.

    data: what is normalised. gamma: a constant [n] or [1, ..., n], see ``as_vector``.
    end: the value after the product with gamma.
    """

    data: ir.Value
    gamma: ir.Value
    epsilon: float
    end: ir.Value


def fuse_layer_norm(node: ir.Node, opset: int) -> bool | Skip | None:
    """Primitive chain -> LayerNormalization (opset 17)."""
    if opset < 17:
        return None
    match = match_rms(node)
    if match is None or isinstance(match, Skip):
        return match
    x = _centred(match.data)
    if x is None:
        return None
    end, inputs = match.end, [match.gamma]
    add = sole_user(end)
    if add is not None and is_op(add, "Add"):
        beta = other_input(add, end)
        if beta is not None and _is_vector(beta, match.gamma) and same_rank(add.outputs[0], end):
            end, inputs = add.outputs[0], [*inputs, beta]
    anchor = end.producer()
    assert anchor is not None
    vectors = [as_vector(value) for value in inputs]
    new = insert(anchor, "LayerNormalization", [x, *vectors], axis=-1, epsilon=match.epsilon)
    take_over(end, new.outputs[0])
    return True


def match_rms(node: ir.Node) -> Normalization | Skip | None:
    """The normalisation whose Sqrt is ``node``, if it is one."""
    if not is_op(node, "Sqrt"):
        return None
    add = producer(node.inputs[0], "Add")
    if add is None:
        return None
    mean = next((n for v in add.inputs if (n := producer(v, "ReduceMean")) is not None), None)
    if mean is None or not _over_last_axis(mean):
        return None
    epsilon = scalar(other_input(add, mean.outputs[0]))
    data = _squared(mean.inputs[0])
    if epsilon is None or data is None:
        return None
    quotient = _quotient(node, data)
    if quotient is None:
        return None
    if quotient.is_graph_output():
        return Skip(label(node), shared_reason(quotient) or "")
    product = sole_user(quotient)
    if product is None or not is_op(product, "Mul"):
        return None
    gamma = other_input(product, quotient)
    if gamma is None or not _is_vector(gamma, None) or not same_rank(product.outputs[0], data):
        return None
    return Normalization(data, gamma, epsilon, product.outputs[0])


def as_vector(value: ir.Value) -> ir.Value:
    """A constant [1, ..., n] as [n]; the value itself if it is one."""
    array = constant(value)
    assert array is not None and isinstance(value.graph, ir.Graph)  # matched before
    if array.ndim == 1:
        return value
    return add_initializer(value.graph, f"{value.name}_vector", array.reshape(-1))


def _over_last_axis(mean: ir.Node) -> bool:
    axes = reduction_axes(mean)
    if axes is None or len(axes) != 1 or not mean.attributes.get_int("keepdims", 1):
        return False
    dimensions = rank(mean.inputs[0])
    return axes[0] == -1 or (dimensions is not None and axes[0] == dimensions - 1)


def _squared(value: ir.Value | None) -> ir.Value | None:
    """d of d^2 or d d."""
    node = producer(value, "Pow", "Mul")
    if node is None:
        return None
    if node.op_type == "Pow":
        return node.inputs[0] if is_close(node.inputs[1], 2.0) else None
    return node.inputs[0] if node.inputs[0] is node.inputs[1] else None


def _centred(value: ir.Value) -> ir.Value | None:
    """x of x - mean(x)."""
    node = producer(value, "Sub")
    if node is None:
        return None
    mean = producer(node.inputs[1], "ReduceMean")
    if mean is None or mean.inputs[0] is not node.inputs[0] or not _over_last_axis(mean):
        return None
    return node.inputs[0]


def _quotient(sqrt: ir.Node, data: ir.Value) -> ir.Value | None:
    """data / sqrt, written as one Div or as Reciprocal (or 1 / sqrt) and Mul."""
    root = sqrt.outputs[0]
    user = sole_user(root)
    if user is None:
        return None
    if is_op(user, "Div") and user.inputs[0] is not None and _same(user.inputs[0], data):
        return user.outputs[0]
    inverse = is_op(user, "Reciprocal") or (
        is_op(user, "Div") and user.inputs[1] is root and is_close(user.inputs[0], 1.0)
    )
    product = sole_user(user.outputs[0]) if inverse else None
    if product is None or not is_op(product, "Mul"):
        return None
    other = other_input(product, user.outputs[0])
    return product.outputs[0] if other is not None and _same(other, data) else None


def _same(value: ir.Value, data: ir.Value) -> bool:
    """True if both are the same value, or the same difference computed twice."""
    if value is data:
        return True
    x = _centred(value)
    return x is not None and x is _centred(data)


def _is_vector(value: ir.Value, like: ir.Value | None) -> bool:
    """True for a constant [n] or [1, ..., n], n being the size of ``like``."""
    array, expected = constant(value), constant(like)
    if array is None or array.ndim == 0 or array.size != array.shape[-1] or array.dtype.kind != "f":
        return False
    if expected is None:
        return array.size > 1  # the length of the last axis is not known from a scalar
    return expected.size == array.size
