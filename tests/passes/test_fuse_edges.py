"""Fuse leaves alone, or gets right, what looks like a pattern and is none."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import context

from edgec.passes.contract import Result
from edgec.passes.equivalence import largest_error
from edgec.passes.execution import graph_bytes
from edgec.passes.fuse import Fuse

FLOAT_NOISE = 1e-5  # folded weights are rounded once more; a wrong rewrite is off by 1e-1 and more


def fused(text: str) -> Result:
    """The result of Fuse, proven valid and equal to the original on random feeds."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    result = Fuse().run(model.clone(), context(model))
    onnx.checker.check_model(onnx.load_from_string(graph_bytes(result.model)), full_check=True)
    random, feeds = np.random.default_rng(3), {}
    for value in model.graph.inputs:
        numbers = 3 * random.standard_normal(value.shape.numpy())
        feeds[value.name] = np.asarray(numbers, value.dtype.numpy())
    assert largest_error(model, result.model, [feeds]) <= FLOAT_NOISE
    return result


def operators(result: Result) -> list[str]:
    return [node.op_type for node in result.model.graph]


def test_weight_that_is_an_output_keeps_its_numbers():
    result = fused(
        """g (float[1,1,4,4] x) => (float[1,1,4,4] y, float[1,1,1,1] w)
        <float[1,1,1,1] w = {2}, float s = {3}> { c = Conv(x, w)
        y = Mul(c, s) }"""
    )
    assert operators(result) == ["Conv"]
    assert result.model.graph.initializers["w"].const_value.numpy().item() == 2.0


def test_factor_inside_a_branch_is_not_folded_into_a_convolution_outside():
    result = fused(
        """g (float[1,1,4,4] x, bool b) => (float[1,1,4,4] y)
        <float[1,1,1,1] w = {2}, float s = {3}> { c = Conv(x, w)
        y = If(b) <then_branch = t () => (float[1,1,4,4] p) { p = Mul(c, s) },
                   else_branch = e () => (float[1,1,4,4] q) { q = Relu(x) }> }"""
    )
    assert result.changed == 0
    assert "outside of this branch" in result.skipped[0].reason


def test_constant_of_more_dimensions_keeps_its_dimensions():
    gelu = """g (float[8] x) => (float[1,8] y)
        <float r = {1.4142135}, float[1,1] one = {1}, float half = {0.5}> {
        a = Div(x, r)
        b = Erf(a)
        c = Add(b, one)
        d = Mul(x, c)
        y = Mul(d, half) }"""
    assert fused(gelu).changed == 0
    assert (
        fused(
            "g (float[8] x) => (float[1,8] y) <float[1,1] c = {2}> { a = Relu(x)\n y = Min(a, c) }"
        ).changed
        == 0
    )


@pytest.mark.parametrize("kind", ["int32", "double"])
def test_mean_without_a_pooling_kernel_stays(kind):
    result = fused(
        f"""g ({kind}[1,2,4,4] x) => ({kind}[1,2,1,1] y) <int64[2] axes = {{2, 3}}>
        {{ y = ReduceMean(x, axes) }}"""
    )
    assert (result.changed, len(result.skipped)) == (0, 1)


def test_hard_swish_in_double_stays_since_no_kernel_computes_it():
    result = fused(
        """g (double[8] x) => (double[8] y)
        <double zero = {0}, double three = {3}, double six = {6}> { a = Add(x, three)
        c = Clip(a, zero, six)
        d = Mul(x, c)
        y = Div(d, six) }"""
    )
    assert result.changed == 0


def test_softmax_of_a_vector_flattened_to_a_column_is_all_ones():
    result = fused(
        """g (float[8] x) => (float[8] y) { f = Flatten<axis = 1>(x)
        p = Softmax<axis = 1>(f)
        s = Shape(x)
        y = Reshape(p, s) }"""
    )
    assert "Softmax" in operators(result) and "Flatten" in operators(result)


def test_padding_as_wide_as_a_pooling_window_stays():
    result = fused(
        """g (float[1,1,4,4] x) => (float[1,1,7,7] y) <int64[8] p = {0,0,2,2,0,0,2,2}>
        { a = Pad(x, p)
        y = AveragePool<kernel_shape = [2, 2]>(a) }"""
    )
    assert result.changed == 0 and "less padding" in result.skipped[0].reason


def test_a_refused_normalisation_leaves_no_initializer_behind():
    rms = """g (float[2,3,4] x) => (float[2,3,4] y) <int64[1] axes = {-1}, float eps = {0.00001},
        float[1,1,4] gamma = {1,2,3,4}, float two = {2}> { p = Pow(x, two)
        v = ReduceMean(p, axes)
        e = Add(v, eps)
        s = Sqrt(e)
        q = Div(x, s)
        r = Mul(q, gamma)
        u = Relu(r)
        y = Relu(u) }"""
    result = fused(rms)
    assert result.changed == 1  # the two Relu
    assert set(result.model.graph.initializers) == {"axes", "eps", "gamma", "two"}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("Relu(x)", "Relu(a)", "Relu"),
        ("Relu(x)", "Clip(a, , b3)", "Clip"),
        ("Clip(x, , m1)", "Relu(a)", "Clip"),  # an upper end below 0: all zeros
        ("Clip(x, m3, m1)", "Clip(a, b1, b3)", "Clip"),  # ranges apart: all at the near end
        ("Clip(x, b1, b3)", "Clip(a, m3, m1)", "Clip"),
        ("Clip(x, b3, b1)", "Clip(a, m1, )", "Clip"),  # crossing bounds: the upper one wins
        ("Max(x, m1)", "Min(a, b1)", "Clip"),
        ("Min(b1, x)", "Max(m1, a)", "Clip"),
        ("Max(x, b1)", "Max(a, b3)", "Clip"),
    ],
)
def test_two_bounds_in_a_row_become_one(first, second, expected):
    constants = "float b1 = {1}, float b3 = {3}, float m1 = {-1}, float m3 = {-3}"
    result = fused(
        f"g (float[50] x) => (float[50] y) <{constants}> {{ a = {first}\n y = {second} }}"
    )
    assert operators(result) == [expected]


def test_bounds_of_one_value_for_two_readers_do_not_share_names():
    result = fused(
        """g (float[50] x) => (float[50] y, float[50] z)
        <float a = {-0.1}, float b = {0.1}, float c = {-1}, float d = {1}> { p = Max(x, a)
        y = Min(p, b)
        q = Max(x, c)
        z = Min(q, d) }"""
    )
    assert operators(result) == ["Clip", "Clip"]
