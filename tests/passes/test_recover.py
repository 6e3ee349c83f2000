"""Recover: what quantization lost comes back, on held-out samples, without labels."""

import dataclasses

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes import PassError, QuantizeStatic, Recover, Skip
from edgec.passes.curriculum import Example, joined
from edgec.passes.execution import graph_bytes
from edgec.passes.stacks import keeps_apart
from edgec.passes.torch_graph import to_torch
from edgec.targets import load_target


def samples(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    return [{"x": graphs.feed(1, 4, 12, 12, seed=seed + i)} for i in range(count)]


@pytest.fixture(scope="module")
def quantized() -> tuple[ir.Model, ir.Model, object]:
    """A float CNN, its int8 form with per-tensor weights, and the context of both."""
    reference, _ = graphs.cnn()
    target = load_target("x86-64")
    coarse = dataclasses.replace(target, int8=dataclasses.replace(target.int8, per_channel=False))
    context = graphs.context(
        reference, coarse, calibration=samples(24, 100), validation=samples(8, 500)
    )
    chosen = QuantizeStatic(ranges="minmax", rounding="nearest", bias_correction=False)
    return reference, chosen.run(reference.clone(), context).model, context


def divergence(reference: ir.Model, model: ir.Model) -> float:
    """Mean KL divergence of the class probabilities on samples that training never saw."""
    total = 0.0
    for feeds in samples(32, 900):
        p, q = (np.exp(graphs.run(m, **feeds)[0].astype(np.float64)) for m in (reference, model))
        p, q = p / p.sum(), q / q.sum()
        total += float((p * np.log(p / q)).sum())
    return total / 32


def test_training_brings_the_outputs_nearer_to_the_reference(quantized):
    reference, model, context = quantized
    before = divergence(reference, model)
    result = Recover(steps=40, rate=0.05).run(model.clone(), context)
    assert result.changed > 0
    assert divergence(reference, result.model) < 0.8 * before


def test_scales_names_and_signature_stay(quantized):
    _, model, context = quantized
    result = Recover(steps=10).run(model.clone(), context)
    before, after = model.graph.initializers, result.model.graph.initializers
    assert list(before) == list(after)
    for name in before:
        assert after[name].dtype == before[name].dtype
        if name.endswith(("_scale", "_zero_point")):
            assert after[name].const_value.tobytes() == before[name].const_value.tobytes()


def test_same_seed_gives_the_same_bytes_and_the_lock_repeats_them(quantized):
    _, model, context = quantized
    chosen = Recover(steps=20, rate=0.05)
    first, second = (chosen.run(model.clone(), context) for _ in range(2))
    assert graph_bytes(first.model) == graph_bytes(second.model)
    locked = dataclasses.replace(context, lock=first.decisions, calibration=None, validation=None)
    assert graph_bytes(chosen.run(model.clone(), locked).model) == graph_bytes(first.model)


def test_a_rate_that_only_harms_leaves_the_model_as_it_was(quantized):
    _, model, context = quantized
    result = Recover(steps=10, rate=500.0, bias_rate=50.0).run(model.clone(), context)
    assert result.changed == 0
    assert graph_bytes(result.model) == graph_bytes(model)
    assert "did not lower" in result.findings[0]


def test_a_graph_that_the_twin_cannot_run_is_skipped_with_the_node():
    text = "places (float[4] x) => (int64[1, n] y) { [where] y = NonZero (x) }"
    model, feeds = graphs.graph(text, {}), {"x": graphs.feed(4)}
    context = graphs.context(model, calibration=[feeds])
    result = Recover().run(model, context)
    assert result.changed == 0
    assert isinstance(result.skipped[0], Skip) and "NonZero" in result.skipped[0].reason
    assert "nothing was trained" in result.findings[0]


def test_biases_alone_are_trained_where_the_rate_of_weights_is_zero(quantized):
    _, model, context = quantized
    result = Recover(steps=10, rate=0.0, bias_rate=0.01).run(model.clone(), context)
    assert result.changed > 0
    before, after = model.graph.initializers, result.model.graph.initializers
    for name in before:
        if len(before[name].shape) > 1:
            assert after[name].const_value.tobytes() == before[name].const_value.tobytes()


def test_scales_are_learned_where_they_have_a_rate(quantized):
    reference, model, context = quantized
    chosen = Recover(steps=30, rate=0.05, scale_rate=0.002)
    result = chosen.run(model.clone(), context)
    before, after = model.graph.initializers, result.model.graph.initializers
    names = [name for name in before if name.endswith("_scale")]
    moved = [n for n in names if after[n].const_value.tobytes() != before[n].const_value.tobytes()]
    assert moved
    assert divergence(reference, result.model) < 0.8 * divergence(reference, model)
    locked = dataclasses.replace(context, lock=result.decisions, calibration=None)
    assert graph_bytes(chosen.run(model.clone(), locked).model) == graph_bytes(result.model)


def test_samples_are_stacked_only_where_the_graph_keeps_them_apart(quantized):
    _, model, _ = quantized
    pair = [Example(feeds) for feeds in samples(2, 0)]
    assert keeps_apart(to_torch(model), pair, ())
    mixing, _ = graphs.cnn()
    mixing.graph.append(mean := ir.node("ReduceMean", [mixing.graph.outputs[0]], {"keepdims": 1}))
    mixing.graph.outputs[0] = mean.outputs[0]
    mean.outputs[0].name = "over_all_samples"
    assert not keeps_apart(to_torch(mixing), pair, ())


def test_a_joined_sample_has_the_start_of_one_and_the_rest_of_the_other():
    a, b = (Example({"x": np.full((1, 3, 4, 10), v, np.float32)}) for v in (1, 2))
    piece = joined(a, b, 0.3).feeds["x"]
    assert piece.shape == (1, 3, 4, 10)
    assert (piece[..., :3] == 1).all() and (piece[..., 3:] == 2).all()
    tokens = Example({"ids": np.zeros((1, 8), np.int64)})
    assert joined(tokens, tokens, 0.5) is None
    assert joined(a, Example({"x": np.zeros((1, 3, 4, 12), np.float32)}), 0.5) is None


def test_missing_data_and_wrong_parameters_are_refused():
    model, _ = graphs.cnn()
    with pytest.raises(PassError, match="needs calibration data"):
        Recover().run(model, graphs.context(model))
    with pytest.raises(PassError, match="steps is 0"):
        Recover(steps=0)
    with pytest.raises(PassError, match="nothing to train: rate, bias_rate, scale_rate are all 0"):
        Recover(rate=0, bias_rate=0)
    with pytest.raises(PassError, match="features is -1, expected 0 or more"):
        Recover(features=-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"temperature": 2.0, "response_weight": 0},
            "temperature is 2.0, but response_weight is 0",
        ),
        ({"features": 3, "feature_weight": 0}, "features is 3, but feature_weight is 0"),
        ({"feature_weight": 2.0, "features": 0}, "feature_weight is 2.0, but features is 0"),
    ],
)
def test_a_setting_that_another_one_leaves_without_effect_is_refused(settings, message):
    with pytest.raises(PassError, match=f"{message}, so it would have no effect"):
        Recover(**settings)


