"""Resize of the twin: nearest, linear and cubic, along one axis after the other.

Each output cell is a weighted sum of input cells, and the weights of an axis depend on
coordinates alone: linear and cubic are a product with a matrix [out, in], nearest is a choice
of indices. Semantics: the ONNX operator specification of Resize, opset 13 to 19, and ONNX
Runtime's where the two differ, since that is what ships; cubic: Keys 1981
(doi:10.1109/TASSP.1981.1163711).

Left out: half_pixel_symmetric with nearest rounds the other way where a place falls exactly
between two cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from edgec.passes.torch_call import Call, Operator


@dataclass(frozen=True)
class _Axis:
    """One resized axis. roi: begin and end of the region as shares of the input."""

    axis: int
    size: int
    wished: int
    scale: float
    roi: tuple[float, float]


def _resize(c: Call) -> Tensor:
    x: Tensor = c[0]
    mode = c.get("coordinate_transformation_mode", "half_pixel")
    outside = torch.zeros((), dtype=torch.bool)
    for axis in _axes(c):
        if axis.size == axis.wished and (axis.scale == 1 or c.get("antialias", 0)):
            continue  # ONNX Runtime looks at neither roi nor scale there
        places = _coordinates(axis, mode)
        x = _along(c, x, axis, places)
        if mode == "tf_crop_and_resize":
            shape = [1] * x.dim()
            shape[axis.axis] = -1
            outside = outside | ((places < 0) | (places > axis.size - 1)).reshape(shape)
    if outside.any():
        value = torch.tensor(float(c.get("extrapolation_value", 0.0)), dtype=x.dtype)
        x = torch.where(outside, value, x)
    return x


def _axes(c: Call) -> list[_Axis]:
    x: Tensor = c[0]
    axes = [a % x.dim() for a in c.get("axes") or range(x.dim())]
    roi = (
        c[1].tolist()
        if c[1] is not None and c[1].numel()
        else [0.0] * len(axes) + [1.0] * len(axes)
    )
    sizes = [x.shape[a] for a in axes]
    if c[3] is not None and c[3].numel():
        wished = c.ints(3) or []
        scales = [w / s for w, s in zip(wished, sizes, strict=True)]
        policy = c.get("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            scale = (min if policy == "not_larger" else max)(scales)
            scales = [scale] * len(axes)
            wished = [math.floor(scale * s + 0.5) for s in sizes]
    else:
        scales = c[2].tolist()
        wished = [math.floor(scale * s) for scale, s in zip(scales, sizes, strict=True)]
    return [
        _Axis(axis, sizes[i], wished[i], scales[i], (roi[i], roi[len(axes) + i]))
        for i, axis in enumerate(axes)
    ]


def _coordinates(axis: _Axis, mode: str) -> Tensor:
    """float32 [wished]: where in the input each output cell lies.

    The output is as long as it has cells, also where a scale would make it a fraction longer;
    float32, as in ONNX Runtime: rounding decides which cell is the nearest.
    """
    size, scale, length = axis.size, torch.tensor(axis.scale, dtype=torch.float32), axis.wished
    y = torch.arange(length, dtype=torch.float32)
    if mode == "align_corners":
        return y * 0 if length == 1 else y * (size - 1) / (length - 1)
    if mode == "asymmetric":
        return y / scale
    if mode == "tf_crop_and_resize":
        start, end = (torch.tensor(share, dtype=torch.float32) for share in axis.roi)
        if length == 1:
            return y * 0 + 0.5 * (start + end) * (size - 1)
        return start * (size - 1) + y * (end - start) * (size - 1) / (length - 1)
    if mode == "pytorch_half_pixel" and length == 1:
        return y * 0
    shift = torch.zeros(())
    if mode == "half_pixel_symmetric":
        shift = size / 2 * (1 - length / (scale * size))
    return shift + (y + 0.5) / scale - 0.5


def _along(c: Call, x: Tensor, axis: _Axis, places: Tensor) -> Tensor:
    """x with one axis resized."""
    if c.get("mode", "nearest") == "nearest":
        rounding = _ROUNDINGS[c.get("nearest_mode", "round_prefer_floor")]
        index = rounding(places).long().clamp(0, axis.size - 1)
        return x.index_select(axis.axis, index)
    weights = _weights(c, axis, places).to(x.dtype)
    return (x.movedim(axis.axis, -1) @ weights.T).movedim(-1, axis.axis)


_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "round_prefer_floor": lambda x: torch.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: torch.floor(x + 0.5),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def _weights(c: Call, axis: _Axis, places: Tensor) -> Tensor:
    """float64 [wished, size]: the share of each input cell in each output cell."""
    smooth = bool(c.get("antialias", 0)) and axis.scale < 1
    squeeze = axis.scale if smooth else 1.0  # antialias: the kernel widens as the image shrinks
    cubic = c.get("mode") == "cubic"
    radius = math.ceil((2 if cubic else 1) / squeeze)
    cells = places.floor()[:, None] + torch.arange(-radius, radius + 1, dtype=torch.float64)
    distance = (cells - places[:, None]).abs() * squeeze
    a = float(c.get("cubic_coeff_a", -0.75))
    weights = _cubic(distance, a) if cubic else (1 - distance).clamp(min=0)
    if c.get("exclude_outside", 0):
        weights = weights * ((cells >= 0) & (cells < axis.size))
    if smooth or c.get("exclude_outside", 0):
        weights = weights / weights.sum(1, keepdim=True)
    matrix = torch.zeros((axis.wished, axis.size), dtype=torch.float64)
    return matrix.scatter_add(1, cells.long().clamp(0, axis.size - 1), weights)


def _cubic(distance: Tensor, a: float) -> Tensor:
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    zero = torch.zeros_like(distance)
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, zero))


RESIZE: dict[str, Operator] = {"Resize": _resize}
