"""Weight-only integers: the standard form, its numbers and its refusals."""

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes import PassError, QuantizeWeights, weight_choices
from edgec.passes.execution import graph_bytes, sqnr_db
from edgec.passes.weights import constant


def quantized(model, target="x86-64", **parameters):
    return QuantizeWeights(**parameters).run(model.clone(), graphs.context(model, target))


def dequantize_node(model, name):
    node = next(n for n in model.graph.all_nodes() if n.name == name)
    return node.inputs[1].producer()


@pytest.mark.parametrize(
    ("bits", "scheme", "dtype", "least_db"),
    [
        (8, "symmetric", ir.DataType.INT8, 40),
        (8, "asymmetric", ir.DataType.UINT8, 40),
        (4, "symmetric", ir.DataType.INT4, 20),
        (4, "asymmetric", ir.DataType.UINT4, 20),
    ],
)
def test_products_become_blocks_along_their_inputs(bits, scheme, dtype, least_db):
    model, feeds = graphs.mlp()
    result = quantized(model, bits=bits, scheme=scheme, block_size=32)
    assert result.changed == 2 and result.touched == ("h", "m")
    transposed, plain = dequantize_node(result.model, "fc1"), dequantize_node(result.model, "fc2")
    assert transposed.attributes.get_int("axis") == 1  # [out, in]
    assert plain.attributes.get_int("axis") == 0  # [in, out]
    assert plain.attributes.get_int("block_size") == 32
    assert plain.inputs[0].dtype == dtype
    assert [tuple(v.shape) for v in plain.inputs[:2]] == [(64, 40), (2, 40)]
    (reference,), (actual,) = graphs.run(model, **feeds), graphs.run(result.model, **feeds)
    assert sqnr_db(reference, actual) > least_db


def test_four_bit_weights_take_half_a_byte():
    model, _ = graphs.mlp()
    node = dequantize_node(quantized(model, bits=4).model, "fc1")
    assert node.inputs[0].const_value.nbytes == 64 * 96 // 2


def test_block_size_comes_from_the_target():
    model, _ = graphs.mlp()
    sizes = [
        dequantize_node(quantized(model, t).model, "fc1").attributes.get_int("block_size")
        for t in ("x86-64", "android")
    ]
    assert sizes == [128, 32]


def test_products_whose_names_match_have_blocks_twice_as_long():
    model, feeds = graphs.mlp()
    result = quantized(model, bits=4, block_size=32, long_blocks=("*2",))
    sizes = {
        name: dequantize_node(result.model, name).attributes.get_int("block_size")
        for name in ("fc1", "fc2")
    }
    assert sizes == {"fc1": 32, "fc2": 64}
    alike = quantized(model, bits=4, block_size=64).model
    ours, theirs = (dequantize_node(m, "fc2").inputs[:2] for m in (result.model, alike))
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine.const_value.numpy(), other.const_value.numpy())
    (reference,), (actual,) = graphs.run(model, **feeds), graphs.run(result.model, **feeds)
    assert sqnr_db(reference, actual) > 18


def test_a_pattern_that_names_no_product_is_refused():
    model, _ = graphs.mlp()
    with pytest.raises(PassError, match="long_blocks has 'fc3', the name of no product.*'fc2'"):
        quantized(model, bits=4, long_blocks=("fc*", "fc3"))


def test_convolutions_stay_in_eight_bits_with_a_scale_a_channel():
    model, feeds = graphs.cnn()
    result = quantized(model, bits=4, min_weights=0)
    for name, channels in (("conv1", 32), ("depthwise", 32)):
        node = dequantize_node(result.model, name)
        assert node.inputs[0].dtype == ir.DataType.INT8
        assert tuple(node.inputs[1].shape) == (channels,)
        assert node.attributes.get_int("axis") == 0
    (reference,), (actual,) = graphs.run(model, **feeds), graphs.run(result.model, **feeds)
    assert sqnr_db(reference, actual) > 20  # the last layer has 4 bits


def test_convolution_keeps_the_sum_of_each_filter():
    model = graphs.graph(
        "g (float[1, 64, 9, 9] x) => (float[1, 32, 9, 9] y) { [c] y = Conv (x, k) }",
        {"k": graphs.weight(32, 64, 1, 1)},
    )
    result = quantized(model)
    x = np.abs(graphs.feed(1, 64, 9, 9)) + 1  # with a mean in common, as behind a Relu
    (reference,), (actual,) = graphs.run(model, x=x), graphs.run(result.model, x=x)
    kernel = constant(model.graph.initializers["k"])
    scale = np.abs(kernel).max(axis=(1, 2, 3), keepdims=True) / 127
    nearest = graphs.graph(
        "g (float[1, 64, 9, 9] x) => (float[1, 32, 9, 9] y) { [c] y = Conv (x, k) }",
        {"k": (np.rint(kernel / scale) * scale).astype(np.float32)},
    )
    assert sqnr_db(reference, actual) > sqnr_db(reference, graphs.run(nearest, x=x)[0]) + 3


