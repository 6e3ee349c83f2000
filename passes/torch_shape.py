"""Operators of the twin that move elements and do not compute: shapes, slices, constants.

Semantics: the ONNX operator specification, default domain, opset 13 to 23.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from edgec.passes.torch_call import Call, Operator, broadcast_shape, tensor, torch_dtype


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


def _flatten(c: Call) -> Tensor:
    axis = int(c.get("axis", 1))
    axis = axis + c[0].dim() if axis < 0 else axis
    rows, columns = math.prod(c[0].shape[:axis]), math.prod(c[0].shape[axis:])
    return c[0].reshape(rows, columns)  # type: ignore[no-any-return]


def _transpose(c: Call) -> Tensor:
    order = c.get("perm") or list(reversed(range(c[0].dim())))
    return c[0].permute(tuple(order))  # type: ignore[no-any-return]


def _slice(c: Call) -> Tensor:
    x: Tensor = c[0]
    starts, ends = c.ints(1) or [], c.ints(2) or []
    axes = c.ints(3) or list(range(len(starts)))
    steps = c.ints(4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        indices = range(x.shape[axis])[slice(start, end, step)]  # ONNX clamps as Python does
        if step == 1:
            x = x.narrow(axis, indices.start if len(indices) else 0, len(indices))
        else:
            x = x.index_select(axis, torch.tensor(list(indices), dtype=torch.int64))
    return x


def _split(c: Call) -> tuple[Tensor, ...]:
    axis = int(c.get("axis", 0))
    sizes = c.ints(1, "split")
    if sizes is None:
        size, parts = c[0].shape[axis], int(c.get("num_outputs", len(c.node.outputs)))
        step = math.ceil(size / parts)
        sizes = [max(min(step, size - i * step), 0) for i in range(parts)]
    return tuple(c[0].split(sizes, axis))


def _pad(c: Call) -> Tensor:
    x: Tensor = c[0]
    pads, axes = c.ints(1, "pads") or [], c.ints(3)
    axes = [a % x.dim() for a in axes] if axes is not None else list(range(x.dim()))
    before, after = pads[: len(pads) // 2], pads[len(pads) // 2 :]
    mode = c.get("mode", "constant")
    if mode == "constant":
        flat = [0] * (2 * x.dim())
        for axis, first, last in zip(axes, before, after, strict=True):
            place = 2 * (x.dim() - 1 - axis)
            flat[place : place + 2] = first, last
        return F.pad(x, flat, value=0.0 if c[2] is None else c[2].item())
    for axis, first, last in zip(axes, before, after, strict=True):
        if first or last:
            x = x.index_select(axis, _padded_indices(x.shape[axis], first, last, mode))
    return x


def _padded_indices(size: int, before: int, after: int, mode: str) -> Tensor:
    """Where the elements of a padded axis come from."""
    places = torch.arange(-before, size + after)
    if mode == "edge":
        return places.clamp(0, size - 1)
    if mode == "wrap":
        return places.remainder(size)
    period = max(2 * (size - 1), 1)  # reflect: there and back, the ends once
    places = places.remainder(period)
    return torch.minimum(places, period - places) if size > 1 else torch.zeros_like(places)


def _expand(c: Call) -> Tensor:
    return c[0].expand(broadcast_shape(c[0].shape, c.ints(1) or ()))  # type: ignore[no-any-return]


def _shape(c: Call) -> Tensor:
    sizes = list(c[0].shape)[int(c.get("start", 0)) : c.get("end")]
    return torch.tensor(sizes, dtype=torch.int64)


def _constant(c: Call) -> Tensor:
    for name, dtype in (
        ("value_float", np.float32),
        ("value_int", np.int64),
        ("value_floats", np.float32),
        ("value_ints", np.int64),
    ):
        if c.get(name) is not None:
            return tensor(np.array(c.get(name), dtype))
    if not isinstance(c.get("value"), ir.TensorProtocol):
        raise ValueError("a constant of strings or a sparse one")
    return tensor(c.get("value").numpy())


def _constant_of_shape(c: Call) -> Tensor:
    value = c.get("value")
    fill = torch.zeros(1) if value is None else tensor(value.numpy())
    return fill.reshape(()).expand(c.ints(0) or []).clone()


def _range(c: Call) -> Tensor:
    start, limit, step = (c[i].item() for i in range(3))
    count = max(math.ceil((limit - start) / step), 0)
    return start + step * torch.arange(count, dtype=c[0].dtype)  # type: ignore[no-any-return]


def _eye_like(c: Call) -> Tensor:
    rows, columns = c[0].shape
    shift, code = int(c.get("k", 0)), c.get("dtype")
    dtype = c[0].dtype if code is None else torch_dtype(int(code))
    places = torch.arange(columns) - torch.arange(rows)[:, None]
    return (places == shift).to(dtype)


def _trilu(c: Call) -> Tensor:
    shift = 0 if c[1] is None else int(c[1])
    return torch.triu(c[0], shift) if c.get("upper", 1) else torch.tril(c[0], shift)


def _depth_to_space(c: Call) -> Tensor:
    size, (n, depth, height, width) = int(c.get("blocksize")), c[0].shape
    if c.get("mode", "DCR") == "DCR":
        x = c[0].reshape(n, size, size, depth // size**2, height, width)
        x = x.permute(0, 3, 4, 1, 5, 2)
    else:
        x = c[0].reshape(n, depth // size**2, size, size, height, width)
        x = x.permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, depth // size**2, height * size, width * size)  # type: ignore[no-any-return]


def _space_to_depth(c: Call) -> Tensor:
    size, (n, depth, height, width) = int(c.get("blocksize")), c[0].shape
    x = c[0].reshape(n, depth, height // size, size, width // size, size)
    order = (0, 3, 5, 1, 2, 4) if c.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    return x.permute(order).reshape(n, depth * size**2, height // size, width // size)  # type: ignore[no-any-return]


SHAPE: dict[str, Operator] = {
    "Concat": lambda c: torch.cat(list(c.arguments), int(c.get("axis"))),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": lambda c: torch.tensor(c[0].numel(), dtype=torch.int64),
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": lambda c: c[0].repeat(c.ints(1) or []),
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
