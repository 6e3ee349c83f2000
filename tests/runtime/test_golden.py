"""The self-test's sample: its size, its exactness and what it catches."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest
from bundle_samples import WEIGHT, write_sample
from hypothesis import given, settings
from hypothesis import strategies as st

import edgec_runtime
from edgec_runtime import golden
from edgec_runtime.errors import BundleError, EdgecError

RNG = np.random.default_rng(0)


def decoded(feeds: dict[str, Any], budget_bytes: int = 10**9) -> dict[str, Any]:
    encoded = golden.encode_inputs(feeds, budget_bytes=budget_bytes)
    result = golden.decode_inputs(encoded.parts, encoded.data)
    for name, array in feeds.items():
        assert result[name].shape == array.shape and result[name].dtype == array.dtype
    return result


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64", "uint64", "bool"])
def test_integers_are_exact(dtype: str) -> None:
    limits = (0, 1) if dtype == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    array = np.array([[limits[0], limits[1], 1]], dtype)
    assert np.array_equal(decoded({"a": array})["a"], array)


def test_integers_take_the_smallest_type() -> None:
    tokens = np.arange(30000, dtype=np.int64)
    encoded = golden.encode_inputs({"ids": tokens, "mask": tokens * 0 + 1}, budget_bytes=10**9)
    assert [p.stored_dtype for p in encoded.parts] == ["uint16", "uint8"]
    assert len(encoded.data) == 30000 * 3


def test_large_floats_become_bytes_within_half_a_step() -> None:
    array = RNG.standard_normal((3, 50, 50)).astype(np.float32)
    encoded = golden.encode_inputs({"a": array}, budget_bytes=10**9)
    assert len(encoded.data) == array.size
    step = (array.max() - array.min()) / 255
    error = np.abs(golden.decode_inputs(encoded.parts, encoded.data)["a"] - array).max()
    assert error <= step / 2 * 1.001  # rounding of the scale itself


def test_small_and_infinite_floats_are_exact() -> None:
    small = RNG.standard_normal((4, 5)).astype(np.float32)
    mask = np.zeros((40, 40), np.float32)
    mask[3] = -np.inf
    result = decoded({"small": small, "mask": mask})
    assert np.array_equal(result["small"], small) and np.array_equal(result["mask"], mask)


def test_constant_floats_are_exact() -> None:
    array = np.full((30, 30), 0.3, np.float32)
    assert np.array_equal(decoded({"a": array})["a"], array)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 12), min_size=0, max_size=4),
    budget=st.integers(1, 3000),
    dtype=st.sampled_from(["float32", "float16", "int64", "bool", "float64"]),
)
def test_the_budget_is_kept(shape: list[int], budget: int, dtype: str) -> None:
    array = np.asarray(np.random.default_rng(1).integers(0, 300, shape)).astype(dtype)
    feeds = {"a": array, "b": np.ones(5, np.int64)}
    encoded = golden.encode_inputs(feeds, budget_bytes=budget)
    assert len(encoded.data) <= max(budget, 8 + 1)  # at least one value of each
    again = golden.decode_inputs(encoded.parts, encoded.data)
    assert again["a"].shape == array.shape and again["a"].dtype == array.dtype


def test_a_thinned_input_repeats_its_neighbours() -> None:
    array = np.arange(7, dtype=np.int64)
    assert decoded({"a": array}, budget_bytes=4)["a"].tolist() == [0, 0, 2, 2, 4, 4, 6]


def test_strings_are_refused() -> None:
    with pytest.raises(EdgecError, match="input 'text' is .*a golden sample holds numbers"):
        golden.encode_inputs({"text": np.array(["a"])}, budget_bytes=10)
    with pytest.raises(EdgecError, match="output 'text' is .*a golden sample holds numbers"):
        golden.encode_outputs({"text": np.array(["a"])}, budget_bytes=10)


@pytest.mark.parametrize(
    "changes",
    [
        {"repeats": (2, 1)},
        {"repeats": (0, 1)},
        {"repeats": (1,)},
        {"stored_shape": (3, 3)},
        {"shape": (3, 4, 1)},
        {"shape": (-3, -4), "stored_shape": (-3, -4)},
        {"stored_dtype": "object"},
        {"dtype": "object"},
        {"stored_dtype": "float64"},
        {"shape": (1 << 20, 1 << 20), "stored_shape": (3, 4), "repeats": (349526, 262144)},
    ],
)
def test_a_sample_that_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    encoded = golden.encode_inputs({"a": np.ones((3, 4), np.int64)}, budget_bytes=100)
    part = dataclasses.replace(encoded.parts[0], **changes)
    with pytest.raises(BundleError, match="golden"):
        golden.decode_inputs([part], encoded.data)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 5000), st.integers(0, 10**12))
def test_positions_are_distinct_and_inside(size: int, count: int, seed: int) -> None:
    positions = golden.sample_positions(size, count, seed)
    assert len(set(positions.tolist())) == len(positions) == min(size, count)
    assert all(0 <= p < size for p in positions.tolist())


def test_positions_never_change() -> None:
    assert golden.sample_positions(1000, 5, 7).tolist() == [7, 626, 245, 864, 483]
    assert golden.sample_positions(3, 9, 7).tolist() == [0, 1, 2]


def sample_of(outputs: dict[str, Any], budget_bytes: int = 400, **options: Any) -> Any:
    encoded = golden.encode_outputs(outputs, budget_bytes=budget_bytes, seed=3)
    inputs = golden.Encoded((), b"")
    part, files = golden.make_golden("main", inputs, encoded, **({"min_sqnr_db": 25.0} | options))
    assert len(files[part.outputs_file]) <= budget_bytes
    return lambda actual: golden.judge(part, files[part.outputs_file], actual)


OUTPUTS = {
    "logits": RNG.standard_normal((4, 1000)).astype(np.float32),
    "small": RNG.standard_normal(3).astype(np.float16),
    "classes": np.arange(200, dtype=np.int64),
}


def test_equal_outputs_pass() -> None:
    result = sample_of(OUTPUTS)(OUTPUTS)
    assert result.passed and result.sqnr_db == 200.0
    assert [v.equal for v in result.outputs] == [None, None, 1.0]


@pytest.mark.parametrize(("noise", "passed"), [(0.01, True), (0.2, False)])  # 40 dB, 14 dB
def test_noise_is_judged_by_sqnr(noise: float, passed: bool) -> None:
    logits = OUTPUTS["logits"] + noise * RNG.standard_normal((4, 1000)).astype(np.float32)
    result = sample_of(OUTPUTS)(OUTPUTS | {"logits": logits})
    assert result.passed is passed
    # 1 % noise is 40 dB; about 30 sampled values estimate it within a few dB
    assert abs(result.sqnr_db - (40.0 if passed else 14.0)) < 4
    assert passed or "its SQNR is" in result.outputs[0].reason


def test_a_difference_at_a_place_that_is_not_sampled_shows_in_the_norm() -> None:
    logits = OUTPUTS["logits"].copy()
    judge = sample_of({"logits": logits}, budget_bytes=40)
    sampled = golden.sample_positions(logits.size, 10, 3)
    other = logits.ravel().copy()
    other[[i for i in range(other.size) if i not in sampled]] *= 1.5
    result = judge({"logits": other.reshape(logits.shape)})
    assert not result.passed and "its norm is" in result.outputs[0].reason


def test_wrong_integers_nan_shapes_and_missing_outputs_fail() -> None:
    judge = sample_of(OUTPUTS, budget_bytes=10**6)
    for name, array, reason in [
        ("classes", OUTPUTS["classes"][::-1].copy(), "0.0% of its integers are equal"),
        ("logits", OUTPUTS["logits"] * np.nan, "its SQNR is -200.0 dB"),
        ("logits", OUTPUTS["logits"][:2], "it is float32 [2, 1000], expected float32 [4, 1000]"),
        ("small", OUTPUTS["small"].astype(np.float32), "it is float32 [3], expected float16"),
        ("small", None, "it is missing"),
    ]:
        result = judge({k: v for k, v in (OUTPUTS | {name: array}).items() if v is not None})
        verdict = next(v for v in result.outputs if v.name == name)
        assert not result.passed and not verdict.passed and reason in verdict.reason


def test_one_integer_in_a_hundred_may_differ() -> None:
    judge = sample_of(OUTPUTS, budget_bytes=10**6)
    classes = OUTPUTS["classes"].copy()
    classes[:2] += 1
    assert judge(OUTPUTS | {"classes": classes}).passed
    classes[:3] += 1
    assert not judge(OUTPUTS | {"classes": classes}).passed


def test_quantized_outputs_may_differ_by_one_step() -> None:
    quantized = {"q": RNG.integers(20, 200, 500, dtype=np.uint8)}
    judge = sample_of(quantized, budget_bytes=10**6)
    assert judge({"q": quantized["q"] + np.uint8(1)}).passed
    assert not judge({"q": quantized["q"][::-1].copy()}).passed


def test_infinities_must_stay_where_they_are() -> None:
    array = np.array([1.0, -np.inf, np.nan, 2.0], np.float32)
    judge = sample_of({"a": array})
    assert judge({"a": array.copy()}).passed
    assert not judge({"a": np.array([1.0, 5.0, np.nan, 2.0], np.float32)}).passed


def test_zeros_and_empty_outputs() -> None:
    outputs = {"zero": np.zeros(5, np.float32), "none": np.zeros((0, 3), np.float32)}
    judge = sample_of(outputs)
    assert judge(outputs).passed
    assert not judge(outputs | {"zero": np.ones(5, np.float32)}).passed


def test_many_outputs_share_the_budget() -> None:
    outputs = {f"kv{i}": RNG.standard_normal((8, 64)).astype(np.float32) for i in range(60)}
    encoded = golden.encode_outputs(outputs, budget_bytes=6000, seed=0)
    assert 5000 < len(encoded.data) <= 6000
    assert min(p.count for p in encoded.parts) == 25


def test_data_of_another_size_is_refused() -> None:
    encoded = golden.encode_outputs(OUTPUTS, budget_bytes=400)
    part, _ = golden.make_golden("main", golden.Encoded((), b""), encoded, min_sqnr_db=25.0)
    with pytest.raises(BundleError, match="have the wrong size"):
        golden.judge(part, encoded.data[:-1], OUTPUTS)


def with_sample(path: pathlib.Path, expected: Any) -> edgec_runtime.Model:
    x = RNG.standard_normal((2, 8)).astype(np.float32)
    inputs = golden.encode_inputs({"x": x}, budget_bytes=100)
    feeds = golden.decode_inputs(inputs.parts, inputs.data)
    outputs = golden.encode_outputs({"y": expected(feeds["x"])}, budget_bytes=100)
    part, files = golden.make_golden("main", inputs, outputs, min_sqnr_db=60.0)
    return edgec_runtime.load(write_sample(path, files, golden=(part,)))


def test_a_bundle_tests_itself(tmp_path: pathlib.Path) -> None:
    result = with_sample(tmp_path / "a", lambda x: x @ WEIGHT).self_test()
    assert result.passed and result.sqnr_db > 100 and result.outputs[0].name == "y"
    result = with_sample(tmp_path / "b", lambda x: x @ (WEIGHT * 0.99)).self_test()
    assert not result.passed and 30 < result.sqnr_db < 50  # 1 % is 40 dB


def test_a_bundle_without_a_sample_says_so(tmp_path: pathlib.Path) -> None:
    with pytest.raises(BundleError, match="carries no golden sample"):
        edgec_runtime.load(write_sample(tmp_path / "a")).self_test()
