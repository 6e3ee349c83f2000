"""Roundings by their algebra, and each accuracy tool on a case that is worse without it."""

import dataclasses

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from static_int8 import conv, quantize, samples, sqnr, target

from edgec.passes import QuantizeStatic
from edgec.passes.execution import sqnr_db
from edgec.passes.qdq import quantize_weight, weight_scale
from edgec.passes.weight_rounding import errors_carried, least_clip_error, sums_kept


def noise(weight: np.ndarray, integers: np.ndarray, inputs: np.ndarray) -> float:
    """Power of the outputs' error; all [groups, ...]."""
    return float(np.square(inputs @ (weight - integers).transpose(0, 2, 1)).sum())


def correlated(rows: int, groups: int, columns: int) -> np.ndarray:
    """Inputs with something in common, as neighbouring pixels have."""
    rng = np.random.default_rng(1)
    own = rng.standard_normal((groups, rows, columns))
    return (own + 2 * rng.standard_normal((groups, rows, 1))).astype(np.float32)


def test_sums_are_kept_within_half_a_step() -> None:
    exact = np.random.default_rng(0).standard_normal((64, 9)) * 40
    kept, nearest = sums_kept(exact), np.rint(exact)
    assert np.abs(kept.sum(axis=1) - exact.sum(axis=1)).max() <= 0.5 + 1e-9
    assert np.abs(nearest.sum(axis=1) - exact.sum(axis=1)).max() > 0.5
    assert np.abs(kept - nearest).max() == 1


@pytest.mark.parametrize(("groups", "columns"), [(1, 150), (12, 9)])
def test_carrying_errors_over_beats_nearest(groups: int, columns: int) -> None:
    inputs = correlated(400, groups, columns)
    exact = (np.random.default_rng(2).standard_normal((groups, 8, columns)) * 40).astype(np.float32)
    carried = noise(exact, errors_carried(exact, [inputs], 127), inputs)
    assert carried < 0.5 * noise(exact, np.rint(exact), inputs)


def test_keeping_sums_helps_on_smooth_positive_inputs() -> None:
    exact = np.random.default_rng(3).standard_normal((1, 64, 9)) * 40
    smooth = 1 + 0.1 * np.random.default_rng(4).standard_normal((1, 500, 9))
    by_sums = noise(exact, sums_kept(exact[0])[None], smooth)
    assert by_sums < 0.3 * noise(exact, np.rint(exact), smooth)


def test_carried_errors_are_the_best_of_all_roundings_of_few_weights_nearly() -> None:
    inputs = correlated(50, 1, 5)
    exact = (np.random.default_rng(3).standard_normal((1, 40, 5)) * 10).astype(np.float32)
    floor = np.floor(exact)
    every = [
        np.square(inputs[0] @ (exact[0] - floor[0] - np.array(up)).T).sum(axis=0)
        for up in np.ndindex(*[2] * 5)
    ]
    best = np.min(every, axis=0).sum()
    carried = noise(exact, errors_carried(exact, [inputs], 127), inputs)
    assert best * 0.99 < carried < best * 1.6  # greedy, against brute force
    assert noise(exact, np.rint(exact), inputs) > best * 2.5


def test_long_rows_are_rounded_in_pieces() -> None:
    inputs = correlated(64, 1, 2500)
    exact = (np.random.default_rng(4).standard_normal((1, 4, 2500)) * 40).astype(np.float32)
    carried = noise(exact, errors_carried(exact, [inputs], 127), inputs)
    assert carried < 0.2 * noise(exact, np.rint(exact), inputs)


def test_inputs_that_are_always_zero_do_not_break_the_rounding() -> None:
    exact = np.full((2, 3, 4), 0.4, np.float32)
    found = errors_carried(exact, [np.zeros((2, 10, 4), np.float32)], 127)
    assert not found.any()


def test_zero_channel_keeps_scale_one() -> None:
    weight = graphs.weight(4, 9)
    weight[2] = 0
    int8 = target().int8
    scale = weight_scale(weight, int8, axis=0)
    assert scale[2] == 1.0
    assert not quantize_weight(weight, int8, scale, axis=0).integers[2].any()


def test_only_a_lonely_large_weight_of_a_long_row_is_clipped() -> None:
    rng = np.random.default_rng(5)
    weight = rng.uniform(-1, 1, (1, 3, 512)).astype(np.float32)
    weight[0, 1:, 7] = 1.3, 100.0  # even; a lonely one; one too large to be lost
    power = np.ones((1, 512), np.float32)
    scale = np.abs(weight).max(axis=2)
    shares = [least_clip_error(weight, scale / top, power, top)[0] for top in (7, 127)]
    assert shares[0][1] > 0 and shares[0][2] == 0
    assert not shares[1].any()  # at 8 bits it costs more than it saves


