"""Calibration and evaluation data: every form gives the same samples, one at a time."""

from __future__ import annotations

import pathlib
import random
import tracemalloc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import graphs
import numpy as np
import pytest

from edgec.data import Dataset, InputSpec, open_data
from edgec.errors import DataError
from edgec.export import Exported
from edgec.inputs import open_inputs
from edgec.targets import load_target

X = InputSpec("x", np.dtype(np.float32), (1, 4))
OPEN = InputSpec("x", np.dtype(np.float32), (None, 4))
IDS = InputSpec("ids", np.dtype(np.int64), (1, None))


def rows(count: int = 8, width: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def opened(given: Any, *inputs: InputSpec) -> Dataset:
    return open_data(given, inputs or (X,), "calibration")


def feeds(data: Dataset, name: str = "x") -> np.ndarray:
    return np.concatenate([sample[name] for sample in data])


def test_all_forms_give_the_same_samples(tmp_path: pathlib.Path) -> None:
    array = rows()
    (tmp_path / "d").mkdir()
    for i, row in enumerate(array):
        np.savez(tmp_path / f"d/{i}.npz", x=row[None], label=i)
    np.savez(tmp_path / "a.npz", x=array, label=np.arange(8))
    np.savez_compressed(tmp_path / "b.npz", anything=array, label=np.arange(8))
    np.savez(tmp_path / "f.npz", x=np.asfortranarray(array), label=np.arange(8))
    np.savez(tmp_path / "whole.npz", x=array[:, None], label=np.arange(8))
    np.save(tmp_path / "c.npy", array)

    def function() -> Iterator[dict[str, Any]]:
        for i, row in enumerate(array):
            yield {"x": row[None], "label": i}

    def pairs() -> Iterator[tuple[dict[str, Any], int]]:
        for i, row in enumerate(array):
            yield {"x": row[None]}, i

    names = ["d", "a.npz", "b.npz", "f.npz", "whole.npz", "c.npy"]
    for form in [*(tmp_path / name for name in names), function, pairs]:
        data = opened(form)
        np.testing.assert_array_equal(feeds(data), array, err_msg=str(form))
        labels = [sample.labels for sample in data.samples()]
        if not str(form).endswith(".npy"):
            assert [int(np.ravel(one["label"])[0]) for one in labels] == list(range(8)), form


def test_a_fixed_batch_takes_that_many_rows(tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / "x.npy", rows(10))
    data = opened(tmp_path / "x.npy", InputSpec("x", np.dtype(np.float32), (4, 4)))
    assert [sample["x"].shape for sample in data] == [(4, 4), (4, 4)]  # two rows are left over
    with pytest.raises(DataError, match="10 rows, but the model takes 16 at a time"):
        opened(tmp_path / "x.npy", InputSpec("x", np.dtype(np.float32), (16, 4)))


def test_a_single_npz_is_read_row_by_row(tmp_path: pathlib.Path) -> None:
    count, width = 400, 25_000  # 40 MB
    np.savez(tmp_path / "big.npz", x=rows(count, width))
    spec = InputSpec("x", np.dtype(np.float32), (1, width))
    tracemalloc.start()
    data = open_data(tmp_path / "big.npz", (spec,), "calibration")
    seen = sum(1 for _ in data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == count
    assert peak < 4e6  # bytes: some copies of one row of 100 kB, not of 400


def test_a_split_is_disjoint_and_does_not_depend_on_the_order() -> None:
    array = rows(20)

    def data(order: Iterator[int]) -> Dataset:
        indices = list(order)
        return opened(lambda: ({"x": array[i : i + 1]} for i in indices))

    first, second = data(iter(range(20))).split(0.25, seed=1)
    assert (len(first), len(second)) == (15, 5)
    assert not first.kept_digests() & second.kept_digests()
    assert feeds(second).shape == (5, 4)
    backwards = data(reversed(range(20))).split(0.25, seed=1)[1]
    assert backwards.kept_digests() == second.kept_digests()
    assert data(iter(range(20))).split(0.25, seed=2)[1].kept_digests() != second.kept_digests()


def test_equal_samples_never_leave_a_split_empty() -> None:
    data = opened(lambda: ({"x": np.ones((1, 4), np.float32)} for _ in range(8)))
    first, second = data.split(0.25, seed=0)
    assert (len(first), len(second)) == (8, 0)


def test_what_a_function_draws_is_the_same_in_every_pass_and_nobody_else_notices() -> None:
    def noise() -> Iterator[dict[str, np.ndarray]]:
        for _ in range(4):
            yield {"x": np.random.standard_normal((1, 4)).astype(np.float32) + random.random()}

    np.random.seed(7)
    random.seed(7)
    expected = (np.random.random(), random.random())
    np.random.seed(7)
    random.seed(7)
    data = opened(noise)
    np.testing.assert_array_equal(feeds(data), feeds(data))
    assert len(set(data.digests)) == 4
    assert (np.random.random(), random.random()) == expected


def test_numbers_of_another_width_are_converted_if_they_fit() -> None:
    narrow = opened(lambda: [{"x": rows(1).astype(np.float64)}])
    assert feeds(narrow).dtype == np.float32
    ids = opened(lambda: [{"ids": np.array([[1, 2]], np.int32)}], IDS)
    assert feeds(ids, "ids").dtype == np.int64
    bytes_ = InputSpec("ids", np.dtype(np.uint8), (1, None))
    with pytest.raises(DataError, match="values that do not fit into uint8"):
        opened(lambda: [{"ids": np.array([[300]])}], bytes_)
    swapped = opened(lambda: [{"x": rows(1).astype(">f4")}])
    np.testing.assert_array_equal(feeds(swapped), rows(1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: [], "it holds no samples"),
        (lambda: None, "raised TypeError"),
        (lambda: [3], "a int, expected a dict"),
        (lambda: [{}], "no array for input 'x'; it has nothing"),
        (
            lambda: [{"x": np.full((1, 4), np.inf, np.float32)}],
            "sample 0: 'x' has a NaN or an infinity; .* leave the sample out",
        ),
        (
            lambda: [{"x": rows(1)}, {"x": rows(1, 5)}],
            r"sample 1: 'x' has shape \[1, 5\], the model expects .*; prepare it as the app",
        ),
        (lambda: [{"x": rows(1) > 0}], "is bool, the model expects float32"),
        ([1, 2], "a list, expected a path or a function"),
        ("data.csv", "no such file or directory"),
        ("data.py:f", "no such file"),
    ],
)
def test_wrong_data_is_refused(given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(given)


def test_a_directory_without_samples_says_how_to_write_one(tmp_path: pathlib.Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"jpeg")
    with pytest.raises(DataError, match=r"holds no \.npz files; save each sample as one, with"):
        opened(tmp_path)


@pytest.mark.parametrize(("different", "doubted"), [(False, True), (True, False)])
def test_calibration_samples_that_are_all_equal_are_a_finding(
    different: bool, doubted: bool
) -> None:
    model, one = graphs.mlp()
    given = [{name: array + different * i for name, array in one.items()} for i in range(8)]
    source: Any = SimpleNamespace(calibration=lambda: given, evaluation=None, metric=None)
    found = open_inputs(source, Exported(model, ()), load_target("x86-64"), seed=0).findings
    assert any("all 8 calibration samples are equal" in text for text in found) == doubted


def test_wrong_arrays_in_one_file_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=rows(3), label=np.arange(4))
    with pytest.raises(DataError, match="differ in their number of samples: label 4, x 3"):
        opened(path)
    np.savez(path, x=rows(3), label=3)
    with pytest.raises(DataError, match="'label' has no leading sample dimension"):
        opened(path)
    np.savez(path, x=np.array([{}], object))
    with pytest.raises(DataError, match="Python objects"):
        opened(path)
    np.savez(path, x=rows(3000))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="cannot be read"):
        opened(path)
    np.savez(path, x=rows(3000))
    damaged = bytearray(path.read_bytes())
    damaged[3000] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="cannot be read"):
        opened(path)


def test_a_dynamic_batch_takes_one_row_each(tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / "x.npy", rows(3))
    assert [s["x"].shape for s in opened(tmp_path / "x.npy", OPEN)] == [(1, 4)] * 3
