"""Histograms merge exactly; ranges agree with numpy on the raw values."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgec.passes.ranges import BINS, Histogram, Range, least_squares, minmax, percentile

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
arrays = hnp.arrays(np.float32, st.integers(1, 40), elements=finite)


def merged(parts: list[np.ndarray]) -> Histogram:
    histogram = Histogram.of(parts[0])
    for part in parts[1:]:
        histogram = histogram.merge(Histogram.of(part))
    return histogram


def state(histogram: Histogram) -> tuple:
    return (
        histogram.counts.tobytes(),
        histogram.reach,
        histogram.signed,
        histogram.low,
        histogram.high,
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(arrays, min_size=1, max_size=6), st.randoms())
def test_streamed_in_any_order_equals_one_batch(parts: list[np.ndarray], random) -> None:
    batch = Histogram.of(np.concatenate(parts))
    random.shuffle(parts)
    assert state(merged(parts)) == state(batch)


@settings(max_examples=100, deadline=None)
@given(arrays)
def test_every_value_is_counted_in_its_bin(values: np.ndarray) -> None:
    histogram = Histogram.of(values)
    assert histogram.counts.sum() == values.size
    used = histogram.centers[histogram.counts > 0]
    for value in values.astype(np.float64):
        assert np.abs(used - value).min() <= histogram.width  # the bin of zero is two wide


def test_state_does_not_grow_with_the_number_of_samples() -> None:
    rng = np.random.default_rng(0)
    sizes = []
    histogram = Histogram.of(rng.standard_normal(1000))
    for scale in range(1, 60):
        histogram = histogram.merge(Histogram.of(rng.standard_normal(1000) * scale))
        sizes.append(histogram.counts.nbytes)
    assert set(sizes) == {BINS * 8}
    assert histogram.counts.sum() == 60_000


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN" if np.isnan(bad) else "infinite"):
        Histogram.of(np.array([1.0, bad], np.float32))


def test_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        Histogram.of(np.zeros(0, np.float32))


def test_a_range_always_contains_zero() -> None:
    assert minmax(Histogram.of(np.array([2, 3], np.float32))) == Range(0.0, 3.0)
    assert minmax(Histogram.of(np.array([-3, -2], np.float32))) == Range(-3.0, 0.0)


@pytest.mark.parametrize("share", [99.0, 99.9, 100.0])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_percentile_agrees_with_numpy_to_two_bins(share: float, shift: float) -> None:
    values = np.random.default_rng(1).standard_normal(50_000).astype(np.float32) + np.float32(shift)
    histogram = Histogram.of(values)
    span = percentile(histogram, share)
    low, high = np.percentile(values, [100 - share, share])
    assert abs(span.low - min(low, 0)) <= 2 * histogram.width
    assert abs(span.high - max(high, 0)) <= 2 * histogram.width


def squared_error(values: np.ndarray, span: Range) -> float:
    step = (span.high - span.low) / 255
    zero = np.rint(-span.low / step)
    q = np.clip(np.rint(values / step) + zero, 0, 255)
    return float(np.square((q - zero) * step - values).sum())


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "rectified", "one outlier"])
def test_least_squares_is_within_five_percent_of_brute_force(kind: str) -> None:
    rng = np.random.default_rng(2)
    values = {
        "normal": rng.standard_normal(30_000),
        "heavy tails": rng.standard_t(3, 30_000),
        "rectified": np.maximum(rng.standard_normal(30_000), 0),
        "one outlier": np.append(rng.standard_normal(30_000), 60.0),
    }[kind].astype(np.float32)
    span = least_squares(Histogram.of(values), 255)
    low, high = float(values.min()), float(values.max())
    best = min(
        squared_error(values, Range(a * low, b * high))
        for a in np.linspace(0.2, 1, 25)
        for b in np.linspace(0.05, 1, 40)
    )
    # the search ends at a quarter of the extremes, which costs a single outlier more
    slack = 2.0 if kind == "one outlier" else 1.05
    assert squared_error(values, span) <= slack * best
    assert squared_error(values, span) <= squared_error(values, Range(low, high)) * 1.01


def test_all_zeros_have_a_range_of_no_width() -> None:
    histogram = Histogram.of(np.zeros((3, 4), np.float32))
    for span in (minmax(histogram), percentile(histogram, 99.9), least_squares(histogram, 255)):
        assert span == Range(0.0, 0.0)
