"""One execution of a node in the twin: its arguments, attributes and quantization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

_RANGES = {
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT16: (-(2**15), 2**15 - 1),
    ir.DataType.UINT16: (0, 2**16 - 1),
    ir.DataType.INT32: (-(2**31), 2**31 - 1),
}


@dataclass(frozen=True)
class Call:
    """One execution of a node.

    latent: the integer range of a weight that is trained as a float, for DequantizeLinear.
    """

    node: ir.Node
    arguments: Sequence[Any]
    latent: tuple[int, int] | None = None

    def __getitem__(self, index: int) -> Any:
        """The argument at ``index``, or None if it is absent."""
        return self.arguments[index] if index < len(self.arguments) else None

    def get(self, name: str, default: Any = None) -> Any:
        """The value of an attribute, or the default."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.value

    def ints(self, index: int, name: str = "") -> list[int] | None:
        """Integers of an input, or of the attribute that held them in earlier opsets."""
        if self[index] is not None:
            return [int(v) for v in self[index].reshape(-1)]
        value = self.get(name) if name else None
        return None if value is None else [int(v) for v in value]

    def quantized(self, x: Tensor) -> Tensor:
        """Integers as floats: clamp(round(x / scale) + zero_point), the gradient passed on."""
        low, high = self._range()
        scale, zero = self._per_axis(x)
        integers: Tensor = _Rounded.apply(x, scale, zero, low, high, 1.0, 0.0)  # type: ignore[no-untyped-call]
        return integers

    def requantized(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """``quantized`` and then dequantized by the given scale and zero point, in one go."""
        low, high = self._range()
        own_scale, own_zero = self._per_axis(x)
        if scale is self[1] and zero is self[2]:
            return self.rounded(x)
        back = (scale.float().reshape(()), 0.0 if zero is None else float(zero))
        real: Tensor = _Rounded.apply(x, own_scale, own_zero, low, high, *back)  # type: ignore[no-untyped-call]
        return real

    def rounded(self, x: Tensor) -> Tensor:
        """x on the grid of its scale: ``dequantized(quantized(x))`` in one go."""
        low, high = self._range()
        scale, zero = self._per_axis(x)
        real: Tensor = _Rounded.apply(x, scale, zero, low, high, scale, zero)  # type: ignore[no-untyped-call]
        return real

    def dequantized(self, q: Tensor) -> Tensor:
        """(q - zero_point) * scale."""
        scale, zero = self._per_axis(q)
        return (q - zero) * scale

    def _per_axis(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """Scale and zero point in a form that broadcasts over x: per tensor, axis or block."""
        scale, zero = self[1].float(), self[2]
        axis, block = int(self.get("axis", 1)), int(self.get("block_size", 0))

        def shaped(t: Tensor) -> Tensor:
            if t.numel() == 1:
                return t.reshape(())
            if block:
                t = t.repeat_interleave(block, dim=axis)
                return t.narrow(axis, 0, x.shape[axis])
            shape = [1] * x.dim()
            shape[axis] = -1
            return t.reshape(shape)

        if zero is not None and zero.numel() == 1:
            return shaped(scale), float(zero)  # a number clamps faster than a tensor
        return shaped(scale), 0.0 if zero is None else shaped(zero.float())

    def _range(self) -> tuple[int, int]:
        if self.latent is not None:
            return self.latent
        zero_point = self.node.inputs[2] if self[2] is not None else None
        if zero_point is not None and zero_point.dtype is not None:
            return _RANGES[zero_point.dtype]
        return _RANGES[ir.DataType(self.get("output_dtype", 0) or ir.DataType.UINT8)]


class _Rounded(torch.autograd.Function):
    """(clamp(round(x / scale) + zero, low, high) - zero_out) * scale_out, straight through.

    The gradient passes rounding unchanged and stops where the clamp cut. One function with
    buffers of its own, since it is the larger part of a training step otherwise.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, scale, zero, low, high, scale_out, zero_out
    ):
        nearest = torch.div(x, scale).round_()
        low, high = low - zero, high - zero
        real = torch.clamp(nearest, low, high)
        ctx.save_for_backward(nearest)
        ctx.bounds, ctx.factor = (low - 0.5, high + 0.5), None
        if scale_out is not scale:
            ctx.factor = scale_out / scale
        if zero is not zero_out:
            real.add_(zero - zero_out)
        return real.mul_(scale_out)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        (nearest,) = ctx.saved_tensors
        low, high = ctx.bounds
        if isinstance(low, float):
            passed = torch.ops.aten.hardtanh_backward(gradient, nearest, low, high)
        else:  # one zero point per channel
            passed = gradient * ((nearest > low) & (nearest < high))
        if ctx.factor is not None:
            passed = passed * ctx.factor
        return passed, None, None, None, None, None, None
