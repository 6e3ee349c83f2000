"""Weight-only products of an attention's queries, keys and values become one, with its results."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes import Context, QuantizeWeights
from edgec.passes.execution import graph_bytes, open_session
from edgec.passes.join_products import join_products
from edgec.passes.lower_weights import lower_weights
from edgec.targets import load_target

TARGET = load_target("x86-64")
# queries of two heads of 16, keys and values of one; two of the three have biases
GRAPH = """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
g (float[B,S,64] x, float[B,1,P,16] past_key, float[B,1,P,16] past_value, int32[B] last,
   int32[1] total) => (float[B,S,32] a, float[B,1,T,16] key, float[B,1,T,16] value)
{
    p = MatMul(x, wq)
    q = Add(p, rq)
    r = MatMul(x, wk)
    k = Add(rk, r)
    v = MatMul(x, wv)
    a, key, value = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1>
        (q, k, v, past_key, past_value, last, total)
}"""
WIDTHS = {"wq": 32, "wk": 16, "wv": 16}


def model(*changes: tuple[str, str]) -> ir.Model:
    text = GRAPH
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    made = ir.from_onnx_text(text)
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal((64, width)) / 4 for name, width in WIDTHS.items()}
    arrays |= {"rq": random.standard_normal(32), "rk": random.standard_normal(16)}
    for name, array in arrays.items():
        value = next(v for n in made.graph for v in n.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array.astype(np.float32), name=name)
        value.shape = ir.Shape(array.shape)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        made.graph.register_initializer(value)
    for node in made.graph:
        for value in node.outputs:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    return made


def lowered(source: ir.Model, **settings) -> ir.Model:
    given = Context(TARGET, source)
    wanted = QuantizeWeights(block_size=32, min_weights=1, **settings)
    return lower_weights(wanted.run(source.clone(), given).model, given).model


def joined(apart: ir.Model) -> ir.Model:
    return join_products(apart.clone(), Context(TARGET, apart)).model


def ops(made: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in made.graph)


def outputs(made: ir.Model, rows: int) -> list[np.ndarray]:
    past = np.random.default_rng(9).standard_normal((1, 1, 3, 16)).astype(np.float32)
    feeds = {
        "x": np.random.default_rng(rows).standard_normal((1, rows, 64)).astype(np.float32),
        "past_key": past,
        "past_value": past[:, :, ::-1].copy(),
        "last": np.array([2 + rows], np.int32),
        "total": np.array([3 + rows], np.int32),
    }
    return open_session(made, optimized=False).run(None, feeds)


def assert_same(apart: ir.Model, other: ir.Model, rows: int) -> None:
    for old, new in zip(outputs(apart, rows), outputs(other, rows), strict=True):
        assert old.shape == new.shape
        # the kernel may add a bias before it rounds the sum, not the other way round
        assert np.abs(old - new).max() <= 1e-5 * np.abs(old).max()


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [4, 8])
def test_queries_keys_and_values_become_one_product_with_the_same_numbers(bits, scheme, rows):
    apart = lowered(model(), bits=bits, scheme=scheme)
    result = join_products(apart.clone(), Context(TARGET, apart))
    assert ops(apart) == {"MatMulNBits": 3, "Add": 2, "GroupQueryAttention": 1}
    assert ops(result.model) == {"MatMulNBits": 1, "GroupQueryAttention": 1}
    assert result.changed == 5
    assert_same(apart, result.model, rows)


def test_outputs_keep_names_and_shapes_and_a_second_run_finds_nothing():
    apart = lowered(model(), bits=4)
    made = joined(apart)
    told = [[(v.name, str(v.shape), v.dtype) for v in m.graph.outputs] for m in (apart, made)]
    assert told[0] == told[1]
    again = join_products(made.clone(), Context(TARGET, made))
    assert again.changed == 0 and graph_bytes(again.model) == graph_bytes(made)
    weights = [v.name for v in made.graph.initializers.values() if v.dtype == ir.DataType.UINT8]
    assert len(weights) == 1  # what was joined is stored once


def test_one_without_zero_points_gets_the_kernels_default():
    source = model()
    value = source.graph.initializers["wq"]  # symmetric by nature: no zero point is stored
    value.const_value = ir.tensor(np.tile([[7.0], [-8.0]], (32, 32)).astype(np.float32), name="wq")
    apart = lowered(source, bits=4, scheme="asymmetric")
    first = next(n for n in apart.graph if n.op_type == "MatMulNBits")
    first.resize_inputs(3)  # as if its zero points were the default
    made = joined(apart)
    assert ops(made)["MatMulNBits"] == 1
    assert_same(apart, made, 3)


def test_other_formats_and_other_inputs_stay_apart():
    apart = lowered(model(), bits=4)
    first = next(n for n in apart.graph if n.op_type == "MatMulNBits")
    first.attributes.add(ir.AttrInt64("accuracy_level", 0))
    assert ops(joined(apart))["MatMulNBits"] == 3
    turned = lowered(model(("v = MatMul(x, wv)", "y = Neg(x) v = MatMul(y, wv)")), bits=4)
    assert ops(joined(turned))["MatMulNBits"] == 3


def test_products_without_an_attention_stay_apart():
    gated = (
        "a, key, value = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1>\n"
        "        (q, k, v, past_key, past_value, last, total)",
        "a = Identity(q) key = Mul(k, v) value = Identity(v)",
    )
    made = joined(lowered(model(gated), bits=4))
    assert ops(made)["MatMulNBits"] == 3 and not ops(made)["Add"]  # biases go in all the same


def test_a_weight_that_something_else_reads_stays():
    apart = lowered(model(), bits=4)
    first = next(n for n in apart.graph if n.op_type == "MatMulNBits")
    reader = ir.node("Identity", [first.inputs[1]])
    reader.outputs[0].name = "packed"
    reader.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
    apart.graph.append(reader)
    apart.graph.outputs.append(reader.outputs[0])
    assert ops(joined(apart))["MatMulNBits"] == 3
