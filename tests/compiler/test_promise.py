"""A promise is kept, broken or not judged, and not judged is not kept."""

from __future__ import annotations

from typing import Any

import pytest

from edgec.errors import EdgecError
from edgec.promise import Limits, judge, limits_from
from edgec.report import Measurement, Metric

HERE = Measurement(cpu="x", arch="x86_64", threads=1, runs=11, is_target=True)
ELSEWHERE = Measurement(cpu="x", arch="x86_64", threads=1, runs=11, is_target=False)
FACTS: dict[str, Any] = {
    "size_bytes": 2_000_000,
    "metric": None,
    "agreement": 0.98,
    "speedup": 1.8,
    "latency_ms": 4.0,
    "measured_on": HERE,
    "real_data": True,
}


def verdict(limits: Limits, **changes: Any) -> tuple[bool, str]:
    (promise,) = judge(limits, **{**FACTS, **changes})
    return promise.kept, promise.reason


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        (Limits(max_size_mb=2.0), True),
        (Limits(max_size_mb=1.999), False),
        (Limits(max_drop=0.02), True),
        (Limits(max_drop=0.019), False),
        (Limits(min_speedup=1.8), True),
        (Limits(min_speedup=1.81), False),
        (Limits(max_latency_ms=4.0), True),
        (Limits(max_latency_ms=3.99), False),
    ],
)
def test_the_limit_itself_is_kept(limits: Limits, kept: bool) -> None:
    assert verdict(limits)[0] is kept


def test_a_metric_takes_the_place_of_agreement() -> None:
    worse = Metric("top1", 0.9, 0.7, 0.2)
    assert verdict(Limits(max_drop=0.1), metric=worse) == (False, "top1")
    assert verdict(Limits(max_drop=0.0), metric=Metric("top1", 0.7, 0.9, -0.2))[0]


@pytest.mark.parametrize(
    ("limits", "changes", "reason"),
    [
        (Limits(max_drop=0.5), {"real_data": False}, "no evaluation data"),
        (Limits(max_drop=0.5), {"agreement": None}, "no evaluation data"),
        (Limits(min_speedup=1.1), {"measured_on": ELSEWHERE}, "not the target"),
        (Limits(min_speedup=1.1), {"measured_on": ELSEWHERE}, "(x1.80)"),
        (Limits(min_speedup=1.1), {"speedup": None}, "no latency"),
        (Limits(max_latency_ms=9.0), {"measured_on": ELSEWHERE}, "(4 ms), which is not the target"),
        (Limits(max_latency_ms=9.0), {"latency_ms": None}, "no latency"),
    ],
)
def test_what_was_not_judged_is_not_kept(limits: Limits, changes: Any, reason: str) -> None:
    kept, said = verdict(limits, **changes)
    assert not kept and said.startswith("not judged") and reason in said


def test_nothing_promised_is_nothing_judged() -> None:
    assert judge(Limits(), **FACTS) == ()


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1"])
@pytest.mark.parametrize("name", ["max_drop", "max_size_mb", "min_speedup", "max_latency_ms"])
def test_an_impossible_limit_is_refused(name: str, value: Any) -> None:
    with pytest.raises(EdgecError, match=f"promise {name} is"):
        Limits(**{name: value})


def test_a_table_with_an_unknown_promise_or_a_wrong_type_is_refused() -> None:
    assert limits_from({"max_drop": 0}, "t") == Limits(max_drop=0.0)
    assert limits_from({"max_latency_ms": 20}, "t") == Limits(max_latency_ms=20.0)
    with pytest.raises(EdgecError, match="unknown promise 'max_drp', did you mean 'max_drop'"):
        limits_from({"max_drp": 1}, "t")
    with pytest.raises(EdgecError, match="True, expected a number"):
        limits_from({"max_drop": True}, "t")


def test_a_refused_limit_says_what_would_be_one():
    with pytest.raises(EdgecError, match="max_drop is -1, expected a number from 0 up"):
        Limits(max_drop=-1)
    with pytest.raises(EdgecError, match="max_size_mb is 0, expected a number above 0"):
        Limits(max_size_mb=0)
