"""Attention over many keys in int8, against float32 and against the same arithmetic by hand."""

import dataclasses

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes import QuantizeDynamic
from edgec.passes.execution import graph_bytes, optimized_graph, sqnr_db
from edgec.passes.integer_attention import _block
from edgec.targets import load_target

HEADS, SIZE = 2, 16


def attention(queries: int | str = 96, keys: int | str = 64, masked: bool = False) -> ir.Model:
    scores = "Add (x, mask)" if masked else "Mul (x, one)"
    return graphs.graph(
        f"""attention (float[n, {HEADS}, {queries}, {SIZE}] q, float[n, {HEADS}, {SIZE}, {keys}] k,
                       float[n, {HEADS}, {keys}, {SIZE}] v, float[1, 1, 1, {keys}] mask)
            => (float[n, {HEADS}, {queries}, {SIZE}] y) {{
            s = MatMul (q, k)
            x = Mul (s, scale)
            m = {scores}
            p = Softmax <axis = -1> (m)
            [attend] y = MatMul (p, v)
        }}""",
        {"scale": np.array(SIZE**-0.5, np.float32), "one": np.array(1, np.float32)},
    )


def feeds(queries: int = 96, keys: int = 64, batch: int = 1, spread: float = 1.0):
    """spread: how much the scores differ."""
    return {
        "q": graphs.feed(batch, HEADS, queries, SIZE, seed=1) * np.float32(spread),
        "k": graphs.feed(batch, HEADS, SIZE, keys, seed=2),
        "v": graphs.feed(batch, HEADS, keys, SIZE, seed=3) + np.float32(0.5),
        "mask": np.zeros((1, 1, 1, keys), np.float32),
    }


def target(keys: int = 64):
    given = load_target("x86-64")
    return dataclasses.replace(given, int8=dataclasses.replace(given.int8, attention_keys=keys))


def quantized(model: ir.Model, keys: int = 64, **parameters):
    return QuantizeDynamic(**parameters).run(model.clone(), graphs.context(model, target(keys)))


def by_hand(q, k, v):
    """One head: [queries, size], [size, keys], [keys, size]."""
    low, high = min(q.min(), 0), max(q.max(), 0)
    q_scale = (high - low) / np.float32(255)
    zero = np.rint(-low / q_scale)
    q8 = np.clip(np.rint(q / q_scale) + zero, 0, 255) - zero
    k_scale, v_scale = np.abs(k).max() / 127, np.abs(v).max() / 127
    x = q8 @ np.rint(k / k_scale) * (q_scale * k_scale * SIZE**-0.5)
    p = np.exp(x - x.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p_scale = p.max(axis=1, keepdims=True) / 255
    return np.rint(p / p_scale) @ np.rint(v / v_scale) * (p_scale * v_scale)


def test_it_is_the_integer_arithmetic_by_hand():
    model, given = attention(), feeds()
    result = quantized(model)
    assert result.changed == 1 and result.touched == ("y",)
    (actual,) = graphs.run(result.model, **given)
    heads = [by_hand(*(given[name][0, h] for name in "qkv")) for h in range(HEADS)]
    # one level of 255 more or less where a quotient lies between two of them
    np.testing.assert_allclose(actual[0], np.stack(heads), atol=1e-3)
    assert not {"Softmax", "MatMul"} & {node.op_type for node in result.model.graph}


@pytest.mark.parametrize("spread", [1e-3, 1.0, 20.0])
def test_even_and_sharp_attention_keep_their_decibels(spread):
    """With one scale for all rows even attention over 1,000 keys would be lost: 0 dB."""
    model, given = attention(128, 1000), feeds(128, 1000, spread=spread)
    (expected,), (actual,) = (graphs.run(m, **given) for m in (model, quantized(model).model))
    # 8 bits of all four operands; scores of 80 are off by a tenth
    assert sqnr_db(expected, actual) > 25


def test_queries_in_blocks_and_a_batch_give_the_same_as_alone():
    model = attention(1024, 64)
    result, given = quantized(model).model, feeds(1024, 64, batch=3)
    (together,) = graphs.run(result, **given)
    for row in range(3):
        alone = {n: a if n == "mask" else a[row : row + 1] for n, a in given.items()}
        np.testing.assert_array_equal(graphs.run(result, **alone)[0][0], together[row])
    (expected,) = graphs.run(model, **given)
    assert sqnr_db(expected, together) > 28
    assert graphs.operators(result).count("Scan") == 2  # heads, and blocks of their queries


def test_blocks_divide_the_queries_or_are_all_of_them():
    assert [_block(n) for n in (96, 512, 1500, 1024, 577)] == [96, 512, 500, 512, 577]


def test_zeros_stay_zeros():
    model, given = attention(), feeds()
    for name in ("k", "v"):
        zeros = {**given, name: np.zeros_like(given[name])}
        (expected,), (actual,) = (graphs.run(m, **zeros) for m in (model, quantized(model).model))
        np.testing.assert_allclose(actual, expected, atol=0.02)  # of values up to 4


def test_onnx_runtime_computes_both_products_in_one_node_each():
    found = graphs.operators(optimized_graph(quantized(attention()).model))
    products = [op for op in found if "MatMul" in op]
    assert sorted(products) == ["DynamicQuantizeMatMul", "MatMulIntegerToFloat"]


@pytest.mark.parametrize(
    "model",
    [attention(masked=True), attention("t"), attention(96, "t"), attention(96, 48)],
    ids=["mask", "open queries", "open keys", "few keys"],
)
def test_other_attention_stays_float(model):
    assert quantized(model).changed == 0


def test_it_can_be_left_out():
    model = attention()
    assert quantized(model, attention=False).changed == 0
    result = quantized(model, skip=("attend",))
    assert result.changed == 0
    assert "named in skip" in {skip.reason for skip in result.skipped}
    assert quantized(model, keys=0).changed == 0  # the target never gains
    assert load_target("arm64").int8.attention_keys == 0
    assert load_target("x86-64").int8.attention_keys == 512


def test_its_error_is_measured_with_that_of_the_products():
    model = attention()
    context = graphs.context(model, target(), calibration=[feeds()])
    result = QuantizeDynamic().run(model.clone(), context)
    assert result.sensitivity.keys() == {"attend"} and 28 < result.sensitivity["attend"] < 60
    again = graphs.context(model, target(), lock=result.decisions)
    assert graph_bytes(QuantizeDynamic().run(model.clone(), again).model) == graph_bytes(
        result.model
    )
