"""Dynamic int8 against ONNX Runtime's float32 and a hand-made integer product."""

import dataclasses

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes import PassError, QuantizeDynamic
from edgec.passes.execution import graph_bytes, run_values, sqnr_db
from edgec.passes.lower import Lower
from edgec.targets import load_target


def quantized(model, target="x86-64", **parameters):
    parameters = {"min_weights": 1024, **parameters}
    return QuantizeDynamic(**parameters).run(model.clone(), graphs.context(model, target))


def optimized_operators(model, folder):
    """Operators of the graph that ONNX Runtime really executes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(
        graph_bytes(model), options, disabled_optimizers=["SkipLayerNormFusion"]
    )
    return graphs.operators(ir.load(folder / "optimized.onnx"))


def product(**attributes):
    text = ", ".join(f"{k} = {v}" for k, v in attributes.items())
    shape = (64, 96) if attributes.get("transB") else (96, 64)
    return graphs.graph(
        f"g (float[n, 96] x) => (float[n, 64] y) {{ [fc] y = Gemm <{text}> (x, w, b) }}",
        {"w": graphs.weight(*shape), "b": graphs.feed(64, seed=1)},
    )


def test_product_equals_the_integer_arithmetic_by_hand():
    model = graphs.graph(
        "g (float[n, 96] x) => (float[n, 64] y) { [fc] y = MatMul (x, w) }",
        {"w": graphs.weight(96, 64)},
    )
    x, w = graphs.feed(5, 96), graphs.weight(96, 64)
    low, high = min(x.min(), 0), max(x.max(), 0)
    x_scale = (high - low) / np.float32(255)
    zero = np.rint(-low / x_scale)
    x_int = np.clip(np.rint(x / x_scale) + zero, 0, 255) - zero
    w_scale = np.abs(w).max(0) / 127
    expected = (x_int @ np.rint(w / w_scale)) * x_scale * w_scale
    (actual,) = graphs.run(quantized(model).model, x=x)
    # float32 rounding of the two scales alone
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "attributes",
    [{"transB": 1}, {"transB": 0}, {"alpha": 0.5}, {"transB": 1, "alpha": 2.0, "beta": 0.25}],
)
def test_gemm_keeps_alpha_beta_and_transpose(attributes):
    model, x = product(**attributes), graphs.feed(9, 96)
    result = quantized(model)
    assert result.changed == 1 and result.touched == ("y",)
    (reference,), (actual,) = graphs.run(model, x=x), graphs.run(result.model, x=x)
    assert sqnr_db(reference, actual) > 35  # 8 bits of both operands; 0 if a factor is lost


def test_onnx_runtime_fuses_every_product(tmp_path):
    model, _ = graphs.transformer()
    found = optimized_operators(
        Lower().run(quantized(model).model, graphs.context(model)).model, tmp_path
    )
    assert found.count("MatMulIntegerToFloat") == 3  # q, k, v share one quantized input
    assert found.count("DynamicQuantizeMatMul") == 2
    assert "MatMulInteger" not in found and "Cast" in found  # the Cast of the embedding rows


def test_products_of_one_value_share_its_quantization():
    model, feeds = graphs.transformer()
    result = quantized(model)
    assert graphs.operators(result.model).count("DynamicQuantizeLinear") == 3
    (reference,), (actual,) = graphs.run(model, **feeds), graphs.run(result.model, **feeds)
    assert sqnr_db(reference, actual) > 30


def test_random_layer_keeps_40_db():
    model, feeds = graphs.mlp()
    (reference,), (actual,) = (
        graphs.run(model, **feeds),
        graphs.run(quantized(model).model, **feeds),
    )
    assert sqnr_db(reference, actual) > 40


def test_reduced_range_and_unsigned_weights_follow_the_target():
    model, feeds = graphs.mlp()
    seven = quantized(model, "x86-64-avx2").model
    largest = max(
        int(np.abs(v.const_value.numpy().astype(int)).max())
        for v in seven.graph.initializers.values()
        if v.dtype == ir.DataType.INT8
    )
    assert largest == 63
    target = load_target("x86-64")
    target = dataclasses.replace(
        target, int8=dataclasses.replace(target.int8, weight="uint8", per_channel=False)
    )
    unsigned = quantized(model, target).model
    assert ir.DataType.UINT8 in {v.dtype for v in unsigned.graph.initializers.values()}
    (reference,), (actual,) = graphs.run(model, **feeds), graphs.run(unsigned, **feeds)
    assert sqnr_db(reference, actual) > 30


@pytest.mark.parametrize("directions", [1, 2])
def test_lstm_reads_int8_weights_with_a_scale_for_each_row(directions):
    model, feeds = graphs.lstm(directions)
    weights = model.graph.initializers
    uneven = weights["r"].const_value.numpy().copy()
    uneven[:, 0] *= 20  # its scale would leave the other rows few integers
    weights["r"].const_value = ir.tensor(uneven)
    result = quantized(model)
    assert result.changed == 1
    scales = {v.name: v.const_value.numpy().size for v in result.model.graph.initializers.values()}
    assert scales["w_scale"] == scales["r_scale"] == directions * 128
    for reference, actual in zip(
        graphs.run(model, **feeds), graphs.run(result.model, **feeds), strict=True
    ):
        assert sqnr_db(reference, actual) > 38


@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent_rows_that_are_alike_have_one_scale_a_direction(directions):
    model, feeds = graphs.lstm(directions)
    weights = model.graph.initializers["r"].const_value.numpy()
    result = quantized(model).model
    scales = {v.name: v.const_value.numpy() for v in result.graph.initializers.values()}
    np.testing.assert_array_equal(
        scales["r_scale"], np.abs(weights).max(axis=(1, 2)) / np.float32(127)
    )
    assert scales["w_scale"].size == directions * 128
    lowered = Lower().run(result.clone(), graphs.context(model)).model
    assert graphs.operators(lowered) == ["DynamicQuantizeLSTM"]
    for reference, actual in zip(
        graphs.run(result, **feeds), graphs.run(lowered, **feeds), strict=True
    ):
        assert sqnr_db(reference, actual) > 38  # activations in 8 bits


def test_two_directions_of_an_old_opset_are_left_untouched():
    model, _ = graphs.lstm(2)
    model.opset_imports[""] = 17
    before = graph_bytes(model)
    result = QuantizeDynamic(min_weights=1024).run(model, graphs.context(model))
    assert result.changed == 0 and "two directions need opset" in result.skipped[0].reason
    assert graph_bytes(result.model) == before


def test_embedding_is_stored_in_int8_by_default_and_can_stay():
    model, _ = graphs.transformer()
    result = quantized(model)
    assert model.graph.initializers["table"].const_value.nbytes == 9600
    tables = [v for k, v in result.model.graph.initializers.items() if k.startswith("table")]
    assert sum(v.const_value.nbytes for v in tables if v.dtype == ir.DataType.INT8) == 2400
    assert "1 embedding table(s)" in result.findings[0]
    kept = quantized(model, embeddings=False)
    assert "table" in kept.model.graph.initializers
    assert ("embed", "embeddings is false") in {(s.node, s.reason) for s in kept.skipped}


def test_float_layers_are_left_with_a_reason():
    model, _ = graphs.cnn()
    reasons = {s.node: s.reason for s in quantized(model).skipped}
    assert "quantize-static" in reasons["conv1"]
    assert "fewer than min_weights" in reasons["fc"]
    model, _ = graphs.mlp()
    target = load_target("arm64")
    target = dataclasses.replace(target, int8=dataclasses.replace(target.int8, dynamic_ops=()))
    result = quantized(model, target)
    assert result.changed == 0
    assert {s.reason for s in result.skipped} == {
        "dynamic int8 Gemm does not pay on arm64",
        "dynamic int8 MatMul does not pay on arm64",
    }


def test_layers_too_small_to_pay_stay_float_by_default():
    model, _ = graphs.mlp()
    result = QuantizeDynamic().run(model, graphs.context(model))
    assert result.changed == 0
    assert result.skipped[0].reason == "it has 6144 weights, fewer than min_weights"


def test_gru_is_stored_in_int8_and_runs_as_float():
    model = graphs.graph(
        """g (float[n, 2, 24] x) => (float[n, 1, 2, 32] y) {
        [gru] y = GRU <hidden_size = 32> (x, w, r)
    }""",
        {"w": graphs.weight(1, 96, 24), "r": graphs.weight(1, 96, 32, seed=1)},
    )
    result = quantized(model)
    assert result.changed == 1
    lowered = Lower().run(result.model, graphs.context(model))
    assert len(graph_bytes(lowered.model)) < 0.5 * len(graph_bytes(model))
    assert "smaller file at float32's speed" in " ".join(lowered.findings)
    x = graphs.feed(7, 2, 24)
    (reference,), (actual,) = graphs.run(model, x=x), graphs.run(lowered.model, x=x)
    assert sqnr_db(reference, actual) > 38


def test_sensitivity_of_a_recurrent_layer_without_its_first_output():
    model, feeds = graphs.lstm()
    model.graph.outputs.pop(0)
    model.graph.node("lstm").outputs[0].name = ""
    context = with_calibration(model, **feeds)
    assert list(QuantizeDynamic(min_weights=1024).run(model, context).sensitivity) == ["lstm"]


def test_constant_on_the_left_and_infinite_weights_are_refused():
    model = graphs.graph(
        """g (float[96, n] x, float[m, 96] z) => (float[64, n] y, float[m, 64] u) {
            [left] y = MatMul (w, x)
            [infinite] u = MatMul (z, v)
        }""",
        {"w": graphs.weight(64, 96), "v": np.full((96, 64), np.inf, np.float32)},
    )
    reasons = {s.node: s.reason for s in quantized(model).skipped}
    assert reasons == {
        "left": "its constant is the left operand",
        "infinite": "its weight contains NaN or infinity",
    }


def test_product_of_two_activations_is_no_candidate():
    model, _ = graphs.transformer()
    assert not {"scores", "mix"} & {s.node for s in quantized(model).skipped}


def test_weight_inside_a_branch_is_quantized():
    text = """g (bool c, float[n, 96] x) => (float[n, 64] y) {
        y = If (c) <
            then_branch = t () => (float[n, 64] a) { [then_fc] a = MatMul (x, w) },
            else_branch = e () => (float[n, 64] b) { [else_fc] b0 = MatMul (x, w) b = Relu (b0) }
        >
    }"""
    model = graphs.graph(text, {"w": graphs.weight(96, 64)})
    result = quantized(model)
    assert result.changed == 2
    stored = [v.dtype for v in result.model.graph.initializers.values()]
    assert stored.count(ir.DataType.INT8) == 1  # one copy for both branches
    x = graphs.feed(3, 96)
    for c in (True, False):
        (reference,) = graphs.run(model, c=np.array(c), x=x)
        (actual,) = graphs.run(result.model, c=np.array(c), x=x)
        assert sqnr_db(reference, actual) > 35


def with_calibration(model, **feeds):
    return graphs.context(model, calibration=[feeds], validation=None)


def test_sensitivity_is_each_layers_own_error_on_float_inputs():
    model, feeds = graphs.mlp()
    # a column 200 times as large as the others takes the range from all of them
    outlier = model.graph.initializers["b1"].const_value.numpy().copy()
    outlier[0] = 200
    model.graph.initializers["b1"].const_value = ir.tensor(outlier, name="b1")
    context = with_calibration(model, **feeds)
    result = QuantizeDynamic(min_weights=1024).run(model.clone(), context)
    assert list(result.sensitivity) == ["fc2", "fc1"]  # the lowest first
    # fc2 by hand: its float input, its own quantization alone
    (hidden,) = run_values(model, ["a"], [feeds])
    alone = graphs.graph(
        "g (float[n, 64] a) => (float[n, 40] m) { [fc2] m = MatMul (a, w2) }",
        {"w2": graphs.weight(64, 40, seed=2)},
    )
    (reference,) = graphs.run(alone, **hidden)
    (actual,) = graphs.run(quantized(alone).model, **hidden)
    assert result.sensitivity["fc2"] == pytest.approx(sqnr_db(reference, actual), abs=0.1)
    assert result.sensitivity["fc1"] > result.sensitivity["fc2"] + 10


def test_skipping_the_most_sensitive_layer_helps_most():
    model, feeds = graphs.transformer()
    (reference,) = graphs.run(model, **feeds)
    context = with_calibration(model, **feeds)
    ranked = QuantizeDynamic(min_weights=1024).run(model.clone(), context).sensitivity

    def gain(name):
        (actual,) = graphs.run(quantized(model, skip=(name,)).model, **feeds)
        return sqnr_db(reference, actual)

    names = list(ranked)
    assert set(names) == {"q", "k", "v", "out", "lm_head"}  # the table of "embed" is tied
    assert gain(names[0]) > gain(names[-1])


def test_sensitivity_comes_from_the_lock_and_changes_no_byte():
    model, feeds = graphs.mlp()
    measured = QuantizeDynamic(min_weights=1024).run(
        model.clone(), with_calibration(model, **feeds)
    )
    replayed = QuantizeDynamic(min_weights=1024).run(
        model.clone(), graphs.context(model, lock=measured.decisions)
    )
    assert replayed.sensitivity == measured.sensitivity != {}
    plain = quantized(model)
    assert plain.sensitivity == {} and plain.decisions == {}
    assert graph_bytes(plain.model) == graph_bytes(measured.model) == graph_bytes(replayed.model)


def test_wrong_parameter_is_refused():
    with pytest.raises(PassError, match="min_weights is -1, expected"):
        QuantizeDynamic(min_weights=-1)
