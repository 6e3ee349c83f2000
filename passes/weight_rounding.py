"""Which integer each weight becomes, and how much of a channel's range is clipped.

Nearest rounding errs least weight by weight, but an output errs by the sum of its weights'
errors times their inputs. Three roundings: "nearest"; "sums", which keeps each filter's sum,
since what its inputs have in common meets that; "gptq", which carries the error of each
weight over to those whose inputs are correlated with its own (Frantar et al. 2022,
arXiv:2210.17323), in the form of Chee et al. 2023 (arXiv:2307.13304, section 4): one
Cholesky factor of the inputs' second moments, no inverse.

A channel's scale may be smaller than its largest weight asks for, where that lessens
the expected error of its output.

Left out: the order of columns by power (GPTQ's act-order), and improving the result column
by column afterwards, which changed nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]
Rounding = Literal["gptq", "sums", "nearest"]

SHARES = np.linspace(1.0, 0.65, 8)  # of a channel's largest weight, tried as the range's end

_WIDEST = 1024  # longer rows are cut: correlations between their pieces are left out
_DAMPING = 0.01  # of the mean second moment, added to each: Frantar et al., section 3.3
_BLOCK = 32  # columns whose errors are carried over among themselves one by one


def least_clip_error(weight: Array, scale: Array, power: Array, greatest: int) -> Array:
    """Which of ``SHARES`` of its range suits each channel: uint8 [groups, m].

    weight: float32 [groups, m, n]. scale: [groups, m], or a number for all. power: [groups, n]
    mean squares of the inputs. A weight inside costs step^2 / 12 as expected, not as it
    happens to round (on short rows the luck of the grid would decide), or its own square
    where it rounds to zero.
    """
    wide = np.broadcast_to(scale, weight.shape[:2])[..., None]
    size = np.abs(weight)
    errors = []
    for share in SHARES:
        step = np.asarray(wide * share, np.float32)
        beyond = np.maximum(size - step * greatest, 0.0)
        inside = np.where(size < step / 2, size * size, step * step / 12)
        cost = np.where(beyond > 0.0, beyond * beyond, inside)
        errors.append(np.matmul(cost, power[..., None])[..., 0])
    total = np.stack(errors)  # [shares, groups, m]
    if np.ndim(scale) == 0:
        total = np.broadcast_to(total.sum(axis=(1, 2), keepdims=True), total.shape)
    return np.asarray(total.argmin(axis=0), np.uint8)


def _nearest(exact: Array, greatest: int) -> Array:
    return np.asarray(np.minimum(np.maximum(np.rint(exact), -greatest), greatest))


def sums_kept(exact: Array) -> Array:
    """Integers next to [rows, n] reals whose row sums are as near as integers allow.

    Nearest rounding, then the entries that cost least go to their other neighbour.
    """
    nearest = np.rint(exact)
    left = exact - nearest
    missing = np.rint(left.sum(axis=1, keepdims=True))
    order = np.argsort(-left * np.sign(missing), axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(exact.shape[1])[None, :], axis=1)
    return np.asarray(nearest + np.where(rank < np.abs(missing), np.sign(missing), 0.0))


def errors_carried(exact: Array, rows: Sequence[Array], greatest: int) -> Array:
    """Integers near float32 [groups, m, n] reals with little error at the output (GPTQ).

    rows: inputs, float32 [groups, kept, n] of each layer that shares the weight. Column k is
    rounded after adding the errors of the columns before it, times their regression on k:
    H = (U + 1) D (U + 1)^T, U strictly upper triangular.
    """
    result = np.empty_like(exact)
    width = exact.shape[-1]
    count = -(-width // _WIDEST)
    for i in range(count):
        piece = slice(width * i // count, width * (i + 1) // count)
        parts = [x[:, :, piece] for x in rows]
        moment = np.sum([np.matmul(x.transpose(0, 2, 1), x) for x in parts], axis=0)
        result[:, :, piece] = _carried(exact[:, :, piece], _feedback(moment), greatest)
    return result


def _feedback(moment: Array) -> Array:
    """U of the factorisation: float32 [groups, w, w]."""
    width = moment.shape[-1]
    power = np.trace(moment, axis1=1, axis2=2) / width
    # inputs that never move have no power, and no say
    damping = np.where(power > np.finfo(np.float32).tiny, power * _DAMPING, 1.0)
    damped = moment.astype(np.float64) + damping[:, None, None] * np.eye(width)
    # the lower factor of the reversed matrix, reversed, is the upper factor
    factor = np.linalg.cholesky(damped[:, ::-1, ::-1])[:, ::-1, ::-1]
    diagonal = np.diagonal(factor, axis1=1, axis2=2)
    return np.asarray(factor / diagonal[:, None, :], np.float32) - np.eye(width, dtype=np.float32)


def _carried(exact: Array, feedback: Array, greatest: int) -> Array:
    columns = np.ascontiguousarray(exact.transpose(0, 2, 1))  # [groups, w, m]: a column is a row
    back = feedback.transpose(0, 2, 1)
    width = columns.shape[1]
    result, errors = np.empty_like(columns), np.zeros_like(columns)
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        block = columns[:, start:stop] + np.matmul(back[:, start:stop, :start], errors[:, :start])
        for k in range(start, stop):
            rounded = _nearest(block[:, k - start], greatest)
            error = columns[:, k] - rounded
            result[:, k], errors[:, k] = rounded, error
            block[:, k - start + 1 :] += back[:, k + 1 : stop, k, None] * error[:, None]
    return result.transpose(0, 2, 1)
