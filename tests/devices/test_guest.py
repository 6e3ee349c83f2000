"""The files of a job are what safetensors reads and writes."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgec.devices import guest
from edgec.devices.guest import by_sample, numbered, read_tensors, write_tensors
from edgec.devices.job import Job, write_job
from edgec.errors import DataError

ARRAYS = {
    "0 x": np.arange(6, dtype=np.float32).reshape(2, 3),
    "0 mask": np.array([True, False]),
    "1 x": np.zeros((0, 3), np.float32),
    "1 größe": np.array(7, np.int64),
    "1 half": np.array([[1.5]], np.float16),
}


def test_tensors_are_read_by_safetensors(tmp_path: pathlib.Path) -> None:
    write_tensors(tmp_path / "a", ARRAYS)
    read = load_file(tmp_path / "a")
    assert read.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_what_safetensors_writes_is_read(tmp_path: pathlib.Path) -> None:
    save_file(ARRAYS, tmp_path / "a")
    read = read_tensors(tmp_path / "a")
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].shape == array.shape


def test_samples_keep_their_order() -> None:
    samples = ({"x": np.zeros(1), "two words": np.ones(2)}, {"x": np.full(1, 2.0)})
    assert by_sample(numbered(samples), 2)[1]["x"] == 2.0
    assert list(by_sample(numbered(samples), 2)[0]) == ["x", "two words"]


def test_samples_are_run_while_one_more_is_likely_to_end_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0

    def model() -> dict[str, np.ndarray]:
        nonlocal now
        now += 10.0  # seconds
        return {}

    monkeypatch.setattr(guest.time, "perf_counter", lambda: now)
    ran = {
        limit_ms: len(guest._run_feeds(model, [{}] * 5, limit_ms))
        for limit_ms in (0, 29_999, 30_000, 45_000, 50_000, None)
    }
    assert ran == {0: 2, 29_999: 2, 30_000: 3, 45_000: 4, 50_000: 5, None: 5}


def test_strings_cannot_be_sent(tmp_path: pathlib.Path) -> None:
    bundle = tmp_path / "b"
    bundle.write_bytes(b"")
    folder = tmp_path / "job"
    folder.mkdir()
    with pytest.raises(DataError, match="cannot be sent to a device"):
        write_job(Job(bundle, [{"x": np.array(["a"])}]), folder)
