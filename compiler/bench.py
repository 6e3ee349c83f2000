"""Latency side by side: the candidates take turns in one process, the median counts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Latency of one candidate over ``runs`` interleaved runs."""

    name: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int


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
        timings.append(Timing(name, statistics.median(times), deciles[0], deciles[-1], len(times)))
    return tuple(timings)
