"""Block-wise integer grids for the weights of matrix products, and the ways to choose them.

A grid gives every run of ``block_size`` weights of one output one scale and one zero point:
weight = (value - zero_point) * scale. Three choices that need no data:

    extremes        the block's smallest and largest weight ("round to nearest", RTN)
    least squares   the clipped range with the least squared error, one refit of the scale
    half quadratic  HQQ: the least l_p error, p < 1, which forgives the few outliers

Everything here is an array program over all blocks at once. Left out on purpose: which
weights there are, and values other than the nearest ones of a grid (see gptq.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgec.passes.weights import Array, positive

# Shares of a block's extreme that the grid ends at. Above 1: symmetric integers reach one
# step farther down than up, so that a range a little too narrow above may still be best.
_SHARES = (1.07, 1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64, 0.58, 0.52, 0.46)

_NORM, _BETA, _GROWTH, _ROUNDS = 0.7, 10.0, 1.01, 20  # as published for HQQ


@dataclass(frozen=True)
class Scheme:
    """What integers a weight is stored in. bits: levels are 2^bits, 2 to 8."""

    bits: int
    symmetric: bool
    block_size: int

    @property
    def low(self) -> int:
        """The smallest stored integer."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        """The largest stored integer."""
        return (1 << (self.bits - self.symmetric)) - 1

    def blocks(self, weight: Array) -> Array:
        """[rows, n] as [rows, blocks, block_size]; the last block is filled with zeros."""
        rows, n = weight.shape
        padded = np.pad(weight, [(0, 0), (0, -n % self.block_size)])
        return padded.reshape(rows, -1, self.block_size)


@dataclass(frozen=True, eq=False)
class Grid:
    """The integers of one weight [rows, n] and their meaning.

    scale: float32 [rows, blocks], all > 0. zero_point: float32 of whole numbers, like scale;
    all 0 in a symmetric scheme.
    """

    scheme: Scheme
    scale: Array
    zero_point: Array

    def nearest(self, weight: Array) -> Array:
        """The integers nearest to a float32 weight [rows, n]: int8, or uint8 if asymmetric."""
        scale, zero = self.spread(weight.shape[1])
        return self.stored(np.rint(weight / scale) + zero)

    def stored(self, values: Array) -> Array:
        """Whole numbers cut to the scheme's range, in the scheme's type."""
        dtype = np.int8 if self.scheme.symmetric else np.uint8
        return np.clip(values, self.scheme.low, self.scheme.high).astype(dtype)

    def weight(self, values: Array) -> Array:
        """The float32 weight [rows, n] that integers of this grid stand for."""
        scale, zero = self.spread(values.shape[1])
        return np.asarray((values.astype(np.float32) - zero) * scale)

    def spread(self, n: int) -> tuple[Array, Array]:
        """Scale and zero point of each of n weights: float32 [rows, n]."""
        size = self.scheme.block_size
        return (
            np.repeat(self.scale, size, axis=1)[:, :n],
            np.repeat(self.zero_point, size, axis=1)[:, :n],
        )


GridMethod = Literal["rtn", "clip", "hqq"]


def fit(
    weight: Array, scheme: Scheme, method: GridMethod, *, importance: Array | None = None
) -> Grid:
    """The grid of a float32 weight [rows, n] by one of the methods of this file.

    importance: float [n], how much the squared error of each input counts; "clip" alone uses it.
    """
    if method == "rtn":
        return extremes(weight, scheme)
    if method == "clip":
        return least_squares(weight, scheme, importance)
    return half_quadratic(weight, scheme)


def extremes(weight: Array, scheme: Scheme) -> Grid:
    """The grid that ends at each block's smallest and largest weight; 0 is always on it."""
    return _at(scheme, *_ends(scheme.blocks(weight)), 1.0)


def least_squares(weight: Array, scheme: Scheme, importance: Array | None = None) -> Grid:
    """The grid with the least squared error among clipped ranges, block by block.

    After the search, the scale is refitted to the integers found, in closed form.
    """
    blocks = scheme.blocks(weight)
    counts: Array | None = None
    if importance is not None:
        counts = scheme.blocks(importance.astype(np.float32)[None])
    ends = _ends(blocks)
    best = _at(scheme, *ends, _SHARES[0])
    least = np.full(best.scale.shape, np.inf, np.float32)
    for share in _SHARES:
        grid = _at(scheme, *ends, share)
        for candidate in (grid, _refitted(grid, blocks, blocks, counts)):
            error = _weighted(np.square(_rounded(candidate, blocks) - blocks), counts)
            best, least = _better(best, least, candidate, error)
    return best