def test_transposed_convolution_has_its_channels_on_axis_one():
    model = graphs.graph(
        "g (float[1, 16, 5, 5] x) => (float[1, 24, 7, 7] y) { [up] y = ConvTranspose (x, w) }",
        {
            "w": graphs.weight(16, 24, 3, 3)
            * np.linspace(0.01, 9, 24, dtype=np.float32)[:, None, None]
        },
    )
    result = quantized(model)
    assert tuple(dequantize_node(result.model, "up").inputs[1].shape) == (24,)
    x = graphs.feed(1, 16, 5, 5)
    (reference,), (actual,) = graphs.run(model, x=x), graphs.run(result.model, x=x)
    assert sqnr_db(reference[:, 0], actual[:, 0]) > 38  # the smallest channel


@pytest.mark.parametrize("directions", [1, 2])
def test_lstm_weights_are_stored_in_int8(directions):
    model, feeds = graphs.lstm(directions)
    result = quantized(model)
    assert graphs.operators(result.model) == ["DequantizeLinear", "DequantizeLinear", "LSTM"]
    for reference, actual in zip(
        graphs.run(model, **feeds), graphs.run(result.model, **feeds), strict=True
    ):
        assert sqnr_db(reference, actual) > 38


def test_tied_table_and_output_layer_are_both_quantized_and_the_float_table_goes():
    model, feeds = graphs.transformer()
    result = quantized(model)
    assert result.changed == 6 and not result.skipped
    assert "table" not in result.model.graph.initializers
    (reference,), (actual,) = graphs.run(model, **feeds), graphs.run(result.model, **feeds)
    assert sqnr_db(reference, actual) > 35


def tied(rows=60, width=64, transposed=True):
    """A table that is looked up and multiplied with, transposed or through Gemm."""
    head = "t = Transpose <perm = [1, 0]> (table) [head] y = MatMul (e, t)"
    if not transposed:
        head = "[head] y = Gemm <transB = 1> (e, table)"
    model = graphs.graph(
        f"g (int64[n] ids) => (float[n, {rows}] y) {{ [look] e = Gather (table, ids) {head} }}",
        {"table": graphs.weight(rows, width) * 3},
    )
    return model, {"ids": np.arange(0, rows, 7)}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_tied_table_is_stored_once_in_blocks(bits, transposed):
    model, feeds = tied(transposed=transposed)
    result = quantized(model, bits=bits, block_size=32)
    assert result.changed == 2 and not result.skipped
    assert sorted(result.model.graph.initializers) == ["table_quantized", "table_scale"]
    assert tuple(result.model.graph.initializers["table_scale"].shape) == (60, 2)
    (reference,), (actual,) = graphs.run(model, **feeds), graphs.run(result.model, **feeds)
    assert sqnr_db(reference, actual) > (15 if bits == 4 else 38)


def test_blocks_of_a_tied_table_divide_its_rows():
    model, _ = tied(width=48)
    node = quantized(model, bits=4, block_size=64).model.graph[0]
    assert node.attributes.get_int("block_size") == 16


@pytest.mark.parametrize(
    ("model", "target", "skip", "reason"),
    [
        (tied(width=40)[0], "x86-64", (), "rows of 40 are no whole number of blocks"),
        (tied()[0], "x86-64-sse", (), "x86-64-sse has no GatherBlockQuantized kernel"),
        (tied()[0], "x86-64", ("look",), "'look' reads it in float32"),
    ],
)
def test_table_that_cannot_be_shared_is_stored_apart_and_that_is_said(model, target, skip, reason):
    result = quantized(model, target, bits=4, skip=skip)
    assert any("are stored apart: " + reason in finding for finding in result.findings)
    assert ("table" in result.model.graph.initializers) == bool(skip)


def test_table_in_four_bits_takes_an_eighth():
    model = graphs.graph(
        "g (int64[n] ids) => (float[n, 64] e) { [look] e = Gather (table, ids) }",
        {"table": graphs.weight(60, 64)},
    )
    (node, _) = quantized(model, embedding_bits=4, block_size=32).model.graph
    assert node.inputs[0].dtype == ir.DataType.INT4 and node.inputs[0].const_value.nbytes == 1920
    (node, _) = quantized(model).model.graph
    assert node.inputs[0].dtype == ir.DataType.INT8 and node.attributes.get_int("axis") == 0
    fallen_back = quantized(model, "x86-64-sse", embedding_bits=4)
    assert fallen_back.model.graph[0].inputs[0].dtype == ir.DataType.INT8
    assert "stored in 8 bits with one scale a row: x86-64-sse has no" in fallen_back.findings[0]


