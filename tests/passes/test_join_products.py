"""Weight-only products of one input become one, and give what they gave."""

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
# three products of x, of which two have biases; one of y
GRAPH = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N,64] x, float[N,64] y) => (float[N,32] a, float[N,48] b, float[N,16] c, float[N,16] d)
{
    p = MatMul(x, wa)
    a = Add(p, ra)
    q = MatMul(x, wb)
    b = Add(rb, q)
    c = MatMul(x, wc)
    d = MatMul(y, wd)
}"""
WIDTHS = {"wa": 32, "wb": 48, "wc": 16, "wd": 16}


def model(seed: int = 0) -> ir.Model:
    made = ir.from_onnx_text(GRAPH)
    random = np.random.default_rng(seed)
    arrays = {name: random.standard_normal((64, width)) for name, width in WIDTHS.items()}
    arrays |= {"ra": random.standard_normal(32), "rb": random.standard_normal(48)}
    for name, array in arrays.items():
        value = next(v for n in made.graph for v in n.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array.astype(np.float32), name=name)
        value.shape = ir.Shape(array.shape)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        made.graph.register_initializer(value)
    return made


def lowered(source: ir.Model, **settings) -> ir.Model:
    given = Context(TARGET, source)
    wanted = QuantizeWeights(block_size=32, min_weights=1, **settings)
    return lower_weights(wanted.run(source.clone(), given).model, given).model


def ops(made: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in made.graph)


def outputs(made: ir.Model, rows: int) -> list[np.ndarray]:
    random = np.random.default_rng(rows)
    feeds = {name: random.standard_normal((rows, 64)).astype(np.float32) for name in "xy"}
    return open_session(made, optimized=False).run(None, feeds)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_of_one_input_become_one_with_the_same_numbers(bits, scheme, rows):
    apart = lowered(model(), bits=bits, scheme=scheme)
    result = join_products(apart.clone(), Context(TARGET, apart))
    found = ops(result.model)
    assert ops(apart)["MatMulNBits"] == 4 and ops(apart)["Add"] == 2
    assert found == {"MatMulNBits": 2, "Split": 1} and result.changed == 5
    for old, new in zip(outputs(apart, rows), outputs(result.model, rows), strict=True):
        assert old.shape == new.shape
        # the kernel may add a bias before it rounds the sum, not the other way round
        assert np.abs(old - new).max() <= 1e-5 * np.abs(old).max()


def test_outputs_keep_names_and_shapes_and_a_second_run_finds_nothing():
    apart = lowered(model(), bits=4)
    joined = join_products(apart.clone(), Context(TARGET, apart)).model
    told = [[(v.name, str(v.shape), v.dtype) for v in m.graph.outputs] for m in (apart, joined)]
    assert told[0] == told[1]
    again = join_products(joined.clone(), Context(TARGET, joined))
    assert again.changed == 0 and graph_bytes(again.model) == graph_bytes(joined)
    weights = [v.name for v in joined.graph.initializers.values() if v.dtype == ir.DataType.UINT8]
    assert len(weights) == 2  # what was joined is stored once


def test_one_without_zero_points_gets_the_kernels_default():
    source = model()
    value = source.graph.initializers["wa"]  # symmetric by nature: no zero point is stored
    value.const_value = ir.tensor(np.tile([[7.0], [-8.0]], (32, 32)).astype(np.float32), name="wa")
    apart = lowered(source, bits=4, scheme="asymmetric")
    products = [n for n in apart.graph if n.op_type == "MatMulNBits"]
    for node in products[:1]:
        node.resize_inputs(3)  # as if its zero points were the default
    joined = join_products(apart.clone(), Context(TARGET, apart)).model
    for old, new in zip(outputs(apart, 3), outputs(joined, 3), strict=True):
        assert np.abs(old - new).max() <= 1e-5 * np.abs(old).max()


def test_other_formats_stay_apart():
    apart = lowered(model(), bits=4)
    first = next(n for n in apart.graph if n.op_type == "MatMulNBits")
    first.attributes.add(ir.AttrInt64("accuracy_level", 0))
    found = ops(join_products(apart.clone(), Context(TARGET, apart)).model)
    assert found["MatMulNBits"] == 3 and found["Split"] == 1


def test_a_weight_that_something_else_reads_stays():
    apart = lowered(model(), bits=4)
    first = next(n for n in apart.graph if n.op_type == "MatMulNBits")
    reader = ir.node("Identity", [first.inputs[1]])
    reader.outputs[0].name = "packed"
    reader.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
    apart.graph.append(reader)
    apart.graph.outputs.append(reader.outputs[0])
    found = ops(join_products(apart.clone(), Context(TARGET, apart)).model)
    assert found["MatMulNBits"] == 3 and found["Split"] == 1
