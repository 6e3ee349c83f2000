"""Pooling layers of the twin.

The fast form is torch's own. Where torch has no argument for it (uneven padding, padding
larger than half a window, windows that reach past the end), the padding is written out so
that the windows fit exactly. Semantics: the ONNX operator specification, opset 13 to 23; a
window that starts behind the padded input is none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgec.passes.torch_call import Call, Operator
from edgec.passes.torch_layers import interleaved, padding


@dataclass(frozen=True)
class _Windows:
    """Geometry of a pooling; ``fill``: cells behind the padding that the last windows reach."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begin: list[int]
    end: list[int]
    fill: list[int]

    @property
    def plain(self) -> bool:
        """True if torch's pooling takes the padding itself."""
        halves = all(2 * p <= k for p, k in zip(self.begin, self.kernel, strict=True))
        return halves and self.begin == self.end and not any(self.fill)


def _windows(c: Call, x: Tensor) -> _Windows:
    kernel = list(c.get("kernel_shape"))
    rank = len(kernel)
    strides, dilations = list(c.get("strides", [1] * rank)), list(c.get("dilations", [1] * rank))
    # ONNX Runtime makes SAME_UPPER and SAME_LOWER of the window as if it were not dilated
    spread = dilations if c.get("auto_pad", "NOTSET") == "NOTSET" else [1] * rank
    begin, end = padding(c, x.shape[2:], kernel, strides, spread)
    fill = []
    for i in range(rank):
        size, reach = x.shape[2 + i], (kernel[i] - 1) * dilations[i] + 1
        room = size + begin[i] + end[i] - reach
        count = room // strides[i] + 1
        if c.get("ceil_mode", 0) and room % strides[i]:
            # a further window, unless it starts behind the input
            count += count * strides[i] < size + begin[i]
        fill.append(max((count - 1) * strides[i] - room, 0))
    return _Windows(kernel, strides, dilations, begin, end, fill)


def _max_pool(c: Call) -> Tensor | tuple[Tensor, Tensor]:
    """Padding counts as minus infinity; with the places of the maxima if asked for."""
    x: Tensor = c[0] if c[0].is_floating_point() else c[0].float()
    windows = _windows(c, x)
    rank, begin, shape = len(windows.kernel), windows.begin, x.shape
    if not windows.plain:
        end = [e + f for e, f in zip(windows.end, windows.fill, strict=True)]
        x, begin = F.pad(x, interleaved(begin, end), value=-math.inf), [0] * rank
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
    kernel, strides = tuple(windows.kernel), tuple(windows.strides)
    settings = (kernel, strides, tuple(begin), tuple(windows.dilations))
    if not c.wants(1):
        return pool(x, *settings).to(c[0].dtype)
    y, places = pool(x, *settings, return_indices=True)  # in one padded channel
    shift = [0] * rank if windows.plain else windows.begin
    inside = [
        axis - first
        for axis, first in zip(torch.unravel_index(places, x.shape[2:]), shift, strict=True)
    ]
    sizes = list(shape[2:])
    if c.get("storage_order", 0):  # the first axis lies innermost
        inside, sizes = inside[::-1], sizes[::-1]
    index = torch.arange(shape[0] * shape[1]).reshape(shape[0], shape[1], *[1] * rank)
    for axis, size in zip(inside, sizes, strict=True):
        index = index * size + axis
    return y.to(c[0].dtype), index


def _average_pool(c: Call) -> Tensor:
    """Dilated or unevenly padded too; padding counts where ONNX says so."""
    x: Tensor = c[0]
    windows, counted = _windows(c, x), bool(c.get("count_include_pad", 0))
    rank = len(windows.kernel)
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    kernel, strides = tuple(windows.kernel), tuple(windows.strides)
    if windows.plain and all(d == 1 for d in windows.dilations):
        return pool(x, kernel, strides, tuple(windows.begin), False, counted)
    # sums over windows by a convolution with ones, divided by the number of counted cells
    pads, fill = interleaved(windows.begin, windows.end), interleaved([0] * rank, windows.fill)
    cells = F.pad(torch.ones_like(x[:1, :1]), pads, value=float(counted))
    cells, x = F.pad(cells, fill), F.pad(F.pad(x, pads), fill)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    ones, channels = torch.ones((1, 1, *kernel), dtype=x.dtype), x.shape[1]
    dilations = tuple(windows.dilations)
    sums = convolve(
        x, ones.expand(channels, 1, *kernel), None, strides, 0, dilations, groups=channels
    )
    return sums / convolve(cells, ones, None, strides, 0, dilations)


POOL: dict[str, Operator] = {
    "AveragePool": _average_pool,
    "MaxPool": _max_pool,
}
