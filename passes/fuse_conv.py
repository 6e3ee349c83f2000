"""Folds what surrounds a convolution or a Gemm into its weight, bias and padding.

    Conv/ConvTranspose/Gemm -> BatchNormalization | Add | Sub | Mul | Div by a constant
        y = s (W x + b) + t    becomes    y = (s W) x + (s b + t),  s and t per channel
    Mul | Div | Add | Sub with one number -> Conv
        y = W (s x + t) + b    becomes    y = (s W) x + (t sum(W) + b)
    Pad with zeros -> Conv | AveragePool    becomes    pads of the second

Folding is done in float64 and rounded once. Left out: an Add in front of a convolution with
padding (inexact at the border), factors per channel in front of one (a per-tensor activation
scale would have to span them), and MatMul, whose bias ONNX Runtime adds itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Skip
from edgec.passes.matching import (
    add_initializer,
    is_op,
    producer,
    remove_unused,
    same_rank,
    scalar,
    shared_reason,
    take_over,
    with_new_numbers,
)
from edgec.passes.weights import Array, constant, label

_LINEAR = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class _Affine:
    """y = scale * data + shift; the arrays broadcast against the data."""

    data: ir.Value
    scale: Array
    shift: Array


def fold_affine(node: ir.Node, opset: int) -> bool | Skip | None:
    """Fold a per-channel affine node into the linear node before it."""
    affine = _affine(node)
    if affine is None:
        return None
    linear = producer(affine.data, *_LINEAR)
    if linear is None:
        return None
    if linear.graph is not node.graph:
        return Skip(label(node), f"'{label(linear)}' is computed outside of this branch")
    weight = constant(linear.inputs[1])
    bias_value = linear.inputs[2] if len(linear.inputs) > 2 else None
    bias = constant(bias_value)
    if weight is None or (bias_value is not None and bias is None):
        return Skip(label(node), f"weight or bias of '{label(linear)}' is computed, not constant")
    if weight.dtype not in (np.float16, np.float32, np.float64):
        return Skip(label(node), f"weight of '{label(linear)}' is {weight.dtype}, not float")
    channels = _output_channels(linear, weight)
    scale = _per_channel(affine.scale, weight.ndim, channels)
    shift = _per_channel(affine.shift, weight.ndim, channels)
    if scale is None or shift is None:
        return None  # a constant that varies along another axis
    if reason := shared_reason(affine.data):
        return Skip(label(node), reason)
    beta = linear.attributes.get_float("beta", 1.0)
    old_bias = _gemm_bias(bias, channels) if bias is not None else np.zeros(channels)
    if old_bias is None or beta == 0.0:
        return Skip(label(node), f"bias of '{label(linear)}' is not one number per channel")
    with np.errstate(over="ignore"):  # an overflow is refused below
        new_weight = _scaled(linear, weight, scale)
        new_bias = (scale * old_bias + shift / beta).astype(weight.dtype)
    if not (np.isfinite(new_weight).all() and np.isfinite(new_bias).all()):
        return Skip(label(node), f"folding overflows the weights of '{label(linear)}'")
    _write(linear, new_weight, new_bias)
    take_over(node.outputs[0], linear.outputs[0])
    return True


def fold_affine_before(node: ir.Node, opset: int) -> bool | Skip | None:
    """Fold one number that is added to a convolution's input, or multiplied with it, into it.

    Learned scales and shifts around an activation (PP-LCNet) are two passes over the tensor.
    """
    if not is_op(node, "Conv"):
        return None
    before = producer(node.inputs[0], "Add", "Sub", "Mul", "Div")
    line = None if before is None else _line(before)
    if before is None or line is None:
        return None
    data, scale, shift = line
    weight, bias = constant(node.inputs[1]), None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = constant(node.inputs[2])
        if bias is None:
            return Skip(label(before), f"bias of '{label(node)}' is computed, not constant")
    if weight is None or weight.dtype not in (np.float16, np.float32, np.float64):
        return Skip(label(before), f"weight of '{label(node)}' is no constant float")
    if reason := shared_reason(before.outputs[0]):
        return Skip(label(before), reason)
    padded = node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    if shift and (padded or any(node.attributes.get_ints("pads", []))):
        return Skip(label(before), f"'{label(node)}' pads with zeros behind it")
    sums = weight.astype(np.float64).reshape(weight.shape[0], -1).sum(axis=1)
    with np.errstate(over="ignore"):  # an overflow is refused below
        new_weight = (scale * weight.astype(np.float64)).astype(weight.dtype)
        new_bias = (shift * sums + (0.0 if bias is None else bias)).astype(weight.dtype)
    if not (np.isfinite(new_weight).all() and np.isfinite(new_bias).all()):
        return Skip(label(before), f"folding overflows the weights of '{label(node)}'")
    if shift:
        _write(node, new_weight, new_bias)
    else:
        assert node.inputs[1] is not None
        node.replace_input_with(1, with_new_numbers(node.inputs[1], new_weight))
    node.replace_input_with(0, data)
    remove_unused(before)
    return True


def _line(node: ir.Node) -> tuple[ir.Value, float, float] | None:
    """x, s and t where a node computes s x + t with one number; None for anything else."""
    for data, other in (node.inputs, (node.inputs[1], node.inputs[0])):
        number = scalar(other)
        if data is None or number is None or scalar(data) is not None:
            continue
        if not same_rank(node.outputs[0], data):
            return None
        if node.op_type == "Add":
            return data, 1.0, number
        if node.op_type == "Mul":
            return data, number, 0.0
        if node.op_type == "Sub":
            return (data, 1.0, -number) if data is node.inputs[0] else (data, -1.0, number)
        return (data, 1.0 / number, 0.0) if data is node.inputs[0] and number else None
    return None


def fold_pad(node: ir.Node, opset: int) -> bool | Skip | None:
    """Turn a Pad with zeros in front of Conv or AveragePool into their own padding."""
    if not is_op(node, "Conv", "AveragePool"):
        return None
    pad = producer(node.inputs[0], "Pad")
    if pad is None:
        return None
    pads = _spatial_pads(pad)
    if isinstance(pads, str):
        return Skip(label(pad), pads)
    own = list(node.attributes.get_ints("pads", [0] * len(pads)))
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return Skip(label(pad), f"'{label(node)}' computes its own padding (auto_pad)")
    if node.op_type == "AveragePool":
        counted = node.attributes.get_int("count_include_pad", 0) == 1
        if node.attributes.get_int("ceil_mode", 0) or (any(own) and not counted):
            return Skip(label(pad), f"'{label(node)}' leaves its own padding out of the mean")
        kernel = node.attributes.get_ints("kernel_shape", [])
        if any(p + o >= k for p, o, k in zip(pads, own, [*kernel, *kernel], strict=True)):
            return Skip(label(pad), f"'{label(node)}' takes less padding than its window is wide")
        node.attributes.add(ir.AttrInt64("count_include_pad", 1))
    node.attributes.pop("auto_pad", None)
    node.attributes.add(ir.AttrInt64s("pads", [a + b for a, b in zip(own, pads, strict=True)]))
    node.replace_input_with(0, pad.inputs[0])
    remove_unused(pad)
    return True


def _affine(node: ir.Node) -> _Affine | None:
    if is_op(node, "BatchNormalization"):
        return _batch_normalization(node)
    if not is_op(node, "Add", "Sub", "Mul", "Div"):
        return None
    first, second = node.inputs
    one, zero = np.float64(1.0), np.float64(0.0)
    for data, other in ((first, second), (second, first)):
        number = constant(other)
        if data is None or number is None or producer(data, *_LINEAR) is None:
            continue
        number = number.astype(np.float64)
        if node.op_type == "Add":
            return _Affine(data, np.asarray(one), number)
        if node.op_type == "Mul":
            return _Affine(data, number, np.asarray(zero))
        if node.op_type == "Sub":  # data - number, or number - data
            sign = one if data is first else -one
            return _Affine(data, np.asarray(sign), -sign * number)
        if data is first and np.all(number != 0):  # Div; number / data is not affine
            return _Affine(data, 1.0 / number, np.asarray(zero))
    return None


def _batch_normalization(node: ir.Node) -> _Affine | None:
    arrays = [constant(value) for value in node.inputs[1:]]
    training = node.attributes.get_int("training_mode", 0)
    spare = any(output.uses() or output.is_graph_output() for output in node.outputs[1:])
    data = node.inputs[0]
    if training or spare or data is None or any(array is None for array in arrays):
        return None
    gamma, beta, mean, variance = (a.astype(np.float64) for a in arrays if a is not None)
    scale = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    # one number per channel, at axis 1 of [batch, channels, ...]
    spread = (-1,) + (1,) * (_weight_rank(data) - 2)
    return _Affine(data, scale.reshape(spread), (beta - mean * scale).reshape(spread))


def _weight_rank(data: ir.Value) -> int:
    linear = producer(data, *_LINEAR)
    weight = None if linear is None else constant(linear.inputs[1])
    return 2 if weight is None else weight.ndim


def _output_channels(linear: ir.Node, weight: Array) -> int:
    if linear.op_type == "Conv":
        return int(weight.shape[0])
    if linear.op_type == "ConvTranspose":  # [in, out / group, ...]
        return int(weight.shape[1]) * linear.attributes.get_int("group", 1)
    return int(weight.shape[0 if linear.attributes.get_int("transB", 0) else 1])


def _per_channel(array: Array, rank: int, channels: int) -> Array | None:
    """The array as [channels] if it varies along axis 1 of ``rank`` axes at most."""
    if array.ndim > rank:
        return None
    shape = (1,) * (rank - array.ndim) + array.shape
    if any(dim != 1 for axis, dim in enumerate(shape) if axis != 1) or shape[1] not in (
        1,
        channels,
    ):
        return None
    return np.broadcast_to(array.reshape(-1), (channels,)).astype(np.float64)


def _gemm_bias(bias: Array, channels: int) -> Array | None:
    """The bias as [channels]; None for a Gemm whose C varies along the rows."""
    if bias.ndim > 1 and bias.shape[0] != 1:
        return None
    return np.broadcast_to(bias.reshape(-1), (channels,)).astype(np.float64)


def _scaled(linear: ir.Node, weight: Array, scale: Array) -> Array:
    wide = weight.astype(np.float64)
    if linear.op_type == "Conv":
        result = wide * scale.reshape((-1,) + (1,) * (weight.ndim - 1))
    elif linear.op_type == "Gemm":
        result = wide * (scale[:, None] if linear.attributes.get_int("transB", 0) else scale)
    else:  # ConvTranspose: the input channels of group g feed the output channels of group g
        group = linear.attributes.get_int("group", 1)
        grouped = wide.reshape(group, -1, *weight.shape[1:])
        ones = (1,) * (weight.ndim - 2)
        result = (grouped * scale.reshape(group, 1, -1, *ones)).reshape(weight.shape)
    return result.astype(weight.dtype)


def _write(linear: ir.Node, weight: Array, bias: Array) -> None:
    old_weight = linear.inputs[1]
    assert old_weight is not None and linear.graph is not None
    linear.replace_input_with(1, with_new_numbers(old_weight, weight))
    if len(linear.inputs) > 2 and linear.inputs[2] is not None:
        linear.replace_input_with(2, with_new_numbers(linear.inputs[2], bias))
        return
    graph = old_weight.graph if isinstance(old_weight.graph, ir.Graph) else linear.graph
    assert isinstance(graph, ir.Graph)
    linear.resize_inputs(3)
    linear.replace_input_with(2, add_initializer(graph, f"{old_weight.name}_bias", bias))


def _spatial_pads(pad: ir.Node) -> list[int] | str:
    """Begin and end of every spatial axis, as Conv wants them, or why that is impossible."""
    if pad.attributes.get_string("mode", "constant") != "constant":
        return "pads by repeating the border, not with zeros"
    pads = constant(pad.inputs[1]) if len(pad.inputs) > 1 else None
    if pads is None:
        return "its padding is computed, not constant"
    if len(pad.inputs) > 2 and pad.inputs[2] is not None:
        fill = constant(pad.inputs[2])
        if fill is None or np.any(fill != 0):
            return "pads with another number than zero"
    data = pad.inputs[0]
    rank = None if data is None or data.shape is None else len(data.shape)
    axes: list[int] | None = None
    if len(pad.inputs) > 3 and pad.inputs[3] is not None:
        array = constant(pad.inputs[3])
        if array is None or rank is None:
            return "its axes or the rank of its input are not known"
        axes = [int(axis) % rank for axis in array]
    if axes is None:
        rank = len(pads) // 2
        axes = list(range(rank))
    assert rank is not None
    begin, end = [0] * rank, [0] * rank
    for index, axis in enumerate(axes):
        begin[axis], end[axis] = int(pads[index]), int(pads[index + len(axes)])
    if rank < 3 or any(begin[:2] + end[:2]):
        return "pads the batch or the channels"
    if min(begin + end) < 0:
        return "negative padding cuts instead of padding"
    return begin[2:] + end[2:]
