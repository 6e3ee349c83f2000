"""Normalization layers of the twin.

Semantics: the ONNX operator specification, default domain, opset 13 to 23.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgec.passes.torch_call import Call, Operator


def _batch_norm(c: Call) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """With the stored mean and variance; in training mode with the batch's, and the new ones."""
    x, scale, bias = c[0], c[1], c[2]
    mean, variance = c[3].detach(), c[4].detach()  # statistics are not trained
    epsilon = float(c.get("epsilon", 1e-5))
    if not c.get("training_mode", 0):
        return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)
    kept, dims = float(c.get("momentum", 0.9)), (0, *range(2, x.dim()))
    batch_mean, batch_variance = x.mean(dims), x.var(dims, correction=0)
    y = F.batch_norm(x, batch_mean, batch_variance, scale, bias, False, 0.0, epsilon)
    return (
        y,
        kept * mean + (1 - kept) * batch_mean,
        kept * variance + (1 - kept) * batch_variance,
    )


def _layer_norm(c: Call) -> Tensor | tuple[Tensor, ...]:
    """Over the axes from ``axis`` on; its mean and 1 / standard deviation if asked for."""
    axis = int(c.get("axis", -1)) % c[0].dim()
    shape = c[0].shape[axis:]
    bias = None if c[2] is None else c[2].expand(shape)
    epsilon = float(c.get("epsilon", 1e-5))
    y = F.layer_norm(c[0], shape, c[1].expand(shape), bias, epsilon)
    if not (c.wants(1) or c.wants(2)):
        return y
    dims = tuple(range(axis, c[0].dim()))
    variance = c[0].var(dims, correction=0, keepdim=True)
    return y, c[0].mean(dims, keepdim=True), torch.rsqrt(variance + epsilon)


def _rms_norm(c: Call) -> Tensor:
    axis = int(c.get("axis", -1)) % c[0].dim()
    dims = tuple(range(axis, c[0].dim()))
    mean = c[0].square().mean(dims, keepdim=True)
    return c[0] * torch.rsqrt(mean + float(c.get("epsilon", 1e-5))) * c[1]  # type: ignore[no-any-return]


def _instance_norm(c: Call) -> Tensor:
    """Each channel of each sample by itself."""
    return F.instance_norm(c[0], weight=c[1], bias=c[2], eps=float(c.get("epsilon", 1e-5)))


def _group_norm(c: Call) -> Tensor:
    groups, channels = int(c.get("num_groups")), c[0].shape[1]
    scale, bias = c[1], c[2]
    if scale.numel() != channels:  # opset 18: one number for each group
        scale, bias = (t.repeat_interleave(channels // groups) for t in (scale, bias))
    return F.group_norm(c[0], groups, scale, bias, float(c.get("epsilon", 1e-5)))


def _lp_norm(c: Call) -> Tensor:
    axis, order = int(c.get("axis", -1)), int(c.get("p", 2))
    size = torch.linalg.vector_norm(c[0], order, axis, keepdim=True)
    return c[0] / torch.where(size == 0, torch.ones_like(size), size)  # type: ignore[no-any-return]


def _mean_variance(c: Call) -> Tensor:
    dims = tuple(c.get("axes", (0, 2, 3)))
    mean, variance = c[0].mean(dims, keepdim=True), c[0].var(dims, correction=0, keepdim=True)
    return (c[0] - mean) / (variance.sqrt() + 1e-9)  # type: ignore[no-any-return]


NORM: dict[str, Operator] = {
    "BatchNormalization": _batch_norm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LpNormalization": _lp_norm,
    "MeanVarianceNormalization": _mean_variance,
    "RMSNormalization": _rms_norm,
}