def half_quadratic(weight: Array, scheme: Scheme) -> Grid:
    """The grid with the least l_0.7 error, by half-quadratic splitting.

    Badri & Shaji 2023 (HQQ): the error is split off as a sparse term by a shrinkage, the
    rest is fitted in closed form, in turn. Theirs moves a fractional zero point; integers in
    standard ONNX have a whole one, so the scale is fitted, and the zero point rounded.
    """
    blocks = scheme.blocks(weight)
    grid = best = extremes(weight, scheme)
    least = np.full(grid.scale.shape, np.inf, np.float32)
    # the shrinkage is made for weights of about 1
    unit = np.maximum(np.abs(blocks).max(axis=2, keepdims=True), np.finfo(np.float32).tiny)
    beta = np.float32(_BETA)
    for _ in range(_ROUNDS):
        error = (blocks - _rounded(grid, blocks)) / unit
        size = np.abs(error)
        powered = np.power(size, np.float32(_NORM))
        best, least = _better(best, least, grid, powered.sum(axis=2))
        # |e| - |e|^(p-1) / beta, where that is positive
        cut = np.maximum(size - powered / np.maximum(size, np.float32(1e-8)) / beta, 0)
        sparse = np.sign(error) * cut * unit
        grid = _refitted(grid, blocks, blocks - sparse, None)
        beta = beta * np.float32(_GROWTH)
    return best


def _ends(blocks: Array) -> tuple[Array, Array]:
    zero = np.float32(0)
    return np.minimum(blocks.min(axis=2), zero), np.maximum(blocks.max(axis=2), zero)


def _at(scheme: Scheme, low: Array, high: Array, share: float) -> Grid:
    """The grid that ends at a share of each block's ends."""
    if scheme.symmetric:
        # halfway between the two ends, which are one step apart in magnitude; 8 bits have
        # levels enough to reach the extreme on both sides
        reach = scheme.high + (0.5 if scheme.bits < 8 else 0.0)
        scale = positive(np.maximum(-low, high) * np.float32(share / reach))
        return Grid(scheme, scale, np.zeros_like(scale))
    scale = positive((high - low) * np.float32(share / scheme.high))
    middle = (high + low) * np.float32(0.5)
    zero_point = np.float32(scheme.high / 2) - middle / scale
    return Grid(scheme, scale, np.clip(np.rint(zero_point), 0, scheme.high))


def _refitted(grid: Grid, blocks: Array, wanted: Array, counts: Array | None) -> Grid:
    """The scale with which the nearest integers of ``blocks`` come closest to ``wanted``."""
    scheme, zero = grid.scheme, grid.zero_point
    values = _integers(grid, blocks)
    if not scheme.symmetric:
        ratio = wanted / grid.scale[..., None]
        zero = np.clip(np.rint((values - ratio).mean(axis=2)), 0, scheme.high)
    steps = values - zero[..., None]
    over = _weighted(steps * wanted, counts)
    under = _weighted(np.square(steps), counts)
    scale = np.divide(over, under, out=grid.scale.copy(), where=under > 0)
    usable = scale > grid.scale * np.float32(0.2)
    return Grid(scheme, np.where(usable, scale, grid.scale), zero)


def _integers(grid: Grid, blocks: Array) -> Array:
    values = np.rint(blocks / grid.scale[..., None]) + grid.zero_point[..., None]
    return np.asarray(np.clip(values, grid.scheme.low, grid.scheme.high))


def _rounded(grid: Grid, blocks: Array) -> Array:
    steps = _integers(grid, blocks) - grid.zero_point[..., None]
    return np.asarray(steps * grid.scale[..., None])


def _weighted(values: Array, counts: Array | None) -> Array:
    return np.asarray((values if counts is None else values * counts).sum(axis=2))


def _better(best: Grid, least: Array, other: Grid, error: Array) -> tuple[Grid, Array]:
    """Block by block, the grid with the smaller error, and that error."""
    wins = error < least
    scale = np.where(wins, other.scale, best.scale)
    zero_point = np.where(wins, other.zero_point, best.zero_point)
    return Grid(best.scheme, scale, zero_point), np.where(wins, error, least)
