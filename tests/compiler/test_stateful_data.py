"""Data that leaves the state out: it follows from the sample before, and data may bring its own."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from edgec.data import InputSpec
from edgec.errors import DataError
from edgec.stateful_data import open_stateful_data

INPUTS = (
    InputSpec("h", np.dtype(np.float32), (1, None, 3)),
    InputSpec("x", np.dtype(np.float32), (None, 3)),
)
STATE = {"h": "hn"}
ROWS = np.arange(15, dtype=np.float32).reshape(5, 1, 3) + 1


class RunningSum:
    """h + x; counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self.runs += 1
        return {"y": feeds["x"], "hn": feeds["h"] + feeds["x"]}


def opened(given: Any, model: RunningSum | None = None) -> Any:
    return open_stateful_data(given, INPUTS, "calibration", STATE, lambda: model or RunningSum())


def states(data: Any) -> np.ndarray:
    return np.stack([feeds["h"] for feeds in data])


def test_the_state_is_what_the_sample_before_left() -> None:
    data = opened(lambda: ({"x": x} for x in ROWS))
    sums = np.concatenate([np.zeros((1, 1, 3)), ROWS.cumsum(0)[:-1]])
    np.testing.assert_array_equal(states(data)[:, 0], sums)
    assert [list(feeds) for feeds in data][0] == ["h", "x"]
    np.testing.assert_array_equal(states(data)[:, 0], sums)  # every time


def test_a_restart_begins_from_zeros_and_is_no_label() -> None:
    def given() -> Any:
        for number, x in enumerate(ROWS):
            yield {"x": x, "restart": number == 3, "label": number}

    data = opened(given)
    assert [bool(h.any()) for h in states(data)] == [False, True, True, False, True]
    assert [list(sample.labels) for sample in data.samples()] == [["label"]] * 5


def test_another_batch_begins_from_zeros() -> None:
    def given() -> Any:
        yield from ({"x": x} for x in ROWS[:2])
        yield {"x": np.ones((4, 3), np.float32)}

    assert [feeds["h"].shape for feeds in opened(given)] == [(1, 1, 3), (1, 1, 3), (1, 4, 3)]
    assert not list(opened(given))[2]["h"].any()


def test_state_that_the_data_brings_is_taken() -> None:
    model, own = RunningSum(), np.full((1, 1, 3), 7, np.float32)
    data = opened(lambda: ({"x": x, "h": own} for x in ROWS), model)
    assert (states(data) == 7).all()
    assert model.runs == 0
    with pytest.raises(DataError, match=r"'h' has shape \[3\], the model expects \[1, any, 3\]"):
        opened(lambda: ({"x": x, "h": own[0, 0]} for x in ROWS))


def test_a_part_of_the_data_keeps_the_states_of_the_whole(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "data.npz", x=ROWS)
    whole = opened(str(tmp_path / "data.npz"))
    by_row = {feeds["x"].tobytes(): feeds["h"] for feeds in whole}
    for part in whole.split(0.4, seed=0):
        assert 0 < len(part) < 5
        for feeds in part:
            np.testing.assert_array_equal(feeds["h"], by_row[feeds["x"].tobytes()])


def test_a_single_array_may_have_any_name_and_be_npy(tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / "data.npy", ROWS)
    assert states(opened(tmp_path / "data.npy"))[1:].all()


def test_without_state_the_data_is_read_as_ever() -> None:
    with pytest.raises(DataError, match="no array for input 'h'"):
        open_stateful_data(lambda: ({"x": x} for x in ROWS), INPUTS, "calibration", {}, RunningSum)
