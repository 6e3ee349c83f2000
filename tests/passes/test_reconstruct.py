"""Reconstruct: integers learned from a few samples bring a quantized network nearer to float."""

import dataclasses
import json

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from digits_cnn import digits

from edgec.passes import Equalize, PassError, QuantizeStatic, QuantizeWeights, Reconstruct
from edgec.passes.differences import differences
from edgec.passes.execution import graph_bytes, open_session, run_feeds, sqnr_db
from edgec.passes.linear import layout_of
from edgec.passes.patches import sampled_rows
from edgec.targets import load_target


def context(model, calibration, **rest):
    target = load_target("x86-64")
    # 7-bit weights: their rounding outweighs that of the activations
    coarse = dataclasses.replace(target.int8, reduce_range=True, min_channels=1)
    return graphs.context(
        model, dataclasses.replace(target, int8=coarse), calibration=calibration, **rest
    )


@pytest.fixture(scope="module")
def quantized():
    """The trained digits network in int8, and the context of both."""
    given = digits()
    around = context(given.model, given.calibration, validation=given.validation)
    model = QuantizeStatic(ranges="minmax").run(given.model.clone(), around).model
    return given, model, dataclasses.replace(around, unquantized=given.model.clone())


@pytest.fixture(scope="module")
def reconstructed(quantized):
    given, model, around = quantized
    return Reconstruct().run(model.clone(), around)


def test_without_it_a_trained_network_is_farther_from_float(quantized, reconstructed):
    given, model, _ = quantized
    reference = given.logits(given.model)
    before, after = (sqnr_db(reference, given.logits(m)) for m in (model, reconstructed.model))
    print(before, after)
    assert reconstructed.changed > 0
    assert after > before + 1


def test_an_integer_moves_to_a_neighbour_of_its_float_weight_only(quantized, reconstructed):
    given, model, _ = quantized
    weights = [n for n in model.graph.initializers if n.endswith("_quantized") and n[0] == "w"]
    moved = 0
    for name in weights:
        before, after = (
            m.graph.initializers[name].const_value.numpy().astype(int)
            for m in (model, reconstructed.model)
        )
        moved += int((before != after).sum())
        assert np.abs(after - before).max() <= 1
        assert np.abs(after).max() <= np.abs(before).max() <= 64
    assert moved > 0


def test_scales_names_and_types_stay(quantized, reconstructed):
    _, model, _ = quantized
    before, after = model.graph.initializers, reconstructed.model.graph.initializers
    assert list(before) == list(after)
    for name in before:
        assert after[name].dtype == before[name].dtype
        if name.endswith(("_scale", "_zero_point")):
            assert after[name].const_value.tobytes() == before[name].const_value.tobytes()


def test_same_seed_gives_the_same_bytes_and_the_lock_repeats_them(quantized, reconstructed):
    _, model, around = quantized
    again = Reconstruct().run(model.clone(), around)
    assert graph_bytes(again.model) == graph_bytes(reconstructed.model)
    lock = json.loads(json.dumps(dict(again.decisions)))
    assert sum(map(len, lock["changes"].values())) < 8_000  # 5,410 weights
    replayed = Reconstruct().run(
        model.clone(), dataclasses.replace(around, lock=lock, calibration=None, unquantized=None)
    )
    assert graph_bytes(replayed.model) == graph_bytes(reconstructed.model)
    assert replayed.changed == again.changed


def test_rounding_that_is_worse_on_held_out_samples_is_not_kept(quantized):
    _, model, around = quantized
    # fitted on noise: what holds there does not hold elsewhere
    noise = [{"x": graphs.feed(1, 1, 8, 8, seed=i)} for i in range(2)]
    around = dataclasses.replace(around, calibration=noise)
    result = Reconstruct(rows=4, biases=False).run(model.clone(), around)
    assert result.changed == 0
    assert "unchanged" in result.findings[0]
    assert graph_bytes(result.model) == graph_bytes(model)


def test_a_layer_named_in_skip_keeps_its_integers(quantized):
    _, model, around = quantized
    names = [n.name for n in model.graph if n.op_type in ("Conv", "Gemm")]
    result = Reconstruct(skip=tuple(names)).run(model.clone(), around)
    assert result.changed == 0
    assert {s.reason for s in result.skipped} == {"named in skip"}


def test_products_with_bias_behind_them_are_reconstructed():
    model, _ = graphs.mlp()
    mixed = graphs.weight(12, 96) * 10  # inputs that have much in common, as those of a network
    data = [{"x": graphs.feed(16, 12, seed=i) @ mixed} for i in range(12)]
    around = context(model, data)
    # GPTQ's rounding leaves nothing to find in one small product
    int8 = QuantizeStatic(ranges="minmax", rounding="nearest").run(model.clone(), around).model
    result = Reconstruct(rows=192).run(int8.clone(), around)
    test = graphs.feed(64, 12, seed=99) @ mixed
    goal = graphs.run(model, x=test)[0]
    before, after = (sqnr_db(goal, graphs.run(m, x=test)[0]) for m in (int8, result.model))
    assert result.changed > 0
    assert after > before + 0.5


