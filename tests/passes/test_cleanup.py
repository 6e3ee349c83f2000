"""Cleanup: what it removes, what it keeps, and that it never touches the signature."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes.cleanup import Cleanup
from edgec.passes.contract import Context, PassError
from edgec.passes.equivalence import largest_error
from edgec.passes.execution import graph_bytes
from edgec.passes.fuse import Fuse
from edgec.targets import load_target


def model_of(text: str, *, opset: int = 21, ir_version: int = 10) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>\n{text}')


def context_for(model: ir.Model) -> Context:
    return Context(load_target("x86-64"), model)


def clean(model: ir.Model):
    return Cleanup().run(model.clone(), context_for(model))


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for graph in model.graphs() for node in graph]


RELU = "g (float[2,3] x) => (float[2,3] y) { y = Relu(x) }"


def test_a_clean_graph_comes_back_byte_equal():
    first = clean(model_of(RELU)).model
    result = clean(first)
    assert result.changed == 0
    assert graph_bytes(result.model) == graph_bytes(first)


def test_constants_become_initializers_and_constant_subgraphs_are_computed():
    model = model_of(
        """g (float[2,3] x) => (float[2,3] y) {
            a = Constant<value_float = 2.0>()
            b = Constant<value_float = 3.0>()
            c = Add(a, b)
            y = Mul(x, c)
        }"""
    )
    result = clean(model)
    assert op_types(result.model) == ["Mul"]
    (value,) = result.model.graph.initializers.values()
    assert value.name == "c" and value.const_value.numpy() == 5.0
    assert result.changed > 0


def test_a_fill_is_stored_where_it_is_a_layers_weight_and_stays_where_it_is_large_data():
    model = model_of(
        """g (float[1,80,4,4] x) => (float[1,80,4,4] y)
        <
            int64[4] w_shape = {80, 80, 1, 1},
            int64[1] c_shape = {80},
            int64[4] d_shape = {1, 80, 8, 8}
        >
        {
            w = ConstantOfShape<value = float[1] {0.02}>(w_shape)
            c = ConstantOfShape<value = float[1] {1.5}>(c_shape)
            d = ConstantOfShape<value = float[1] {1.0}>(d_shape)
            h = Conv(x, w)
            n = BatchNormalization(h, c, c, c, c)
            p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(d)
            y = Add(n, p)
        }"""
    )
    result = clean(model)
    assert op_types(result.model).count("ConstantOfShape") == 1
    fused = Fuse().run(result.model, context_for(model)).model
    assert "BatchNormalization" not in op_types(fused)
    feeds = {"x": np.random.default_rng(0).normal(size=(1, 80, 4, 4)).astype(np.float32)}
    assert largest_error(model, fused, [feeds]) < 1e-5


def test_dead_duplicate_and_identity_nodes_go():
    model = model_of(
        """g (float[2,3] x) => (float[2,3] y) {
            dead = Sin(x)
            a = Relu(x)
            b = Relu(x)
            i = Identity(b)
            y = Add(a, i)
        }"""
    )
    assert op_types(clean(model).model) == ["Relu", "Add"]


def test_an_input_that_is_returned_keeps_its_identity_node():
    model = model_of("g (float[2] x) => (float[2] y) { y = Identity(x) }")
    assert op_types(clean(model).model) == ["Identity"]


def test_an_identity_of_an_outer_value_in_a_branch_survives():
    model = model_of(
        """g (bool c, float[2] x) => (float[2] y) {
            r = Relu(x)
            y = If (c) <then_branch = t () => (float[2] a) { a = Identity(r) },
                        else_branch = e () => (float[2] b) { b = Neg(r) }>
        }"""
    )
    result = clean(model)
    assert sorted(op_types(result.model)) == ["Identity", "If", "Neg", "Relu"]
    feeds = [{"c": np.array(v), "x": np.array([-1, 2], np.float32)} for v in (True, False)]
    assert largest_error(model, result.model, feeds) == 0.0


def test_functions_are_inlined():
    text = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[2] x) => (float[2] y) { y = local.twice(x) }
        <opset_import: ["" : 21], domain: "local"> twice (a) => (b) { b = Add(a, a) }"""
    result = clean(ir.from_onnx_text(text))
    assert op_types(result.model) == ["Add"] and not result.model.functions
    assert set(result.model.opset_imports) == {""}


def test_initializers_listed_as_inputs_are_no_inputs():
    model = model_of(
        "g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Mul(x, w) }"
    )
    assert [value.name for value in clean(model).model.graph.inputs] == ["x"]