# --- each tool switched off ---------------------------------------------------------------

ALL = QuantizeStatic(ranges="mse")


def smooth(count: int) -> list[dict[str, np.ndarray]]:
    """Positive images whose neighbouring pixels are alike."""
    made = []
    for seed in range(count):
        coarse = np.abs(graphs.feed(1, 8, 3, 3, seed=seed))
        fine = np.abs(graphs.feed(1, 8, 12, 12, seed=1000 + seed))
        made.append({"x": np.kron(coarse, np.ones((4, 4), np.float32)) + 0.1 * fine})
    return made


def network(**weights: np.ndarray) -> ir.Model:
    return conv(
        "[c1] a = Conv <pads = [1, 1, 1, 1], group = 8> (x, k) r = Relu (a)"
        "[c2] y = Conv (r, k2, b)",
        shape="1, 8, 12, 12",
        **{"k": graphs.weight(8, 1, 3, 3), "k2": graphs.weight(8, 8, 3, 3, seed=5)} | weights,
    )


def quality(
    chosen: QuantizeStatic, model: ir.Model | None = None, data=None, judged=None, **int8: object
) -> float:
    """SQNR in dB on images that calibration has not seen."""
    model = network() if model is None else model
    result = quantize(
        model, chosen, target(**int8), calibration=smooth(24) if data is None else data
    )
    judged = smooth(40)[24:] if judged is None else judged
    outputs = [
        np.concatenate([graphs.run(m, **feeds)[0].ravel() for feeds in judged])
        for m in (model, result.model)
    ]
    return sqnr_db(*outputs)


def test_gptq_beats_nearest_rounding_and_keeping_sums() -> None:
    model = conv("[c] y = Conv (x, k)", shape="1, 8, 12, 12")
    db = {
        # 7 bits, so that the weights' noise stands out from that of the activations
        rounding: quality(
            QuantizeStatic(rounding=rounding, bias_correction=False), model, reduce_range=True
        )
        for rounding in ("gptq", "sums", "nearest")
    }
    assert db["gptq"] > max(db["sums"], db["nearest"]) + 1


def test_bias_correction_restores_channel_means() -> None:
    weights = graphs.weight(16, 8, 1, 1, seed=7)
    model = conv("[c] y = Conv (x, k, b)", k=weights, b=graphs.feed(16))
    # rectified inputs have a mean, which the rounding errors of a filter multiply
    data = [{"x": np.abs(graphs.feed(1, 8, 10, 10, seed=i))} for i in range(16)]
    float_mean = np.mean([graphs.run(model, **f)[0] for f in data], axis=(0, 1, 3, 4))
    shift = []
    for corrected in (True, False):
        chosen = QuantizeStatic(ranges="minmax", rounding="nearest", bias_correction=corrected)
        result = quantize(model, chosen, calibration=data)
        mean = np.mean([graphs.run(result.model, **f)[0] for f in data], axis=(0, 1, 3, 4))
        shift.append(np.abs(mean - float_mean).mean())
    assert shift[0] < 0.5 * shift[1]


def test_one_scale_per_channel_beats_one_per_weight() -> None:
    uneven = np.logspace(0, -3, 40, dtype=np.float32)
    model = graphs.graph(
        "g (float[5, 96] x) => (float[5, 40] y) { m = MatMul (x, w) y = Div (m, size) }",
        {"w": graphs.weight(96, 40) * uneven, "size": uneven},
    )
    data = samples(model, 20)
    kept = dict(model=model, data=data[:14], judged=data[14:])
    assert quality(ALL, **kept) > quality(ALL, per_channel=False, **kept) + 10


@pytest.mark.parametrize("ranges", ["percentile", "entropy", "auto"])
def test_ranges_that_cut_a_wild_sample_beat_its_extremes(ranges: str) -> None:
    data = smooth(24)
    data[0]["x"][0, 0, 0, 0] = 300.0
    chosen = QuantizeStatic(ranges=ranges, percentile=99.9)
    extremes = quality(dataclasses.replace(chosen, ranges="minmax"), data=data)
    assert quality(chosen, data=data) > extremes + 3


