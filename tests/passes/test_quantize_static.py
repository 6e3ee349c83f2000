"""Static int8: the arithmetic by hand, the kernels by ONNX Runtime, replays by bytes."""

import dataclasses
import json
import os
import subprocess
import sys

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from static_int8 import DEFAULT, array, conv, kernels, quantize, samples, sqnr, target

from edgec.passes import PassError, QuantizeDynamic, QuantizeStatic
from edgec.passes.execution import graph_bytes, sqnr_db

NEAREST = QuantizeStatic(ranges="minmax", rounding="nearest", bias_correction=False)

# --- arithmetic -------------------------------------------------------------------------


def test_scales_zero_points_and_integers_follow_the_textbook() -> None:
    model = conv("[c] y = Conv <pads = [1, 1, 1, 1]> (x, k, b)")
    calibration = samples(model)
    result = quantize(model, NEAREST, calibration=calibration)
    x = np.stack([f["x"] for f in calibration])
    scale = np.float32((float(x.max()) - float(x.min())) / 255)
    assert array(result.model, "x_scale") == scale
    assert array(result.model, "x_zero_point") == np.rint(-float(x.min()) / float(scale))

    weight = array(model, "k")
    per_channel = np.abs(weight).max(axis=(1, 2, 3)) / np.float32(127)
    np.testing.assert_array_equal(array(result.model, "k_scale"), per_channel)
    integers = array(result.model, "k_quantized").astype(np.float32)
    error = np.abs(integers * per_channel[:, None, None, None] - weight)
    assert (error < per_channel[:, None, None, None] * 0.5001).all()

    bias = array(result.model, "b_quantized")
    assert bias.dtype == np.int32
    np.testing.assert_array_equal(bias, np.rint(array(model, "b") / (scale * per_channel)))


def test_seven_bit_weights_where_the_target_reduces_the_range() -> None:
    model, _ = graphs.cnn()
    result = quantize(model, NEAREST, target(reduce_range=True))
    for name in ("k1_quantized", "k2_quantized", "w_quantized"):
        assert np.abs(array(result.model, name).astype(int)).max() == 64


def test_unsigned_weights_are_centred_on_128() -> None:
    model, _ = graphs.cnn()
    result = quantize(model, on=target(weight="uint8"))
    assert (array(result.model, "k1_zero_point") == 128).all()
    assert array(result.model, "k1_quantized").dtype == np.uint8
    assert sqnr(model, result.model) > 25


def test_signed_activations_still_fuse_their_activation_function() -> None:
    model, _ = graphs.cnn()
    result = quantize(model, on=target(activation="int8"))
    assert not {"Relu", "Clip", "Conv"} & set(kernels(result.model))
    assert sqnr(model, result.model) > 25


def test_one_scale_per_weight_where_the_target_has_no_channels() -> None:
    model, _ = graphs.cnn()
    result = quantize(model, on=target(per_channel=False))
    assert array(result.model, "k1_scale").shape == ()
    assert not result.findings


def test_bias_far_above_its_weights_fits_into_int32() -> None:
    weights = graphs.weight(8, 8, 3, 3)
    weights[1] *= 1e-12
    bias = np.full(8, 50.0, np.float32)
    model = conv("[c] y = Conv (x, k, b)", k=weights, b=bias)
    result = quantize(model)
    y = graphs.run(result.model, x=samples(model)[0]["x"])[0]
    np.testing.assert_allclose(y[0, 1], 50.0, atol=0.5)  # half a step of the output


@pytest.mark.parametrize("activation", ["uint16", "int16"])
def test_sixteen_bit_activations_leave_the_noise_of_the_weights(activation: str) -> None:
    model, _ = graphs.cnn()
    result = quantize(model, on=target(activation=activation))
    assert array(result.model, "x_zero_point").dtype == activation
    assert result.findings == ()
    feeds = samples(model, 12)[-1]
    reference = graphs.run(model, **feeds)[0]
    narrow, wide = (
        sqnr_db(reference, graphs.run(m, optimized=False, **feeds)[0])
        for m in (quantize(model).model, result.model)
    )
    assert wide > narrow + 0.5  # what is left is the rounding of the weights
    assert wide > 40


def test_sixteen_bits_need_opset_21() -> None:
    text = "g (float[1, 8] x) => (float[1, 4] y) { y = MatMul (x, w) }"
    model = graphs.graph(text, {"w": graphs.weight(8, 4)}, opset=20)
    with pytest.raises(PassError, match="uint16 activations need 21"):
        quantize(model, on=target(activation="uint16"))


