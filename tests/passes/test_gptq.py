"""Error-compensated rounding: it must beat the nearest levels where inputs are correlated."""

import graphs
import numpy as np
import pytest

from edgec.passes import QuantizeWeights, gptq
from edgec.passes.execution import graph_bytes
from edgec.passes.grids import Scheme, fit


def correlated(count, n, seed=0):
    """Inputs [count, n] with the spectrum of trained features: few strong directions."""
    rng = np.random.default_rng(seed)
    mixing = np.linalg.qr(rng.standard_normal((n, n)))[0]
    strengths = 1 / (1 + np.arange(n))
    return (rng.standard_normal((count, n)) * strengths @ mixing.T).astype(np.float32)


def problem(n=192, rows=40):
    weight = np.random.default_rng(1).standard_normal((rows, n)).astype(np.float32)
    inputs = correlated(4000, n)
    return weight, inputs[:3000].T @ inputs[:3000] / 3000, inputs[3000:]


def error(weight, grid, values, inputs):
    return float(np.square(inputs @ (grid.weight(values) - weight).T).mean())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("n", [192, 130, 20])  # also ends within a group of columns and a block
def test_output_error_on_unseen_inputs_is_far_below_the_nearest_levels(n, bits, symmetric):
    weight, moments, inputs = problem(n)
    grid = fit(weight, Scheme(bits, symmetric, 32), "clip")
    nearest, compensated = grid.nearest(weight), gptq.rounded(weight, grid, moments)
    assert compensated.shape == weight.shape and compensated.dtype == nearest.dtype
    low, high = grid.scheme.low, grid.scheme.high
    assert low <= compensated.min() and compensated.max() <= high
    assert error(weight, grid, compensated, inputs) < 0.5 * error(weight, grid, nearest, inputs)


def test_uncorrelated_inputs_leave_the_nearest_levels():
    weight, _, _ = problem()
    grid = fit(weight, Scheme(4, True, 32), "rtn")
    np.testing.assert_array_equal(
        gptq.rounded(weight, grid, np.eye(weight.shape[1])), grid.nearest(weight)
    )


def test_inputs_that_are_never_seen_get_the_nearest_levels():
    weight, moments, _ = problem()
    moments[5], moments[:, 5] = 0, 0
    grid = fit(weight, Scheme(4, True, 32), "rtn")
    values = gptq.rounded(weight, grid, moments)
    np.testing.assert_array_equal(values[:, 5], grid.nearest(weight)[:, 5])
    silent = gptq.rounded(weight, grid, np.zeros_like(moments))
    np.testing.assert_array_equal(silent, grid.nearest(weight))


def brain_surgeon(weight, grid, moments):
    """The algorithm as Frantar et al. wrote it: with the inverse, a column at a time."""
    damped = moments + np.eye(len(moments)) * 0.01 * np.diag(moments).mean()
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, values = weight.astype(np.float64), np.empty_like(weight)
    scale, zero = grid.spread(weight.shape[1])
    for c in range(len(moments)):
        values[:, c] = np.rint(left[:, c] / scale[:, c]) + zero[:, c]
        values[:, c] = values[:, c].clip(grid.scheme.low, grid.scheme.high)
        miss = (left[:, c] - (values[:, c] - zero[:, c]) * scale[:, c]) / upper[c, c]
        left[:, c:] -= np.outer(miss, upper[c, c:])
    return values


@pytest.mark.parametrize("symmetric", [False, True])
def test_equals_the_published_algorithm(symmetric, monkeypatch):
    weight, moments, _ = problem()
    grid = fit(weight, Scheme(4, symmetric, 32), "clip")
    monkeypatch.setattr(gptq, "column_order", lambda power: np.arange(len(power)))
    found = gptq.rounded(weight, grid, moments)
    # float32 against float64: a tie may fall the other way, and the columns behind it with it
    assert (found == brain_surgeon(weight, grid, moments)).mean() > 0.99


def test_columns_in_the_order_of_their_power_matter():
    """Powers grow with the index, so that the weakest columns would go first otherwise."""
    weight, moments, inputs = problem()
    power = np.geomspace(0.01, 10, len(moments)).astype(np.float32)
    moments, inputs = moments * np.outer(power, power), inputs * power
    grid = fit(weight, Scheme(3, True, 32), "rtn")
    found, in_order = gptq.rounded(weight, grid, moments), brain_surgeon(weight, grid, moments)
    assert error(weight, grid, found, inputs) < 0.9 * error(weight, grid, in_order, inputs)


def test_output_error_is_the_mean_over_the_inputs():
    weight, _, inputs = problem()
    change = weight / 100
    moments = inputs.T @ inputs / len(inputs)
    expected = np.square(inputs @ change.T).sum(1).mean()
    assert gptq.output_error(change, moments) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_a_change_of_more_than_127_steps_replays(scheme):
    n = 512
    weight = graphs.weight(n, 16)
    weight[:32] *= 50
    weight[32:] *= 0.02  # fine steps, which take over the errors of the coarse ones
    model = graphs.graph(
        f"g (float[b, {n}] x) => (float[b, 16] y) {{ y = MatMul (x, w) }}", {"w": weight}
    )
    x = graphs.feed(256, 1) + 0.001 * graphs.feed(256, n, seed=1)
    x[:, 0] *= 100
    chosen = QuantizeWeights(bits=8, method="gptq", scheme=scheme)
    first = chosen.run(model.clone(), graphs.context(model, calibration=[{"x": x}]))
    again = chosen.run(model.clone(), graphs.context(model, lock=first.decisions))
    assert graph_bytes(again.model) == graph_bytes(first.model)
