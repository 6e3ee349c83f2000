"""Streams: state is carried from call to call, apart from others, and never half changed."""

from __future__ import annotations

import pathlib
import threading
from typing import Any

import numpy as np
import pytest
from bundle_samples import write_sample
from state_samples import write_counter, write_running_sum

import edgec_runtime
from edgec_runtime.errors import InputError

STEPS = np.arange(24, dtype=np.float32).reshape(4, 2, 3)  # [step, row, 3]: sums are exact


@pytest.fixture
def model(tmp_path: pathlib.Path) -> edgec_runtime.Model:
    return edgec_runtime.load(write_running_sum(tmp_path / "sum.edgec"))


def test_each_call_starts_from_what_the_call_before_left(model: edgec_runtime.Model) -> None:
    stream = model.stream(batch=2)
    answers = [stream(x) for x in STEPS]
    np.testing.assert_array_equal([a["y"][0] for a in answers], 2 * STEPS.cumsum(0))
    assert all(set(a) == {"y"} for a in answers)


def test_it_gives_what_the_model_gives_with_the_state_carried_by_hand(
    model: edgec_runtime.Model,
) -> None:
    stream, state = model.stream(), np.zeros((1, 1, 3), np.float32)
    for x in STEPS[:, :1]:
        outputs = model(x=x, h=state)
        state = outputs["hn"]
        np.testing.assert_array_equal(stream(x=x)["y"], outputs["y"])


def test_it_says_what_a_call_takes_and_gives(model: edgec_runtime.Model) -> None:
    stream = model.stream(batch=5)
    assert isinstance(stream, edgec_runtime.Stream)
    assert [v.name for v in stream.inputs] == ["x"]
    assert [v.name for v in stream.outputs] == ["y"]
    assert stream.batch == 5
    assert repr(stream) == "<Stream of 5 rows of sample, state h>"


def test_streams_of_one_model_are_apart(model: edgec_runtime.Model) -> None:
    first, second = model.stream(), model.stream()
    x = STEPS[1, :1]
    first(x)
    np.testing.assert_array_equal(first(x)["y"][0], 4 * x)
    np.testing.assert_array_equal(second(x)["y"][0], 2 * x)


def test_threads_with_a_stream_each_do_not_disturb_one_another(model: edgec_runtime.Model) -> None:
    ends: dict[int, Any] = {}

    def run(number: int) -> None:
        stream, x = model.stream(), np.full((1, 3), number, np.float32)
        for _ in range(200):
            last = stream(x)["y"]
        ends[number] = last[0, 0, 0]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == {number: 400 * number for number in range(4)}


def test_reset_begins_anew(model: edgec_runtime.Model) -> None:
    stream = model.stream(batch=2)
    first = stream(STEPS[1])["y"]
    stream(STEPS[2])
    stream.reset()
    np.testing.assert_array_equal(stream(STEPS[1])["y"], first)


def test_one_row_of_a_batch_begins_anew(model: edgec_runtime.Model) -> None:
    stream = model.stream(batch=2)
    stream(STEPS[1])
    before = stream.snapshot()["h"].copy()
    stream.reset(1)
    after = stream.snapshot()["h"]
    np.testing.assert_array_equal(after[:, 0], before[:, 0])
    assert before[:, 1].any() and not after[:, 1].any()


def test_a_stream_goes_on_from_a_snapshot(
    model: edgec_runtime.Model, tmp_path: pathlib.Path
) -> None:
    stream = model.stream(batch=2)
    stream(STEPS[1])
    np.savez(tmp_path / "state.npz", **stream.snapshot())  # as an app that is stopped would
    expected = stream(STEPS[2])["y"]
    with np.load(tmp_path / "state.npz") as saved:
        resumed = model.stream(state=dict(saved))
    assert resumed.batch == 2
    np.testing.assert_array_equal(resumed(STEPS[2])["y"], expected)


def test_a_snapshot_is_a_copy_both_ways(model: edgec_runtime.Model) -> None:
    stream = model.stream()
    saved = stream.snapshot()
    branch = model.stream(state=saved)
    saved["h"][:] = 100
    zeros = np.zeros((1, 3), np.float32)
    assert not stream(zeros)["y"].any()
    assert not branch(zeros)["y"].any()


def test_a_call_that_fails_leaves_the_state(model: edgec_runtime.Model) -> None:
    stream = model.stream()
    stream(STEPS[1, :1])
    before = stream.snapshot()
    for wrong in (STEPS[1, :1].astype(np.float64), STEPS[1, :, :2], STEPS[1]):
        with pytest.raises(InputError):
            stream(wrong)
    np.testing.assert_array_equal(stream.snapshot()["h"], before["h"])
    np.testing.assert_array_equal(stream(STEPS[1, :1])["y"][0], 4 * STEPS[1, :1])


