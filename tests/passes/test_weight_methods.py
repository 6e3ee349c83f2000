"""Every way to round weights, on a trained layer and its real inputs.

Weights and inputs are MiniLM's first layer over news texts, so that inputs are as correlated
as they are in practice; the texts judged are others than those calibrated on.
"""

import dataclasses
import functools
import json

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from fixtures import models, similarity

from edgec.passes import PassError, QuantizeWeights, awq, gptq, moments
from edgec.passes.execution import graph_bytes, sqnr_db
from edgec.passes.weights import constant

WIDTHS = {"x": 384, "n0": 384}
OUTPUTS = 256  # of 1,536: fast, and each output is rounded on its own
TEXT = f"""layer (float[n, 384] x) => (float[n, {OUTPUTS}] y) {{
    n0 = LayerNormalization <axis = -1, epsilon = 1e-12> (x, gamma, beta)
    [up] u = MatMul (n0, w)
    y = Add (u, b)
}}"""


@functools.cache
def layer():
    """The layer, feeds for calibration (of 16 texts) and one for judgement (of 4 others)."""
    import torch

    tokenizer, module = models.require_minilm()
    lee = similarity.require_pairs("lee")
    texts = sorted({*lee.first, *lee.second})[:20]
    block, found = module.encoder.layer[0], []
    hook = block.attention.output.LayerNorm.register_forward_pre_hook(
        lambda _, given: found.append(given[0][0].numpy())
    )
    with torch.no_grad():
        for text in texts:
            module(**tokenizer(text, truncation=True, max_length=96, return_tensors="pt"))
    hook.remove()
    norm, up = block.attention.output.LayerNorm, block.intermediate.dense
    weights = {
        "gamma": norm.weight,
        "beta": norm.bias,
        "w": up.weight.T[:, :OUTPUTS],
        "b": up.bias[:OUTPUTS],
    }
    arrays = {k: np.ascontiguousarray(v.detach().numpy()) for k, v in weights.items()}
    feeds = [{"x": np.concatenate(found[i : i + 4])} for i in range(0, 20, 4)]
    return graphs.graph(TEXT, arrays), feeds[:4], feeds[4]


def run(method, **parameters):
    model, calibration, _ = layer()
    made = QuantizeWeights(method=method, **{"bits": 4, "block_size": 32, **parameters})
    return made.run(model.clone(), graphs.context(model, calibration=calibration))


@functools.cache
def judged(method, bits=4, block_size=32, scheme="symmetric"):
    """SQNR of the layer's output on texts that were not calibrated on, in dB."""
    model, _, held_out = layer()
    made = run(method, bits=bits, block_size=block_size, scheme=scheme).model
    return sqnr_db(graphs.run(model, **held_out)[0], graphs.run(made, **held_out)[0])


@pytest.mark.parametrize(
    ("method", "bits", "block_size", "gain_db"),
    [
        ("clip", 4, 32, 0.5),
        ("clip", 3, 128, 1.5),
        ("hqq", 4, 32, 0.3),
        ("hqq", 3, 32, 0.6),
        ("awq", 4, 32, 1.5),
        ("awq", 3, 128, 1.5),
        ("gptq", 4, 32, 2.5),
        ("gptq", 4, 128, 2.5),
        ("gptq", 3, 32, 2.5),
        ("gptq", 3, 128, 3.0),
    ],
)
def test_method_beats_rounding_to_the_nearest_level(method, bits, block_size, gain_db):
    assert judged(method, bits, block_size) > judged("rtn", bits, block_size) + gain_db


def test_scaling_of_awq_is_what_helps_beyond_its_clipped_ranges(monkeypatch):
    with_scales = judged("awq")
    monkeypatch.setattr(awq, "channel_scales", lambda w, s, m: np.ones(len(m), np.float32))
    judged.cache_clear()
    without = judged("awq")
    judged.cache_clear()
    assert with_scales > without + 0.4


def test_order_of_columns_helps_gptq(monkeypatch):
    ordered = judged("gptq", 3, 128)
    monkeypatch.setattr(gptq, "column_order", lambda power: np.arange(len(power)))
    judged.cache_clear()
    in_order = judged("gptq", 3, 128)
    judged.cache_clear()
    assert ordered > in_order + 0.05


@pytest.mark.parametrize("method", ["rtn", "clip", "gptq"])
def test_zero_points_help(method):
    assert judged(method, scheme="asymmetric") > judged(method) + 0.5


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("method", ["rtn", "clip", "hqq", "awq", "gptq"])
def test_decisions_replay_to_the_same_bytes_without_data(method, scheme):
    first = run(method, scheme=scheme)
    lock = json.loads(json.dumps(dict(first.decisions)))
    model, _, _ = layer()
    context = dataclasses.replace(graphs.context(model), lock=lock)
    chosen = QuantizeWeights(method=method, scheme=scheme, bits=4, block_size=32)
    again = chosen.run(model.clone(), context)
    assert graph_bytes(again.model) == graph_bytes(first.model)
    # 4 bits a weight is what the integers themselves would take
    assert len(json.dumps(lock)) < 384 * OUTPUTS * 4 / 8