def test_the_least_squared_error_beats_the_extremes_on_heavy_tails() -> None:
    rng = np.random.default_rng(6)
    data = [{"x": rng.standard_t(3, (50, 96)).astype(np.float32)} for _ in range(40)]
    text = "g (float[50, 96] x) => (float[50, 40] y) { y = MatMul (x, w) }"
    model = graphs.graph(text, {"w": graphs.weight(96, 40)})
    kept = dict(model=model, data=data[:24], judged=data[24:])
    assert quality(ALL, **kept) > quality(QuantizeStatic(ranges="minmax"), **kept) + 1


def test_auto_is_as_good_as_the_best_method_by_itself() -> None:
    db = {r: quality(QuantizeStatic(ranges=r)) for r in ("mse", "percentile", "minmax", "entropy")}
    assert quality(QuantizeStatic()) > max(db.values()) - 0.5


def test_clipping_weights_helps_where_one_scale_serves_many() -> None:
    heavy = np.random.default_rng(3).standard_t(3, (64, 256, 1, 1)).astype(np.float32)
    model = conv("[c] y = Conv (x, k)", shape="1, 256, 6, 6", k=heavy)
    data = [{"x": graphs.feed(1, 256, 6, 6, seed=i)} for i in range(24)]
    kept = dict(model=model, data=data[:16], judged=data[16:], per_channel=False)
    clipped = dataclasses.replace(ALL, clip_weights=True)
    assert quality(clipped, **kept) > quality(ALL, **kept) + 0.3


def test_sensitivity_names_the_layer_that_quantization_hurts() -> None:
    weak = graphs.weight(8, 8, 3, 3, seed=5)
    weak[:, 0, 0, 0] *= 300  # one weight of each filter takes the scale from the others
    model = conv(
        "[c1] a = Conv (x, k, b) r = Relu (a) [c2] m = Conv (r, weak) [c3] y = Conv (m, k3)",
        weak=weak,
        k3=graphs.weight(8, 8, 3, 3, seed=6),
    )
    found = quantize(model, calibration=samples(model, 20)[:8]).sensitivity
    assert set(found) == {"c1", "c2", "c3"}
    by_skipping = {
        name: sqnr(model, quantize(model, QuantizeStatic(skip=(name,))).model) for name in found
    }
    assert min(found, key=found.get) == max(by_skipping, key=by_skipping.get)


def test_inputs_whose_squares_vanish_in_float32_round_to_the_nearest() -> None:
    exact = graphs.feed(1, 4, 32) * 40
    rows = graphs.feed(1, 16, 32, seed=1) * np.float32(1e-22)
    np.testing.assert_array_equal(errors_carried(exact, [rows], 127), np.rint(exact))


def test_choosing_the_range_of_each_value_by_its_noise_beats_every_method_for_all() -> None:
    """Rare values 20 times larger: those of x carry the result, those of z nearly nothing."""
    weights = {"wx": graphs.weight(64, 32), "wz": graphs.weight(64, 32, seed=1)}
    weights["wx"][5] *= 3
    weights["wz"][7] *= 1e-3
    model = graphs.graph(
        "g (float[50, 64] x, float[50, 64] z) => (float[50, 64] y)"
        "{ a = MatMul (x, wx) c = MatMul (z, wz) y = Concat <axis = 1> (a, c) }",
        weights,
    )
    data = []
    for i in range(40):
        feeds = {"x": graphs.feed(50, 64, seed=i), "z": graphs.feed(50, 64, seed=100 + i)}
        feeds["x"][i, 5] = feeds["z"][i, 7] = 80.0
        data.append(feeds)
    kept = dict(model=model, data=data[:24], judged=data[24:])
    db = {
        ranges: quality(QuantizeStatic(ranges=ranges, percentile=99.9), **kept)
        for ranges in ("auto", "minmax", "percentile", "mse", "entropy")
    }
    auto = db.pop("auto")
    assert auto > max(db.values()) + 1.5


@pytest.mark.parametrize(("rounding", "loss_db"), [("nearest", 1.0), ("gptq", 0.3)])
def test_without_bias_correction_unseen_inputs_lose_decibels(rounding: str, loss_db: float) -> None:
    model = conv("[c] y = Conv (x, k, b)", k=graphs.weight(32, 8, 1, 1, seed=7), b=graphs.feed(32))
    # positive inputs have a mean, which the rounding errors of a filter multiply; 7 bits, so
    # that the weights' noise stands out
    data = [{"x": np.abs(graphs.feed(1, 8, 10, 10, seed=i)) + 2} for i in range(24)]
    kept = dict(model=model, data=data[:16], judged=data[16:], reduce_range=True)
    chosen = QuantizeStatic(rounding=rounding)
    without = quality(dataclasses.replace(chosen, bias_correction=False), **kept)
    assert quality(chosen, **kept) > without + loss_db
