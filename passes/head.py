"""The head of a classifier: the last layer before its output, and its replacement.

The head is the last Gemm, MatMul (with its Add) or Conv before the output; only nodes that
keep classes apart may follow it. A new head has another number of classes, and the output's
shape follows.

Left out: several outputs of classes, and heads that are more than one layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import PassError
from edgec.passes.linear import LINEAR_OPS, Layout, Linear, linear, set_constant
from edgec.passes.matching import is_op, with_new_numbers
from edgec.passes.responses import Kind
from edgec.passes.weights import Array, Refused, constant, label

Growth = Literal["new", "grow"]

_PROBABILITIES = frozenset({"Softmax"})
_KEEP_CLASSES = frozenset(
    {
        "AveragePool",
        "Flatten",
        "GlobalAveragePool",
        "Identity",
        "LogSoftmax",  # a softmax of it is the same again: its numbers serve as logits
        "ReduceMean",
        "Reshape",
        "Softmax",
        "Squeeze",
    }
)


@dataclass(frozen=True)
class Head:
    """The last layer and what follows it. output: of the graph. after: nodes, nearest first."""

    layer: Linear
    output: str
    kind: Kind
    after: tuple[ir.Node, ...]

    @property
    def classes(self) -> int:
        """Number of classes that it tells apart."""
        return self.layer.outputs

    def class_axis(self, rank: int) -> int:
        """The axis of the classes in a value of ``rank`` dimensions, behind the layer."""
        return 1 if self.layer.is_conv and rank > 2 else rank - 1  # conv: [n, classes, h, w]

    def names(self) -> tuple[str, ...]:
        """Names of its initializers: the weight and, where it has one, the bias."""
        values = [self.layer.node.inputs[1]]
        if self.layer.bias is not None:
            node, index = self.layer.bias
            values.append(node.inputs[index])
        return tuple(str(v.name) for v in values if v is not None and v.is_initializer())


def find_head(model: ir.Model) -> Head:
    """The head of a classifier with one floating-point output.

    Raises PassError naming the output or the node that stands in the way.
    """
    outputs = [v for v in model.graph.outputs if v.dtype == ir.DataType.FLOAT]
    if len(outputs) != 1:
        names = ", ".join(f"'{v.name}'" for v in outputs) or "none"
        raise PassError(
            f"adapt: no head found: it needs one float32 output of class scores, found {names}; "
            "cut the others off the model"
        )
    output = outputs[0]
    node, after = output.producer(), list[ir.Node]()
    bias: ir.Node | None = None
    while node is not None and not is_op(node, *LINEAR_OPS):
        value = node.inputs[0] if node.inputs else None
        if is_op(node, "Add") and bias is None:
            bias = node
            value = node.inputs[1 if constant(node.inputs[0]) is not None else 0]
        elif not is_op(node, *_KEEP_CLASSES):
            break
        after.insert(0, node)
        node = None if value is None else value.producer()
    if node is None or not is_op(node, *LINEAR_OPS):
        where = "an input" if node is None else f"node '{label(node)}' ({node.op_type})"
        raise PassError(
            f"adapt: no head found: output '{output.name}' comes from {where}, expected a Gemm, "
            "MatMul or Conv of class scores; cut what follows the scores off the model"
        )
    try:
        layer = linear(node)
    except Refused as reason:
        raise PassError(
            f"adapt: no head found: node '{label(node)}' ({node.op_type}) before output "
            f"'{output.name}': {reason}"
        ) from None
    if layer.layout.groups > 1 or (bias is not None and layer.output is not bias.outputs[0]):
        raise PassError(
            f"adapt: no head found: node '{label(node)}' ({node.op_type}) before output "
            f"'{output.name}' has groups, or a bias that is no row; expected one weight for each "
            "class, over all inputs: retrain the model with such a head, or cut it off"
        )
    softmax = any(n.op_type in _PROBABILITIES for n in after)
    rest = tuple(n for n in after if n is not bias)
    head = Head(layer, str(output.name), "probabilities" if softmax else "logits", rest)
    for follower in rest:
        _check_apart(head, follower)
    return head


def _check_apart(head: Head, node: ir.Node) -> None:
    """Raise PassError if a node behind the layer mixes classes with places, as far as is known."""
    before = None if node.inputs[0] is None else node.inputs[0].shape
    after = node.outputs[0].shape
    if not is_op(node, "Flatten", "ReduceMean", "Reshape", "Squeeze") or not after:
        return
    axis = head.class_axis(len(after))
    same = isinstance(after[axis], ir.SymbolicDim) or after[axis] == head.classes
    if same and before and not is_op(node, "ReduceMean"):
        inner = _cells(before, head.class_axis(len(before))), _cells(after, axis)
        same = None in inner or inner[0] == inner[1]
    if not same:
        raise PassError(
            f"adapt: no head found: behind node '{label(node)}' ({node.op_type}), of shape "
            f"{after}, the {head.classes} classes of node '{label(head.layer.node)}' are no "
            "axis of their own any more; pool the places before it, or cut it off the model"
        )


def _cells(shape: ir.Shape, axis: int) -> int | None:
    """Number of values behind an axis; None where a dimension is open."""
    sizes = [size for size in shape[axis + 1 :] if isinstance(size, int)]
    return math.prod(sizes) if len(sizes) == len(shape) - axis - 1 else None


def replace_head(model: ir.Model, classes: int, growth: Growth, seed: int) -> Head:
    """Give the model a head of ``classes`` classes, and its output the shape.

    growth: "new" forgets the classes there were; "grow" keeps their rows, the first ones.
    Weights are uniform within 1 / sqrt(inputs), as torch initialises a layer; biases zero.
    Raises PassError if there is no head, or if it would have to shrink.
    """
    head = find_head(model)
    layer, old = head.layer, head.classes
    if growth == "grow" and classes < old:
        raise PassError(
            f"adapt: the head has {old} classes and cannot grow to {classes}; take head='new' "
            "to forget them"
        )
    blocks = layer.blocks  # [1, classes, inputs, taps]
    reach = 1.0 / np.sqrt(blocks.shape[2] * blocks.shape[3])
    shape = (1, classes, *blocks.shape[2:])
    fresh = np.random.default_rng(seed).uniform(-reach, reach, shape).astype(np.float32)
    if growth == "grow":
        fresh[:, :old] = blocks
    stored = list(layer.layout.shape)
    stored[1 if layer.layout.inputs_first else 0] = classes
    layout = Layout(1, layer.layout.inputs_first, tuple(stored))
    set_constant(layer.node, 1, layout.stored(fresh))
    if layer.bias is not None:
        node, index = layer.bias
        set_constant(node, index, _new_row(constant(node.inputs[index]), old, classes, growth))
    _reshape(head, old, classes)
    return find_head(model)


def _new_row(row: Array | None, old: int, classes: int, growth: Growth) -> Array:
    assert row is not None
    shape = (classes,) if row.ndim < 2 else (*row.shape[:-1], classes)
    fresh = np.zeros(shape, np.float32)
    if growth == "grow":
        fresh[..., :old] = row.reshape(-1) if row.size > 1 else row.reshape(-1)[0]
    return fresh


def _reshape(head: Head, old: int, classes: int) -> None:
    """Let the shapes behind the head follow, and the constant of a Reshape to the old ones."""
    for node in head.after:
        target = constant(node.inputs[1]) if node.op_type == "Reshape" else None
        axis = 0 if target is None else head.class_axis(target.size)
        if target is not None and target[axis] == old:
            value = node.inputs[1]
            assert value is not None
            new = np.array([*target[:axis], classes, *target[axis + 1 :]], np.int64)
            node.replace_input_with(1, with_new_numbers(value, new))
    behind = [head.layer.node, *head.after]
    for value in {head.layer.output, *(v for node in behind for v in node.outputs)}:
        if value.shape is None:
            continue
        sizes = list(value.shape)
        sizes[head.class_axis(len(sizes))] = classes
        value.shape = ir.Shape(sizes)
