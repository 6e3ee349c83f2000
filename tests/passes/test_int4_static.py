"""Static quantization with weights of 4 bits: their grid, their storage, their recovery."""

import dataclasses

import graphs
import numpy as np
import onnx_ir as ir
import pytest
import static_int8
from static_int8 import array, quantize, samples, sqnr

from edgec.passes import Lower, PassError, QuantizeStatic, Recover
from edgec.passes.differences import apply_differences, differences
from edgec.passes.execution import graph_bytes

FOUR = QuantizeStatic(weight_bits=4, rounding="nearest", bias_correction=False)


def stored(model: ir.Model) -> list[str]:
    return [
        name
        for name, value in model.graph.initializers.items()
        if value.const_value.dtype == ir.DataType.INT4 and name.endswith("_quantized")
    ]


def test_weights_lie_on_fifteen_levels_and_take_half_a_byte():
    model = graphs.cnn()[0]
    made = quantize(model, FOUR).model
    assert len(stored(made)) == 3
    weight, integers = array(model, "k1"), array(made, "k1_quantized")
    scale = array(made, "k1_scale")
    assert integers.astype(np.int8).min() >= -7 and integers.astype(np.int8).max() == 7
    np.testing.assert_allclose(scale, np.abs(weight).max(axis=(1, 2, 3)) / 7, rtol=1e-6)
    nearest = np.rint(weight / scale.reshape(-1, 1, 1, 1))
    np.testing.assert_array_equal(integers.astype(np.float32), nearest)
    tensor = made.graph.initializers["k1_quantized"].const_value
    assert tensor.nbytes == weight.size / 2


def test_four_bits_cost_accuracy_and_the_better_roundings_less():
    model = graphs.cnn()[0]
    eight = sqnr(model, quantize(model).model)
    nearest = sqnr(model, quantize(model, FOUR).model)
    better = sqnr(model, quantize(model, QuantizeStatic(weight_bits=4)).model)
    assert nearest + 3 < eight and nearest < better


@pytest.mark.parametrize("weight", ["int8", "uint8"])
def test_lowered_they_run_in_integer_kernels_and_stay_small(weight):
    target = static_int8.target(weight=weight)
    model = graphs.cnn()[0]
    result = quantize(model, FOUR, target)
    made = result.model
    assert result.findings == ()  # nothing runs in float
    lowered = Lower().run(made.clone(), graphs.context(model, target)).model
    kernels = static_int8.kernels(lowered)
    assert kernels.count("QLinearConv") == 2 and "Conv" not in kernels
    assert len(stored(lowered)) == 3
    x = graphs.feed(1, 4, 12, 12)
    plain = graphs.run(made, optimized=False, x=x)[0]
    np.testing.assert_allclose(graphs.run(lowered, x=x)[0], plain, atol=0.02)


def test_recover_trains_them_and_the_lock_repeats_it():
    reference = graphs.cnn()[0]
    context = graphs.context(reference, static_int8.target(), calibration=samples(reference, 16))
    made = FOUR.run(reference.clone(), context).model
    chosen = Recover(steps=20, rate=0.05)
    result = chosen.run(made.clone(), context)
    assert any(name in result.decisions["changes"] for name in stored(made))
    assert stored(result.model) == stored(made)
    locked = dataclasses.replace(context, lock=result.decisions, calibration=None)
    assert graph_bytes(chosen.run(made.clone(), locked).model) == graph_bytes(result.model)


def test_differences_of_packed_integers_are_exact():
    before = quantize(graphs.cnn()[0], FOUR).model
    after = before.clone()
    value = after.graph.initializers["k1_quantized"]
    integers = value.const_value.numpy().astype(np.int8)
    moved = np.where(integers < 7, integers + 1, -7).astype(value.const_value.numpy().dtype)
    value.const_value = ir.tensor(moved, dtype=ir.DataType.INT4, name=value.name)
    changes = differences(before, after)
    assert list(changes) == ["k1_quantized"]
    apply_differences(before, changes)
    assert graph_bytes(before) == graph_bytes(after)


def test_decisions_replay_without_data():
    model = graphs.cnn()[0]
    chosen = QuantizeStatic(weight_bits=4, clip_weights=True)
    first = quantize(model, chosen)
    again = quantize(model, chosen, calibration=None, lock=first.decisions)
    assert graph_bytes(again.model) == graph_bytes(first.model)


def test_other_numbers_of_bits_and_old_opsets_are_refused():
    with pytest.raises(PassError, match="weight_bits is 5, expected 4 or 8"):
        QuantizeStatic(weight_bits=5)
    old = graphs.graph(
        "net (float[n, 8] x) => (float[n, 8] y) { y = MatMul (x, w) }",
        {"w": graphs.weight(8, 8)},
        opset=19,
    )
    with pytest.raises(PassError, match="opset 19; weights of 4 bits need 21"):
        quantize(old, FOUR)
