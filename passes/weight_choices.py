"""Chooses the integers of every weight matrix by one method.

    rtn    the nearest level of a grid between the extremes
    clip   the nearest level of the clipped grid with the least squared error
    hqq    the nearest level of the grid with the least l_p error
    awq    input channels scaled by their power first, then clip weighted by that power
    gptq   levels that keep the product's output, on a grid clipped as for awq

The last two read the second moments of the layers' inputs from one run of the float model
over the calibration data. A matrix of more than 16,384 inputs, whose moments would take
gigabytes, gets clip instead. One that is an embedding table too is rounded for the product: its
rows move farther than by clip, which costs a language model less than a worse output layer.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from edgec.passes import awq, gptq
from edgec.passes.contract import Context, PassError
from edgec.passes.grids import Grid, GridMethod, Scheme, fit
from edgec.passes.moments import second_moments
from edgec.passes.weights import Array, Refused, constant, required

Method = Literal["rtn", "clip", "hqq", "awq", "gptq"]
METHODS: tuple[Method, ...] = ("rtn", "clip", "hqq", "awq", "gptq")
CALIBRATED = ("awq", "gptq")
WIDEST = 16384  # inputs of a matrix whose second moments, 2 GB then, are taken


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight of two dimensions and the nodes that read it.

    axis: of the weight that products sum over. products: MatMul and Gemm nodes. tables:
    Gathers of its rows.
    """

    value: ir.Value
    axis: int
    scheme: Scheme
    products: tuple[ir.Node, ...] = ()
    tables: tuple[ir.Node, ...] = ()

    @property
    def name(self) -> str:
        """What it is called in the lock."""
        return f"{self.value.name}:{self.axis}"

    @property
    def wide(self) -> bool:
        """True if a product sums over so many inputs that their moments are too large."""
        array = constant(self.value)
        assert array is not None  # checked when it was collected
        return bool(array.shape[self.axis] > WIDEST)

    def rows(self) -> Array:
        """The weight as float32 [out, in]."""
        array = constant(self.value)
        assert array is not None  # checked when it was collected
        return np.ascontiguousarray(array if self.axis == 1 else array.T)

    def inputs(self) -> dict[str, ir.Value]:
        """The values that products multiply it with, by name; none if too wide for moments."""
        if self.wide:
            return {}
        values = (required(node, 0) for node in self.products)
        return {str(value.name): value for value in values}


@dataclass(frozen=True, eq=False)
class Choice:
    """The integers [out, in] of a matrix, on a grid."""

    grid: Grid
    values: Array


@dataclass(frozen=True, eq=False)
class Scaling:
    """What AWQ decided. channels: scales by name of the value they divide.

    power: mean squares of the scaled value, by its name. refusals: products left unscaled.
    """

    channels: Mapping[str, Array]
    power: Mapping[str, Array]
    refusals: Mapping[str, int]


def resolved(wanted: Method | Literal["auto"], bits: int, context: Context) -> tuple[Method, str]:
    """The method to use, and why if that was left open.

    Raises PassError if it needs calibration data and there is none.
    """
    has_data = context.calibration is not None and len(context.calibration) > 0
    if wanted != "auto":
        if wanted in CALIBRATED and not has_data:
            raise PassError(
                f"quantize-weights: method '{wanted}' needs calibration data: give some dozen "
                "typical inputs, or choose a method without data (clip, hqq, rtn)"
            )
        return wanted, ""
    if bits == 8:
        return "rtn", "8 bits need no more than plain rounding"
    if has_data:
        return "gptq", "calibration data was given"
    # measured at 3 and 4 bits, blocks of 32 and 128: clip beats hqq by 0.1 to 0.4 dB
    return "clip", "there is no calibration data; with some, gptq gains 3 dB and more"


def choose(
    matrices: Sequence[Matrix],
    method: Method,
    model: ir.Model,
    context: Context,
    scaling: Scaling | None = None,
) -> dict[str, Choice]:
    """The integers of every matrix by its name. scaling: of awq, folded into the model."""
    if method == "gptq":
        return _error_compensated(matrices, model, context)
    kinds: dict[Method, GridMethod] = {"rtn": "rtn", "hqq": "hqq"}
    found = {}
    for matrix in matrices:
        rows, importance = scaled_rows(matrix, scaling), None
        if scaling is not None:
            powers = [scaling.power[name] for name in matrix.inputs()]
            importance = np.sum(powers, axis=0) if powers else None
        grid = fit(rows, matrix.scheme, kinds.get(method, "clip"), importance=importance)
        found[matrix.name] = Choice(grid, grid.nearest(rows))
    return found


