"""SmoothActivations: outliers of activations move into the weights, and the outputs stay."""

import dataclasses
import json
import weakref

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes import (
    PassError,
    QuantizeDynamic,
    QuantizeStatic,
    SmoothActivations,
    smooth_activations,
)
from edgec.passes.execution import graph_bytes, sqnr_db
from edgec.passes.smooth_activations import _activations
from edgec.targets import load_target

WIDTH = 48
PRE_NORM = """block (float[n, 9, 48] x) => (float[n, 9, 48] y, float[n, 9, 48] z) {
    h = LayerNormalization <axis = -1> (x, gamma, beta)
    [q] q0 = MatMul (h, wq)
    q1 = Add (q0, bq)
    [k] z = MatMul (h, wk)
    [up] u = MatMul (q1, wu)
    y = Add (u, x)
}"""


def pre_norm() -> ir.Model:
    """Two products of a LayerNormalization with three outlier channels, as large models have."""
    gamma = np.ones(WIDTH, np.float32)
    gamma[[3, 17, 40]] = (60, 90, 40)
    names = enumerate(("wq", "wk", "wu"))
    return graphs.graph(
        PRE_NORM,
        {name: graphs.weight(WIDTH, WIDTH, seed=i) for i, name in names}
        | {"gamma": gamma, "beta": graphs.feed(WIDTH, seed=7), "bq": graphs.feed(WIDTH, seed=8)},
    )


