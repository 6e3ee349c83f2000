"""Block-wise grids: bounds of the error, edge cases, and what each way to choose one gains."""

import graphs
import numpy as np
import pytest

from edgec.passes.grids import Scheme, extremes, fit, half_quadratic, least_squares

METHODS = ("rtn", "clip", "hqq")


def heavy(rows=24, n=256, seed=0):
    """Weights with the tails of trained ones: Student's t, 4 degrees of freedom."""
    return np.random.default_rng(seed).standard_t(4, (rows, n)).astype(np.float32) / 16


def rounded(weight, grid):
    return grid.weight(grid.nearest(weight))


def squared(weight, grid):
    return float(np.square(rounded(weight, grid) - weight).sum())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [64, 40, 7])
def test_error_is_at_most_half_a_step(symmetric, size):
    weight = graphs.weight(6, size)
    grid = extremes(weight, Scheme(8, symmetric, 32))
    assert grid.scale.shape == (6, -(-size // 32))
    step, _ = grid.spread(size)
    # float32 rounding of the quotient
    assert (np.abs(rounded(weight, grid) - weight) <= step * 0.5001).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("bits", "symmetric", "low", "high"),
    [(3, True, -4, 3), (3, False, 0, 7), (4, True, -8, 7), (4, False, 0, 15), (8, True, -127, 127)],
)
def test_all_levels_are_used_and_no_other(method, bits, symmetric, low, high):
    weight = heavy()
    values = fit(weight, Scheme(bits, symmetric, 32), method).nearest(weight)
    assert values.dtype == (np.int8 if symmetric else np.uint8)
    if bits == 8:
        low, high = max(low, values.min()), min(high, values.max())
    assert (values.min(), values.max()) == (low, high)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_is_kept_and_zero_and_subnormal_blocks_give_no_nan(method, symmetric):
    weight = np.zeros((3, 64), np.float32)
    weight[1, :32] = 1e-44
    weight[2, ::2] = graphs.weight(1, 32)
    grid = fit(weight, Scheme(4, symmetric, 32), method)
    result = rounded(weight, grid)
    assert np.isfinite(result).all() and (grid.scale > 0).all()
    assert not result[weight == 0].any()


@pytest.mark.parametrize("method", METHODS)
def test_integers_over_their_scale_are_reproduced(method):
    levels = np.arange(16, dtype=np.float32) - 5
    weight = np.tile(np.random.default_rng(0).permutation(levels), (4, 2)) * np.float32(0.25)
    grid = fit(weight, Scheme(4, False, 16), method)
    # the scale may be fitted anew: float32 rounding
    np.testing.assert_allclose(rounded(weight, grid), weight, atol=1e-6)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [32, 128])
def test_least_squares_beats_extremes(bits, symmetric, size):
    weight, scheme = heavy(), Scheme(bits, symmetric, size)
    assert squared(weight, least_squares(weight, scheme)) < 0.95 * squared(
        weight, extremes(weight, scheme)
    )


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_half_quadratic_has_the_least_error_in_its_own_norm(bits, symmetric):
    weight, scheme = heavy(), Scheme(bits, symmetric, 64)

    def error(grid):
        return (np.abs(rounded(weight, grid) - weight) ** 0.7).sum()

    assert error(half_quadratic(weight, scheme)) < 0.98 * error(extremes(weight, scheme))


def test_importance_moves_the_error_to_inputs_that_count_less():
    weight, scheme = heavy(), Scheme(3, True, 128)
    importance = np.where(np.arange(256) % 8 == 0, 30.0, 1.0)

    def error(grid):
        return (np.square(rounded(weight, grid) - weight) * importance).sum()

    assert error(least_squares(weight, scheme, importance)) < 0.97 * error(
        least_squares(weight, scheme)
    )
