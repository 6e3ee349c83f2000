"""The operators of the twin: one small function each, from ONNX's definition to torch.

A function takes a ``Call`` (node, arguments, attributes) and returns a tensor or a tuple
of tensors. Shapes and indices arrive as integer tensors on the CPU. Semantics: the ONNX
operator specification, default domain, opset 13 to 21.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from edgec.passes import torch_layers as layers
from edgec.passes.torch_call import Call

_TORCH_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
}

_PAD_MODES = {
    "constant": "constant",
    "reflect": "reflect",
    "edge": "replicate",
    "wrap": "circular",
}


Operator = Callable[[Call], Any]


def _quantize(c: Call) -> Tensor:
    return c.quantized(c[0])


def _dequantize(c: Call) -> Tensor:
    # a trained weight arrives as a float and is rounded on its way; other data is integer
    return c.rounded(c[0]) if c.latent is not None else c.dequantized(c[0].float())


def quantize_dequantize(c: Call) -> Tensor:
    """A QuantizeLinear and the DequantizeLinear behind it: x and the parameters of both."""
    return c.requantized(c[0], c[3], c[4])


def _gelu(c: Call) -> Tensor:
    return F.gelu(c[0], approximate=c.get("approximate", "none"))


def _clip(c: Call) -> Tensor:
    low, high = c[1], c[2]
    x = c[0]
    if low is not None:
        x = torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _reduce(function: Callable[..., Tensor]) -> Operator:
    def run(c: Call) -> Tensor:
        axes = c.ints(1, "axes")
        if not axes and c.get("noop_with_empty_axes", 0):
            return c[0]  # type: ignore[no-any-return]
        dims = tuple(axes) if axes else tuple(range(c[0].dim()))
        return function(c[0], dims, bool(c.get("keepdims", 1)))

    return run


def _reshape(c: Call) -> Tensor:
    sizes = c.ints(1) or []
    if not c.get("allowzero", 0):
        sizes = [c[0].shape[i] if s == 0 else s for i, s in enumerate(sizes)]
    return c[0].reshape(sizes)  # type: ignore[no-any-return]


def _squeeze(c: Call) -> Tensor:
    axes = c.ints(1, "axes")
    x: Tensor = c[0]
    return x.squeeze() if axes is None else x.squeeze(tuple(a % x.dim() for a in axes))


def _unsqueeze(c: Call) -> Tensor:
    axes = c.ints(1, "axes") or []
    x: Tensor = c[0]
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


def _transpose(c: Call) -> Tensor:
    order = c.get("perm") or list(reversed(range(c[0].dim())))
    return c[0].permute(tuple(order))  # type: ignore[no-any-return]


def _slice(c: Call) -> Tensor:
    x: Tensor = c[0]
    starts, ends = c.ints(1) or [], c.ints(2) or []
    axes = c.ints(3) or list(range(len(starts)))
    steps = c.ints(4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        indices = range(size)[slice(start, end if abs(end) < 2**31 - 1 else None, step)]
        if step < 0 and end <= -(2**31) + 1:
            indices = range(size)[start::step]
        if step == 1:
            x = x.narrow(axis, indices.start if len(indices) else 0, len(indices))
        else:
            x = x.index_select(axis, torch.tensor(list(indices), dtype=torch.int64))
    return x


def _gather(c: Call) -> Tensor:
    axis = int(c.get("axis", 0)) % c[0].dim()
    size = c[0].shape[axis]
    index = torch.where(c[1] < 0, c[1] + size, c[1]).long()
    y = c[0].index_select(axis, index.reshape(-1))
    return y.reshape((*c[0].shape[:axis], *index.shape, *c[0].shape[axis + 1 :]))  # type: ignore[no-any-return]


def _split(c: Call) -> tuple[Tensor, ...]:
    axis = int(c.get("axis", 0))
    sizes = c.ints(1, "split")
    if sizes is None:
        parts = int(c.get("num_outputs", len(c.node.outputs)))
        step = math.ceil(c[0].shape[axis] / parts)
        return tuple(c[0].split(step, axis))
    return tuple(c[0].split(sizes, axis))


def _concat(c: Call) -> Tensor:
    return torch.cat(list(c.arguments), int(c.get("axis")))


def _pad(c: Call) -> Tensor:
    x: Tensor = c[0]
    pads, axes = c.ints(1, "pads") or [], c.ints(3)
    axes = [a % x.dim() for a in axes] if axes is not None else list(range(x.dim()))
    half = len(pads) // 2
    flat = [0] * (2 * x.dim())
    for i, axis in enumerate(axes):
        flat[2 * (x.dim() - 1 - axis)] = pads[i]
        flat[2 * (x.dim() - 1 - axis) + 1] = pads[half + i]
    mode = _PAD_MODES[c.get("mode", "constant")]
    if mode == "constant":
        value = 0.0 if c[2] is None else float(c[2])
        return F.pad(x, flat, value=value)
    while flat and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    return F.pad(x, flat, mode=mode)


def _expand(c: Call) -> Tensor:
    return c[0].expand(_common_shape(c[0].shape, tuple(c.ints(1) or ())))  # type: ignore[no-any-return]


def _common_shape(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    common: tuple[int, ...] = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return common


def _mean(c: Call) -> Tensor:
    shape = _common_shape(*(a.shape for a in c.arguments))
    return torch.stack([a.expand(shape) for a in c.arguments]).mean(0)


def _cast(c: Call) -> Tensor:
    return c[0].to(_TORCH_DTYPES[ir.DataType(int(c.get("to")))])  # type: ignore[no-any-return]


def _shape(c: Call) -> Tensor:
    sizes = list(c[0].shape)[int(c.get("start", 0)) : c.get("end")]
    return torch.tensor(sizes, dtype=torch.int64)


def _constant(c: Call) -> Tensor:
    for name, dtype in (("value_float", torch.float32), ("value_int", torch.int64)):
        if c.get(name) is not None:
            return torch.tensor(c.get(name), dtype=dtype)
    for name, dtype in (("value_floats", torch.float32), ("value_ints", torch.int64)):
        if c.get(name) is not None:
            return torch.tensor(list(c.get(name)), dtype=dtype)
    return torch.from_numpy(c.get("value").numpy().copy())


def _constant_of_shape(c: Call) -> Tensor:
    value = c.get("value")
    fill = torch.zeros(1) if value is None else torch.from_numpy(value.numpy().copy())
    return fill.reshape(()).expand(c.ints(0) or []).clone()


def _div(c: Call) -> Tensor:
    if c[0].is_floating_point():
        return c[0] / c[1]  # type: ignore[no-any-return]
    return torch.div(c[0], c[1], rounding_mode="trunc")


def _matmul(c: Call) -> Tensor:
    return torch.matmul(c[0], c[1])


def _softmax(c: Call) -> Tensor:
    return torch.softmax(c[0], int(c.get("axis", -1)))


def _log_softmax(c: Call) -> Tensor:
    return torch.log_softmax(c[0], int(c.get("axis", -1)))


def _hard_sigmoid(c: Call) -> Tensor:
    alpha, beta = float(c.get("alpha", 0.2)), float(c.get("beta", 0.5))
    return torch.clamp(alpha * c[0] + beta, 0.0, 1.0)


def _global_average(c: Call) -> Tensor:
    return c[0].mean(tuple(range(2, c[0].dim())), keepdim=True)  # type: ignore[no-any-return]


def _flatten(c: Call) -> Tensor:
    axis = int(c.get("axis", 1))
    axis = axis + c[0].dim() if axis < 0 else axis
    return c[0].reshape(math.prod(c[0].shape[:axis]), -1)  # type: ignore[no-any-return]


def _many(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def run(c: Call) -> Tensor:
        result: Tensor = c.arguments[0]
        for other in c.arguments[1:]:
            result = function(result, other)
        return result

    return run


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda c: function(c[0])


def _binary(function: Callable[[Any, Any], Tensor]) -> Operator:
    return lambda c: function(c[0], c[1])


OPERATORS: dict[str, Operator] = {
    "Abs": _unary(torch.abs),
    "Add": _binary(torch.add),
    "And": _binary(torch.logical_and),
    "AveragePool": layers.average_pool,
    "BatchNormalization": layers.batch_norm,
    "Cast": _cast,
    "Ceil": _unary(torch.ceil),
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Conv": layers.conv,
    "ConvTranspose": layers.conv_transpose,
    "Cos": _unary(torch.cos),
    "DequantizeLinear": _dequantize,
    "Div": _div,
    "Elu": lambda c: F.elu(c[0], float(c.get("alpha", 1.0))),
    "Equal": _binary(torch.eq),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _unary(torch.floor),
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": layers.gemm,
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": lambda c: c[0].amax(tuple(range(2, c[0].dim())), keepdim=True),
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(F.hardswish),
    "Identity": _unary(lambda x: x),
    "InstanceNormalization": layers.instance_norm,
    "LayerNormalization": layers.layer_norm,
    "LeakyRelu": lambda c: F.leaky_relu(c[0], float(c.get("alpha", 0.01))),
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "Log": _unary(torch.log),
    "LogSoftmax": _log_softmax,
    "MatMul": _matmul,
    "Max": _many(torch.maximum),
    "MaxPool": layers.max_pool,
    "Mean": _mean,
    "Min": _many(torch.minimum),
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "Or": _binary(torch.logical_or),
    "PRelu": lambda c: torch.where(c[0] < 0, c[0] * c[1], c[0]),
    "Pad": _pad,
    "Pow": lambda c: torch.pow(c[0], c[1]).to(c[0].dtype),
    "QuantizeLinear": _quantize,
    "Reciprocal": _unary(torch.reciprocal),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "Relu": _unary(torch.relu),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": _unary(torch.sigmoid),
    "Sin": _unary(torch.sin),
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": _unary(F.softplus),
    "Split": _split,
    "Sqrt": _unary(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _binary(torch.sub),
    "Sum": _many(torch.add),
    "Tanh": _unary(torch.tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": lambda c: torch.where(c[0], c[1], c[2]),
}