def samples(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    return [{"x": graphs.feed(2, 9, WIDTH, seed=seed + i)} for i in range(count)]


def smooth(model: ir.Model, calibration=None, **parameters: object):
    data = samples(8, 100) if calibration is None else calibration
    return SmoothActivations(**parameters).run(
        model.clone(), graphs.context(model, calibration=data)
    )


def all_outputs(model: ir.Model, seed: int = 900) -> np.ndarray:
    runs = [graphs.run(model, **feeds) for feeds in samples(8, seed)]
    return np.concatenate([array.ravel() for outputs in runs for array in outputs])


def assert_same_outputs(model: ir.Model, changed: ir.Model) -> None:
    # float32 rounds scaled numbers once more: 2^-24 is 144 dB; a wrong scale gives < 20 dB
    assert sqnr_db(all_outputs(model), all_outputs(changed)) > 100


@pytest.mark.parametrize(
    "quantize", [QuantizeDynamic(min_weights=100), QuantizeStatic(ranges="minmax")]
)
def test_without_it_outlier_channels_cost_decibels(quantize):
    model = pre_norm()
    db = []
    for given in (model, smooth(model).model):
        context = graphs.context(model, calibration=samples(8, 100))
        int8 = quantize.run(given.clone(), context).model
        db.append(sqnr_db(all_outputs(model), all_outputs(int8)))
    print(db)
    assert db[1] > db[0] + 3


def test_products_of_one_activation_share_the_scales_and_outputs_stay():
    model = pre_norm()
    result = smooth(model, alpha=0.5)
    assert_same_outputs(model, result.model)
    before, after = (m.graph.initializers for m in (model, result.model))
    assert result.changed == 2  # the normalization, and q1 -> up
    scale = before["gamma"].const_value.numpy() / after["gamma"].const_value.numpy()
    assert scale[17] > 5 * np.median(scale)
    np.testing.assert_allclose(
        after["wk"].const_value.numpy(),
        before["wk"].const_value.numpy() * scale[:, None],
        rtol=1e-5,  # the scale is recovered from two float32 numbers
    )


def test_a_second_run_at_one_half_finds_nothing_left():
    model = pre_norm()
    once = smooth(model, alpha=0.5).model
    assert smooth(once, alpha=0.5).changed == 0


def test_values_that_hold_other_numbers_get_other_names():
    result = smooth(pre_norm(), alpha=0.5)
    names = {v.name for node in result.model.graph for v in node.outputs}
    assert {"h_smoothed", "y", "z"} <= names and "h" not in names


GATED = """gated (float[n, 9, 48] x) => (float[n, 9, 48] y) {
    [gate] g = MatMul (x, wg)
    s = Sigmoid (g)
    [up] u = MatMul (x, wu)
    m = Mul (s, u)
    [down] y = MatMul (m, wd)
}"""
SCALED = """scaled (float[n, 9, 48] x) => (float[n, 9, 48] y) {
    a = Abs (x)
    s = Mul (gamma, a)
    b = Add (s, beta)
    r = Relu (b)
    [product] y = MatMul (r, wu)
}"""


@pytest.mark.parametrize("text", [GATED, SCALED])
def test_gated_products_and_scaled_rows_are_sources(text):
    weights = {name: graphs.weight(48, 48, seed=i) for i, name in enumerate(("wg", "wu", "wd"))}
    if text is GATED:
        weights["wu"][:, [5, 20]] *= 80
    else:
        weights = {"wu": weights["wu"], "gamma": graphs.feed(48), "beta": graphs.feed(48, seed=2)}
        weights["gamma"][[5, 20]] *= 80
    model = graphs.graph(text, weights)
    result = smooth(model, insert=False)
    assert result.changed == 1
    assert_same_outputs(model, result.model)


POST_NORM = """block (float[n, s, 48] x) => (float[n, s, 48] y, float[n, s, 48] z) {
    h = LayerNormalization <axis = -1> (x, gamma, beta)
    [q] q0 = MatMul (h, wq)
    [k] z = MatMul (h, wk)
    y = Add (q0, h)
}"""


def post_norm() -> ir.Model:
    """Outlier channels that the residual reads, too."""
    weights = pre_norm().graph.initializers
    names = ("gamma", "beta", "wq", "wk")
    return graphs.graph(POST_NORM, {name: weights[name].const_value.numpy() for name in names})


def test_where_a_residual_reads_the_activation_one_node_serves_its_products():
    model = post_norm()
    assert smooth(model, insert=False).changed == 0
    result = smooth(model)
    assert result.changed == 1
    assert graphs.operators(result.model).count("Mul") == 1
    assert_same_outputs(model, result.model)


def test_that_node_saves_decibels():
    model, db = post_norm(), []
    for given in (model, smooth(model).model):
        context = graphs.context(model, calibration=samples(8, 100))
        int8 = QuantizeDynamic(min_weights=100).run(given.clone(), context).model
        db.append(sqnr_db(all_outputs(model), all_outputs(int8)))
    assert db[1] > db[0] + 3


def test_padding_does_not_choose_the_scales():
    text = POST_NORM.replace("x) =>", "x, int64[n, s] attention_mask) =>")
    weights = post_norm().graph.initializers
    made = {name: value.const_value.numpy() for name, value in weights.items()}
    model = graphs.graph(text, made)
    plain, padded = [], []
    for feeds in samples(4, 100):
        mask = np.zeros((2, 9), np.int64)
        mask[:, :5] = 1
        noise = graphs.feed(2, 9, WIDTH, seed=5)
        other = np.where(mask[..., None] == 1, feeds["x"], noise)
        plain.append({"x": feeds["x"][:, :5], "attention_mask": np.ones((2, 5), np.int64)})
        padded.append({"x": other, "attention_mask": mask})
    rows = {}
    for name, given in (("plain", plain), ("padded", padded)):
        rows[name], _ = _activations(model, ["h"], given, graphs.context(model))
    np.testing.assert_array_equal(rows["plain"]["h"], rows["padded"]["h"])


@pytest.mark.parametrize("count", [8, 300])
def test_what_is_kept_does_not_grow_with_the_number_of_samples(count, monkeypatch):
    model, born, alive = pre_norm(), [], []
    run_values = smooth_activations.run_values

    def watched(*given):
        for values in run_values(*given):
            born.append(weakref.ref(values["h"]))
            alive.append(sum(activation() is not None for activation in born))
            yield values

    monkeypatch.setattr(smooth_activations, "run_values", watched)
    given = samples(count, 100)
    rows, _ = _activations(model, ["h"], given, graphs.context(model))
    assert len(born) == count
    # the newest ones, until their names are taken anew; a view would hold the first, too
    assert max(alive) <= 3
    assert 50 < len(rows["h"]) <= 256
    assert len(given) < 256 or len(rows["h"]) < len(given)


def test_a_channel_that_is_silent_on_the_calibration_data_may_speak_later():
    """Behind Gelu: thousandths on the data there is, as large as the others on what comes."""
    model = graphs.graph(
        "gelu (float[n, 9, 48] x) => (float[n, 9, 48] y) { [down] y = MatMul (x, w) }",
        {"w": graphs.weight(48, 48)},
    )
    given, coming = samples(8, 100), samples(8, 500)
    for feeds in given:
        feeds["x"][..., 5:20] *= 1e-3
        feeds["x"][..., 30] *= 80
    for feeds in coming:
        feeds["x"][..., 30] *= 80
    result = smooth(model, calibration=given)
    assert result.changed == 1
    context = graphs.context(model)
    db = []
    for one in (model, result.model):
        int8 = QuantizeDynamic(min_weights=100).run(one.clone(), context).model
        runs = [(graphs.run(model, **f)[0], graphs.run(int8, **f)[0]) for f in coming]
        db.append(sqnr_db(*(np.concatenate(side) for side in zip(*runs, strict=True))))
    assert db[1] > db[0]  # divided by what was seen of them, it loses 9 dB instead


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("a = Gelu (x) [p] y = MatMul (a, w)", "comes from Gelu"),
        ("[p] y = MatMul (x, w)", "an input of the model"),
        ("[p] m = MatMul (x, w) s = Relu (m) [r] t = MatMul (s, w2) y = Add (t, s)", "else than"),
        ("[p] y = MatMul (x, x)", "computed at run time"),
        ("a = LayerNormalization <axis = 1> (x, w) [p] y = MatMul (a, w2)", "no constant scale"),
        ("c = Clip (x) s = Mul (x, c) [p] y = MatMul (s, w)", "comes from Mul"),
    ],
)
def test_what_cannot_be_smoothed_is_refused_with_a_reason(nodes, reason):
    text = f"no (float[48, 48] x) => (float[48, 48] y) {{ {nodes} }}"
    model = graphs.graph(text, {"w": graphs.weight(48, 48), "w2": graphs.weight(48, 48, seed=1)})
    result = smooth(model, [{"x": graphs.feed(48, 48)}], insert=False)
    assert result.changed == 0
    assert any(reason in s.reason for s in result.skipped)
    assert graph_bytes(result.model) == graph_bytes(model)