EVERYTHING = Recover(
    steps=2,
    rate=0.1,
    scale_rate=0.1,
    temperature=2.0,
    features=3,
    feature_weight=2.0,
    label_weight=1.0,
    micro_batch=4,
)


def test_settings_that_find_nothing_to_work_on_are_told():
    text = """numbers (float[1, 4] x) => (float[1, 4] y) {
        m = Mul (x, b)
        y = Reshape (m, one_row)
    }"""
    model = graphs.graph(text, {"b": graphs.feed(4), "one_row": np.array([1, 4])})
    data = [{"x": graphs.feed(1, 4, seed=i)} for i in range(4)]
    context = graphs.context(model, calibration=data)
    result = dataclasses.replace(EVERYTHING, sharded=True).run(model.clone(), context)
    told = [finding for finding in result.findings if " had no effect: " in finding]
    assert [finding.split(" = ")[0] for finding in told] == [
        *("rate", "scale_rate", "temperature", "features", "feature_weight", "label_weight"),
        *("micro_batch", "sharded"),
    ]
    assert told[0] == "rate = 0.1 had no effect: no weight of this graph is trained"
    assert not any("no effect" in f for f in Recover().run(model.clone(), context).findings)


def test_a_held_out_distance_of_samples_that_were_learned_from_is_told(quantized):
    _, model, context = quantized
    for validation, told in ((None, True), ([], True), (context.validation, False)):
        given = dataclasses.replace(context, validation=validation)
        findings = Recover(steps=4).run(model.clone(), given).findings
        assert any("too few samples to hold some out" in f for f in findings) is told


@pytest.mark.parametrize(
    ("last", "labels", "told"),
    [
        ("y = Softmax (l)", np.array([1]), "class labels 'label' counted, too (label_weight 0.1)"),
        ("y = Tanh (l)", np.array([1]), "labels were not used: no output is of classes"),
        ("y = Softmax (l)", np.array([1.0]), "labels were not used: 'label' is float64"),
    ],
)
def test_whether_labels_count_is_told_at_the_default_weight(last, labels, told):
    text = f"net (float[n, 4] x) => (float[n, 3] y) {{ l = Gemm (x, w, b)\n {last} }}"
    student, teacher = (
        graphs.graph(text, {"w": graphs.weight(4, 3, seed=i), "b": graphs.feed(3)}) for i in (1, 2)
    )
    feeds = [{"x": graphs.feed(1, 4, seed=i)} for i in range(8)]
    context = graphs.context(
        teacher, calibration=feeds, calibration_labels=[{"label": labels}] * len(feeds)
    )
    findings = Recover(steps=4, rate=0.5).run(student, context).findings
    assert any(finding.startswith(told) for finding in findings)
    assert sum("label" in finding for finding in findings) == 1


def test_settings_that_have_an_effect_are_not_told(quantized):
    _, model, context = quantized
    labels = [{"label": np.array([i % 10])} for i in range(len(context.calibration))]
    context = dataclasses.replace(context, calibration_labels=labels)
    result = EVERYTHING.run(model.clone(), context)
    assert not any("no effect" in finding for finding in result.findings)


@pytest.mark.parametrize(
    "text",
    [
        """second (float[n, 6, 32] x) => (float[n, 6, 8] y) {
            t = Transpose <perm = [1, 0, 2]> (x)  a = MatMul (t, w)  h = Add (a, b)
            y = Transpose <perm = [1, 0, 2]> (h)
        }""",
        """scalar (float[n, 6, 32] x) => (float[n, 6, 8] y, float z) {
            a = MatMul (x, w)  y = Add (a, b)  z = ReduceMean <keepdims = 0> (y)
        }""",
    ],
)
def test_values_with_the_batch_elsewhere_or_nowhere_are_trained_one_by_one(text):
    model = graphs.graph(text, {"w": graphs.weight(32, 8), "b": graphs.feed(8)})
    data = [{"x": graphs.feed(1, 6, 32, seed=i)} for i in range(6)]
    context = graphs.context(model, calibration=data)
    int8 = QuantizeStatic(ranges="minmax").run(model.clone(), context).model
    result = Recover(steps=3, batch=4).run(int8, context)
    assert "held-out distance" in result.findings[0]
