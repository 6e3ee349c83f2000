"""Layers of the twin: convolution and matrix products.

Padding that torch has no argument for (uneven, larger than half a kernel) is written out.
Semantics: the ONNX operator specification, default domain, opset 13 to 23.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from edgec.passes.torch_call import Call, Operator


def convolve(c: Call, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Conv of rank 1 to 3, grouped and dilated: x [N, C, ...], w [M, C/group, ...]."""
    rank = w.dim() - 2
    strides, dilations = c.get("strides", [1] * rank), c.get("dilations", [1] * rank)
    begin, end = padding(c, x.shape[2:], w.shape[2:], strides, dilations)
    if begin != end:
        x, begin = F.pad(x, interleaved(begin, end)), [0] * rank
    if w[0, 0].numel() == 1 and w.shape[1] == x.shape[1] and {*strides} == {1} and not any(begin):
        # one matrix product where the channels lie innermost: half of a convolution's time
        return F.linear(x.movedim(1, -1), w.flatten(1), bias).movedim(-1, 1)
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    groups = int(c.get("group", 1))
    return function(x, w, bias, tuple(strides), tuple(begin), tuple(dilations), groups)


def padding(
    c: Call,
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> tuple[list[int], list[int]]:
    """Padding at the begin and at the end of each axis, from ``pads`` or ``auto_pad``."""
    rank, mode = len(kernel), c.get("auto_pad", "NOTSET")
    if mode == "VALID":
        return [0] * rank, [0] * rank
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        pads = list(c.get("pads", [0] * 2 * rank))
        return pads[:rank], pads[rank:]
    begin, end = [], []
    for size, length, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        reach = (length - 1) * dilation + 1
        total = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
        small, large = total // 2, total - total // 2
        begin.append(small if mode == "SAME_UPPER" else large)
        end.append(large if mode == "SAME_UPPER" else small)
    return begin, end


def interleaved(begin: Sequence[int], end: Sequence[int]) -> list[int]:
    """Padding as ``torch.nn.functional.pad`` takes it: the last axis first."""
    pairs = list(zip(begin, end, strict=True))
    return [pad for pair in reversed(pairs) for pad in pair]


def _conv_transpose(c: Call) -> Tensor:
    rank = c[1].dim() - 2
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    strides = tuple(c.get("strides", [1] * rank))
    dilations, groups = tuple(c.get("dilations", [1] * rank)), int(c.get("group", 1))
    extra = c.get("output_padding", [0] * rank)
    begin, end = _cropping(c, c[0].shape[2:], c[1].shape[2:], strides, dilations)
    if begin == end and all(e < s for e, s in zip(extra, strides, strict=True)):
        pads = tuple(begin)
        if all(p >= 0 for p in pads):
            return function(c[0], c[1], c[2], strides, pads, tuple(extra), groups, dilations)
    whole = function(c[0], c[1], None, strides, 0, 0, groups, dilations)
    crop = [e - p for e, p in zip(extra, end, strict=True)]
    y = F.pad(whole, interleaved([-p for p in begin], crop))
    return y if c[2] is None else y + c[2].reshape(-1, *[1] * rank)


def _cropping(
    c: Call,
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> tuple[list[int], list[int]]:
    """What a ConvTranspose cuts off the begin and the end of each axis."""
    rank, mode, shape = len(kernel), c.get("auto_pad", "NOTSET"), c.get("output_shape")
    if mode in ("SAME_UPPER", "SAME_LOWER") and shape is None:
        shape = [size * stride for size, stride in zip(sizes, strides, strict=True)]
    if shape is None:
        pads = list(c.get("pads", [0] * 2 * rank)) if mode == "NOTSET" else [0] * 2 * rank
        return pads[:rank], pads[rank:]
    extra = c.get("output_padding", [0] * rank)
    begin, end = [], []
    for i, wished in enumerate(shape[-rank:]):
        reach = (kernel[i] - 1) * dilations[i] + 1
        total = strides[i] * (sizes[i] - 1) + extra[i] + reach - wished
        half = total // 2
        begin.append(half if mode == "SAME_UPPER" else total - half)
        end.append(total - half if mode == "SAME_UPPER" else half)
    return begin, end


def _gemm(c: Call) -> Tensor:
    """alpha * A' B' + beta * C."""
    alpha, beta = float(c.get("alpha", 1.0)), float(c.get("beta", 1.0))
    a = c[0].transpose(0, 1) if c.get("transA", 0) else c[0]
    b = c[1] if c.get("transB", 0) else c[1].transpose(0, 1)
    if alpha == beta == 1 and (c[2] is None or c[2].dim() == 1):
        return F.linear(a, b, c[2])
    y = alpha * F.linear(a, b)
    return y if c[2] is None else y + beta * c[2]


def _einsum(c: Call) -> Tensor:
    return torch.einsum(c.get("equation").replace(" ", ""), *c.arguments)


LAYERS: dict[str, Operator] = {
    "Conv": lambda c: convolve(c, c[0], c[1], c[2]),
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "MatMul": lambda c: torch.matmul(c[0], c[1]),
}