def test_an_activation_without_outliers_stays():
    model = pre_norm()
    for name, value in model.graph.initializers.items():
        even = value.const_value.numpy()
        even = np.ones_like(even) if name == "gamma" else np.sign(even) * (even.ndim > 1) / 7
        value.const_value = ir.tensor(even.astype(np.float32), name=name)
    reasons = {s.node: s.reason for s in smooth(model, insert=False).skipped}
    assert "less than a tenth" in reasons["q"]


def test_a_product_named_in_skip_keeps_its_input():
    result = smooth(pre_norm(), skip=("k",), alpha=0.5, insert=False)
    reasons = {s.node: s.reason for s in result.skipped}
    assert reasons["k"] == "named in skip"
    assert "another product" in reasons["q"]
    with pytest.raises(PassError, match="no node of the model"):
        smooth(pre_norm(), skip=("kk",))


def test_the_lock_repeats_the_bytes_without_data_and_fits_one_model_only():
    model = pre_norm()
    first = smooth(model)
    lock = json.loads(json.dumps(dict(first.decisions)))
    context = dataclasses.replace(graphs.context(model), lock=lock)
    again = SmoothActivations().run(model.clone(), context)
    assert first.changed and graph_bytes(again.model) == graph_bytes(first.model)
    other, _ = graphs.mlp()
    with pytest.raises(PassError, match="another model"):
        SmoothActivations().run(other, context)


def test_missing_data_and_wrong_parameters_are_refused():
    model = pre_norm()
    with pytest.raises(PassError, match="needs calibration data"):
        SmoothActivations().run(model, graphs.context(model, load_target("x86-64")))
    with pytest.raises(PassError, match="expected 0 to 1"):
        SmoothActivations(alpha=1.5)
    with pytest.raises(PassError, match="not finite"):
        smooth(model, [{"x": np.full((1, 9, WIDTH), np.nan, np.float32)}])
    with pytest.raises(PassError, match="is empty"):
        smooth(model, [{"x": np.zeros((0, 9, WIDTH), np.float32)}])
    damaged = dataclasses.replace(graphs.context(model), lock={"scales": {"h": "abc"}})
    with pytest.raises(PassError, match="damaged"):
        SmoothActivations().run(model, damaged)


def test_a_factor_that_broadcasts_over_the_channels_is_no_source():
    text = """g (float[n, 48] x) => (float[n, 48] y) {
        g = MatMul (x, wg)  h = MatMul (x, wh)  p = Mul (g, h)  y = MatMul (p, wd)
    }"""
    weights = {"wg": graphs.weight(48, 1), "wh": graphs.weight(48, 48, seed=1)}
    weights["wh"][:, [5, 20]] *= 80
    model = graphs.graph(text, weights | {"wd": graphs.weight(48, 48, seed=2)})
    given = [{"x": graphs.feed(9, 48, seed=i)} for i in range(4)]
    result = smooth(model, given, insert=False)
    assert result.changed == 1  # by the other factor
    x = graphs.feed(9, 48)
    assert sqnr_db(graphs.run(model, x=x)[0], graphs.run(result.model, x=x)[0]) > 100


def test_a_tied_output_layer_leaves_no_float_table_behind():
    """Scaled for its product alone, the layer has numbers of its own; the table becomes int8."""
    model = graphs.graph(
        """tied (int64[n, 9] ids) => (float[n, 9, 300] y) {
            e = Gather (table, ids)
            h = LayerNormalization <axis = -1> (e, gamma, beta)
            w = Transpose <perm = [1, 0]> (table)
            [head] y = MatMul (h, w)
        }""",
        {
            "table": graphs.weight(300, 48),
            "gamma": graphs.feed(48),
            "beta": graphs.feed(48, seed=2),
        },
    )
    ids = [{"ids": np.random.default_rng(i).integers(0, 300, (1, 9))} for i in range(8)]
    smoothed = smooth(model, calibration=ids, alpha=0.5)
    assert smoothed.changed == 1
    assert "Transpose" not in graphs.operators(smoothed.model)
    result = QuantizeDynamic(min_weights=100).run(smoothed.model, graphs.context(model))
    assert result.changed == 2  # the product and the table
    large = [
        v for v in result.model.graph.initializers.values() if v.const_value.size > 48 * 300 - 1
    ]
    assert {v.dtype for v in large} == {ir.DataType.INT8}
