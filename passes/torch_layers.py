"""Layers of the twin: convolution, pooling, matrix products and normalization.

Padding that torch has no argument for (uneven, larger than half a kernel) is written out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from edgec.passes.torch_call import Call


def conv(c: Call) -> Tensor:
    """Conv of rank 1 to 3, grouped and dilated: x [N, C, ...], w [M, C/group, ...]."""
    x, w = c[0], c[1]
    rank = w.dim() - 2
    strides, dilations = c.get("strides", [1] * rank), c.get("dilations", [1] * rank)
    x, pads = _padded(c, x, w.shape[2:], strides, dilations, 0.0)
    if w[0, 0].numel() == 1 and w.shape[1] == x.shape[1] and {*strides} == {1} and not any(pads):
        # one matrix product where the channels lie innermost: half of a convolution's time
        return F.linear(x.movedim(1, -1), w.flatten(1), c[2]).movedim(-1, 1)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return convolve(x, w, c[2], tuple(strides), pads, tuple(dilations), int(c.get("group", 1)))


def conv_transpose(c: Call) -> Tensor:
    """ConvTranspose with even pads and no output_shape."""
    rank = c[1].dim() - 2
    pads = list(c.get("pads", [0] * 2 * rank))
    if pads[:rank] != pads[rank:] or c.get("output_shape") is not None:
        raise ValueError("ConvTranspose with uneven pads or an output_shape")
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    return convolve(
        c[0],
        c[1],
        c[2],
        tuple(c.get("strides", [1] * rank)),
        tuple(pads[:rank]),
        tuple(c.get("output_padding", [0] * rank)),
        int(c.get("group", 1)),
        tuple(c.get("dilations", [1] * rank)),
    )


def _padded(
    c: Call,
    x: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    value: float,
) -> tuple[Tensor, tuple[int, ...]]:
    """x padded where torch cannot (uneven pads), and the even padding that it can."""
    rank = len(kernel)
    mode = c.get("auto_pad", "NOTSET")
    pads = list(c.get("pads", [0] * 2 * rank))
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        for axis in range(rank):
            size, stride = x.shape[2 + axis], strides[axis]
            reach = (kernel[axis] - 1) * dilations[axis] + 1
            total = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
            small, large = total // 2, total - total // 2
            first = small if mode == "SAME_UPPER" else large
            pads[axis], pads[rank + axis] = first, total - first
    if pads[:rank] == pads[rank:]:
        return x, tuple(pads[:rank])
    flat = [p for axis in reversed(range(rank)) for p in (pads[axis], pads[rank + axis])]
    return F.pad(x, flat, value=value), (0,) * rank


def max_pool(c: Call) -> Tensor:
    """MaxPool without indices; padding counts as minus infinity."""
    kernel = c.get("kernel_shape")
    rank = len(kernel)
    strides, dilations = c.get("strides", [1] * rank), c.get("dilations", [1] * rank)
    x, pads = _padded(c, c[0], kernel, strides, dilations, -math.inf)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
    ceil = bool(c.get("ceil_mode", 0))
    if any(2 * p > k for p, k in zip(pads, kernel, strict=True)):
        x = F.pad(x, [p for p in reversed(pads) for _ in (0, 1)], value=-math.inf)
        pads = (0,) * rank
    if len(c.node.outputs) > 1:
        raise ValueError("MaxPool with indices")
    return pool(x, tuple(kernel), tuple(strides), pads, tuple(dilations), ceil)


def average_pool(c: Call) -> Tensor:
    """AveragePool, dilated or unevenly padded too; padding counts where ONNX says so."""
    kernel = c.get("kernel_shape")
    rank = len(kernel)
    strides, dilations = c.get("strides", [1] * rank), c.get("dilations", [1] * rank)
    include, ceil = bool(c.get("count_include_pad", 0)), bool(c.get("ceil_mode", 0))
    x, pads = _padded(c, c[0], kernel, strides, dilations, 0.0)
    small = all(2 * p <= k for p, k in zip(pads, kernel, strict=True))
    if x is c[0] and small and all(d == 1 for d in dilations):
        pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
        return pool(x, tuple(kernel), tuple(strides), pads, ceil, include)
    # sums over windows by a convolution with ones, divided by the number of counted cells
    ones = torch.ones_like(c[0])
    counted, _ = _padded(c, ones, kernel, strides, dilations, 1.0 if include else 0.0)
    even = [p for p in reversed(pads) for _ in (0, 1)]
    x, counted = F.pad(x, even), F.pad(counted, even, value=1.0 if include else 0.0)
    if ceil:
        extra = []
        for axis in reversed(range(rank)):
            reach = (kernel[axis] - 1) * dilations[axis] + 1
            rest = (x.shape[2 + axis] - reach) % strides[axis]
            extra += [0, (strides[axis] - rest) % strides[axis]]
        x, counted = F.pad(x, extra), F.pad(counted, extra)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    channels = x.shape[1]
    window = torch.ones((channels, 1, *kernel), dtype=x.dtype)
    settings = (None, tuple(strides), 0, tuple(dilations), channels)
    return convolve(x, window, *settings) / convolve(counted, window, *settings)


def gemm(c: Call) -> Tensor:
    """alpha * A' B' + beta * C."""
    a = c[0].transpose(0, 1) if c.get("transA", 0) else c[0]
    b = c[1].transpose(0, 1) if c.get("transB", 0) else c[1]
    y: Tensor = float(c.get("alpha", 1.0)) * (a @ b)
    return y if c[2] is None else y + float(c.get("beta", 1.0)) * c[2]


def batch_norm(c: Call) -> Tensor:
    """BatchNormalization of inference: with the stored mean and variance."""
    return F.batch_norm(c[0], c[3], c[4], c[1], c[2], False, 0.0, float(c.get("epsilon", 1e-5)))


def layer_norm(c: Call) -> Tensor | tuple[Tensor, ...]:
    """LayerNormalization over the axes from ``axis`` on; its mean and 1 / std if asked for."""
    axis = int(c.get("axis", -1)) % c[0].dim()
    shape = c[0].shape[axis:]
    bias = None if c[2] is None else c[2].expand(shape)
    epsilon = float(c.get("epsilon", 1e-5))
    y = F.layer_norm(c[0], shape, c[1].expand(shape), bias, epsilon)
    if len(c.node.outputs) == 1:
        return y
    dims = tuple(range(axis, c[0].dim()))
    variance = c[0].var(dims, correction=0, keepdim=True)
    return y, c[0].mean(dims, keepdim=True), torch.rsqrt(variance + epsilon)


def instance_norm(c: Call) -> Tensor:
    """InstanceNormalization: each channel of each sample by itself."""
    return F.instance_norm(c[0], weight=c[1], bias=c[2], eps=float(c.get("epsilon", 1e-5)))
