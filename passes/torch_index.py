"""Operators of the twin that read and write where other tensors say: Gather, Scatter, OneHot.

Semantics: the ONNX operator specification, default domain, opset 13 to 23.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgec.passes.torch_call import Call, Operator

_REDUCTIONS = {"add": "sum", "mul": "prod", "min": "amin", "max": "amax"}


def _within(index: Tensor, size: int) -> Tensor:
    """Indices that count from the end, counted from the start."""
    return torch.where(index < 0, index + size, index).long()


def _gather(c: Call) -> Tensor:
    axis = int(c.get("axis", 0)) % c[0].dim()
    index = _within(c[1], c[0].shape[axis])
    y = c[0].index_select(axis, index.reshape(-1))
    return y.reshape((*c[0].shape[:axis], *index.shape, *c[0].shape[axis + 1 :]))  # type: ignore[no-any-return]


def _gather_elements(c: Call) -> Tensor:
    axis = int(c.get("axis", 0))
    return torch.gather(c[0], axis, _within(c[1], c[0].shape[axis]))


def _gather_nd(c: Call) -> Tensor:
    data, indices, shared = c[0], c[1].long(), int(c.get("batch_dims", 0))
    depth, batch = indices.shape[-1], math.prod(data.shape[:shared])
    rows = data.reshape(batch, *data.shape[shared:])
    places = indices.reshape(batch, -1, depth)
    picked = rows[(torch.arange(batch)[:, None], *places.unbind(-1))]
    return picked.reshape(*indices.shape[:-1], *data.shape[shared + depth :])  # type: ignore[no-any-return]


def _scatter_elements(c: Call) -> Tensor:
    axis, reduction = int(c.get("axis", 0)), c.get("reduction", "none")
    index = _within(c[1], c[0].shape[axis])
    if reduction == "none":
        return torch.scatter(c[0], axis, index, c[2])
    return torch.scatter_reduce(c[0], axis, index, c[2], _REDUCTIONS[reduction])


def _scatter_nd(c: Call) -> Tensor:
    data, indices, updates = c[0], c[1], c[2]
    reduction = c.get("reduction", "none")
    places = tuple(indices.long().unbind(-1))
    if reduction in ("none", "add"):
        return torch.index_put(data, places, updates, accumulate=reduction == "add")
    depth = len(places)
    row = torch.zeros_like(places[0])  # which of the slices that the indices choose from
    for place, size in zip(places, data.shape, strict=False):
        row = row * size + _within(place, size)
    slices = data.reshape(math.prod(data.shape[:depth]), -1)
    new = updates.reshape(row.numel(), -1)
    index = row.reshape(-1, 1).expand_as(new)
    return torch.scatter_reduce(slices, 0, index, new, _REDUCTIONS[reduction]).reshape(data.shape)


def _one_hot(c: Call) -> Tensor:
    depth, (off, on) = int(c[1].reshape(())), c[2]
    axis = int(c.get("axis", -1)) % (c[0].dim() + 1)
    index = torch.where(c[0] < 0, c[0] + depth, c[0]).unsqueeze(axis)
    shape = [1] * index.dim()
    shape[axis] = depth
    return torch.where(index == torch.arange(depth).reshape(shape), on, off)


INDEX: dict[str, Operator] = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "OneHot": _one_hot,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
}