def test_a_depthwise_conv_of_a_float_value_stays_float_where_it_does_not_pay() -> None:
    model = conv(
        "[stem] a = Conv (x, k) s = Softplus (a) [depth] d = Conv <group = 8> (s, k2)"
        "[point] p = Conv (d, k3) [again] y = Conv <group = 8> (p, k2)",
        k2=graphs.weight(8, 1, 3, 3, seed=5),
        k3=graphs.weight(8, 8, 1, 1, seed=6),
    )
    result = quantize(model, on=target(depthwise_pays=False))
    reasons = {skip.node: skip.reason for skip in result.skipped}
    assert "float is as fast" in reasons["depth"] and "again" not in reasons
    assert "depth" in quantize(model, on=target(depthwise_pays=True)).sensitivity
    assert not result.findings


def test_sixteen_bits_span_the_largest_value() -> None:
    text = "g (float[1, 8] x) => (float[1, 4] y) { y = MatMul (x, w) }"
    model = graphs.graph(text, {"w": graphs.weight(8, 4)})
    given = samples(model)
    given[0]["x"][0, 0] = 1e3  # an outlier that a search for the least noise cuts off
    result = quantize(model, on=target(activation="uint16"), calibration=given)
    assert array(result.model, "x_scale") * 65535 > 1e3


def test_where_no_kernel_gives_float_every_output_is_quantized() -> None:
    text = "g (float[1, 8] x) => (float[1, 4] y) { m = MatMul (x, w) y = Softmax (m) }"
    model = graphs.graph(text, {"w": graphs.weight(8, 4)})
    for float_outputs, pairs in ((True, 1), (False, 2)):
        result = quantize(model, on=target(activation="uint16", float_outputs=float_outputs))
        kinds = [node.op_type for node in result.model.graph]
        assert kinds.count("QuantizeLinear") == pairs


# --- placement --------------------------------------------------------------------------


def test_a_small_cnn_runs_in_integers_from_end_to_end() -> None:
    model, _ = graphs.cnn()
    result = quantize(model)
    assert result.findings == ()
    assert sorted(set(kernels(result.model)) - {"Reshape", "Flatten"}) == [
        "QGemm",
        "QLinearConv",
        "QLinearGlobalAveragePool",
        "QuantizeLinear",
    ]
    assert result.changed == 5  # two Conv, pool, Flatten, Gemm
    assert result.touched == ("r1", "r2", "p", "f", "y")
    assert sqnr(model, result.model) > 30


def test_residual_add_stays_integer() -> None:
    model = conv(
        "[c1] a = Conv <pads = [1,1,1,1]> (x, k, b) [c2] c = Conv <pads = [1,1,1,1]> (a, k2, b)"
        "[sum] s = Add (a, c) r = Relu (s) [c3] y = Conv (r, k3)",
        k2=graphs.weight(8, 8, 3, 3, seed=5),
        k3=graphs.weight(8, 8, 3, 3, seed=6),
    )
    result = quantize(model)
    assert not result.findings
    found = kernels(result.model)
    assert found.count("QLinearConv") == 3
    assert found.count("QLinearAdd") == 1
    assert found.count("QuantizeLinear") == found.count("DequantizeLinear") == 1


def test_max_pool_keeps_the_scale_of_its_input() -> None:
    model = conv(
        "[c1] a = Conv (x, k, b) [pool] p = MaxPool <kernel_shape = [2, 2]> (a)"
        "[c2] y = Conv (p, k2)",
        k2=graphs.weight(8, 8, 3, 3, seed=5),
    )
    result = quantize(model)
    assert array(result.model, "p_scale") == array(result.model, "a_scale")
    assert kernels(result.model).count("QuantizeLinear") == 1
    # for a replay in which c1 stays float, so that p needs a range of its own
    assert result.decisions["ranges"]["p"] == result.decisions["ranges"]["a"]


def test_concat_of_quantized_values_stays_integer() -> None:
    model = conv(
        "[c1] a = Conv (x, k, b) [c2] c = Conv (x, k2, b) [cat] j = Concat <axis = 1> (a, c)"
        "[c3] y = Conv (j, k3)",
        k2=graphs.weight(8, 8, 3, 3, seed=5),
        k3=graphs.weight(4, 16, 3, 3, seed=6),
    )
    result = quantize(model)
    assert "QLinearConcat" in kernels(result.model)
    assert not result.findings


