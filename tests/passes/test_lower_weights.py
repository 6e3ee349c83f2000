"""What `lower` makes of integer weights, and that ONNX Runtime executes it as meant."""

import dataclasses

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes import ConvertFloat16, Lower, QuantizeDynamic, QuantizeWeights
from edgec.passes.execution import graph_bytes, sqnr_db
from edgec.targets import Int4, load_target


def float_compute():
    """A target whose MatMulNBits computes in float32: the numbers of the dequantized matrix."""
    return dataclasses.replace(load_target("x86-64"), int4=Int4(32, 0, pays=True))


def lowered(model, target="x86-64"):
    return Lower().run(model.clone(), graphs.context(model, target))


def executed(model, folder):
    """The graph that ONNX Runtime runs after its own optimisation."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(graph_bytes(model), options)
    return ir.load(folder / "optimized.onnx")


def product(ins, *, transposed=False, row=True):
    if transposed:
        text, shape = "[fc] y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b)", (48, ins)
    else:
        text, shape = "[fc] y = MatMul (x, w)", (ins, 48)
    model = graphs.graph(
        f"g (float[n, {ins}] x) => (float[n, 48] y) {{ {text} }}",
        {"w": graphs.weight(*shape), "b": graphs.feed(*((48,) if row else (1, 48)), seed=1)},
    )
    if not transposed:
        del model.graph.initializers["b"]
    return model, {"x": graphs.feed(6, ins)}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("ins", [128, 80, 20])  # whole blocks, a partial one, less than one
@pytest.mark.parametrize("transposed", [False, True])
def test_nbits_equals_the_product_with_the_dequantized_matrix(bits, scheme, ins, transposed):
    model, feeds = product(ins, transposed=transposed)
    target = float_compute()
    if bits == 8:  # only level 4 pays with 8 bits; its activations are rounded
        target = load_target("x86-64")
    chosen = QuantizeWeights(bits=bits, scheme=scheme, block_size=32, min_weights=0)
    standard = chosen.run(model, graphs.context(model, target)).model
    result = lowered(standard, target)
    assert result.changed == 1
    assert graphs.operators(result.model) == ["MatMulNBits"]
    (reference,) = graphs.run(standard, optimized=False, **feeds)
    (actual,) = graphs.run(result.model, **feeds)
    # float32 summation order; with level 4 activations have 8 bits
    assert sqnr_db(reference, actual) > (110 if bits == 4 else 38)


def test_nbits_output_has_type_shape_and_name():
    model, _ = product(128)
    standard = QuantizeWeights().run(model, graphs.context(model)).model
    (output,) = lowered(standard).model.graph.outputs
    assert (output.name, output.dtype, str(output.shape)) == ("y", ir.DataType.FLOAT, "[n,48]")


def test_nbits_takes_block_size_and_accuracy_from_the_target():
    model, _ = product(256)
    standard = QuantizeWeights(bits=4).run(model, graphs.context(model)).model
    (node,) = lowered(standard).model.graph
    assert node.domain == "com.microsoft"
    found = {
        k: node.attributes.get_int(k) for k in ("K", "N", "bits", "block_size", "accuracy_level")
    }
    assert found == {"K": 256, "N": 48, "bits": 4, "block_size": 128, "accuracy_level": 4}


def test_gemm_with_a_bias_of_two_dimensions_keeps_it():
    model, feeds = product(64, transposed=True, row=False)
    standard = QuantizeWeights().run(model, graphs.context(model)).model
    (reference,) = graphs.run(standard, optimized=False, **feeds)
    (actual,) = graphs.run(lowered(standard).model, **feeds)
    assert sqnr_db(reference, actual) > 38


@pytest.mark.parametrize(
    ("target", "bits", "reason"),
    [
        ("arm64", 4, "4-bit MatMulNBits does not pay on arm64"),
        (dataclasses.replace(load_target("web"), kernels=()), 8, "web has no MatMulNBits kernel"),
        (float_compute(), 8, "8-bit MatMulNBits does not pay on x86-64"),
    ],
)
def test_product_without_a_kernel_that_pays_is_expanded_once(target, bits, reason, tmp_path):
    model, feeds = product(80)
    context = graphs.context(model, target)
    standard = QuantizeWeights(bits=bits, scheme="asymmetric", block_size=32).run(model, context)
    result = Lower().run(standard.model.clone(), context)
    assert result.skipped[0].reason == f"its weights are expanded at load: {reason}"
    assert "expanded to 0.0 MB of float32 once at load" in result.findings[0]
    assert graphs.operators(executed(result.model, tmp_path)) in (["Gemm"], ["MatMul"])
    (reference,) = graphs.run(standard.model, optimized=False, **feeds)
    (actual,) = graphs.run(result.model, **feeds)
    assert sqnr_db(reference, actual) > 110


def test_convolution_behind_dequantize_is_recomputed_and_lowered_it_is_not(tmp_path):
    model, feeds = graphs.cnn()
    standard = QuantizeWeights(min_weights=0).run(model, graphs.context(model)).model
    assert "DequantizeLinear" in graphs.operators(executed(standard, tmp_path))
    result = lowered(standard)
    found = graphs.operators(executed(result.model, tmp_path))
    assert not {"DequantizeLinear", "Cast", "Mul"} & set(found)
    (reference,), (actual,) = (
        graphs.run(m, optimized=False, **feeds) for m in (standard, result.model)
    )
    # the product layer rounds its activations to 8 bits
    assert sqnr_db(reference, actual) > 35


def test_expanded_file_is_as_small_as_the_integers():
    model = graphs.graph(
        "g (float[1, 64, 9, 9] x) => (float[1, 64, 7, 7] y) { [c] y = Conv (x, w) }",
        {"w": graphs.weight(64, 64, 3, 3)},
    )
    size = len(graph_bytes(model))
    standard = QuantizeWeights().run(model, graphs.context(model)).model
    assert len(graph_bytes(lowered(standard).model)) < 0.27 * size


def test_table_is_gathered_in_integers():
    model, feeds = graphs.transformer()
    standard = QuantizeDynamic(min_weights=1024).run(model, graphs.context(model)).model
    result = lowered(standard)
    gathers = [n for n in result.model.graph if n.op_type == "Gather"]
    assert [n.inputs[0].dtype for n in gathers] == [ir.DataType.INT8, ir.DataType.FLOAT]
    assert "DequantizeLinear" not in graphs.operators(result.model)
    # attention may be lowered too: the order of summation
    for reference, actual in zip(
        graphs.run(standard, **feeds), graphs.run(result.model, **feeds), strict=True
    ):
        assert sqnr_db(reference, actual) > 40


def tied(transposed=True):
    head = "t = Transpose <perm = [1, 0]> (table) [head] y = MatMul (e, t)"
    if not transposed:
        head = "[head] y = Gemm <transB = 1> (e, table)"
    model = graphs.graph(
        f"g (int64[n] ids) => (float[n, 60] y) {{ [look] e = Gather (table, ids) {head} }}",
        {"table": graphs.weight(60, 96) * 3},
    )
    return model, {"ids": np.arange(0, 60, 7)}


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("transposed", [False, True])
def test_tied_table_is_looked_up_and_multiplied_from_one_storage(bits, scheme, transposed):
    model, feeds = tied(transposed)
    target = load_target("x86-64") if bits == 8 else float_compute()
    chosen = QuantizeWeights(bits=bits, scheme=scheme, block_size=32)
    standard = chosen.run(model, graphs.context(model, target)).model
    result = lowered(standard, target)
    assert graphs.operators(result.model) == ["Reshape", "GatherBlockQuantized", "MatMulNBits"]
    stored = [v.name for v in result.model.graph.initializers.values() if v.const_value.size > 1000]
    assert stored == ["table_quantized_packed"]
    (reference,) = graphs.run(standard, optimized=False, **feeds)
    (actual,) = graphs.run(result.model, **feeds)
    # float32 summation order; with level 4 activations have 8 bits
    assert sqnr_db(reference, actual) > (38 if bits == 8 else 110)


@pytest.mark.parametrize("transposed", [False, True])
def test_tied_table_whose_product_does_not_pay_is_expanded_for_both(transposed):
    model, feeds = tied(transposed)
    context = graphs.context(model, "arm64")
    standard = QuantizeWeights(bits=4, block_size=32).run(model, context).model
    result = Lower().run(standard.clone(), context)
    assert "com.microsoft" not in {node.domain for node in result.model.graph}
    stored = [v for v in result.model.graph.initializers.values() if v.const_value.size > 1000]
    assert len(stored) == 1 and stored[0].dtype == ir.DataType.INT4
    (reference,) = graphs.run(standard, optimized=False, **feeds)
    (actual,) = graphs.run(result.model, **feeds)
    assert sqnr_db(reference, actual) > 110


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_four_bit_table_is_looked_up_in_blocks(scheme):
    model = graphs.graph(
        "g (int64[a, b] ids) => (float[a, b, 64] e) { [look] e = Gather (table, ids) }",
        {"table": graphs.weight(60, 64)},
    )
    chosen = QuantizeWeights(embedding_bits=4, scheme=scheme, block_size=32)
    standard = chosen.run(model, graphs.context(model)).model
    result = lowered(standard)
    assert graphs.operators(result.model) == ["Reshape", "GatherBlockQuantized"]
    assert [str(v.shape) for v in result.model.graph.outputs] == ["[a,b,64]"]
    ids = np.arange(60).reshape(5, 12)
    np.testing.assert_array_equal(
        graphs.run(standard, optimized=False, ids=ids)[0], graphs.run(result.model, ids=ids)[0]
    )


@pytest.mark.parametrize("directions", [1, 2])
def test_lstm_becomes_the_int8_kernel(directions):
    model, feeds = graphs.lstm(directions)
    standard = QuantizeDynamic(min_weights=1024).run(model.clone(), graphs.context(model)).model
    result = lowered(standard)
    assert graphs.operators(result.model) == ["DynamicQuantizeLSTM"]
    assert result.touched == ("y",) and "round their activations" in result.findings[0]
    assert all(v.shape is not None and v.dtype is not None for v in result.model.graph.outputs)
    for reference, actual in zip(
        graphs.run(model, **feeds), graphs.run(result.model, **feeds), strict=True
    ):
        assert sqnr_db(reference, actual) > 35  # 8 bits in weights and activations


@pytest.mark.parametrize("directions", [1, 2])
def test_lstm_without_a_paying_kernel_is_expanded_once(directions, tmp_path):
    model, feeds = graphs.lstm(directions)
    target = load_target("arm64")
    target = dataclasses.replace(target, int8=dataclasses.replace(target.int8, dynamic_ops=()))
    context = graphs.context(model, target)
    standard = QuantizeWeights().run(model, context).model
    result = Lower().run(standard.clone(), context)
    assert "int8 LSTM does not pay on arm64" in result.skipped[0].reason
    assert graphs.operators(executed(result.model, tmp_path)) == ["LSTM"]
    for reference, actual in zip(
        graphs.run(standard, optimized=False, **feeds),
        graphs.run(result.model, **feeds),
        strict=True,
    ):
        assert sqnr_db(reference, actual) > 100  # float32 noise


def test_weights_of_integer_kernels_are_left_alone():
    text = """g (float[1, 4, 8, 8] x) => (float[1, 8, 8, 8] y) {
        q = QuantizeLinear (x, s, z)
        d = DequantizeLinear (q, s, z)
        w = DequantizeLinear <axis = 0> (k, ks)
        b = DequantizeLinear <axis = 0> (kb, bs)
        [conv] c = Conv <pads = [1, 1, 1, 1]> (d, w, b)
        r = QuantizeLinear (c, s, z)
        y = DequantizeLinear (r, s, z)
    }"""
    weights = {
        "s": np.float32(0.02),
        "z": np.uint8(128),
        "k": np.random.default_rng(0).integers(-127, 128, (8, 4, 3, 3)).astype(np.int8),
        "ks": np.full(8, 0.01, np.float32),
        "kb": np.arange(8, dtype=np.int32),
        "bs": np.full(8, 0.0002, np.float32),
    }
    model = graphs.graph(text, {k: np.asarray(v) for k, v in weights.items()})
    before = graph_bytes(model)
    result = Lower().run(model, graphs.context(model))
    assert result.changed == 0 and graph_bytes(result.model) == before


def test_second_run_finds_nothing():
    model, _ = graphs.transformer()
    context = graphs.context(model)
    for chosen in (QuantizeDynamic(min_weights=1024), QuantizeWeights(bits=4), ConvertFloat16()):
        once = Lower().run(chosen.run(model.clone(), context).model, context).model
        before = graph_bytes(once)
        again = Lower().run(once, context)
        assert again.changed == 0 and graph_bytes(again.model) == before