def test_behind_equalize_the_float_weights_are_those_that_were_quantized():
    from edgec.pipeline import run_passes

    given = digits()
    around = context(given.model, given.calibration, validation=given.validation)
    passes = (Equalize(), QuantizeStatic(ranges="minmax"), Reconstruct())
    steps = run_passes(passes, around, list(given.validation[:2]))
    assert [step.result.changed > 0 for step in steps] == [True, True, True]
    assert not steps[-1].result.skipped
    reference = given.logits(given.model)
    quantized, reconstructed = (sqnr_db(reference, given.logits(step.model)) for step in steps[1:])
    assert reconstructed > quantized


def test_a_model_without_integer_weights_is_left_alone():
    model, _ = graphs.cnn()
    result = Reconstruct().run(model.clone(), context(model, None))
    assert result.changed == 0 and not result.skipped


def test_layers_that_do_not_fit_are_refused_with_a_reason(quantized):
    given, model, around = quantized
    other = given.model.clone()
    weight = other.graph.initializers["w2"]
    noise = graphs.weight(*weight.const_value.shape, seed=4)
    weight.const_value = ir.tensor(noise, name="w2")
    for node in list(other.graph):
        if node.name == "depthwise2":
            node.outputs[0].name = "elsewhere"
    around = dataclasses.replace(around, unquantized=other)
    result = Reconstruct().run(model.clone(), around)
    reasons = {s.node: s.reason for s in result.skipped}
    assert "no rounding of the float model's weight" in reasons["pointwise1"]
    assert "has no such layer" in reasons["depthwise2"]


def test_blocks_of_weights_are_refused():
    model, feeds = graphs.mlp()
    around = context(model, [feeds])
    packed = QuantizeWeights(min_weights=100).run(model.clone(), around).model
    result = Reconstruct().run(packed, around)
    assert result.changed == 0
    assert [s.node for s in result.skipped] == ["fc1", "fc2"]
    assert all("a scale for each block" in s.reason for s in result.skipped)


def test_missing_data_and_wrong_parameters_are_refused(quantized):
    _, model, around = quantized
    with pytest.raises(PassError, match="needs calibration data"):
        Reconstruct().run(model.clone(), dataclasses.replace(around, calibration=None))
    with pytest.raises(PassError, match="rows is 0"):
        Reconstruct(rows=0)


def test_a_lock_of_another_model_is_refused(quantized, reconstructed):
    _, model, _ = quantized
    other, _ = graphs.mlp()
    around = context(other, None)
    lock = reconstructed.decisions
    with pytest.raises(PassError, match="another model or target"):
        Reconstruct().run(other, dataclasses.replace(around, lock=lock))
    broken = {"changes": {"w1": "AAAA"}}
    with pytest.raises(PassError, match="damaged"):
        Reconstruct().run(other, dataclasses.replace(around, lock=broken))


def test_nothing_changed_gives_no_differences(quantized):
    _, model, _ = quantized
    assert differences(model, model.clone()) == {}


@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ("pads = [1, 0, 2, 1], strides = [2, 1], dilations = [1, 2]", (12, 6, 3, 2)),
        ('auto_pad = "SAME_UPPER", strides = [2, 3], group = 3', (12, 2, 3, 4)),
        ('auto_pad = "SAME_LOWER", group = 6', (6, 1, 2, 2)),
        ('auto_pad = "VALID"', (4, 6, 1, 3)),
    ],
)
def test_rows_are_what_the_convolution_multiplies(attributes, shape):
    text = (
        f"conv (float[2, 6, 9, 10] x) => (float[n, c, h, w] y) {{ y = Conv <{attributes}> (x, w) }}"
    )
    model = graphs.graph(text, {"w": graphs.weight(*shape)})
    x = graphs.feed(2, 6, 9, 10)
    [y] = run_feeds(open_session(model, outputs=["y"]), {"x": x})
    node = model.graph[0]
    layout = layout_of(node, shape)
    rows = sampled_rows(
        node, shape[2:], layout.groups, (x, y), count=50, random=np.random.RandomState(0)
    )
    weight = layout.blocks(graphs.weight(*shape))
    weight = weight.reshape(*weight.shape[:2], -1)
    np.testing.assert_allclose(rows.inputs @ weight.swapaxes(1, 2), rows.outputs, atol=1e-5)
    assert rows.outputs.shape[1] == min(50, y.size // y.shape[1])


def test_a_convolution_that_makes_the_output_is_fitted_too():
    text = "g (float[n, 8, 12, 12] x) => (float[n, 8, 10, 10] y) { [c] y = Conv (x, k) }"
    model = graphs.graph(text, {"k": graphs.weight(8, 8, 3, 3)})
    data = [{"x": np.abs(graphs.feed(1, 8, 12, 12, seed=i))} for i in range(8)]
    context = graphs.context(model, calibration=data)
    chosen = QuantizeStatic(ranges="minmax", rounding="nearest", bias_correction=False)
    result = Reconstruct().run(chosen.run(model.clone(), context).model, context)
    assert result.changed and not result.skipped