def test_float_islands_get_no_pairs_of_their_own() -> None:
    model = conv(
        "[c1] a = Conv (x, k, b) h = Softplus (a) s = Sigmoid (h) m = Mul (h, s)"
        "[c2] y = Conv (m, k2)",
        k2=graphs.weight(8, 8, 3, 3, seed=5),
    )
    result = quantize(model)
    quantized = [n.inputs[0].name for n in result.model.graph if n.op_type == "QuantizeLinear"]
    assert quantized == ["x", "a", "m", "y_float"]
    reasons = {skip.node: skip.reason for skip in result.skipped}
    assert any(reason.startswith("Softplus: not in static_ops") for reason in reasons.values())


def test_an_op_whose_result_reaches_no_quantized_op_stays_float() -> None:
    model = conv("[c1] a = Conv (x, k, b) [pool] y = GlobalAveragePool (a)")
    result = quantize(model)
    assert [(s.node, s.reason) for s in result.skipped] == [
        ("pool", "its result reaches no quantized op")
    ]


def test_matmul_and_bias_become_an_integer_kernel_with_float_output() -> None:
    model, _ = graphs.mlp()
    result = quantize(model)
    assert "MatMulIntegerToFloat" in kernels(result.model)
    assert not {"Gemm", "MatMul"} & set(kernels(result.model))
    assert not result.findings
    assert sqnr(model, result.model) > 30


def test_a_bias_on_the_left_of_the_add_is_subtracted_from_the_product() -> None:
    text = "left (float[5, 96] x) => (float[5, 40] y) { m = MatMul (x, w) y = Add (b, m) }"
    model = graphs.graph(text, {"w": graphs.weight(96, 40), "b": graphs.feed(40)})
    assert sqnr(model, quantize(model).model) > 30


def test_a_shared_weight_stays_shared() -> None:
    text = """tied (float[5, 40] x) => (float[5, 40] y) {
        a = MatMul (x, w) r = Relu (a) y = MatMul (r, w)
    }"""
    model = graphs.graph(text, {"w": graphs.weight(40, 40)})
    result = quantize(model)
    integers = [n for n in result.model.graph.initializers if "w_quantized" in n]
    assert integers == ["w_quantized"]
    assert not result.findings


def padded_conv_behind_an_affine_map() -> ir.Model:
    return conv(
        "[c1] a = Conv (x, k, b) h = Softplus (a) m = Mul (factor, h) s = Add (m, offset)"
        "[c2] y = Conv <pads = [1, 1, 1, 1]> (s, k2)",
        k2=graphs.weight(8, 8, 3, 3, seed=5),
        factor=np.float32(0.2),
        offset=np.float32(-0.05),
    )


def test_scalar_affine_before_a_padded_conv_moves_into_the_quantization() -> None:
    model = padded_conv_behind_an_affine_map()
    result = quantize(model)
    assert not {"Mul", "Add"} & {node.op_type for node in result.model.graph}
    assert "factor" not in result.model.graph.initializers
    assert sqnr(model, result.model) > 30


@pytest.mark.parametrize("two_scales", [True, False])
def test_pairs_have_two_scales_only_where_the_target_computes_them(two_scales: bool) -> None:
    model = padded_conv_behind_an_affine_map()
    result = quantize(model, on=target(two_scales=two_scales)).model
    pairs = [(n.inputs[0].producer(), n) for n in result.graph if n.op_type == "DequantizeLinear"]
    scales = [(q.inputs[1].name, d.inputs[1].name) for q, d in pairs if q is not None]
    assert any(before != after for before, after in scales) == two_scales
    assert ("Mul" in graphs.operators(result)) == (not two_scales)
    assert sqnr(model, result) > 30


def test_outputs_keep_their_names_and_shapes() -> None:
    model = conv("[c1] y = Conv (x, k, b)")
    result = quantize(model)
    assert [v.name for v in result.model.graph.outputs] == ["y"]
    assert str(result.model.graph.outputs[0].shape) == str(model.graph.outputs[0].shape)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("[c] y = Conv (x, x)", "weight is not constant"),
        ("[c] z = Conv (x, k) y = ConvTranspose (z, k)", "ConvTranspose: not in static_ops"),
    ],
)
def test_each_node_left_alone_has_its_reason(nodes: str, reason: str) -> None:
    model = conv(nodes)
    assert any(s.reason.startswith(reason) for s in quantize(model).skipped)


def test_a_weight_with_nan_is_left_alone() -> None:
    weights = graphs.weight(8, 8, 3, 3)
    weights[0, 0, 0, 0] = np.nan
    result = quantize(conv("[c] y = Conv (x, k)", k=weights))
    assert [(s.node, s.reason) for s in result.skipped] == [
        ("c", "weight contains NaN or infinity")
    ]
    assert result.changed == 0