def test_products_of_one_weight_and_two_inputs_are_calibrated_on_both():
    model = graphs.graph(
        """g (float[n, 64] x) => (float[n, 64] y) {
            [one] h = MatMul (x, w)
            [two] y = MatMul (h, w)
        }""",
        {"w": graphs.weight(64, 64)},
    )
    feeds = [{"x": graphs.feed(200, 64) * np.linspace(0.1, 3, 64, dtype=np.float32)}]
    context = graphs.context(model, calibration=feeds)
    outputs = {}
    for method in ("rtn", "gptq"):
        made = QuantizeWeights(bits=3, method=method, block_size=32).run(model.clone(), context)
        outputs[method] = graphs.run(made.model, **feeds[0])[0]
    (reference,) = graphs.run(model, **feeds[0])
    assert sqnr_db(reference, outputs["gptq"]) > sqnr_db(reference, outputs["rtn"]) + 1


def test_product_in_a_branch_is_refused():
    model = graphs.graph(
        """g (bool c, float[n, 64] x) => (float[n, 64] y) {
            [if] y = If (c) <
                then_branch = yes () => (float[n, 64] a) { [in] a = MatMul (x, w) },
                else_branch = no () => (float[n, 64] b) { b = Identity (x) }
            >
        }""",
        {"w": graphs.weight(64, 64)},
    )
    result = quantized(model, bits=4)
    assert result.changed == 0
    assert [s.node for s in result.skipped] == ["in"]
    assert "inside a branch" in result.skipped[0].reason
    graphs.run(result.model, c=np.array(True), x=graphs.feed(9, 64))  # with optimizations


def test_table_that_stays_in_float_elsewhere_is_not_stored_twice():
    model, _ = graphs.transformer()
    result = quantized(model, skip=("lm_head",))
    reasons = {s.node: s.reason for s in result.skipped}
    assert "also used in float32" in reasons["embed"]


def test_shared_weight_is_stored_once():
    model = graphs.graph(
        """g (float[n, 64] x) => (float[n, 64] y) {
            [one] h = MatMul (x, w)
            [two] y = MatMul (h, w)
        }""",
        {"w": graphs.weight(64, 64)},
    )
    result = quantized(model)
    assert result.changed == 2
    assert sorted(result.model.graph.initializers) == ["w_quantized", "w_scale"]


def test_refusals_have_reasons():
    model, _ = graphs.mlp()
    old = graphs.graph(
        "g (float[n, 96] x) => (float[n, 64] y) { [fc] y = MatMul (x, w) }",
        {"w": graphs.weight(96, 64)},
        opset=17,
    )
    assert "opset 21, the model has 17" in quantized(old).skipped[0].reason
    assert quantized(model, skip=("fc1",)).skipped[0].reason == "named in skip"
    small = quantized(model, min_weights=5000).skipped
    assert [(s.node, s.reason) for s in small] == [
        ("fc2", "it has 2560 weights, fewer than min_weights")
    ]


def test_reference_weights_are_untouched():
    model, _ = graphs.mlp()
    before = constant(model.graph.initializers["w1"]).copy()
    quantized(model, bits=4)
    np.testing.assert_array_equal(constant(model.graph.initializers["w1"]), before)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"bits": 5}, "bits is 5, expected 8, 4 or 3"),
        ({"method": "gtpq"}, "no method 'gtpq', did you mean 'gptq'"),
        ({"embedding_bits": 2}, "embedding_bits is 2, expected 8 or 4"),
        ({"scheme": "signed"}, "scheme is 'signed'"),
        ({"block_size": 48}, "block_size is 48, expected a power of two"),
        ({"block_size": 8}, "block_size is 8"),
        ({"block_size": 256, "long_blocks": ("*",)}, "with long_blocks expected at most 128"),
        ({"min_weights": -5}, "min_weights is -5"),
    ],
)
def test_wrong_parameters_are_refused(parameters, message):
    with pytest.raises(PassError, match=message):
        QuantizeWeights(**parameters)


def test_a_transposed_first_operand_is_refused() -> None:
    model = graphs.graph(
        "g (float[64, n] x) => (float[n, 64] y) { y = Gemm <transA = 1> (x, w) }",
        {"w": graphs.weight(64, 64)},
    )
    result = QuantizeWeights(bits=4).run(model.clone(), graphs.context(model))
    assert result.changed == 0 and "transA" in result.skipped[0].reason


def test_matrices_too_wide_for_second_moments_are_clipped_and_named(monkeypatch) -> None:
    monkeypatch.setattr(weight_choices, "WIDEST", 63)
    text = "g (float[n, 64] x) => (float[n, 64] y) { y = MatMul (x, w) }"
    model = graphs.graph(text, {"w": graphs.weight(64, 64)})
    context = graphs.context(model, calibration=[{"x": graphs.feed(4, 64)}])
    for method in ("gptq", "awq"):
        chosen = QuantizeWeights(bits=4, method=method)
        result = chosen.run(model.clone(), context)
        assert "moments of more than" in result.findings[1]
        clip = QuantizeWeights(bits=4, method="clip").run(model.clone(), context)
        assert graph_bytes(result.model) == graph_bytes(clip.model)
        again = chosen.run(model.clone(), graphs.context(model, lock=result.decisions))
        assert graph_bytes(again.model) == graph_bytes(result.model)
