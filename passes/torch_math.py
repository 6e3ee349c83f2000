"""Operators of the twin that work on each element by itself: arithmetic, comparison, activation.

Semantics: the ONNX operator specification, default domain, opset 13 to 23.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgec.passes.torch_call import Call, Operator, broadcast_shape, torch_dtype


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda c: function(c[0])


def _binary(function: Callable[[Any, Any], Tensor]) -> Operator:
    return lambda c: function(c[0], c[1])


def _many(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def run(c: Call) -> Tensor:
        result: Tensor = c.arguments[0]
        for other in c.arguments[1:]:
            result = function(result, other)
        return result

    return run


def _cast(c: Call) -> Tensor:
    return c[0].to(torch_dtype(int(c.get("to"))))  # type: ignore[no-any-return]


def _cast_like(c: Call) -> Tensor:
    kind = c.dtype(1)
    return c[0].to(c[1].dtype if kind is None else torch_dtype(kind))  # type: ignore[no-any-return]


def _clip(c: Call) -> Tensor:
    x, low, high = c[0], c[1], c[2]
    if low is not None:
        x = torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _div(c: Call) -> Tensor:
    if c[0].is_floating_point():
        return c[0] / c[1]  # type: ignore[no-any-return]
    return torch.div(c[0], c[1], rounding_mode="trunc")


def _dropout(c: Call) -> Tensor | tuple[Tensor, Tensor]:
    if c[2] is not None and bool(c[2]) and (c[1] is None or float(c[1]) > 0):
        raise ValueError("Dropout in training mode; a shipped graph has none")
    return (c[0], torch.ones_like(c[0], dtype=torch.bool)) if c.wants(1) else c[0]


def _hard_sigmoid(c: Call) -> Tensor:
    alpha, beta = float(c.get("alpha", 0.2)), float(c.get("beta", 0.5))
    return torch.clamp(alpha * c[0] + beta, 0.0, 1.0)


def _is_inf(c: Call) -> Tensor:
    positive, negative = c.get("detect_positive", 1), c.get("detect_negative", 1)
    if positive and negative:
        return torch.isinf(c[0])
    if not (positive or negative):
        return torch.zeros_like(c[0], dtype=torch.bool)
    return torch.isposinf(c[0]) if positive else torch.isneginf(c[0])


def _mean(c: Call) -> Tensor:
    shape = broadcast_shape(*(a.shape for a in c.arguments))
    return torch.stack([a.expand(shape) for a in c.arguments]).mean(0)


def _mod(c: Call) -> Tensor:
    return torch.fmod(c[0], c[1]) if c.get("fmod", 0) else torch.remainder(c[0], c[1])


def _pow(c: Call) -> Tensor:
    exponent = c[1]
    if exponent.numel() == 1 and not exponent.requires_grad and exponent.dim() <= c[0].dim():
        exponent = exponent.item()  # x * x and the square root have forms of their own
    return torch.pow(c[0], exponent).to(c[0].dtype)


def _selu(c: Call) -> Tensor:
    alpha = float(c.get("alpha", 1.6732631921768188))
    gamma = float(c.get("gamma", 1.0507010221481323))
    return gamma * (torch.relu(c[0]) + alpha * torch.expm1(c[0].clamp(max=0)))


def _shrink(c: Call) -> Tensor:
    x, edge, bias = c[0], float(c.get("lambd", 0.5)), float(c.get("bias", 0.0))
    zero = torch.zeros_like(x)
    return torch.where(x < -edge, x + bias, torch.where(x > edge, x - bias, zero)).to(x.dtype)


def _thresholded_relu(c: Call) -> Tensor:
    return torch.where(c[0] > float(c.get("alpha", 1.0)), c[0], torch.zeros_like(c[0]))


MATH: dict[str, Operator] = {
    "Abs": _unary(torch.abs),
    "Acos": _unary(torch.acos),
    "Acosh": _unary(torch.acosh),
    "Add": _binary(torch.add),
    "And": _binary(torch.logical_and),
    "Asin": _unary(torch.asin),
    "Asinh": _unary(torch.asinh),
    "Atan": _unary(torch.atan),
    "Atanh": _unary(torch.atanh),
    "BitwiseAnd": _binary(torch.bitwise_and),
    "BitwiseNot": _unary(torch.bitwise_not),
    "BitwiseOr": _binary(torch.bitwise_or),
    "BitwiseXor": _binary(torch.bitwise_xor),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": _unary(torch.ceil),
    "Celu": lambda c: F.celu(c[0], float(c.get("alpha", 1.0))),
    "Clip": _clip,
    "Cos": _unary(torch.cos),
    "Cosh": _unary(torch.cosh),
    "Div": _div,
    "Dropout": _dropout,
    "Elu": lambda c: F.elu(c[0], float(c.get("alpha", 1.0))),
    "Equal": _binary(torch.eq),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Floor": _unary(torch.floor),
    "Gelu": lambda c: F.gelu(c[0], approximate=c.get("approximate", "none")),
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(F.hardswish),
    "Identity": _unary(lambda x: x),
    "IsInf": _is_inf,
    "IsNaN": _unary(torch.isnan),
    "LeakyRelu": lambda c: F.leaky_relu(c[0], float(c.get("alpha", 0.01))),
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "Log": _unary(torch.log),
    "LogSoftmax": lambda c: torch.log_softmax(c[0], int(c.get("axis", -1))),
    "Max": _many(torch.maximum),
    "Mean": _mean,
    "Min": _many(torch.minimum),
    "Mish": _unary(F.mish),
    "Mod": _mod,
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "Or": _binary(torch.logical_or),
    "PRelu": lambda c: torch.where(c[0] < 0, c[0] * c[1], c[0]),
    "Pow": _pow,
    "Reciprocal": _unary(torch.reciprocal),
    "Relu": _unary(torch.relu),
    "Round": _unary(torch.round),
    "Selu": _selu,
    "Shrink": _shrink,
    "Sigmoid": _unary(torch.sigmoid),
    "Sign": _unary(torch.sign),
    "Sin": _unary(torch.sin),
    "Sinh": _unary(torch.sinh),
    "Softmax": lambda c: torch.softmax(c[0], int(c.get("axis", -1))),
    "Softplus": _unary(F.softplus),
    "Softsign": _unary(F.softsign),
    "Sqrt": _unary(torch.sqrt),
    "Sub": _binary(torch.sub),
    "Sum": _many(torch.add),
    "Swish": lambda c: c[0] * torch.sigmoid(float(c.get("alpha", 1.0)) * c[0]),
    "Tan": _unary(torch.tan),
    "Tanh": _unary(torch.tanh),
    "ThresholdedRelu": _thresholded_relu,
    "Where": lambda c: torch.where(c[0], c[1], c[2]),
    "Xor": _binary(torch.logical_xor),
}
