"""The candidates take turns, and the median counts."""

from __future__ import annotations

import statistics
import time

import pytest

from edgec.bench import Timing, interleave, speedup_of


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


def test_the_speedup_has_the_error_of_its_drift_and_not_of_what_both_suffer() -> None:
    def timing(taken: list[float]) -> Timing:
        return Timing("", statistics.median(taken), 0.0, 0.0, len(taken), tuple(taken))

    clock = [1.0 + 0.5 * (i // 10 % 2) for i in range(100)]  # the CPU changes its rate
    slow, fast = timing([3.0 * c for c in clock]), timing([2.0 * c for c in clock])
    found = speedup_of(slow, fast)
    assert found.ratio == pytest.approx(1.5) and found.error == pytest.approx(0.0)
    assert found.is_above(1.49) and found.is_below(1.51)

    drifting = speedup_of(timing([2.0] * 50 + [3.0] * 50), timing([2.0] * 100))
    # ten parts, half of them 1.0 and half 1.5: standard deviation 0.2635, of their mean 0.0833
    assert drifting.ratio == pytest.approx(1.25) and drifting.error == pytest.approx(
        0.0833, abs=1e-4
    )
    assert not drifting.is_above(1.1) and not drifting.is_below(1.4)
