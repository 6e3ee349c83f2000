"""HardSwish between quantizations: it runs in integers, within a step of the float form."""

from __future__ import annotations

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes.execution import optimized_graph
from edgec.passes.gates import quantize_gates


def gated(op_type: str = "HardSwish", *, dtype: str = "uint8", zero: int = 110) -> ir.Model:
    """uint8 or int8 [1, 8, 4, 4] -> dequantized, activated, quantized again."""
    text = f"""g ({dtype}[1, 8, 4, 4] q) => ({dtype}[1, 8, 4, 4] y) {{
        [dq] x = DequantizeLinear (q, sx, zx)
        [act] a = {op_type} (x)
        [q] y = QuantizeLinear (a, sy, zy)
    }}"""
    low = 0 if dtype == "uint8" else -128
    weights = {
        "sx": np.array(0.06, np.float32),
        "zx": np.array(zero + low, dtype),
        "sy": np.array(0.035, np.float32),
        "zy": np.array(11 + low, dtype),
    }
    return graphs.graph(text, weights)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("start", [0, 128])
def test_the_integer_form_is_within_one_step_of_the_float_form(dtype: str, start: int) -> None:
    model = gated(dtype=dtype)
    q = np.roll(np.arange(256, dtype=np.uint8), -start)[:128].view(dtype).reshape(1, 8, 4, 4)
    expected = graphs.run(model, q=q)[0].astype(int)
    assert quantize_gates(model.graph) == 1
    actual = graphs.run(model, q=q)[0].astype(int)
    # the gate has 8 bits: an error of 1 / 510 of at most 3, less than a fifth of a step
    assert np.abs(actual - expected).max() <= 1
    assert np.abs(actual - expected).mean() < 0.1


def test_the_runtime_executes_it_with_integer_kernels_alone() -> None:
    model = gated()
    quantize_gates(model.graph)
    found = {node.op_type for node in optimized_graph(model).graph}
    assert found == {"QLinearAdd", "QLinearMul"}


def test_the_value_keeps_its_name() -> None:
    model = gated()
    quantize_gates(model.graph)
    names = {v.name for node in model.graph for v in node.outputs}
    assert {"x", "a", "y"} <= names


def test_other_activations_and_float_readers_are_left_alone() -> None:
    assert quantize_gates(gated("Softplus").graph) == 0
    text = """g (uint8[1, 8] q) => (float[1, 8] a) {
        x = DequantizeLinear (q, s, z)
        a = HardSwish (x)
    }"""
    weights = {"s": np.array(0.06, np.float32), "z": np.array(110, np.uint8)}
    assert quantize_gates(graphs.graph(text, weights).graph) == 0