def test_damaged_or_foreign_decisions_are_refused():
    model, _, _ = layer()
    lock = dict(run("gptq").decisions)
    chosen = QuantizeWeights(bits=4, block_size=32)

    def replay(**changes):
        context = dataclasses.replace(graphs.context(model), lock={**lock, **changes})
        return chosen.run(model.clone(), context)

    with pytest.raises(PassError, match="names no method"):
        replay(method="best")
    with pytest.raises(PassError, match="knows nothing about weight 'w:0'"):
        replay(matrices={})
    entry = dict(lock["matrices"]["w:0"])
    for key, text in (("scale", entry["change"]), ("change", "AAAA"), ("scale", "!")):
        with pytest.raises(PassError, match="do not fit the model"):
            replay(matrices={"w:0": {**entry, key: text}})
    with pytest.raises(PassError, match="scales value 'other'"):
        replay(channels={"other": entry["scale"]})


def test_auto_takes_what_the_data_allow_and_says_so():
    model, calibration, _ = layer()

    def finding(samples, bits):
        context = graphs.context(model, calibration=samples)
        return QuantizeWeights(bits=bits).run(model.clone(), context).findings[0]

    assert "in 4 bits by gptq (auto: calibration data was given" in finding(calibration, 4)
    assert "in 4 bits by clip (auto: there is no calibration data" in finding(None, 4)
    assert "in 8 bits by rtn (auto" in finding(calibration, 8)


def test_methods_that_need_data_say_so():
    model, _, _ = layer()
    for method in ("awq", "gptq"):
        with pytest.raises(PassError, match=f"method '{method}' needs calibration data"):
            QuantizeWeights(method=method).run(model.clone(), graphs.context(model))


def test_three_bits_take_eight_levels_of_four_stored_bits():
    result = run("gptq", bits=3)
    node = next(n for n in result.model.graph if n.op_type == "DequantizeLinear")
    values = constant(node.inputs[0]).astype(np.int8)
    assert node.inputs[0].dtype == ir.DataType.INT4
    assert sorted(np.unique(values)) == list(range(-4, 4))
    assert any("8 levels, but take 4 bits" in finding for finding in result.findings)


def test_awq_says_which_inputs_it_could_not_scale():
    model = graphs.graph(
        "g (float[n, 64] x) => (float[n, 64] y) { [fc] y = MatMul (x, w) }",
        {"w": graphs.weight(64, 64)},
    )
    feeds = [{"x": graphs.feed(50, 64)}]
    context = graphs.context(model, calibration=feeds)
    found = QuantizeWeights(bits=4, method="awq").run(model, context).findings
    assert "unscaled: 'x' is an input of the model" in found[1]


def test_samples_with_nan_are_named():
    model, calibration, _ = layer()
    feeds = [*calibration[:1], {"x": np.full((4, 384), np.nan, np.float32)}]
    with pytest.raises(PassError, match="calibration sample 1: value 'n0' holds NaN"):
        QuantizeWeights(bits=4).run(model.clone(), graphs.context(model, calibration=feeds))


def test_memory_of_the_moments_is_bounded_by_groups_of_values(monkeypatch):
    model, calibration, _ = layer()
    whole = dict(moments.second_moments(model, WIDTHS, calibration[:2], progress=lambda *_: None))
    monkeypatch.setattr(moments, "_GROUP_BYTES", 8 * 384 * 384)
    steps = []
    apart = dict(
        moments.second_moments(
            model, WIDTHS, calibration[:2], progress=lambda *done: steps.append(done)
        )
    )
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]  # a run over the samples for each value
    for name, expected in whole.items():
        np.testing.assert_array_equal(apart[name], expected)


def test_samples_behind_enough_rows_are_left_alone(monkeypatch):
    model, calibration, _ = layer()
    rows = len(calibration[0]["x"])
    monkeypatch.setattr(moments, "_ROWS", rows + 1)
    monkeypatch.setattr(moments, "_ROWS_A_CHANNEL", 0)
    unusable = {"x": np.full((4, 384), np.nan, np.float32)}
    given = [*calibration[:2], unusable]
    found = dict(moments.second_moments(model, WIDTHS, given, progress=lambda *_: None))
    monkeypatch.undo()
    expected = moments.second_moments(model, WIDTHS, given[:2], progress=lambda *_: None)
    for name, mean in expected:
        np.testing.assert_array_equal(found[name], mean)


def test_a_table_that_is_the_output_layer_too_is_rounded_for_the_product():
    text = """g (int64[m] ids, float[n, 64] x) => (float[m, 64] e, float[n, 300] y) {
        [look] e = Gather (table, ids)
        t = Transpose <perm = [1, 0]> (table)
        [head] y = MatMul (x, t)
    }"""
    model = graphs.graph(text, {"table": graphs.weight(300, 64)})
    mixed = graphs.feed(64, 64, seed=1) * np.linspace(0.1, 3.0, 64, dtype=np.float32)[:, None]

    def feeds(seed):  # inputs that are correlated, as behind a trained network
        return {"ids": np.arange(0, 300, 7), "x": graphs.feed(200, 64, seed=seed) @ mixed}

    context = graphs.context(model, calibration=[feeds(2), feeds(3)])
    table, product = {}, {}
    for method in ("clip", "gptq", "awq"):
        made = QuantizeWeights(bits=4, embedding_bits=4, method=method, block_size=32)
        result = made.run(model.clone(), context)
        (e, y), (e4, y4) = graphs.run(model, **feeds(4)), graphs.run(result.model, **feeds(4))
        table[method], product[method] = sqnr_db(e, e4), sqnr_db(y, y4)
    assert product["gptq"] > product["clip"] + 2
    assert table["gptq"] > table["clip"] - 6
    assert product["awq"] > product["clip"]  # its grid is chosen for the inputs, unscaled
