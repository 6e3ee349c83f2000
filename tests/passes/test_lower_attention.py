"""Attention and RMSNorm become the runtime's operators where that is proven, and only there."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgec.passes.contract import Context, Feeds
from edgec.passes.equivalence import largest_error, padded_variants
from edgec.passes.execution import graph_bytes, run_values
from edgec.passes.lower_attention import lower_attention
from edgec.passes.lower_norm import lower_norm
from edgec.passes.matching import bypass_identities
from edgec.targets import load_target

FLOAT_NOISE = 1e-5  # the kernels sum in another order

# 2 heads of size 4; the projections are inputs, so that a mistake in the order shows
ATTENTION = """g (float[B,S,8] q, float[B,S,8] k, float[B,S,8] v, int64[B,S] attention_mask)
    => (float[B,S,8] y)
<int64[4] split = {0, 0, 2, 4}, int64[3] merge = {0, 0, 8}, float root = {2.0}, float one = {1.0},
 float low = {-3.4028235e38}, int64[2] axes = {1, 2},
 float[B,2,S,4] qh, float[B,2,4,S] kh, float[B,2,S,4] vh, float[B,1,1,S] bias, float[B,S,8] y0> {
    c = Cast<to = 1>(attention_mask)
    i = Sub(one, c)
    w = Mul(i, low)
    bias = Unsqueeze(w, axes)
    q4 = Reshape(q, split)
    qh = Transpose<perm = [0, 2, 1, 3]>(q4)
    k4 = Reshape(k, split)
    kh = Transpose<perm = [0, 2, 3, 1]>(k4)
    v4 = Reshape(v, split)
    vh = Transpose<perm = [0, 2, 1, 3]>(v4)
    qk = MatMul(qh, kh)
    scaled = Div(qk, root)
    SCORES
    p = Softmax<axis = -1>(scores)
    o = MatMul(p, vh)
    m = Transpose<perm = [0, 2, 1, 3]>(o)
    y0 = Reshape(m, merge)
    y = Relu(y0)
}"""


MIXED = "q5 = Reshape(q, wrong)"


class Batches(list):
    """Samples for tests: a list of feeds."""


def attention(scores: str = "scores = Add(scaled, bias)", **replace: str) -> ir.Model:
    text = ATTENTION.replace("SCORES", scores)
    for old, new in replace.items():
        text = text.replace(old, new)
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')


def context_for(model: ir.Model, *, samples: list[Feeds] | None = None, **fields) -> Context:
    calibration = None if samples is None else Batches(samples)
    return Context(load_target("x86-64"), model, calibration=calibration, **fields)


def feeds(batch: int = 2, length: int = 6) -> Feeds:
    random = np.random.default_rng(3)
    arrays = {n: random.standard_normal((batch, length, 8)).astype(np.float32) for n in "qkv"}
    return {**arrays, "attention_mask": np.ones((batch, length), np.int64)}


def contrib_context(model: ir.Model) -> Context:
    """A target whose runtime has MultiHeadAttention and no standard Attention."""
    target = dataclasses.replace(load_target("x86-64"), kernels=("MultiHeadAttention",))
    return dataclasses.replace(context_for(model), target=target)


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_masked_attention_becomes_one_node_and_computes_the_same_on_padded_batches():
    model = attention()
    result = lower_attention(model.clone(), context_for(model))
    assert result.changed == 1 and "Softmax" not in op_types(result.model)
    node = next(n for n in result.model.graph if n.op_type == "Attention")
    assert node.domain == "" and node.outputs[0].name == "y0"
    assert result.model.opset_imports == {"": 23}
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    assert largest_error(model, result.model, padded_variants(model, feeds())) < FLOAT_NOISE


def test_the_mask_cannot_make_denormals_in_the_exponential():
    model = attention()
    lowered = lower_attention(model.clone(), context_for(model)).model
    node = next(n for n in lowered.graph if n.op_type == "Attention")
    given = dict(feeds())
    given["attention_mask"] = np.array([[1, 1, 0, 0, 0, 0]] * 2)
    ((mask,),) = [v.values() for v in run_values(lowered, [node.inputs[3].name], [given])]
    assert mask.min() == -60.0  # exp(-60) is a normal float32; of -3.4e38 it is given as 1e-45
    assert mask.max() == 0.0
    assert largest_error(model, lowered, [given]) < FLOAT_NOISE


def test_a_target_without_standard_attention_gets_multi_head_attention():
    model = attention()
    result = lower_attention(model.clone(), contrib_context(model))
    assert result.changed == 1 and "Softmax" not in op_types(result.model)
    node = next(n for n in result.model.graph if n.op_type == "MultiHeadAttention")
    assert node.domain == "com.microsoft" and node.outputs[0].name == "y0"
    assert result.model.opset_imports == {"": 21, "com.microsoft": 1}
    assert str(node.outputs[0].shape) == "[B,S,8]"  # a contrib op's shape is never inferred
    assert largest_error(model, result.model, padded_variants(model, feeds())) < FLOAT_NOISE


def test_attention_without_a_mask_becomes_one_node():
    model = attention("scores = Identity(scaled)").clone()
    next(n for n in model.graph if n.op_type == "Softmax").replace_input_with(
        0, next(n for n in model.graph if n.op_type == "Div").outputs[0]
    )
    result = lower_attention(model.clone(), context_for(model))
    assert result.changed == 1
    assert largest_error(model, result.model, [feeds()]) < FLOAT_NOISE


def test_a_scale_on_both_sides_is_collected():
    model = attention().clone()
    for node in list(model.graph):
        if node.op_type == "MatMul" and node.outputs[0].name == "qk":
            for index in (0, 1):
                factor = ir.Value(name=f"f{index}", const_value=ir.tensor(np.float32(0.3)))
                model.graph.register_initializer(factor)
                scaled = ir.node("Mul", [node.inputs[index], factor])
                scaled.outputs[0].shape = node.inputs[index].shape
                model.graph.insert_before(node, scaled)
                node.replace_input_with(index, scaled.outputs[0])
    result = lower_attention(model.clone(), context_for(model))
    assert result.changed == 1
    (fused,) = (n for n in result.model.graph if n.op_type == "Attention")
    assert fused.attributes.get_float("scale") == pytest.approx(0.3 * 0.3 / 2)


def test_a_match_that_computes_something_else_is_left_with_its_error():
    # queries split as [B, size, heads]: looks like attention, but mixes the heads
    model = attention(
        **{
            "q4 = Reshape(q, split)": f"{MIXED} q4 = Transpose<perm = [0, 1, 3, 2]>(q5)",
            "int64[3] merge": "int64[4] wrong = {0, 0, 4, 2}, int64[3] merge",
        }
    )
    result = lower_attention(model.clone(), contrib_context(model))
    assert result.changed == 0
    assert "MultiHeadAttention differs by" in result.skipped[0].reason
    assert graph_bytes(result.model) == graph_bytes(model)


def test_heads_made_in_another_way_are_taken_as_they_are():
    # the same mixed queries: right in split form, which asks nothing about their origin
    model = attention(
        **{
            "q4 = Reshape(q, split)": f"{MIXED} q4 = Transpose<perm = [0, 1, 3, 2]>(q5)",
            "int64[3] merge": "int64[4] wrong = {0, 0, 4, 2}, int64[3] merge",
        }
    )
    result = lower_attention(model.clone(), context_for(model))
    assert result.decisions == {"attention": {"o": "split"}}
    assert largest_error(model, result.model, padded_variants(model, feeds())) < FLOAT_NOISE


def test_only_the_false_one_of_two_matches_is_left():
    body = ATTENTION[ATTENTION.index("> {") + 3 : ATTENTION.rindex("}")]
    first = body.replace("SCORES", "scores = Add(scaled, bias)")
    again = re.sub(
        r"\b(q4|qh|k4|kh|v4|vh|qk|scaled|scores|p|o|m|y0|y)\b",
        r"\1_2",
        first[first.index("q4 =") :],
    )
    false = again.replace(
        "q4_2 = Reshape(q, split)", f"{MIXED} q4_2 = Transpose<perm = [0, 1, 3, 2]>(q5)"
    )
    header = ATTENTION[: ATTENTION.index("> {")]
    header = header.replace("(float[B,S,8] y)", "(float[B,S,8] y, float[B,S,8] y_2)")
    header = header.replace("int64[3] merge", "int64[4] wrong = {0, 0, 4, 2}, int64[3] merge")
    header += ", float[B,2,S,4] qh_2, float[B,2,4,S] kh_2, float[B,2,S,4] vh_2, float[B,S,8] y0_2"
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 21]>\n{header}> {{ {first} {false} }}'
    )
    result = lower_attention(model.clone(), contrib_context(model))
    assert result.decisions == {"attention": {"o": "merged"}}
    assert [skip.node for skip in result.skipped] == ["o_2"]
    assert largest_error(model, result.model, padded_variants(model, feeds())) < FLOAT_NOISE


def test_a_result_that_is_never_a_number_proves_nothing():
    model = attention()
    # 0 * -infinity: the mask is NaN where attended to
    model.graph.initializers["low"].const_value = ir.tensor(np.float32(-np.inf), name="low")
    result = lower_attention(model.clone(), context_for(model))
    assert result.changed == 0 and "differs by inf" in result.skipped[0].reason


def test_a_lock_is_followed_without_a_proof():
    model = attention()
    assert lower_attention(model.clone(), context_for(model, lock={"attention": {}})).changed == 0
    for form in ("merged", "split"):
        lock = {"attention": {"o": form}}
        result = lower_attention(model.clone(), context_for(model, lock=lock))
        assert result.changed == 1 and result.decisions == lock
        assert ("y0" in {n.outputs[0].name for n in result.model.graph}) and largest_error(
            model, result.model, padded_variants(model, feeds())
        ) < FLOAT_NOISE


def test_a_target_without_the_kernel_keeps_the_graph():
    model = attention()
    target = dataclasses.replace(load_target("x86-64"), kernels=())
    result = lower_attention(model.clone(), dataclasses.replace(context_for(model), target=target))
    assert result.changed == 0 and graph_bytes(result.model) == graph_bytes(model)


def test_a_classifiers_softmax_is_no_attention_and_says_why():
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]>'
        "g (float[N,8] x) => (float[N,8] y) { y = Softmax<axis = -1>(x) }"
    )
    result = lower_attention(model.clone(), context_for(model))
    assert result.changed == 0 and "no left factor of a MatMul" in result.skipped[0].reason


def test_a_second_run_changes_nothing():
    model = attention()
    first = lower_attention(model.clone(), context_for(model)).model
    second = lower_attention(first.clone(), context_for(model))
    assert second.changed == 0 and graph_bytes(second.model) == graph_bytes(first)


def test_calibration_feeds_are_used_where_there_are_some():
    model = attention()
    result = lower_attention(model.clone(), context_for(model, samples=[feeds(length=5)]))
    assert result.changed == 1


@pytest.mark.parametrize(
    "scores",
    [
        "attend = Cast<to = 9>(attention_mask) a4 = Unsqueeze(attend, axes) "
        "scores = Where(a4, scaled, low)",
        "s0 = Add(scaled, bias) scores = Identity(s0)",
        "row = Unsqueeze(bias, zero) r1 = Squeeze(row, zero) scores = Add(r1, scaled)",
    ],
    ids=["where", "identity", "operands swapped"],
)
def test_masks_of_other_exporters_are_understood(scores):
    text = {
        "int64[2] axes": "int64[1] zero = {0}, float[B,1,1,S] r1, bool[B,1,1,S] a4, int64[2] axes"
    }
    model = attention(scores, **text)
    bypass_identities(model)
    result = lower_attention(model.clone(), context_for(model))
    assert result.changed == 1, result.skipped
    assert largest_error(model, result.model, padded_variants(model, feeds())) < FLOAT_NOISE


def test_three_axes_as_nn_multihead_attention_writes_them():
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[6,S,4] q, float[6,T,4] k, float[6,T,4] v) => (float[6,S,4] y)
    <float half = {0.5}, float[6,4,T] kt, float[6,S,T] s, float[6,S,T] p> {
        kt = Transpose<perm = [0, 2, 1]>(k)
        scaled = Mul(q, half)
        s = MatMul(scaled, kt)
        p = Softmax<axis = -1>(s)
        y = MatMul(p, v)
    }"""
    model = ir.from_onnx_text(text)
    result = lower_attention(model.clone(), context_for(model))
    assert result.decisions == {"attention": {"y": "split"}}
    random = np.random.default_rng(1)
    shapes = {"q": (6, 5, 4), "k": (6, 7, 4), "v": (6, 7, 4)}
    arrays = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    assert largest_error(model, result.model, [arrays]) < FLOAT_NOISE


