"""Latency side by side: the candidates take turns in one process, the median counts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_BLOCKS = 10  # parts of a measurement, whose spread is its error


@dataclass(frozen=True)
class Timing:
    """Latency of one candidate over ``runs`` interleaved runs. taken_ms: of each, in order."""

    name: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int
    taken_ms: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Speedup:
    """How many times faster one candidate is than another. error: one standard error."""

    ratio: float
    error: float

    def is_below(self, limit: float) -> bool:
        """True if it is below by more than two standard errors: not by chance."""
        return self.ratio + 2 * self.error < limit

    def is_above(self, limit: float) -> bool:
        """True if it is above by more than two standard errors."""
        return self.ratio - 2 * self.error > limit

    def __str__(self) -> str:
        """The ratio and its error."""
        return f"{self.ratio:.2f} ± {self.error:.2f}"


def speedup_of(slow: Timing, fast: Timing) -> Speedup:
    """Median of ``slow`` over that of ``fast``, which took turns.

    The error is that of the mean of the ratios of consecutive parts of the measurement, so it
    holds what drifts, like the clock rate of the CPU, and not what both suffer alike.
    """
    parts = min(_BLOCKS, slow.runs // 2)
    bounds = [slow.runs * i // parts for i in range(parts + 1)]
    ratios = [
        statistics.median(slow.taken_ms[a:b]) / statistics.median(fast.taken_ms[a:b])
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    return Speedup(slow.median_ms / fast.median_ms, statistics.stdev(ratios) / parts**0.5)


def interleave(
    candidates: Sequence[tuple[str, Callable[[], object]]],
    *,
    seconds: float = 4.0,
    min_runs: int = 11,
    max_runs: int = 400,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Timing, ...]:
    """Time the candidates in turns: A B C A B C …, until the time is up.

    Every candidate is warmed up twice. At least ``min_runs`` rounds are made, however long
    they take; the order is reversed every other round, so that none always follows the same.
    clock: seconds; ``time.thread_time`` for the CPU time of calls that use no other thread.
    """
    for _, call in candidates:
        call()
        call()
    taken: list[list[float]] = [[] for _ in candidates]
    started = time.perf_counter()
    for round_ in range(max_runs):
        if round_ >= min_runs and time.perf_counter() - started > seconds:
            break
        order = range(len(candidates))
        for index in order if round_ % 2 == 0 else reversed(order):
            before = clock()
            candidates[index][1]()
            taken[index].append((clock() - before) * 1e3)
    timings = []
    for (name, _), times in zip(candidates, taken, strict=True):
        deciles = statistics.quantiles(times, n=10)
        median = statistics.median(times)
        timings.append(Timing(name, median, deciles[0], deciles[-1], len(times), tuple(times)))
    return tuple(timings)
