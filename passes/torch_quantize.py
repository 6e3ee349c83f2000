"""Quantization in the twin: integers as floats, differentiated straight through.

Rounding passes the gradient on and clamping stops it (Bengio et al. 2013, arXiv:1308.3432;
Jacob et al. 2018, arXiv:1712.05877, section 3). A learned scale s of x gets, for the values
between the limits, round(x / s) - x / s, and the limit itself for the others, all times
1 / sqrt(N * Qp) (LSQ, Esser et al. 2020, arXiv:1902.08153, sections 2.1 and 2.2; N: values that
share the scale, of one sample; Qp: the largest integer). A scale that the graph computes is
a constant to the gradient. A trained weight may be rounded to a finer grid over the same range.

The integers of MatMulInteger, QLinearConv and the like are float32 too: sums beyond 2^24 are
rounded, which ONNX Runtime's are not. Left out: float8, float4 and 2-bit types.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from edgec.passes.torch_call import Call, Operator, torch_dtype
from edgec.passes.torch_layers import convolve

_RANGES = {
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT16: (-(2**15), 2**15 - 1),
    ir.DataType.UINT16: (0, 2**16 - 1),
    ir.DataType.INT32: (-(2**31), 2**31 - 1),
}


def quantized(c: Call, x: Tensor) -> Tensor:
    """Integers as floats: clamp(round(x / scale) + zero_point)."""
    low, high = _range(c)
    x = _real(x)
    scale, zero = _fitted(c, x)
    return _rounded(x, scale, zero, (low, high), 1.0, 0.0)


def dequantized(c: Call, q: Tensor) -> Tensor:
    """(q - zero_point) * scale."""
    q = _real(q)
    scale, zero = _fitted(c, q)
    return (q - zero) * scale


def requantized(c: Call, x: Tensor) -> Tensor:
    """x on the grid of its scale: quantized and dequantized in one go."""
    x = _real(x)
    scale, zero = _fitted(c, x)
    return _rounded(x, scale, zero, _range(c), scale, zero, c.finer)


def quantize_dequantize(c: Call) -> Tensor:
    """A QuantizeLinear and the DequantizeLinear behind it: x, then scale and zero point of both."""
    if c[3] is c[1] and c[4] is c[2]:
        return _as_scale(c, requantized(c, c[0]))
    x = _real(c[0])
    scale, zero = _fitted(c, x)
    back = Call(c.node, [x, c[3], c[4]])
    y = _rounded(x, scale, zero, _range(c), *_fitted(back, x))
    return _as_scale(back, y)


def _quantize(c: Call) -> Tensor:
    return quantized(c, c[0])


def _dequantize(c: Call) -> Tensor:
    # a trained weight arrives as a float and is rounded on its way; other data is integer
    return _as_scale(c, (requantized if c.latent is not None else dequantized)(c, c[0]))


def _as_scale(c: Call, y: Tensor) -> Tensor:
    """What a DequantizeLinear yields has the type of its scale, or the one that it names."""
    code = c.get("output_dtype", 0) if c.node.op_type == "DequantizeLinear" else 0
    dtype = torch_dtype(int(code)) if code else c[1].dtype
    return y if y.dtype in (dtype, torch.float64) else y.to(dtype)


def _real(x: Tensor) -> Tensor:
    """float64 as it is, everything else as float32: also under autocast."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _fitted(c: Call, x: Tensor) -> tuple[Tensor, Tensor | float]:
    """Scale and zero point in a form that broadcasts over x: per tensor, axis or block."""
    scale, zero = c[1].to(x.dtype), c[2]
    axis, block = int(c.get("axis", 1)), int(c.get("block_size", 0))
    if scale.requires_grad:
        scale = _tempered(c, x, scale) if c.constant(1) else scale.detach()

    def shaped(t: Tensor) -> Tensor:
        if t.numel() == 1:
            return t.reshape(())
        if block:
            t = t.repeat_interleave(block, dim=axis)
            return t.narrow(axis, 0, x.shape[axis])
        shape = [1] * x.dim()
        shape[axis] = -1
        return t.reshape(shape)

    if zero is None or zero.numel() == 1:  # a number clamps faster than a tensor
        return shaped(scale), 0.0 if zero is None else float(zero)
    return shaped(scale), shaped(zero.to(x.dtype))


def _tempered(c: Call, x: Tensor, scale: Tensor) -> Tensor:
    """The same scale, its gradient times 1 / sqrt(N * Qp)."""
    zero = 0.0 if c[2] is None else float(c[2].float().mean())
    largest = max(_range(c)[1] - zero, 1.0)
    samples = 1 if c.latent is not None or c.constant(0) or x.dim() < 2 else x.shape[0]
    count = max(x.numel() / samples / scale.numel(), 1.0)
    factor = 1 / math.sqrt(count * largest)
    fixed = scale.detach()
    return fixed + (scale - fixed) * factor


def _range(c: Call) -> tuple[int, int]:
    """The least and the greatest integer of what a node quantizes to."""
    if c.latent is not None:
        return c.latent
    kind = c.dtype(2) if c[2] is not None else None
    if kind is None and c.node.op_type == "DequantizeLinear":
        kind = c.dtype(0)
    kind = kind or ir.DataType(int(c.get("output_dtype", 0)) or ir.DataType.UINT8)
    if kind not in _RANGES:
        raise ValueError(f"quantization to {kind.name} is not differentiated")
    return _RANGES[kind]