def test_a_node_named_in_skip_stays_float() -> None:
    model, _ = graphs.cnn()
    result = quantize(model, QuantizeStatic(skip=("fc",)))
    assert ("fc", "named in skip") in [(s.node, s.reason) for s in result.skipped]
    assert "Gemm" in kernels(result.model)


def test_ops_leaves_products_to_dynamic_ranges() -> None:
    """As in encoders of speech, which begin with convolutions."""
    model, _ = graphs.cnn()
    result = quantize(model, QuantizeStatic(ops=("Conv",)))
    assert ("fc", "Gemm: not in static_ops of the target, or not in ops") in [
        (s.node, s.reason) for s in result.skipped
    ]
    both = QuantizeDynamic(min_weights=1).run(result.model.clone(), graphs.context(model)).model
    assert {"QLinearConv", "DynamicQuantizeMatMul"} <= set(kernels(both))
    assert not {"Conv", "Gemm", "MatMul"} & set(kernels(both))
    assert sqnr(model, both) > 25  # as with everything static


def test_ops_that_the_target_does_not_compute_are_refused() -> None:
    model, _ = graphs.cnn()
    message = "ops has 'Convs', which x86-64 .*; it has Conv, Gemm, MatMul, did you mean 'Conv'"
    with pytest.raises(PassError, match=message):
        quantize(model, QuantizeStatic(ops=("Convs",)))


def test_a_pair_that_does_not_fuse_is_a_finding() -> None:
    model = conv(
        "[c1] a = Conv (x, k, b) [negative] g = Neg (a) [c2] y = Conv (g, k2)",
        k2=graphs.weight(8, 8, 3, 3, seed=5),
    )
    chosen = target()
    ops = (*chosen.int8.integer_ops, "Neg")
    result = quantize(model, on=target(integer_ops=ops))
    assert len(result.findings) == 1
    assert "'negative' (Neg)" in result.findings[0]


# --- calibration, locks, determinism ----------------------------------------------------


def test_decisions_replay_to_the_same_bytes_without_data() -> None:
    model, _ = graphs.cnn()
    first = quantize(model)
    lock = json.loads(json.dumps(dict(first.decisions)))
    again = quantize(model, lock=lock, calibration=None)
    assert graph_bytes(again.model) == graph_bytes(first.model)
    assert json.loads(json.dumps(dict(again.decisions))) == lock


def test_a_lock_of_another_model_is_refused() -> None:
    model, _ = graphs.cnn()
    other, _ = graphs.mlp()
    with pytest.raises(PassError, match="another model or target"):
        quantize(model, lock=quantize(other).decisions)


def test_a_lock_with_corrections_is_refused_without_bias_correction() -> None:
    model, _ = graphs.cnn()
    with pytest.raises(PassError, match="bias_correction is off"):
        quantize(model, NEAREST, lock=quantize(model).decisions)


def test_decisions_replay_with_more_nodes_left_in_float() -> None:
    model = conv(
        "[c1] a = Conv (x, k, b) [pool] p = MaxPool <kernel_shape = [2, 2]> (a)"
        "[c2] y = Conv (p, k2)",
        k2=graphs.weight(8, 8, 3, 3, seed=5),
    )
    first = quantize(model)
    less = QuantizeStatic(skip=("c1",))
    again = quantize(model, less, lock=dict(first.decisions), calibration=None)
    assert 0 < again.changed < first.changed
    assert again.sensitivity == first.sensitivity
    assert again.decisions == first.decisions  # so they still serve a run with less in skip
    assert sqnr(model, again.model) > sqnr(model, first.model) > 25


def test_same_bytes_under_any_hash_seed() -> None:
    script = (
        "import graphs, hashlib, static_int8 as t;"
        "from edgec.passes.execution import graph_bytes;"
        "print(hashlib.sha256(graph_bytes(t.quantize(graphs.cnn()[0]).model)).hexdigest())"
    )
    path = os.path.dirname(os.path.dirname(__file__))
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_a_second_run_changes_nothing() -> None:
    model, _ = graphs.cnn()
    once = quantize(model)
    before = graph_bytes(once.model)
    twice = quantize(once.model)
    assert twice.changed == 0
    assert graph_bytes(twice.model) == before


def test_weights_that_clones_share_are_not_written_to() -> None:
    model, _ = graphs.cnn()
    before = graph_bytes(model)
    quantize(model)
    assert graph_bytes(model) == before


