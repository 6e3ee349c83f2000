"""Static int8 of products of two activations: the scheme by hand, and where it applies."""

from __future__ import annotations

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from static_int8 import array, quantize, target

from edgec.passes import Cleanup, QuantizeStatic, Result
from edgec.passes.execution import graph_bytes, sqnr_db
from edgec.targets import load_target

PAYS = target(activation_products=True)
TEXT = "g (float[2, 5, 16] a, float[2, 16, 7] b) => (float[2, 5, 7] y) { [mix] y = MatMul (a, b) }"
RNG = np.random.default_rng(0)


def feeds(low: float) -> list[dict[str, np.ndarray]]:
    """Samples for TEXT; ``a`` has no number below ``low``."""
    return [
        {
            "a": np.maximum(RNG.standard_normal((2, 5, 16)), low).astype(np.float32),
            "b": RNG.standard_normal((2, 16, 7)).astype(np.float32),
        }
        for _ in range(8)
    ]


def node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def test_factors_are_signed_without_a_zero_point() -> None:
    given = feeds(-9.0)
    made = quantize(graphs.graph(TEXT, {}), on=PAYS, calibration=given).model
    integers, scales = {}, {}
    for name in ("a", "b"):
        largest = max(np.abs(each[name]).max() for each in given)
        scales[name] = array(made, f"{name}_scale")
        assert scales[name] == np.float32(largest / 127)
        zero = array(made, f"{name}_zero_point")
        assert zero.dtype == np.int8 and zero == 0
        exact = np.clip(np.rint(given[0][name] / scales[name]), -128, 127)
        integers[name] = exact.astype(np.int32)
    expected = np.matmul(integers["a"], integers["b"]) * (scales["a"] * scales["b"])
    np.testing.assert_allclose(graphs.run(made, **given[0])[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["uint8", "int8"])
def test_factors_without_negative_numbers_stay_unsigned(activation: str) -> None:
    given, on = feeds(0.0), target(activation_products=True, activation=activation)
    made = quantize(graphs.graph(TEXT, {}), on=on, calibration=given).model
    zero = array(made, "a_zero_point")
    assert zero.dtype == np.uint8 and zero == 0
    # the whole range: what attends most is not cut off
    assert array(made, "a_scale") == np.float32(max(each["a"].max() for each in given) / 255)


def test_they_stay_float_where_they_do_not_pay() -> None:
    model = graphs.graph(TEXT, {})
    result = quantize(model, on=target(), calibration=feeds(-9.0))
    assert result.changed == 0 and result.skipped[0].reason == "weight is not constant"
    assert load_target("x86-64-openvino").int8.activation_products
    assert not load_target("x86-64").int8.activation_products


def attention(chosen: QuantizeStatic, **rest: object) -> tuple[ir.Model, Result, list[dict]]:
    """A transformer block on the target for which products of activations pay."""
    model, _ = graphs.transformer()
    on = load_target("x86-64-openvino")
    ids = [{"ids": np.random.default_rng(i).integers(0, 50, (2, 9))} for i in range(16)]
    context = graphs.context(model, on, calibration=ids, **rest)
    clean = Cleanup().run(model.clone(), context).model
    return model, chosen.run(clean, context), ids


def test_an_attention_block_is_quantized_throughout() -> None:
    model, result, ids = attention(QuantizeStatic())
    for name in ("scores", "mix"):
        sources = [value.producer() for value in node(result.model, name).inputs]
        assert [source.op_type for source in sources] == ["DequantizeLinear"] * 2
    shares = node(result.model, "mix").inputs[0].producer()
    assert shares.inputs[0].dtype == ir.DataType.UINT8
    assert not result.findings
    pairs = [(graphs.run(model, **f)[0], graphs.run(result.model, **f)[0]) for f in ids[-4:]]
    assert sqnr_db(*(np.stack(side) for side in zip(*pairs, strict=True))) > 25


def test_a_named_product_stays_float_and_locks_replay() -> None:
    chosen = QuantizeStatic(skip=("scores",))
    _, result, _ = attention(chosen)
    assert node(result.model, "scores").inputs[1].producer().op_type != "DequantizeLinear"
    assert node(result.model, "mix").inputs[1].producer().op_type == "DequantizeLinear"
    _, again, _ = attention(chosen, lock=result.decisions)
    assert graph_bytes(again.model) == graph_bytes(result.model)


@pytest.mark.parametrize("wide", ["uint16", "int16"])
def test_sixteen_bits_keep_their_type(wide: str) -> None:
    given = feeds(-9.0)
    on = target(activation_products=True, activation=wide)
    made = quantize(graphs.graph(TEXT, {}), on=on, calibration=given).model
    assert str(array(made, "a_zero_point").dtype) == wide
