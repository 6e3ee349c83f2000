"""Weight-only integers: the standard form, its numbers and its refusals."""

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes import PassError, QuantizeWeights
from edgec.passes.execution import sqnr_db
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
        ({"bits": 3}, "bits is 3, expected 8 or 4"),
        ({"scheme": "signed"}, "scheme is 'signed'"),
        ({"block_size": 48}, "block_size is 48, expected a power of two"),
        ({"block_size": 8}, "block_size is 8"),
        ({"min_weights": -5}, "min_weights is -5"),
    ],
)
def test_wrong_parameters_are_refused(parameters, message):
    with pytest.raises(PassError, match=message):
        QuantizeWeights(**parameters)
