"""Layers that are linear in their input, seen alike: Conv, Gemm and MatMul with a constant weight.

What passes that move scales between layers, or that fit a layer's weights, share: the weight
as [groups, outputs, inputs, taps] whatever its layout in the file, where the bias is, and
which value carries the result.

Left out: ConvTranspose, Gemm with a transposed input, weights computed at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgec.passes.matching import is_op, remove_unused, sole_user, with_new_numbers
from edgec.passes.weights import Array, Refused, constant, float_weight

LINEAR_OPS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Layout:
    """How a weight lies in its file.

    groups: of a Conv; 1 for products. inputs_first: [inputs, outputs], else [outputs, ...].
    shape: of the stored weight.
    """

    groups: int
    inputs_first: bool
    shape: tuple[int, ...]

    def blocks(self, weight: Array) -> Array:
        """A stored weight as [groups, outputs per group, inputs per group, taps]."""
        rows = weight.T if self.inputs_first else weight
        return rows.reshape(self.groups, rows.shape[0] // self.groups, rows.shape[1], -1)

    def stored(self, blocks: Array) -> Array:
        """The inverse of ``blocks``."""
        if self.inputs_first:
            return np.ascontiguousarray(blocks.reshape(self.shape[::-1]).T)
        return np.ascontiguousarray(blocks.reshape(self.shape))


@dataclass(frozen=True)
class Linear:
    """A layer of the graph. bias: node and input index of its constant bias, if any.

    output: the layer's result, behind the Add that a MatMul's bias is in.
    """

    node: ir.Node
    layout: Layout
    bias: tuple[ir.Node, int] | None
    output: ir.Value

    @property
    def is_conv(self) -> bool:
        """True if channels are axis 1 of [N, C, ...]; else they are the last axis."""
        return self.node.op_type == "Conv"

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return int(self.blocks.shape[0] * self.blocks.shape[2])

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return int(self.blocks.shape[0] * self.blocks.shape[1])

    @property
    def blocks(self) -> Array:
        """The weight, float32 [groups, outputs per group, inputs per group, taps]."""
        array = constant(self.node.inputs[1])
        assert array is not None  # checked by ``linear``
        return self.layout.blocks(array)

    def scale_inputs(self, factor: Array) -> None:
        """Multiply the weights of each input channel; factor: [inputs]."""
        blocks = self.blocks
        by_group = factor.reshape(blocks.shape[0], 1, blocks.shape[2], 1)
        self._set_weight(blocks * by_group)

    def scale_outputs(self, factor: Array) -> None:
        """Multiply weights and bias of each output channel; factor: [outputs]."""
        blocks = self.blocks
        self._set_weight(blocks * factor.reshape(*blocks.shape[:2], 1, 1))
        if self.bias is not None:
            node, index = self.bias
            scale_row(node, index, factor)

    def _set_weight(self, blocks: Array) -> None:
        set_constant(self.node, 1, self.layout.stored(blocks))


def linear(node: ir.Node) -> Linear:
    """The layer that a Conv, Gemm or MatMul is. Raises Refused with the reason if it is none."""
    weight = float_weight(node.inputs[1])
    shared = node.inputs[1]
    if shared is not None and len(shared.uses()) != 1:
        raise Refused(f"its weight is read by {len(shared.uses())} nodes")
    if constant(node.inputs[0]) is not None:
        raise Refused("its input is constant")
    layout = layout_of(node, weight.shape)
    outputs = weight.shape[1 if layout.inputs_first else 0]
    bias, output = _bias(node, outputs), node.outputs[0]
    if bias is not None and bias[0] is not node:
        output = bias[0].outputs[0]
    return Linear(node, layout, bias, output)


def layout_of(node: ir.Node, shape: tuple[int, ...]) -> Layout:
    """How the weight of a Conv, Gemm or MatMul lies. Raises Refused where it is no matrix."""
    if node.op_type == "Conv":
        group = node.attributes.get("group")
        return Layout(1 if group is None else group.as_int(), False, shape)
    if len(shape) != 2:
        raise Refused(f"its weight has {len(shape)} dimensions, 2 are needed")
    if node.op_type == "MatMul":
        return Layout(1, True, shape)
    if _flag(node, "transA"):
        raise Refused("Gemm with a transposed input")
    return Layout(1, not _flag(node, "transB"), shape)


def scale_row(node: ir.Node, index: int, factor: Array) -> None:
    """Multiply a constant input by one factor a channel; factor: [channels].

    The constant holds one number, or one a channel along its only axis longer than 1.
    """
    old = constant(node.inputs[index])
    assert old is not None  # a row was found there before
    shape = old.shape if old.size == factor.size else (*old.shape[:-1], factor.size)
    set_constant(node, index, old * factor if old.size == 1 else old * factor.reshape(shape))


def set_constant(node: ir.Node, index: int, array: Array) -> None:
    """Let a node's input hold another float32 array; other readers keep the old one."""
    value = node.inputs[index]
    assert value is not None
    node.replace_input_with(index, with_new_numbers(value, array.astype(np.float32)))
    remove_unused(value.producer())  # a Transpose of a table that others read


def is_row(value: ir.Value | None, channels: int) -> bool:
    """True for a float32 constant of one number, or of one a channel along its last axis."""
    array = constant(value)
    if array is None or array.dtype != np.float32:
        return False
    return array.size == 1 or (array.size == channels and array.shape[-1] == channels)


def _bias(node: ir.Node, outputs: int) -> tuple[ir.Node, int] | None:
    """Where the constant bias is. Raises Refused if the node has one that is no row."""
    if node.op_type == "MatMul":
        add = sole_user(node.outputs[0])
        if add is None or not is_op(add, "Add"):
            return None
        index = 1 if add.inputs[0] is node.outputs[0] else 0
        return (add, index) if is_row(add.inputs[index], outputs) else None
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return None
    if not is_row(node.inputs[2], outputs):
        raise Refused("its bias is no constant row of float32 numbers")
    return node, 2


def _flag(node: ir.Node, name: str) -> bool:
    attribute = node.attributes.get(name)
    return attribute is not None and bool(attribute.as_int())
