"""Drift: two streams side by side, on the bundle of a running sum whose error is known."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from state_samples import write_running_sum

import edgec_runtime
from edgec.drift import Drift, measure_drift
from edgec.errors import PassError

STATE = {"h": "hn"}
# the sum is 1 and -1 in turns
SAMPLES = [
    {"x": np.full((1, 3), x, np.float32), "h": np.zeros((1, 1, 3), np.float32)}
    for x in (1.0, *[-2.0, 2.0] * 32)
]


@pytest.fixture
def bundle(tmp_path: pathlib.Path) -> edgec_runtime.Model:
    return edgec_runtime.load(write_running_sum(tmp_path / "sum.edgec"))


def reference(error: Callable[[], float] = lambda: 0.0) -> Any:
    """The running sum, off by ``error()`` in each step."""

    def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
        hn = feeds["h"] + feeds["x"] + np.float32(error())
        return {"y": 2 * hn, "hn": hn}

    return run


def test_equal_sides_have_no_drift(bundle: edgec_runtime.Model) -> None:
    drift = measure_drift(STATE, reference(), bundle, SAMPLES)
    assert drift == Drift(64, (200.0,) * 7, (200.0,) * 7)
    assert not drift.grows
    [text] = drift.findings
    assert text.endswith("each with its own state: equal in every number")


def test_an_error_that_adds_up_is_found_to_grow(bundle: edgec_runtime.Model) -> None:
    drift = measure_drift(STATE, reference(lambda: 0.01), bundle, SAMPLES)
    assert drift.state_db[0] == pytest.approx(40.1, abs=0.1)  # 1.01 against 1
    falls = -np.diff(drift.state_db[3:])
    assert (falls > 3).all()
    assert drift.grows
    assert "the error of the state GROWS" in drift.findings[1]


def test_an_error_that_dies_away_does_not_grow(bundle: edgec_runtime.Model) -> None:
    errors = itertools.cycle([0.01, 0.0, -0.01, 0.0])  # off for two steps, right for two
    drift = measure_drift(STATE, reference(lambda: next(errors)), bundle, SAMPLES)
    assert min(drift.state_db) > 39 and not drift.grows


def test_float_noise_is_no_drift() -> None:
    assert Drift(64, (), (140.0, 130.0, 120.0, 110.0)).grows is False
    assert Drift(64, (), (70.0, 65.0, 62.0, 59.0)).grows is True
    assert Drift(2, (), (30.0, 20.0)).grows is False  # too few to tell


def test_few_samples_are_taken_again_and_steps_need_no_power_of_two(
    bundle: edgec_runtime.Model,
) -> None:
    drift = measure_drift(STATE, reference(lambda: 0.1), bundle, SAMPLES[:1], steps=5)
    assert (drift.steps, len(drift.outputs_db), len(drift.state_db)) == (5, 4, 4)
    assert "over 5 steps" in drift.findings[0] and "up to step 1, 2, 4, 5:" in drift.findings[0]


def test_samples_of_another_batch_are_left_out(bundle: edgec_runtime.Model) -> None:
    double = {name: np.concatenate([a, a], axis=-2) for name, a in SAMPLES[0].items()}
    drift = measure_drift(STATE, reference(), bundle, [SAMPLES[0], double, *SAMPLES], steps=3)
    assert drift.steps == 3


def test_a_state_that_is_lost_in_the_bundle_alone_is_refused(
    bundle: edgec_runtime.Model,
) -> None:
    huge = [{**SAMPLES[0], "x": np.full((1, 3), 3e38, np.float32)}]

    def clipped(feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {"y": feeds["h"], "hn": np.float32(1e38) + 0 * feeds["h"]}

    with pytest.raises(PassError, match="the state 'h' of the bundle is not finite after step 2"):
        with np.errstate(over="ignore"):
            measure_drift(STATE, clipped, bundle, huge)