def scaled_rows(matrix: Matrix, scaling: Scaling | None) -> Array:
    """The weight float32 [out, in], times AWQ's scales if its input is divided by them."""
    rows = matrix.rows()
    if scaling is not None:
        for name in matrix.inputs():
            if name in scaling.channels:
                return rows * scaling.channels[name]
    return rows


def measure_scaling(matrices: Sequence[Matrix], model: ir.Model, context: Context) -> Scaling:
    """AWQ's scales, chosen on the calibration data. The model stays as it is."""
    readers, widths = _readers(matrices)
    channels: dict[str, Array] = {}
    power: dict[str, Array] = {}
    refusals: Counter[str] = Counter()
    for name, moments in _moments(widths, model, context):
        group = readers[name]
        scales = np.ones(widths[name], np.float32)
        try:
            _source(name, group)
        except Refused as reason:
            nodes = (node for matrix in group for node in matrix.products)
            refusals[str(reason)] += sum(required(node, 0).name == name for node in nodes)
        else:
            weights = [matrix.rows() for matrix in group]
            scales = awq.channel_scales(weights, group[0].scheme, moments)
            if (scales != 1).any():
                channels[name] = scales
        power[name] = np.diag(moments) / np.square(scales)
    return Scaling(channels, power, dict(refusals))


def fold_scaling(matrices: Sequence[Matrix], channels: Mapping[str, Array]) -> tuple[ir.Value, ...]:
    """Divide values of the model by AWQ's scales.

    Returns all values that hold other numbers now. Raises PassError if the scales were made
    for another model.
    """
    readers, _ = _readers(matrices)
    divided: dict[ir.Value, None] = {}
    for name, scales in channels.items():
        try:
            source = _source(name, readers.get(name, []))
        except Refused as reason:
            raise PassError(
                f"the lock scales value '{name}', but {reason}: it was made for another model; "
                "build without it"
            ) from reason
        source.divide(scales)
        divided |= dict.fromkeys(source.values)
    return tuple(divided)


def _error_compensated(
    matrices: Sequence[Matrix], model: ir.Model, context: Context
) -> dict[str, Choice]:
    measured = [matrix for matrix in matrices if matrix.inputs()]
    unmeasured = [matrix for matrix in matrices if not matrix.inputs()]
    found = choose(unmeasured, "clip", model, context)
    readers, widths = _readers(measured)
    waiting: dict[str, Array] = {}  # moments of a matrix whose other inputs are to come
    missing = {matrix.name: len(matrix.inputs()) for matrix in measured}
    for name, moments in _moments(widths, model, context):
        for matrix in readers[name]:
            missing[matrix.name] -= 1
            total = waiting.pop(matrix.name, 0) + moments
            if missing[matrix.name]:
                waiting[matrix.name] = total
                continue
            rows = matrix.rows()
            grid = fit(rows, matrix.scheme, "clip", importance=np.diag(total))
            found[matrix.name] = Choice(grid, gptq.rounded(rows, grid, total))
    return found


def _readers(matrices: Sequence[Matrix]) -> tuple[dict[str, list[Matrix]], dict[str, int]]:
    """The matrices that multiply a value, and its width, by its name."""
    readers: dict[str, list[Matrix]] = {}
    widths: dict[str, int] = {}
    for matrix in matrices:
        for name in matrix.inputs():
            readers.setdefault(name, []).append(matrix)
            array = constant(matrix.value)
            assert array is not None  # checked when it was collected
            widths[name] = array.shape[matrix.axis]
    return readers, widths


def _source(name: str, group: Sequence[Matrix]) -> awq.Source:
    """Where the scales of a value go. Raises Refused."""
    if not group:
        raise Refused("no quantized product reads it")
    products = {node for matrix in group for node in matrix.products}
    if any(matrix.tables for matrix in group):
        raise Refused("its weight is an embedding table, too, whose rows are looked up")
    if any(len(matrix.inputs()) > 1 for matrix in group):
        raise Refused("its weight multiplies several values")
    width = group[0].rows().shape[1]
    return awq.source_of(group[0].inputs()[name], products, width)


def _moments(
    widths: Mapping[str, int], model: ir.Model, context: Context
) -> Iterator[tuple[str, Array]]:
    assert context.calibration is not None  # checked by ``resolved``
    progress = functools.partial(context.progress, "measure inputs")
    return second_moments(model, widths, context.calibration, progress=progress)
