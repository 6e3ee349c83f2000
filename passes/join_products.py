"""Joins the weight-only products of an attention's queries, keys and values into one call.

    MatMulNBits(x, A) + row              ->  MatMulNBits(x, A, row)
    GroupQueryAttention(MatMulNBits(x, Q), MatMulNBits(x, K), MatMulNBits(x, V))
                                         ->  GroupQueryAttention(MatMulNBits(x, [Q; K; V]))

Rows of integers, scales and zero points are put one behind another, so that every number stays
as it was; the kernel takes the three as they come out of one product. A step of one token
spends a good part of its time in calls on small matrices. Measured with ONNX Runtime 1.31 on
x86-64 with VNNI, one thread, the products of SmolLM2-135M in blocks of 32: 0.94 of the time.

Left out: the two halves of a gated FFN, which would have to be split again (measured in the
same way: a step takes 1.01 of the time, a prompt of 256 tokens 1.03); queries and keys that are
rotated in front of the kernel; float products; integer products whose rows another node reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, Result
from edgec.passes.matching import is_op, other_input, sole_user
from edgec.passes.weights import Array, Editor, constant, home, label, required

_CONTRIB = "com.microsoft"
_PRODUCT, _ATTENTION = "MatMulNBits", "GroupQueryAttention"
_ALIKE = ("K", "bits", "block_size", "accuracy_level")
_SCALES, _ZEROS, _GROUPS, _BIAS = 2, 3, 4, 5  # inputs of the product


def join_products(model: ir.Model, context: Context) -> Result:
    """Join what reads the same value in the same format; ``changed`` counts joined products."""
    del context  # there are such products only where the target has their kernel
    editor = Editor(model)
    changed = 0
    for node in list(model.graph):
        changed += _biased(editor, node)
    for node in list(model.graph):
        if node.op_type == _ATTENTION and node.domain == _CONTRIB:
            changed += _packed(editor, node)
    return Result(model, changed)


def _biased(editor: Editor, node: ir.Node) -> bool:
    """Let the kernel add a constant row to its result."""
    if node.op_type != _PRODUCT or node.domain != _CONTRIB or len(node.inputs) > _GROUPS:
        return False
    add = sole_user(node.outputs[0])
    if add is None or not is_op(add, "Add"):
        return False
    row = other_input(add, node.outputs[0])
    array = None if row is None else constant(row)
    if array is None or array.shape != (node.attributes.get_int("N"),):
        return False
    inputs = [*node.inputs, *[None] * (_BIAS - len(node.inputs)), row]
    (result,) = editor.before(
        add,
        _PRODUCT,
        inputs,
        dict(node.attributes),
        wanted=f"{label(node)}_biased",
        shapes=[add.outputs[0].shape],
        domain=_CONTRIB,
    )
    editor.replace(add, [result])
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    return True


def _packed(editor: Editor, attention: ir.Node) -> int:
    """Let the kernel read queries, keys and values from one product; the count of those joined."""
    products = []
    for value in attention.inputs[:3]:
        node = None if value is None else value.producer()
        if value is None or node is None or len(value.uses()) != 1 or value.is_graph_output():
            return 0
        products.append(node)
    if len({_format(node) for node in products}) != 1 or _format(products[0]) is None:
        return 0
    first = min(products, key=list(attention.graph or ()).index)
    joined = _joined(editor, products, first=first)
    for index, value in enumerate([joined, None, None]):
        attention.replace_input_with(index, value)
    for node in products:
        inputs = [value for value in node.inputs if value is not None]
        assert node.graph is not None
        node.graph.remove(node, safe=True)
        for value in inputs:
            editor.drop(value)
    return len(products)


def _format(node: ir.Node) -> tuple[object, ...] | None:
    """What products that are joined have in common; None for another node."""
    if node.op_type != _PRODUCT or node.domain != _CONTRIB or _input(node, _GROUPS) is not None:
        return None
    own = [value for value in node.inputs[1:] if value is not None]
    if any(constant(value) is None or len(value.uses()) != 1 for value in own):
        return None
    return (required(node, 0), *(node.attributes.get_int(name, 0) for name in _ALIKE))


def _joined(editor: Editor, group: Sequence[ir.Node], *, first: ir.Node) -> ir.Value:
    """The result of one product in the place of several. first: of them in the graph."""
    graph = home(first.outputs[0])
    stem = f"{label(first)}_joined"
    bits, k = first.attributes.get_int("bits"), first.attributes.get_int("K")
    rows = [node.attributes.get_int("N") for node in group]
    blocks = -(-k // first.attributes.get_int("block_size"))
    zero_bytes = -(-blocks * bits // 8)
    middle = 0x88 if bits == 4 else 0x80  # of both halves of a byte: the kernel's default

    def stacked(index: int, default: float, width: int) -> Array:
        parts = []
        for node, count in zip(group, rows, strict=True):
            value = _input(node, index)
            array = None if value is None else constant(value)
            if array is None:
                dtype = np.uint8 if index == _ZEROS else np.float32
                array = np.full((count, width), default, dtype)
            parts.append(array.reshape(count, -1))
        return np.concatenate(parts)

    weight = [constant(required(node, 1)) for node in group]
    packed = np.concatenate([array for array in weight if array is not None])
    inputs: list[ir.Value | None] = [
        required(first, 0),
        editor.constant(graph, f"{stem}_packed", packed),
        editor.constant(graph, f"{stem}_block_scale", stacked(_SCALES, 0.0, blocks)),
        None,
        None,
        None,
    ]
    if any(_input(node, _ZEROS) is not None for node in group):
        zeros = stacked(_ZEROS, middle, zero_bytes)
        inputs[_ZEROS] = editor.constant(graph, f"{stem}_block_zero_point", zeros)
    if any(_input(node, _BIAS) is not None for node in group):
        bias = stacked(_BIAS, 0.0, 1).reshape(-1)
        inputs[_BIAS] = editor.constant(graph, f"{stem}_bias", bias)
    while inputs[-1] is None:
        inputs.pop()
    shape = first.outputs[0].shape
    (result,) = editor.before(
        first,
        _PRODUCT,
        inputs,
        {**first.attributes, "N": sum(rows)},
        wanted=stem,
        shapes=[None if shape is None else ir.Shape([*shape[:-1], sum(rows)])],
        domain=_CONTRIB,
    )
    return result


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None
