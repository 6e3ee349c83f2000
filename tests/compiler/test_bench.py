"""The candidates take turns, and the median counts."""

from __future__ import annotations

import time

import pytest

from edgec.bench import interleave


def test_candidates_take_turns_in_alternating_order_after_warm_up() -> None:
    calls: list[str] = []
    candidates = [(name, lambda name=name: calls.append(name)) for name in "ABC"]
    timings = interleave(candidates, seconds=0.0, min_runs=4)
    assert "".join(calls[:6]) == "AABBCC"  # warm-up
    assert "".join(calls[6:]) == "ABCCBAABCCBA"
    assert [t.name for t in timings] == list("ABC") and all(t.runs == 4 for t in timings)


def test_the_slower_candidate_is_measured_slower() -> None:
    fast, slow = interleave(
        [("fast", lambda: None), ("slow", lambda: time.sleep(0.002))], seconds=0.0
    )
    assert slow.median_ms >= 2.0 > fast.median_ms  # sleep() never returns early
    assert slow.p10_ms <= slow.median_ms <= slow.p90_ms


def test_time_ends_the_rounds_and_max_runs_bounds_them() -> None:
    started = time.perf_counter()
    (timing,) = interleave([("a", lambda: time.sleep(0.001))], seconds=0.05)
    assert 11 <= timing.runs <= 51
    assert time.perf_counter() - started < 5
    assert interleave([("a", lambda: None)], max_runs=20)[0].runs == 20


def test_an_error_of_a_candidate_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        interleave([("a", lambda: 1 / 0)])
