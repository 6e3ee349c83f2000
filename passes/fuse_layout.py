"""Simplifies pooling and shapes.

    Flatten -> Softmax -> Reshape back       -> Softmax
    ReduceMean over height and width         -> GlobalAveragePool [+ Flatten]
    Reshape to a computed shape              -> Reshape to a constant one, where every
                                                dimension is a number, copied, or the only rest

GlobalAveragePool stays integer between quantized operators, ReduceMean does not; a constant
shape frees the chain of Shape, Gather and Concat that computed it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Skip
from edgec.passes.matching import (
    add_initializer,
    insert,
    is_op,
    producer,
    rank,
    reduction_axes,
    remove_unused,
    sole_user,
    take_over,
)
from edgec.passes.weights import constant, label


def fuse_global_pool(node: ir.Node, opset: int) -> bool | Skip | None:
    """ReduceMean over all axes but batch and channels -> GlobalAveragePool.

    Tensors of rank 3 are left alone: there the last axis is as a rule no space but features.
    """
    if not is_op(node, "ReduceMean"):
        return None
    axes, dimensions, data = reduction_axes(node), rank(node.inputs[0]), node.inputs[0]
    if axes is None or data is None:
        return None
    if dimensions is None:
        return Skip(label(node), f"the rank of '{data.name}' is not known")
    if data.dtype not in (None, ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return Skip(label(node), f"ONNX Runtime has no GlobalAveragePool of {data.dtype}")
    if dimensions < 4 or sorted(axis % dimensions for axis in axes) != list(range(2, dimensions)):
        return None
    old = node.outputs[0]
    pool = insert(node, "GlobalAveragePool", [data])
    if node.attributes.get_int("keepdims", 1):
        take_over(old, pool.outputs[0])
        return True
    pooled = pool.outputs[0]
    pooled.name, pooled.type = f"{old.name}_pooled", old.type
    if old.shape is not None:
        pooled.shape = ir.Shape([*old.shape, *[1] * (dimensions - 2)])
    take_over(old, insert(node, "Flatten", [pooled], axis=1).outputs[0])
    return True


def fuse_flat_softmax(node: ir.Node, opset: int) -> bool | Skip | None:
    """Flatten -> Softmax -> Reshape back  becomes  Softmax over the last axis.

    ONNX's converter leaves this where it raises a Softmax from below opset 13.
    """
    if opset < 13 or not is_op(node, "Softmax"):
        return None
    flatten, data = producer(node.inputs[0], "Flatten"), None
    if flatten is not None and node.attributes.get_int("axis", -1) in (1, -1):
        data = flatten.inputs[0]
    dimensions = rank(data)
    reshape = sole_user(node.outputs[0])
    if flatten is None or data is None or dimensions is None or reshape is None:
        return None
    if dimensions < 2:  # a vector becomes a column, of which every row is 1
        return None
    if flatten.attributes.get_int("axis", 1) % dimensions != dimensions - 1:
        return None
    shape = producer(reshape.inputs[1], "Shape") if is_op(reshape, "Reshape") else None
    if shape is None or shape.inputs[0] is not data or shape.attributes:
        return None
    new = insert(node, "Softmax", [data], axis=-1)
    new.name = node.name
    take_over(reshape.outputs[0], new.outputs[0])
    return True


def fix_reshape(node: ir.Node, opset: int) -> bool | Skip | None:
    """Reshape to a computed shape -> Reshape to the constant shape that it always has."""
    if not is_op(node, "Reshape") or constant(node.inputs[1]) is not None:
        return None
    data, result = node.inputs[0], node.outputs[0]
    if data is None or result.shape is None or _wrong_rank(node.inputs[1], result.shape):
        return None
    shape: list[int] = []
    for axis, dimension in enumerate(result.shape):
        if isinstance(dimension, int):
            if dimension == 0:
                return None
            shape.append(dimension)
        elif _copied(data, axis, dimension):
            shape.append(0)
        else:
            shape.append(-1)
    if shape.count(-1) > 1:
        return Skip(label(node), "its shape has more than one dimension that is not known")
    assert isinstance(node.graph, ir.Graph)
    value = add_initializer(node.graph, f"{result.name}_shape", np.array(shape, np.int64))
    computed = node.inputs[1]
    node.replace_input_with(1, value)
    remove_unused(None if computed is None else computed.producer())
    node.attributes.pop("allowzero", None)
    return True


def _wrong_rank(wanted: ir.Value | None, declared: ir.Shape) -> bool:
    """True if the shape asked for has another length than the declared one, which then lies."""
    if wanted is None or wanted.shape is None or len(wanted.shape) != 1:
        return False
    return isinstance(wanted.shape[0], int) and wanted.shape[0] != len(declared)


def _copied(data: ir.Value, axis: int, dimension: ir.SymbolicDim) -> bool:
    if data.shape is None or axis >= len(data.shape) or dimension.value is None:
        return False
    return data.shape[axis] == dimension