def test_equal_biases_stay_apart_and_equal_scalars_merge():
    model = model_of(
        """g (float[2] x) => (float[2] y)
        <float[2] b1 = {0.0, 0.0}, float[2] b2 = {0.0, 0.0}, float s1 = {3.0}, float s2 = {3.0}> {
            a = Add(x, b1)
            b = Mul(a, s1)
            c = Relu(b)
            d = Add(c, b2)
            y = Mul(d, s2)
        }"""
    )
    assert sorted(clean(model).model.graph.initializers) == ["b1", "b2", "s1"]


def test_equal_biases_in_integers_stay_apart_too():
    model = model_of(
        """g (float[1,2] x) => (float[1,2] y)
        <int32[2] b = {0, 0}, int32[2] c = {0, 0}, float s = {0.5}, float t = {0.25}> {
        p = DequantizeLinear(b, s)
        q = DequantizeLinear(c, t)
        a = Add(x, p)
        y = Sub(a, q) }"""
    )
    assert {"b", "c"} <= set(clean(model).model.graph.initializers)


def test_stale_shapes_are_replaced():
    model = model_of("g (float[N,3] x) => (float[N,3] y) <float[1,7] h> { h = Relu(x) y = Neg(h) }")
    result = clean(model)
    node = next(iter(result.model.graph))
    assert str(node.outputs[0].shape) == "[N,3]"


def test_declared_shapes_stay_where_inference_is_mute():
    model = model_of(
        """g (float[N,6] x, int64[3] s) => (float[N,A,B] y) <float[N,2,3] h> {
            h = Reshape(x, s)
            y = Relu(h)
        }"""
    )
    node = next(iter(clean(model).model.graph))
    assert str(node.outputs[0].shape) == "[N,2,3]"


def test_the_signature_keeps_names_types_and_shapes():
    model = model_of("g (float[batch,3] x) => (float[?,?] y) { y = Relu(x) }")
    after = clean(model).model
    for before, now in zip(
        (*model.graph.inputs, *model.graph.outputs),
        (*after.graph.inputs, *after.graph.outputs),
        strict=True,
    ):
        assert (before.name, before.dtype, before.shape) == (now.name, now.dtype, now.shape)


def test_metadata_and_source_paths_are_stripped():
    model = model_of(RELU)
    node = next(iter(model.graph))
    node.metadata_props["pkg.torch.onnx.stack_trace"] = "/src/somebody/net.py"
    model.doc_string = "made by /src/somebody"
    assert b"somebody" not in graph_bytes(clean(model).model)


def test_a_nan_weight_is_refused_by_name_and_minus_infinity_is_not():
    model = model_of("g (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Mul(x, w) }")
    weight = model.graph.initializers["w"]
    weight.const_value = ir.tensor(np.array([1, -np.inf], np.float32), name="w")
    assert "w" in clean(model).model.graph.initializers
    weight.const_value = ir.tensor(np.array([1, np.nan], np.float32), name="w")
    with pytest.raises(PassError, match="initializer 'w' has a NaN"):
        clean(model)


def test_opset_9_is_raised_to_the_targets_and_computes_the_same():
    model = model_of(
        """g (float[1,2,4,4] x) => (float[1,2] y) {
            a = Clip<min = 0.0, max = 6.0>(x)
            b = ReduceMean<axes = [2, 3], keepdims = 1>(a)
            y = Squeeze<axes = [2, 3]>(b)
        }""",
        opset=9,
        ir_version=4,
    )
    result = clean(model)
    assert result.model.opset_imports[""] == 21 and not result.skipped
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 2, 4, 4)).astype(np.float32)}
    assert largest_error(model, result.model, [feeds]) < 1e-6  # same kernels, same order


def test_opset_18_is_raised():
    assert clean(model_of(RELU, opset=18, ir_version=8)).model.opset_imports[""] == 21


def test_an_opset_above_the_targets_is_left_with_a_reason():
    result = clean(model_of(RELU, opset=22))
    assert result.model.opset_imports[""] == 22
    assert "cannot be lowered" in result.skipped[0].reason


def test_an_opset_that_cannot_be_checked_is_left_with_a_reason():
    model = model_of("g (string[N] x) => (string[N] y) { y = Identity(x) }", opset=18)
    result = clean(model)
    assert result.model.opset_imports[""] == 18
    assert "give calibration data" in result.skipped[0].reason


def test_the_same_input_gives_the_same_bytes():
    model = model_of(
        "g (float[2,3] x) => (float[2,3] y) { a = Relu(x) b = Sin(a) c = Cos(a) y = Add(b, c) }"
    )
    assert graph_bytes(clean(model).model) == graph_bytes(clean(model).model)


def test_the_model_handed_in_keeps_its_weights():
    model = model_of("g (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Mul(x, w) }")
    before = model.graph.initializers["w"].const_value.numpy().copy()
    clean(model)
    assert np.array_equal(before, model.graph.initializers["w"].const_value.numpy())
