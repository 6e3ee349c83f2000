"""A decoder's output layer reads the positions that are asked for."""

from __future__ import annotations

import decoders
import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes import Context
from edgec.passes.execution import graph_bytes
from edgec.passes.lower_logits import lower_logits
from edgec.targets import load_target
from edgec_runtime.generation import LOGITS_FROM

TARGET = load_target("x86-64")
GRAPH = """<ir_version: 10, opset_import: ["" : 21]>
g (int64[B,S] input_ids, int64[B,T] attention_mask, float[B,2,P,8] past_key)
    => (float[B,S,32] logits, float[B,2,T,8] present_key)
<int64[4] split = {0, 0, 2, 8}, float half = {0.5}, float cap = {2.0}> {
    h = Gather(table, input_ids)
    s = Reshape(h, split)
    t = Transpose<perm = [0, 2, 1, 3]>(s)
    present_key = Concat<axis = 2>(past_key, t)
    l = MatMul(h, head)
    d = Mul(l, half)
    n = Tanh(d)
    logits = Mul(n, cap)
}"""


def model(*changes: tuple[str, str]) -> ir.Model:
    text = GRAPH
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    made = ir.from_onnx_text(text)
    random = np.random.default_rng(0)
    for name, shape in {"table": (32, 16), "head": (16, 32)}.items():
        value = next(v for n in made.graph for v in n.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(random.standard_normal(shape).astype(np.float32), name=name)
        value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        made.graph.register_initializer(value)
    for node in made.graph:
        if node.outputs[0].name in ("h", "l"):
            node.outputs[0].shape = ir.Shape(["B", "S", 16 if node.outputs[0].name == "h" else 32])
    for value in (*made.graph.inputs, *made.graph.outputs):
        if "key" in str(value.name):
            prefix = "past_key_values" if str(value.name).startswith("past") else "present"
            value.name = f"{prefix}.0.key"
    return made


def feeds(tokens: int = 5) -> dict[str, np.ndarray]:
    return {
        "input_ids": np.arange(2 * tokens).reshape(2, tokens),
        "attention_mask": np.ones((2, tokens), np.int64),
        "past_key_values.0.key": np.zeros((2, 2, 0, 8), np.float32),
    }


def test_all_positions_by_default_and_the_last_one_if_told():
    source = model()
    result = lower_logits(source.clone(), Context(TARGET, source))
    assert result.changed == 1
    (expected, keys) = decoders.open_session(source).run(None, feeds())
    emitted = result.model  # an input with a default, as in a bundle
    emitted.graph.inputs.append(emitted.graph.initializers[LOGITS_FROM])
    session = decoders.open_session(emitted)
    assert [value.name for value in session.get_overridable_initializers()] == [LOGITS_FROM]
    for given, kept in (({}, slice(None)), ({LOGITS_FROM: np.array([-1])}, slice(4, 5))):
        logits, present = session.run(None, {**feeds(), **given})
        np.testing.assert_allclose(logits, expected[:, kept], rtol=1e-6)
        np.testing.assert_array_equal(present, keys)


@pytest.mark.parametrize(
    "change",
    [
        ("n = Tanh(d)", "n = Softmax<axis = 1>(d)"),  # mixes positions
        ("logits = Mul(n, cap)", "logits = Mul(n, d)"),  # two values of all positions
        ("l = MatMul(h, head)", "w = Unsqueeze(head, zero) l = MatMul(h, w)"),
        ("input_ids, int64[B,T] attention_mask", "tokens, int64[B,T] attention_mask"),
    ],
    ids=["mixes", "two", "batched weights", "no decoder"],
)
def test_other_graphs_stay(change):
    changes = [change, ("float half = {0.5}", "int64[1] zero = {0}, float half = {0.5}")]
    if "tokens" in change[1]:
        changes.append(("Gather(table, input_ids)", "Gather(table, tokens)"))
    source = model(*changes)
    for node in source.graph:
        if node.op_type == "Unsqueeze":
            node.outputs[0].shape = ir.Shape([1, 16, 32])
    result = lower_logits(source.clone(), Context(TARGET, source))
    assert result.changed == 0 and graph_bytes(result.model) == graph_bytes(source)


def test_a_second_run_finds_nothing():
    source = model()
    once = lower_logits(source.clone(), Context(TARGET, source)).model
    again = lower_logits(once.clone(), Context(TARGET, once))
    assert again.changed == 0 and graph_bytes(again.model) == graph_bytes(once)
