"""Value ranges of tensors, from histograms that are built sample after sample.

A histogram has 2,048 bins whose width is a power of two. When a larger value arrives, the
width doubles and neighbouring bins merge; since halving a bin index is exact, the result
depends on the multiset of values alone: streamed, batched, and merged in any order it is
the same, bit for bit, and its size does not grow with the number of samples.

Four ways to choose the range that the integers shall span: the extremes, percentiles, the
least mean squared error, or the least divergence (entropy).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

BINS = 2048
RangeMethod = Literal["minmax", "percentile", "mse", "entropy"]

_HALF = BINS // 2
_LEAST_REACH = -89  # values below 2**-89 share the bin of zero: 2**100 is exact in float32
_CANDIDATES = 64  # clip thresholds tried on each side by the search for the least error
_LEAST_SHARE = 0.25  # of the extreme value: the lowest clip threshold tried


@dataclass(frozen=True)
class Range:
    """The interval [low, high] that a tensor's integers span; always contains zero."""

    low: float
    high: float

    def __post_init__(self) -> None:
        """Widen the interval to zero, which must have an exact integer."""
        object.__setattr__(self, "low", min(float(self.low), 0.0))
        object.__setattr__(self, "high", max(float(self.high), 0.0))


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of float32 values in 2,048 bins of one power-of-two width.

    Unsigned: bin i counts i <= x / width < i + 1. Signed, once a negative value was seen:
    bin 1024 + i counts the x whose quotient x / width truncates to i, so that the bin of
    zero is two widths wide. reach: every |x| < 2**reach. low, high: exact extremes.
    """

    counts: np.ndarray[Any, np.dtype[np.int64]]
    reach: int
    signed: bool
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray[Any, Any], *, most: int | None = None) -> Histogram:
        """The histogram of a float array of any shape.

        most: about how many of the values are counted, at an odd distance from each other so
        that all columns of an image have their turn; None counts all. The extremes are exact.
        Raises ValueError if a value is NaN or infinite, or if there is none.
        """
        if values.size == 0:
            raise ValueError("no values")
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("NaN" if math.isnan(low) or math.isnan(high) else "an infinite value")
        flat = values.ravel()
        if most is not None and values.size > most:
            flat = flat[:: values.size // most | 1]
        signed = low < 0.0
        top = max(high, -low)
        reach = max(math.frexp(top)[1], _LEAST_REACH) if top else _LEAST_REACH
        scale = np.float32(2.0 ** (_bits(signed) - reach))
        indices = (flat.astype(np.float32, copy=False) * scale).astype(np.intp)
        if signed:
            indices += _HALF
        counts = np.bincount(indices, minlength=BINS)
        return cls(counts, reach, signed, low, high)

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 2.0 ** (self.reach - _bits(self.signed))

    @property
    def centers(self) -> np.ndarray[Any, Any]:
        """Middle of each bin; of a signed histogram's bin of zero: zero."""
        if not self.signed:
            return (np.arange(BINS) + 0.5) * self.width
        index = np.arange(BINS) - _HALF
        return (index + 0.5 * np.sign(index)) * self.width

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both multisets together."""
        signed, reach = self.signed or other.signed, max(self.reach, other.reach)
        counts = self._counts_at(reach, signed) + other._counts_at(reach, signed)
        low, high = min(self.low, other.low), max(self.high, other.high)
        return Histogram(counts, reach, signed, low, high)

    def _counts_at(self, reach: int, signed: bool) -> np.ndarray[Any, np.dtype[np.int64]]:
        doublings = (reach - _bits(signed)) - (self.reach - _bits(self.signed))
        if doublings == 0 and signed == self.signed:
            return self.counts
        used = np.flatnonzero(self.counts)
        index = used - (_HALF if self.signed else 0)
        index = np.sign(index) * (np.abs(index) >> min(doublings, 32))
        counts = np.zeros(BINS, np.int64)
        np.add.at(counts, index + (_HALF if signed else 0), self.counts[used])
        return counts


def minmax(histogram: Histogram) -> Range:
    """The range from the least to the greatest value."""
    return Range(histogram.low, histogram.high)


def percentile(histogram: Histogram, share: float) -> Range:
    """The range outside of which at most 1 - share / 100 of the values lie on either side.

    share: percent, above 50 up to 100, resolved to the bins' outer edges.
    """
    tail = (1.0 - share / 100.0) * float(histogram.counts.sum())
    below = np.cumsum(histogram.counts)
    above = np.cumsum(histogram.counts[::-1])
    first = int(np.searchsorted(below, tail, side="right"))
    last = BINS - 1 - int(np.searchsorted(above, tail, side="right"))
    width, centers = histogram.width, histogram.centers
    low = max(float(centers[first]) - width, histogram.low)
    high = min(float(centers[last]) + width, histogram.high)
    return Range(low, high)


def least_squares(histogram: Histogram, levels: int) -> Range:
    """The range whose uniform quantization has the least expected squared error.

    levels: steps between the range's ends, 255 for 8 bits. A value inside costs step^2 / 12,
    or its own square where it rounds to zero; a value outside its squared distance. Both
    ends are searched together over 64 thresholds each, with sums prefixed over the bins.
    """
    used = np.flatnonzero(histogram.counts)
    n = histogram.counts[used].astype(np.float64)
    c = histogram.centers[used]
    n0, n1, n2 = (np.concatenate([[0.0], np.cumsum(n * c**k)]) for k in range(3))
    shares = np.linspace(_LEAST_SHARE, 1.0, _CANDIDATES)
    highs = shares * histogram.high if histogram.high > 0 else np.zeros(1)
    lows = shares * histogram.low if histogram.low < 0 else np.zeros(1)
    high, low = highs[:, None], lows[None, :]
    step = (high - low) / levels

    top = np.searchsorted(c, highs, side="right")[:, None]
    bottom = np.searchsorted(c, lows, side="left")[None, :]
    clipped = (n2[-1] - n2[top]) - 2 * high * (n1[-1] - n1[top]) + high**2 * (n0[-1] - n0[top])
    clipped = clipped + n2[bottom] - 2 * low * n1[bottom] + low**2 * n0[bottom]
    near_high = np.minimum(np.searchsorted(c, step / 2, side="left"), top)
    near_low = np.maximum(np.searchsorted(c, -step / 2, side="right"), bottom)
    near_high = np.maximum(near_high, near_low)
    rounded = (n0[top] - n0[bottom]) - (n0[near_high] - n0[near_low])
    error = clipped + (n2[near_high] - n2[near_low]) + rounded * step**2 / 12
    i, j = np.unravel_index(int(np.argmin(error)), error.shape)
    return Range(float(lows[j]), float(highs[i]))


def least_divergence(histogram: Histogram, levels: int) -> Range:
    """The range whose integers tell most about the distribution of the values (entropy).

    levels: steps between the range's ends. Least Kullback-Leibler divergence of the clipped
    distribution from what its integers can express: every bin of a level gets the level's
    mean. Ends move together. Method: Migacz 2017, "8-bit inference with TensorRT".
    """
    used = np.flatnonzero(histogram.counts)
    counts, centers = histogram.counts[used].astype(np.float64), histogram.centers[used]
    best, least = minmax(histogram), math.inf
    for share in np.linspace(1.0, _LEAST_SHARE, _CANDIDATES // 2):
        span = Range(share * histogram.low, share * histogram.high)
        step = (span.high - span.low) / levels
        if step <= 0.0:
            break
        first, last = np.searchsorted(centers, [span.low, span.high])
        if last <= first:
            break
        inside = counts[first:last]
        clipped = inside.copy()
        clipped[0] += counts[:first].sum()
        clipped[-1] += counts[last:].sum()
        level = np.rint((centers[first:last] - span.low) / step).astype(np.intp)
        # the mean of the level without the outliers: clipping has to cost something
        mean = np.bincount(level, inside) / np.maximum(np.bincount(level), 1)
        expressed = mean[level]
        p, q = clipped / clipped.sum(), expressed / expressed.sum()
        divergence = float((p * np.log(p / q)).sum())
        if divergence < least:
            best, least = span, divergence
    return best


def _bits(signed: bool) -> int:
    return 10 if signed else 11