def test_a_batch_of_fixed_size_needs_no_number(tmp_path: pathlib.Path) -> None:
    model = edgec_runtime.load(write_running_sum(tmp_path / "a", batch=2))
    stream = model.stream()
    assert stream.batch is None
    stream(STEPS[1])
    np.testing.assert_array_equal(stream(STEPS[1])["y"][0], 4 * STEPS[1])
    with pytest.raises(InputError, match=r"batch is 2, but the model's batch has a fixed size"):
        model.stream(batch=2)
    with pytest.raises(InputError, match=r"'h' has the fixed shape \[1, 2, 3\].*reset the whole"):
        stream.reset(0)


def test_another_batch_is_refused_where_its_dimension_has_no_name(tmp_path: pathlib.Path) -> None:
    """ONNX Runtime would broadcast the state of one row over both."""
    stream = edgec_runtime.load(write_running_sum(tmp_path / "a", batch=None)).stream()
    with pytest.raises(InputError, match=r"'hn' came back with the shape \[1, 2, 3\]"):
        stream(STEPS[1])
    assert not stream.snapshot()["h"].any()


def test_a_scalar_and_a_flag_are_states_as_well(tmp_path: pathlib.Path) -> None:
    stream = edgec_runtime.load(write_counter(tmp_path / "a")).stream()
    for step in range(3):
        assert stream.snapshot()["count"] == step
        stream(np.zeros(3, np.float32))
    started = edgec_runtime.load(tmp_path / "a").stream(
        state={"count": np.int64(40), "flag": np.array([True, False])}
    )
    for _ in range(2):
        started(np.zeros(3, np.float32))
    assert started.snapshot()["count"] == 42
    np.testing.assert_array_equal(started.snapshot()["flag"], [True, False])


def test_two_threads_in_one_stream_are_refused(model: edgec_runtime.Model) -> None:
    stream = model.stream()
    with stream._alone():  # as during a call
        for call in (lambda: stream(STEPS[1, :1]), stream.reset):
            with pytest.raises(InputError, match="in a call of another thread; make one stream"):
                call()
    stream(STEPS[1, :1])


def test_a_bundle_without_state_has_no_stream(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="states no state to keep.*--state INPUT=OUTPUT"):
        edgec_runtime.load(write_sample(tmp_path / "a")).stream()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch is 0, expected a whole number from 1 up"),
        ({"batch": True}, "batch is True, expected"),
        ({"batch": 1.5}, "batch is 1.5, expected"),
        ({"state": {}}, "state: input 'h' is missing"),
        ({"state": [1]}, "state is a list, expected what Stream.snapshot gives"),
        ({"state": {"x": STEPS[0]}}, "state: the model has no input 'x'"),
        ({"state": {"h": np.zeros((1, 1, 3))}}, "state: input 'h' is float64, expected float32"),
        ({"state": {"h": np.zeros((1, 1, 4), "f")}}, "state: input 'h' has size 4 in dimension 2"),
        (
            {"batch": 3, "state": {"h": np.zeros((1, 2, 3), "f")}},
            "batch is 3, but state has 2 rows; leave batch out",
        ),
    ],
)
def test_a_wrong_start_is_refused(
    model: edgec_runtime.Model, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model.stream(**options)


@pytest.mark.parametrize(
    ("arrays", "feeds", "message"),
    [
        ((), {"x": STEPS[0], "h": STEPS[:1]}, "input 'h' is state, which the stream keeps"),
        ((STEPS[0], STEPS[:1]), {}, "2 arrays were given, the model has 1 input: 'x'"),
        ((), {}, "input 'x' is missing"),
        ((STEPS[0, :1],), {}, r"'x' has batch = 1, the stream has 2; .*stream\(batch=1\)"),
    ],
)
def test_a_wrong_call_is_refused(
    model: edgec_runtime.Model, arrays: Any, feeds: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model.stream(batch=2)(*arrays, **feeds)


@pytest.mark.parametrize("row", [-1, 2, 0.5])
def test_a_row_that_there_is_not(model: edgec_runtime.Model, row: Any) -> None:
    stream = model.stream(batch=2)
    stream(STEPS[1])
    with pytest.raises(InputError, match=r"row .*: the stream has rows 0 to 1"):
        stream.reset(0, row)
    assert stream.snapshot()["h"].all()