def _rounded(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | float,
    limits: tuple[int, int],
    scale_out: Tensor | float,
    zero_out: Tensor | float,
    finer: int = 1,
) -> Tensor:
    low, high = limits
    y: Tensor = _Rounded.apply(  # type: ignore[no-untyped-call]
        x, scale, zero, low, high, scale_out, zero_out, finer
    )
    return y


class _Rounded(torch.autograd.Function):
    """(clamp(round(x / scale) + zero, low, high) - zero_out) * scale_out, straight through.

    finer: what is rounded to are multiples of 1 / finer. One function with buffers of its own,
    since it is the larger part of a training step otherwise.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, scale, zero, low, high, scale_out, zero_out, finer
    ):
        nearest = torch.div(x, scale)
        nearest = nearest.round_() if finer == 1 else nearest.mul_(finer).round_().div_(finer)
        low, high = low - zero, high - zero
        real = torch.clamp(nearest, low, high)
        learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[5]
        ctx.save_for_backward(nearest, *((x, scale) if learned else ()))
        ctx.bounds, ctx.beyond, ctx.factor = (low, high), 0.5 / finer, None
        if scale_out is not scale:
            ctx.factor = scale_out / scale
        ctx.shift = None
        if zero is not zero_out:
            ctx.shift = zero - zero_out
            real.add_(ctx.shift)
        return real.mul_(scale_out)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        nearest, *learned = ctx.saved_tensors
        low, high = ctx.bounds
        if isinstance(low, float):
            around = low - ctx.beyond, high + ctx.beyond
            passed = torch.ops.aten.hardtanh_backward(gradient, nearest, *around)
        else:  # one zero point per channel
            passed = gradient * ((nearest >= low) & (nearest <= high))
        if ctx.factor is not None:
            passed = passed * ctx.factor
        of_scale = of_scale_out = None
        if ctx.needs_input_grad[1]:
            x, scale = learned
            of_scale = (passed * x / scale).neg_().sum_to_size(scale.shape)
        if ctx.needs_input_grad[5]:
            real = torch.clamp(nearest, low, high)
            real = real if ctx.shift is None else real + ctx.shift
            of_scale_out = (gradient * real).sum_to_size(learned[1].shape)
        return passed, of_scale, None, None, None, of_scale_out, None, None


def _dynamic_quantize(c: Call) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 over the range of x and zero; scale and zero point are no part of the gradient."""
    x = c[0]
    least, greatest = x.detach().amin().clamp(max=0), x.detach().amax().clamp(min=0)
    scale = torch.where(greatest == least, torch.ones_like(least), greatest - least) / 255
    zero = torch.round(torch.clamp(-least / scale, 0, 255))
    return _rounded(x, scale, float(zero), (0, 255), 1.0, 0.0), scale, zero.to(torch.uint8)


def _centred(x: Tensor, zero: Tensor | None, axis: int | None = None) -> Tensor:
    """Integers minus their zero point, as floats; axis: that of a list of zero points."""
    if zero is None:
        return _real(x)
    return _real(x) - _spread(zero, x, axis)


def _spread(t: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """A number, or one number per place of an axis, in a form that broadcasts over x."""
    t = _real(t)
    if t.numel() == 1:
        return t.reshape(())
    if t.dim() != 1 or axis is None:
        return t
    shape = [1] * x.dim()
    shape[axis] = -1
    return t.reshape(shape)


def _matmul_integer(c: Call) -> Tensor:
    return _centred(c[0], c[2], -2) @ _centred(c[1], c[3], -1)


def _conv_integer(c: Call) -> Tensor:
    return convolve(c, _centred(c[0], c[2]), _centred(c[1], c[3], 0), None)


def _qlinear_conv(c: Call) -> Tensor:
    x, w = _centred(c[0], c[2]), _centred(c[3], c[5], 0)
    bias = None if c[8] is None else c[8].to(x.dtype)
    channels = _spread(_real(c[1]) * _real(c[4]), x, 1)
    return _onto(c, convolve(c, x, w, bias) * channels, 6)


def _qlinear_matmul(c: Call) -> Tensor:
    a = _centred(c[0], c[2], -2) * _spread(c[1], c[0], -2)
    b = _centred(c[3], c[5], -1) * _spread(c[4], c[3], -1)
    return _onto(c, a @ b, 6)


def _onto(c: Call, y: Tensor, index: int) -> Tensor:
    """y as the integers of the scale and zero point at an index."""
    low, high = _RANGES[c.dtype(index + 1) or ir.DataType.UINT8]
    scale, zero = _spread(c[index], y, -1), _spread(c[index + 1], y, -1)
    number: Any = float(zero) if zero.dim() == 0 else zero
    return _rounded(y, scale.detach(), number, (low, high), 1.0, 0.0)


QUANTIZE: dict[str, Operator] = {
    "ConvInteger": _conv_integer,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "MatMulInteger": _matmul_integer,
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _qlinear_matmul,
    "QuantizeLinear": _quantize,
}