def test_without_calibration_data_the_error_says_what_to_do() -> None:
    model, _ = graphs.cnn()
    with pytest.raises(PassError, match="needs calibration data.*quantize-dynamic"):
        quantize(model, calibration=None)


def test_nan_in_a_sample_is_named_with_its_tensor() -> None:
    model, _ = graphs.cnn()
    data = samples(model)
    data[3]["x"][0, 0, 0, 0] = np.nan
    with pytest.raises(PassError, match="sample 3: value 'x' holds NaN"):
        quantize(model, calibration=data)


def test_all_zero_calibration_gives_a_model_that_runs() -> None:
    model, _ = graphs.cnn()
    data = [{"x": np.zeros((1, 4, 12, 12), np.float32)}]
    result = quantize(model, calibration=data)
    assert array(result.model, "x_scale") == 1.0
    assert np.isfinite(graphs.run(result.model, x=graphs.feed(1, 4, 12, 12))[0]).all()


def test_progress_is_reported_for_the_one_run_over_the_data() -> None:
    model, _ = graphs.cnn()
    seen: list[tuple[str, int, int]] = []
    quantize(model, progress=lambda *step: seen.append(step))
    assert seen == [("calibrate", i + 1, 8) for i in range(8)]


def test_a_damaged_lock_is_refused() -> None:
    model, _ = graphs.cnn()
    lock = dict(quantize(model).decisions)
    for text, message in (("no base64!", "damaged"), ("eJwDAAAAAAE=", "knows nothing about")):
        rounding = dict.fromkeys(lock["rounding"], text)
        with pytest.raises(PassError, match=message):
            quantize(model, lock={**lock, "rounding": rounding})


def test_a_lock_without_roundings_is_refused_unless_nearest() -> None:
    model, _ = graphs.cnn()
    lock = dict(quantize(model, dataclasses.replace(DEFAULT, rounding="nearest")).decisions)
    with pytest.raises(PassError, match="with other parameters"):
        quantize(model, lock=lock)


def test_an_old_opset_is_refused() -> None:
    text = "old (float[1, 8] x) => (float[1, 8] y) { y = Relu (x) }"
    model = graphs.graph(text, {}, opset=12)
    with pytest.raises(PassError, match="opset 12"):
        quantize(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranges": "minmx"}, "did you mean 'minmax'"),
        ({"rounding": "gtpq"}, "did you mean 'gptq'"),
        ({"percentile": 40.0}, "above 50"),
    ],
)
def test_wrong_parameters_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(PassError, match=message):
        QuantizeStatic(**arguments)


def test_an_unknown_name_in_skip_is_refused_with_a_suggestion() -> None:
    model, _ = graphs.cnn()
    with pytest.raises(PassError, match="did you mean 'conv1'"):
        quantize(model, QuantizeStatic(skip=("conv",)))


def test_a_conv_of_few_channels_stays_float_where_the_target_says_so() -> None:
    model, _ = graphs.cnn()  # its first Conv reads four channels
    wide = dataclasses.replace(target().int8, min_channels=5)
    result = quantize(model, on=dataclasses.replace(target(), int8=wide))
    reasons = {skip.node: skip.reason for skip in result.skipped}
    assert reasons["conv1"] == "Conv of 4 input channels: float is faster below 5 on the target"
    assert quantize(model).changed > result.changed > 0
    assert "QLinearConv" in kernels(result.model)
    assert sqnr(model, result.model) > 25


def test_an_unnamed_node_is_skipped_by_its_label() -> None:
    model = conv("y = Conv <pads = [1, 1, 1, 1]> (x, k, b)")
    result = quantize(model, QuantizeStatic(skip=("Conv -> y",)))
    assert result.changed == 0
    assert [(s.node, s.reason) for s in result.skipped] == [("Conv -> y", "named in skip")]


def test_a_hard_swish_named_in_skip_stays_float() -> None:
    text = "a = Conv (x, k, b) [act] h = HardSwish (a) y = Conv (h, k2)"
    model = conv(text, k2=graphs.weight(8, 8, 3, 3, seed=4))
    assert "HardSwish" not in graphs.operators(quantize(model).model)
    kept = quantize(model, QuantizeStatic(skip=("act",)))
    assert "HardSwish" in graphs.operators(kept.model)


def test_damaged_ranges_are_refused() -> None:
    model = conv("y = Conv (x, k, b)")
    with pytest.raises(PassError, match="the lock is damaged"):
        quantize(model, lock={"ranges": {"x": ["none", "0x1p+0"]}})
