"""Gives the matrices that need it 8 bits and the others 4, within a mean of bits per weight.

What 4 bits cost a matrix is the power of its output's error over that of its output,

    sum_j E[x_j^2] sum_o (w_oj - w'_oj)^2  /  sum_j E[x_j^2] sum_o w_oj^2,

with the mean squares of its inputs from the calibration data, or 1 where there is none, and
w' the nearest levels. Matrices get 8 bits in the order of error removed for each bit of
storage, as far as the budget goes; storage counts scales, zero points and the filling of last
blocks, as the kernel reads them.

The idea of spending bits by measured sensitivity: Dong et al. 2019 (HAWQ, arXiv:1905.03696).
Left out: correlations of inputs, other widths than 4 and 8, blocks of their own for a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, PassError
from edgec.passes.execution import run_values
from edgec.passes.grids import Scheme, fit
from edgec.passes.weight_choices import Matrix
from edgec.passes.weights import Array, constant

FEW, MANY = 4, 8
_SCALE_BITS = 32


def widths_within(
    matrices: Sequence[Matrix], budget: float, model: ir.Model, context: Context
) -> dict[str, int]:
    """Bits of each matrix by its name, so that storage is at most ``budget`` bits a weight.

    Raises PassError if even the fewest bits take more.
    """
    weights = sum(outs * ins for outs, ins in map(_sizes, matrices))
    least = sum(storage_bits(matrix, FEW) for matrix in matrices)
    if least > budget * weights:
        raise PassError(
            f"quantize-weights: bits_per_weight is {budget:g}, but {FEW} bits with scales, in "
            f"blocks of the size chosen, take {least / weights:.2f}; allow more, or set block_size"
        )
    power = _mean_squares(matrices, model, context)
    gains = {}
    for matrix in matrices:
        removed = _error(matrix, FEW, power) - _error(matrix, MANY, power)
        more = storage_bits(matrix, MANY) - storage_bits(matrix, FEW)
        gains[matrix.name] = (removed / more, more)
    widths, room = dict.fromkeys(gains, FEW), budget * weights - least
    for name, (_, more) in sorted(gains.items(), key=lambda item: -item[1][0]):
        if more <= room:
            widths[name], room = MANY, room - more
    return widths


def with_widths(matrices: Sequence[Matrix], widths: Mapping[str, int]) -> tuple[Matrix, ...]:
    """The matrices, those named in ``widths`` with that many bits."""
    return tuple(
        replace(matrix, scheme=replace(matrix.scheme, bits=widths[matrix.name]))
        if matrix.name in widths
        else matrix
        for matrix in matrices
    )


def storage_bits(matrix: Matrix, bits: int) -> int:
    """Bits that a matrix takes in the form that the kernel reads."""
    outs, ins = _sizes(matrix)
    size = matrix.scheme.block_size
    blocks = outs * -(-ins // size)
    zero_points = 0 if matrix.scheme.symmetric else bits
    return int(blocks * (size * bits + _SCALE_BITS + zero_points))


def mean_bits(matrices: Sequence[Matrix]) -> float:
    """Storage of all matrices in bits a weight."""
    bits = sum(storage_bits(matrix, matrix.scheme.bits) for matrix in matrices)
    return bits / sum(outs * ins for outs, ins in map(_sizes, matrices))


def _sizes(matrix: Matrix) -> tuple[int, int]:
    """Outputs and inputs."""
    array = constant(matrix.value)
    assert array is not None  # checked when it was collected
    return array.shape[1 - matrix.axis], array.shape[matrix.axis]


def _error(matrix: Matrix, bits: int, power: Mapping[str, Array]) -> float:
    """Power of the output's error over the power of the output."""
    rows = matrix.rows()
    scheme = Scheme(bits, matrix.scheme.symmetric, matrix.scheme.block_size)
    grid = fit(rows, scheme, "rtn")
    means = [power[name] for name in matrix.inputs() if name in power]
    mean: Array = np.sum(means, axis=0) if means else np.ones(rows.shape[1])
    change = np.square(rows - grid.weight(grid.nearest(rows))).sum(axis=0) @ mean
    total = np.square(rows).sum(axis=0) @ mean
    return float(change / total) if total > 0 else 0.0


def _mean_squares(
    matrices: Sequence[Matrix], model: ir.Model, context: Context
) -> dict[str, Array]:
    """Mean squares [inputs] of the values that matrices multiply; nothing without data."""
    names = list(dict.fromkeys(name for matrix in matrices for name in matrix.inputs()))
    samples = context.calibration
    if samples is None or not len(samples) or not names:
        return {}
    sums: dict[str, Array] = {}
    for done, values in enumerate(run_values(model, names, samples, optimized=True), 1):
        for name in names:
            x = values[name].reshape(-1, values[name].shape[-1])
            square = np.square(x, dtype=np.float64).mean(axis=0)
            if not np.isfinite(square).all():
                raise PassError(
                    f"calibration sample {done - 1}: value '{name}' holds NaN or infinity: check "
                    "the sample, or the model's weights"
                )
            sums[name] = sums.get(name, 0) + square
        context.progress("measure sensitivity", done, len(samples))
    return {name: total / len(samples) for name, total in sums.items()}
