"""Operators of the twin that put the elements along an axis together or in order.

Semantics: the ONNX operator specification, default domain, opset 13 to 23.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from edgec.passes.torch_call import Call, Operator

_Reduction = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _reduce(function: _Reduction, *, empty: float | None = None) -> Operator:
    """empty: what nothing reduces to, where torch would refuse."""

    def run(c: Call) -> Tensor:
        x, axes, keep = c[0], c.ints(1, "axes"), bool(c.get("keepdims", 1))
        if not axes and c.get("noop_with_empty_axes", 0):
            return function(x.unsqueeze(-1), (-1,), False)
        dims = tuple(a % x.dim() for a in axes) if axes else tuple(range(x.dim()))
        if not dims:  # a number is one element along an axis that it does not have
            return function(x.reshape(1), (0,), False)
        if empty is not None and any(x.shape[d] == 0 for d in dims):
            sizes = [1 if d in dims else s for d, s in enumerate(x.shape)]
            fill = empty > 0 if x.dtype == torch.bool else empty
            filled = torch.full(sizes, fill, dtype=x.dtype)
            return filled if keep else filled.squeeze(dims)
        return function(x, dims, keep)

    return run


def _product(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    for dim in sorted((d % x.dim() for d in dims), reverse=True):
        x = torch.prod(x, dim, keepdim=keep).to(x.dtype)
    return x


def _sum(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return torch.sum(x, dims, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, dims, keepdim=keep)
    return torch.mean(x.double(), dims, keepdim=keep).trunc().to(x.dtype)


def _l2(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    real = x if x.is_floating_point() else x.double()
    return torch.linalg.vector_norm(real, 2, dims, keep).to(x.dtype)  # type: ignore[no-any-return]


def _log_sum_exp(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    real = x if x.is_floating_point() else x.double()
    return torch.logsumexp(real, dims, keep).to(x.dtype)


def _arg(function: Callable[..., Tensor]) -> Operator:
    def run(c: Call) -> Tensor:
        axis, keep = int(c.get("axis", 0)), bool(c.get("keepdims", 1))
        last = bool(c.get("select_last_index", 0))
        place = function(c[0].flip(axis) if last else c[0], axis, keepdim=keep)
        return c[0].shape[axis] - 1 - place if last else place

    return run


def _top_k(c: Call) -> tuple[Tensor, Tensor]:
    axis, largest = int(c.get("axis", -1)), bool(c.get("largest", 1))
    # stable: the lower index comes first among equals, which torch.topk does not promise
    values, places = torch.sort(c[0], dim=axis, descending=largest, stable=True)
    count = int(c[1])
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


def _cumulative_sum(c: Call) -> Tensor:
    x: Tensor = c[0]
    axis, backwards = int(c[1]), bool(c.get("reverse", 0))
    x = x.flip(axis) if backwards else x
    if c.get("exclusive", 0):
        kept = x.narrow(axis, 0, max(x.shape[axis] - 1, 0))
        x = torch.cat([torch.zeros_like(x.narrow(axis, 0, 1)), kept], axis)
    y = torch.cumsum(x, axis, dtype=x.dtype)
    return y.flip(axis) if backwards else y


def _global(function: _Reduction) -> Operator:
    return lambda c: function(c[0], tuple(range(2, c[0].dim())), True)


REDUCE: dict[str, Operator] = {
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "CumSum": _cumulative_sum,
    "GlobalAveragePool": _global(_mean),
    "GlobalMaxPool": _global(torch.amax),
    "ReduceL1": _reduce(lambda x, d, k: _sum(x.abs(), d, k)),
    "ReduceL2": _reduce(_l2),
    "ReduceLogSum": _reduce(lambda x, d, k: torch.log(_sum(x, d, k))),
    "ReduceLogSumExp": _reduce(_log_sum_exp, empty=-math.inf),
    "ReduceMax": _reduce(torch.amax, empty=-math.inf),
    "ReduceMean": _reduce(_mean),
    "ReduceMin": _reduce(torch.amin, empty=math.inf),
    "ReduceProd": _reduce(_product),
    "ReduceSum": _reduce(_sum),
    "ReduceSumSquare": _reduce(lambda x, d, k: _sum(x * x, d, k)),
    "TopK": _top_k,
}