def test_a_scale_computed_from_the_size_of_a_head_is_read():
    root = (
        "sizes = Shape(qh) last = Gather(sizes, three) "
        "size = Cast<to = 1>(last) rt = Sqrt(size) scaled = Div(qk, rt)"
    )
    model = attention(
        **{"scaled = Div(qk, root)": root, "int64[2] axes": "int64 three = {3}, int64[2] axes"}
    )
    result = lower_attention(model.clone(), context_for(model))
    (node,) = (n for n in result.model.graph if n.op_type == "Attention")
    assert node.attributes.get_float("scale") == pytest.approx(0.5)
    assert largest_error(model, result.model, padded_variants(model, feeds())) < FLOAT_NOISE


def test_written_out_rms_norm_becomes_the_runtimes_operator():
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]>'
        "g (float[2,3,4] x) => (float[2,3,4] y) "
        "<float two = {2.0}, float eps = {0.00001}, int64[1] last = {-1}, "
        "float[4] gamma = {0.5, 1.0, 1.5, -2.0}> "
        "{ q = Pow(x, two) m = ReduceMean<keepdims = 1>(q, last) e = Add(m, eps) s = Sqrt(e) "
        "r = Reciprocal(s) n = Mul(x, r) y = Mul(gamma, n) }"
    )
    result = lower_norm(model.clone(), context_for(model))
    assert op_types(result.model) == ["SimplifiedLayerNormalization"] and result.changed == 1
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    assert largest_error(model, result.model, [{"x": x}]) < FLOAT_NOISE
    assert lower_norm(result.model, context_for(model)).changed == 0


def test_padded_variants_cover_both_sides():
    model = attention()
    single, right, left = (v["attention_mask"] for v in padded_variants(model, feeds(batch=1)))
    assert single.tolist() == [[1] * 6]
    assert right.tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]
    assert left.tolist() == [[1] * 6, [0, 0, 1, 1, 1, 1]]
