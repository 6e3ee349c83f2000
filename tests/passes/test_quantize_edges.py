"""Shapes and attributes at the edge of what the quantizers and their kernels take."""

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes import (
    Lower,
    PruneMagnitude,
    QuantizeDynamic,
    QuantizeStatic,
    QuantizeWeights,
    Result,
)
from edgec.passes.execution import graph_bytes, sqnr_db


def static(model: ir.Model) -> Result:
    value = model.graph.inputs[0]
    samples = [{value.name: graphs.feed(*value.shape.numpy(), seed=i)} for i in range(8)]
    return QuantizeStatic().run(model.clone(), graphs.context(model, calibration=samples))


def reasons(result: Result) -> str:
    return " ".join(skip.reason for skip in result.skipped)


def sqnr(model: ir.Model, other: ir.Model) -> float:
    value = model.graph.inputs[0]
    feeds = {value.name: graphs.feed(*value.shape.numpy(), seed=50)}
    return sqnr_db(graphs.run(model, **feeds)[0], graphs.run(other, **feeds)[0])


def test_number_added_to_a_product_of_one_column_is_its_bias():
    model = graphs.graph(
        "g (float[5, 64] x) => (float[5, 1] y) { m = MatMul (x, w)\n y = Add (m, b) }",
        {"w": graphs.weight(64, 1), "b": np.array(0.5, np.float32)},
    )
    result = static(model)
    assert result.changed == 1
    assert sqnr(model, result.model) > 30  # 8 bits; without the bias below 10


def test_gemm_bias_that_varies_by_row_is_not_taken_for_one_by_channel():
    column = np.array([[10], [-10], [0], [3]], np.float32)
    model = graphs.graph(
        "g (float[4, 64] x) => (float[4, 4] y) { y = Gemm (x, w, b) }",
        {"w": graphs.weight(64, 4), "b": column},
    )
    result = static(model)
    assert result.changed == 0 and "bias has shape [4, 1]" in reasons(result)


def test_empty_weight_is_left_alone():
    model = graphs.graph(
        "g (float[4, 0] x) => (float[4, 8] y) { y = MatMul (x, w) }",
        {"w": np.zeros((0, 8), np.float32)},
    )
    result = static(model)
    assert result.changed == 0 and "weight is empty" in reasons(result)


@pytest.mark.parametrize(
    ("layer", "shape", "out", "weight"),
    [
        ("Conv <pads = [1, 1]> (x, w, b)", "1, 8, 32", "1, 8, 32", (8, 8, 3)),
        (
            "Conv <group = 2, pads = [1, 1, 1, 1, 1, 1]> (x, w, b)",
            "1, 8, 4, 4, 4",
            "1, 8, 4, 4, 4",
            (8, 4, 3, 3, 3),
        ),
        ("Gemm <transA = 1> (x, w, b)", "64, 4", "4, 8", (64, 8)),
    ],
)
def test_unusual_layers_are_quantized_well(layer, shape, out, weight):
    model = graphs.graph(
        f"g (float[{shape}] x) => (float[{out}] y) {{ y = {layer} }}",
        {"w": graphs.weight(*weight), "b": graphs.feed(8, seed=1)},
    )
    result = static(model)
    assert result.changed == 1
    assert sqnr(model, result.model) > 20  # few samples clip a tail; a wrong axis is below 10


def test_refused_gemm_leaves_the_model_as_it_was():
    model = graphs.graph(
        "g (float[64, 4] x) => (float[4, 8] y) { y = Gemm <transA = 1, beta = 2.0> (x, w, b) }",
        {"w": graphs.weight(64, 8), "b": graphs.feed(1, 8)},
    )
    result = QuantizeDynamic(min_weights=0).run(model.clone(), graphs.context(model))
    assert result.changed == 0 and "transA" in reasons(result)
    assert graph_bytes(result.model) == graph_bytes(model)


@pytest.mark.parametrize("block_size", [256, 512])
def test_blocks_that_the_kernel_has_not_are_expanded_instead(block_size):
    model = graphs.graph(
        "g (float[4, 600] x) => (float[4, 8] y) { y = MatMul (x, w) }",
        {"w": graphs.weight(600, 8)},
    )
    stored = QuantizeWeights(block_size=block_size).run(model.clone(), graphs.context(model)).model
    lowered = Lower().run(stored, graphs.context(stored))
    assert ("MatMulNBits" in graphs.operators(lowered.model)) == (block_size == 256)
    assert ("in blocks of 512" in reasons(lowered)) == (block_size == 512)
    assert sqnr(model, lowered.model) > 30


def test_number_as_gemm_bias_of_one_column_becomes_a_row():
    model = graphs.graph(
        "g (float[4, 64] x) => (float[4, 1] y) { y = Gemm (x, w, b) }",
        {"w": graphs.weight(64, 1), "b": np.array(2, np.float32)},
    )
    stored = QuantizeWeights(min_weights=0).run(model.clone(), graphs.context(model)).model
    lowered = Lower().run(stored, graphs.context(stored)).model
    assert "MatMulNBits" in graphs.operators(lowered)
    assert sqnr(model, lowered) > 30


def test_of_equal_magnitudes_the_last_stay():
    weight = np.array([[1, -1, 1, 2], [1, -1, 0, 1]], np.float32)
    model = graphs.graph(
        "g (float[3, 2] x) => (float[3, 4] y) { y = MatMul (x, w) }", {"w": weight}
    )
    result = PruneMagnitude(sparsity=0.5, min_weights=0).run(model.clone(), graphs.context(model))
    pruned = result.model.graph.initializers["w"].const_value.numpy()
    assert pruned.tolist() == [[0, 0, 0, 2], [1, -1, 0, 1]]


def test_weight_that_is_an_output_is_not_pruned():
    model = graphs.graph(
        "g (float[3, 8] x) => (float[3, 4] y, float[8, 4] w) { y = MatMul (x, w) }",
        {"w": graphs.weight(8, 4)},
    )
    result = PruneMagnitude(min_weights=0).run(model.clone(), graphs.context(model))
    assert result.changed == 0 and "output of the model" in reasons(result)
