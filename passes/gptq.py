"""GPTQ: rounds the weights of a product so that its output, not each weight, keeps its value.

Frantar et al. 2022 (arXiv:2210.17323): column after column is rounded to the grid, and what
that changes in the output is compensated in the columns that are still free, as the second
moments of the inputs tell. In the equal form of Chee et al. 2023 (arXiv:2307.13304, section
4) one Cholesky factor does, without an inverse. Columns go in the order of their inputs'
power ("act order"), on grids chosen beforehand ("static groups"), which keeps block-wise
scales usable at run time without a permutation.

Left out: quantized activations, and re-measuring the inputs behind layers that are already
quantized; all moments come from one run of the float model.
"""

from __future__ import annotations

import numpy as np

from edgec.passes.grids import Grid
from edgec.passes.weights import Array

_COLUMNS = 128  # whose errors reach one another one by one, those behind in one product
_DAMPING = 0.01  # of the mean power, added to every input's power


def rounded(weight: Array, grid: Grid, moments: Array) -> Array:
    """Integers on the grid with a smaller output error than the nearest ones.

    weight: float32 [rows, n]. moments: float [n, n], mean or sum of x x^T over the inputs x.
    Returns int8 or uint8 [rows, n].
    """
    n = weight.shape[1]
    order = column_order(np.diag(moments))
    carried = _carried(moments[np.ix_(order, order)].astype(np.float64))
    scale, zero = (part[:, order].T.copy() for part in grid.spread(n))  # [n, rows]: a column
    exact = weight[:, order].T.copy()
    errors, values = np.zeros_like(exact), np.empty_like(exact)
    low, high = grid.scheme.low, grid.scheme.high
    for start in range(0, n, _COLUMNS):
        stop = min(start + _COLUMNS, n)
        wanted = exact[start:stop] + carried[:start, start:stop].T @ errors[:start]
        for column in range(start, stop):
            value = np.rint(wanted[column - start] / scale[column]) + zero[column]
            values[column] = value = np.clip(value, low, high)
            errors[column] = exact[column] - (value - zero[column]) * scale[column]
            # rank one: [columns left in this group, rows]
            rest = carried[column, column + 1 : stop]
            wanted[column + 1 - start :] += np.outer(rest, errors[column])
    result = np.empty_like(values)
    result[order] = values
    return grid.stored(result.T)


def column_order(power: Array) -> Array:
    """The columns by falling power: what is rounded late finds little to compensate it."""
    return np.argsort(-power, kind="stable")


def output_error(change: Array, moments: Array) -> float:
    """Squared error of a product's output, given the change of its weight [rows, n].

    moments: mean of x x^T; the result is the mean over the same inputs, summed over outputs.
    """
    return float(np.vdot(change @ moments, change))


def _carried(moments: Array) -> Array:
    """U, strictly upper triangular: the share of column j's error that column k > j takes.

    moments + damping = (U + 1) D (U + 1)^T with D diagonal. Returns float32 [n, n].
    """
    power = np.diag(moments)
    silent = power <= 0  # never seen: any value will do
    damping = _DAMPING * max(float(power.mean()), 1e-30)
    damped = moments + np.diag(np.where(silent, 1.0, damping))
    # the lower factor of the reversed matrix, reversed, is the upper factor
    factor = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return np.asarray(np.triu(factor / np.diag(factor), 1), np.float32)
