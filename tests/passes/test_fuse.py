"""Fuse: each rule matches what it should, computes the same, and says why it refuses."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes.contract import Context
from edgec.passes.equivalence import largest_error
from edgec.passes.execution import graph_bytes
from edgec.passes.fuse import Fuse
from edgec.targets import load_target

FLOAT_NOISE = 1e-5  # folded weights are rounded once more; a wrong fold is off by 1e-2 and more


def model_of(text: str, *, opset: int = 21, **weights: np.ndarray) -> ir.Model:
    """A model from ONNX text; ``weights`` become initializers."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    for name, array in weights.items():
        tensor = ir.tensor(array, name=name)
        value = model.graph.initializers[name]
        value.const_value, value.shape = tensor, ir.Shape(array.shape)
    return model


def with_weights(text: str, *, opset: int = 21, **arrays: np.ndarray) -> ir.Model:
    """Like ``model_of``; declares an initializer for every array in the text's angle brackets."""
    kinds = {"float32": "float", "int64": "int64"}
    declared = ", ".join(
        f"{kinds[str(a.dtype)]}[{','.join(map(str, a.shape))}] {n} = "
        f"{{{', '.join(repr(x.item()) for x in a.ravel())}}}"
        for n, a in arrays.items()
    )
    return model_of(text.replace("<>", f"<{declared}>"), opset=opset)


def fuse(model: ir.Model):
    result = Fuse().run(model.clone(), Context(load_target("x86-64"), model))
    again = Fuse().run(result.model.clone(), Context(load_target("x86-64"), model))
    assert again.changed == 0, "a second run finds something to do"
    assert graph_bytes(again.model) == graph_bytes(result.model)
    if result.changed == 0:
        assert graph_bytes(result.model) == graph_bytes(model)
    return result


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for graph in model.graphs() for node in graph]


def assert_same(model: ir.Model, fused: ir.Model, tolerance: float = FLOAT_NOISE) -> None:
    random = np.random.default_rng(7)
    feeds = {
        str(v.name): random.standard_normal(
            [d if isinstance(d, int) else 3 for d in v.shape]
        ).astype(np.float32)
        for v in model.graph.inputs
    }
    assert largest_error(model, fused, [feeds]) < tolerance


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def batch_norm(channels: int) -> dict[str, np.ndarray]:
    return {
        "gamma": normal(channels, seed=1),
        "beta": normal(channels, seed=2),
        "mean": normal(channels, seed=3),
        "var": np.abs(normal(channels, seed=4)) + 0.1,
    }


# ---- folding into linear nodes ----


@pytest.mark.parametrize(
    ("linear", "shape", "weight", "out"),
    [
        ("Conv<group = 2>(x, w)", "2,4,5,5", (6, 2, 3, 3), "2,6,3,3"),
        ("ConvTranspose<group = 2>(x, w)", "2,4,3,3", (4, 3, 2, 2), "2,6,4,4"),
        ("Gemm(x, w)", "2,4", (4, 6), "2,6"),
        ("Gemm<transB = 1, alpha = 0.5>(x, w)", "2,4", (6, 4), "2,6"),
    ],
)
def test_batch_normalization_folds_into_the_linear_node(linear, shape, weight, out):
    model = with_weights(
        f"g (float[{shape}] x) => (float[{out}] y) <> "
        f"{{ h = {linear} y = BatchNormalization(h, gamma, beta, mean, var) }}",
        w=normal(*weight),
        **batch_norm(6),
    )
    result = fuse(model)
    assert len(op_types(result.model)) == 1 and result.changed == 1
    assert result.model.graph.outputs[0].name == "y"
    assert_same(model, result.model)


def test_a_gemm_bias_is_scaled_by_beta_only_once():
    model = with_weights(
        "g (float[2,4] x) => (float[2,6] y) <> "
        "{ h = Gemm<beta = 0.5>(x, w, b) y = BatchNormalization(h, gamma, beta, mean, var) }",
        w=normal(4, 6),
        b=normal(6, seed=5),
        **batch_norm(6),
    )
    result = fuse(model)
    assert op_types(result.model) == ["Gemm"]
    assert_same(model, result.model)


@pytest.mark.parametrize(
    ("expression", "folds"),
    [
        ("Add(h, c)", True),
        ("Add(c, h)", True),
        ("Sub(h, c)", True),
        ("Sub(c, h)", True),
        ("Mul(h, c)", True),
        ("Mul(c, h)", True),
        ("Div(h, c)", True),
        ("Div(c, h)", False),
    ],
)
def test_a_constant_per_channel_folds_into_the_convolution(expression, folds):
    model = with_weights(
        f"g (float[1,2,4,4] x) => (float[1,3,4,4] y) <> {{ h = Conv(x, w, b) y = {expression} }}",
        w=normal(3, 2, 1, 1),
        b=normal(3, seed=1),
        c=normal(1, 3, 1, 1, seed=2),
    )
    result = fuse(model)
    assert op_types(result.model) == (["Conv"] if folds else ["Conv", "Div"])
    assert_same(model, result.model)


def test_a_constant_per_pixel_does_not_fold():
    model = with_weights(
        "g (float[1,2,4,4] x) => (float[1,3,4,4] y) <> { h = Conv(x, w) y = Add(h, c) }",
        w=normal(3, 2, 1, 1),
        c=normal(4, 4),
    )
    assert op_types(fuse(model).model) == ["Conv", "Add"]


@pytest.mark.parametrize(
    "expression", ["Add(x, c)", "Sub(x, c)", "Sub(c, x)", "Mul(c, x)", "Div(x, c)"]
)
@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (1, 1, 1, 1)])
def test_one_number_in_front_folds_into_the_convolution_where_padding_allows(expression, pads):
    model = with_weights(
        f"g (float[1,4,5,5] x) => (float y) <> "
        f"{{ a = {expression} y = Conv<group = 2, pads = {list(pads)}>(a, w) }}",
        w=normal(6, 2, 3, 3),
        c=np.array([0.7], np.float32),
    )
    result = fuse(model)
    folds = not any(pads) or expression[:3] in ("Mul", "Div")
    assert op_types(result.model) == (["Conv"] if folds else [expression[:3], "Conv"])
    assert_same(model, result.model)
    assert folds or "pads with zeros" in result.skipped[0].reason


def test_a_learned_scale_and_shift_both_fold_into_the_convolution_behind_them():
    model = with_weights(
        "g (float[1,4,5,5] x) => (float y) <> "
        "{ h = HardSwish(x) m = Mul(a, h) n = Add(m, c) y = Conv(n, w, b) }",
        w=normal(3, 4, 1, 1),
        b=normal(3, seed=1),
        a=np.array([1.3], np.float32),
        c=np.array([-0.2], np.float32),
    )
    result = fuse(model)
    assert op_types(result.model) == ["HardSwish", "Conv"]
    assert_same(model, result.model)


def test_a_number_in_front_of_two_readers_stays_with_a_reason():
    model = with_weights(
        "g (float[1,4,5,5] x) => (float y, float z) <> "
        "{ a = Mul(x, c) y = Conv(a, w) z = Relu(a) }",
        w=normal(3, 4, 1, 1),
        c=np.array([0.7], np.float32),
    )
    result = fuse(model)
    assert result.changed == 0
    assert "read by 2 nodes" in result.skipped[0].reason


def test_a_shared_weight_keeps_its_numbers_for_the_other_node():
    model = with_weights(
        "g (float[1,2,4,4] x) => (float[1,3,4,4] y, float[1,3,4,4] z) <> "
        "{ h = Conv(x, w) y = BatchNormalization(h, gamma, beta, mean, var) z = Conv(x, w) }",
        w=normal(3, 2, 1, 1),
        **batch_norm(3),
    )
    result = fuse(model)
    assert op_types(result.model) == ["Conv", "Conv"]
    assert_same(model, result.model)


def test_a_convolution_whose_result_is_an_output_is_left_with_a_reason():
    model = with_weights(
        "g (float[1,2,4,4] x) => (float[1,3,4,4] h, float[1,3,4,4] y) <> "
        "{ h = Conv(x, w) y = Mul(h, c) }",
        w=normal(3, 2, 1, 1),
        c=normal(1),
    )
    result = fuse(model)
    assert result.changed == 0
    assert "'h' is a graph output" in result.skipped[0].reason


def test_a_convolution_read_twice_is_left_with_a_reason():
    model = with_weights(
        "g (float[1,2,4,4] x) => (float[1,3,4,4] y) <> "
        "{ h = Conv(x, w) a = Mul(h, c) y = Add(a, h) }",
        w=normal(3, 2, 1, 1),
        c=normal(1),
    )
    assert "read by 2 nodes" in fuse(model).skipped[0].reason


def test_a_computed_weight_is_left_with_a_reason():
    model = with_weights(
        "g (float[1,2,4,4] x, float[3,2,1,1] w) => (float[1,3,4,4] y) <> "
        "{ h = Conv(x, w) y = BatchNormalization(h, gamma, beta, mean, var) }",
        **batch_norm(3),
    )
    assert "computed, not constant" in fuse(model).skipped[0].reason


def test_a_fold_that_overflows_is_left_with_a_reason():
    model = with_weights(
        "g (float[1,1,4,4] x) => (float[1,1,4,4] y) <> { h = Conv(x, w) y = Mul(h, c) }",
        w=np.full((1, 1, 1, 1), 1e30, np.float32),
        c=np.full(1, 1e30, np.float32),
    )
    assert "overflows" in fuse(model).skipped[0].reason


def test_zero_padding_moves_into_the_convolution():
    model = with_weights(
        "g (float[1,2,4,4] x) => (float[1,3,5,4] y) <> "
        "{ h = Pad(x, p) y = Conv<pads = [0,1,0,1]>(h, w) }",
        p=np.array([0, 0, 1, 0, 0, 0, 2, 0]),
        w=normal(3, 2, 3, 3),
    )
    result = fuse(model)
    assert op_types(result.model) == ["Conv"]
    assert_same(model, result.model)


def test_zero_padding_moves_into_the_mean_and_is_counted():
    model = with_weights(
        "g (float[1,2,4,4] x) => (float[1,2,4,4] y) <> "
        "{ h = Pad(x, p) y = AveragePool<kernel_shape = [2,2]>(h) }",
        p=np.array([0, 0, 1, 1, 0, 0, 0, 0]),
    )
    result = fuse(model)
    assert op_types(result.model) == ["AveragePool"]
    assert_same(model, result.model)


@pytest.mark.parametrize(
    ("pads", "extra", "reason"),
    [
        ([0, 1, 0, 0, 0, 0, 0, 0], "", "batch or the channels"),
        ([0, 0, -1, 0, 0, 0, 0, 0], "", "negative padding"),
        ([0, 0, 1, 1, 0, 0, 1, 1], ", c", "another number than zero"),
    ],
)
def test_other_padding_stays_with_a_reason(pads, extra, reason):
    model = with_weights(
        f"g (float[1,2,4,4] x) => (float[?,?,?,?] y) <> {{ h = Pad(x, p{extra}) y = Conv(h, w) }}",
        p=np.array(pads),
        w=normal(3, 3 if pads[1] else 2, 1, 1),
        **({"c": np.ones(1, np.float32)} if extra else {}),
    )
    result = fuse(model)
    assert result.changed == 0 and reason in result.skipped[0].reason


# ---- activations ----


@pytest.mark.parametrize(
    "tail",
    [
        "d = Mul(x, c) y = Mul(d, half)",
        "d = Mul(c, half) y = Mul(x, d)",
        "d = Mul(x, half) y = Mul(d, c)",
        "d = Div(x, two) y = Mul(c, d)",
    ],
)
def test_the_erf_chain_becomes_gelu_in_every_order(tail):
    model = model_of(
        "g (float[3,8] x) => (float[3,8] y) "
        "<float s = {1.4142135}, float one = {1.0}, float half = {0.5}, float two = {2.0}> "
        f"{{ a = Div(x, s) b = Erf(a) c = Add(b, one) {tail} }}"
    )
    result = fuse(model)
    assert op_types(result.model) == ["Gelu"]
    assert_same(model, result.model)


def test_the_tanh_chain_becomes_gelu():
    model = model_of(
        "g (float[3,8] x) => (float[3,8] y) <float k = {0.044715}, float s = {0.7978846}, "
        "float one = {1.0}, float half = {0.5}, float three = {3.0}> "
        "{ p = Pow(x, three) a = Mul(p, k) b = Add(x, a) c = Mul(b, s) t = Tanh(c) "
        "d = Add(t, one) e = Mul(x, half) y = Mul(e, d) }"
    )
    result = fuse(model)
    assert op_types(result.model) == ["Gelu"]
    assert_same(model, result.model)


def test_gelu_waits_for_opset_20():
    model = model_of(
        "g (float[3,8] x) => (float[3,8] y) "
        "<float s = {1.4142135}, float one = {1.0}, float half = {0.5}> "
        "{ a = Div(x, s) b = Erf(a) c = Add(b, one) d = Mul(x, c) y = Mul(d, half) }",
        opset=19,
    )
    assert fuse(model).changed == 0


def test_an_erf_chain_with_another_factor_stays():
    model = model_of(
        "g (float[3,8] x) => (float[3,8] y) "
        "<float s = {1.4142135}, float one = {1.0}, float half = {0.7}> "
        "{ a = Div(x, s) b = Erf(a) c = Add(b, one) d = Mul(x, c) y = Mul(d, half) }"
    )
    assert fuse(model).changed == 0


@pytest.mark.parametrize(
    "tail",
    [
        "c = Mul(x, b) y = Div(c, six)",
        "c = Div(b, six) y = Mul(c, x)",
        "c = Mul(b, r) y = Mul(x, c)",
    ],
)
def test_the_written_out_hard_swish_becomes_one_node(tail):
    model = model_of(
        "g (float[3,8] x) => (float[3,8] y) <float three = {3.0}, float zero = {0.0}, "
        "float six = {6.0}, float r = {0.16666667}> "
        f"{{ a = Add(x, three) b = Clip(a, zero, six) {tail} }}"
    )
    result = fuse(model)
    assert op_types(result.model) == ["HardSwish"]
    assert_same(model, result.model)


def test_the_written_out_hard_sigmoid_becomes_one_node():
    model = model_of(
        "g (float[3,8] x) => (float[3,8] y) "
        "<float three = {3.0}, float zero = {0.0}, float six = {6.0}> "
        "{ a = Add(x, three) b = Clip(a, zero, six) y = Div(b, six) }"
    )
    result = fuse(model)
    assert op_types(result.model) == ["HardSigmoid"]
    assert_same(model, result.model)


@pytest.mark.parametrize(("alpha", "fuses"), [(1 / 6, True), (0.2, False)])
def test_hard_sigmoid_times_x_is_hard_swish_only_with_slope_one_sixth(alpha, fuses):
    model = model_of(
        "g (float[3,8] x) => (float[3,8] y) "
        f"{{ a = HardSigmoid<alpha = {alpha:.9f}, beta = 0.5>(x) y = Mul(x, a) }}"
    )
    result = fuse(model)
    assert op_types(result.model) == (["HardSwish"] if fuses else ["HardSigmoid", "Mul"])
    assert_same(model, result.model)


def test_a_chain_whose_middle_is_an_output_is_left_with_a_reason():
    model = model_of(
        "g (float[3,8] x) => (float[3,8] a, float[3,8] y) "
        "{ a = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x) y = Mul(x, a) }"
    )
    result = fuse(model)
    assert result.changed == 0 and "'a' is a graph output" in result.skipped[0].reason


# ---- normalisation ----

LAYER_NORM = (
    "g (float[2,3,8] x) => (float[2,3,8] y) <> {{ m = ReduceMean<keepdims = 1>(x, last) "
    "d = Sub(x, m) {square} v = ReduceMean<keepdims = 1>(q, last) e = Add(v, eps) s = Sqrt(e) "
    "{quotient} {tail} }}"
)


@pytest.mark.parametrize("square", ["q = Pow(d, two)", "q = Mul(d, d)"])
@pytest.mark.parametrize("quotient", ["n = Div(d, s)", "r = Reciprocal(s) n = Mul(d, r)"])
@pytest.mark.parametrize("tail", ["g1 = Mul(n, gamma) y = Add(g1, beta)", "y = Mul(gamma, n)"])
def test_the_written_out_layer_norm_becomes_one_node(square, quotient, tail):
    model = with_weights(
        LAYER_NORM.format(square=square, quotient=quotient, tail=tail),
        last=np.array([-1]),
        eps=np.full((1,), 1e-5, np.float32),
        two=np.full((1,), 2, np.float32),
        gamma=normal(8),
        beta=normal(8, seed=1),
    )
    result = fuse(model)
    assert op_types(result.model) == ["LayerNormalization"]
    assert_same(model, result.model)


def test_a_mean_over_another_axis_is_no_layer_norm():
    model = with_weights(
        LAYER_NORM.format(
            square="q = Mul(d, d)", quotient="n = Div(d, s)", tail="y = Mul(n, gamma)"
        ),
        last=np.array([1]),
        eps=np.full((1,), 1e-5, np.float32),
        gamma=normal(8),
    )
    assert fuse(model).changed == 0


# ---- pooling and shapes ----


@pytest.mark.parametrize("keep", [0, 1])
def test_a_mean_over_height_and_width_becomes_global_average_pool(keep):
    model = with_weights(
        f"g (float[2,3,4,5] x) => (float[2,3{',1,1' if keep else ''}] y) <> "
        f"{{ h = Relu(x) y = ReduceMean<keepdims = {keep}>(h, axes) }}",
        axes=np.array([-1, 2]),
    )
    model.graph[0].outputs[0].shape = ir.Shape([2, 3, 4, 5])
    result = fuse(model)
    assert op_types(result.model) == ["Relu", "GlobalAveragePool"] + ["Flatten"] * (not keep)
    assert_same(model, result.model)


def test_a_mean_over_features_stays():
    model = with_weights(
        "g (float[2,3,4] x) => (float[2,3,1] y) <> { y = ReduceMean<keepdims = 1>(x, axes) }",
        axes=np.array([2]),
    )
    assert fuse(model).changed == 0


def test_a_computed_reshape_becomes_constant_and_frees_its_chain():
    model = with_weights(
        "g (float[batch,seq,8] x) => (float[batch,seq,2,4] y) <> "
        "{ s = Shape<start = 0, end = 2>(x) t = Concat<axis = 0>(s, tail) y = Reshape(x, t) }",
        tail=np.array([2, 4]),
    )
    result = fuse(model)
    assert op_types(result.model) == ["Reshape"]
    shape = result.model.graph[0].inputs[1].const_value.numpy()
    assert shape.tolist() == [0, 0, 2, 4]
    assert_same(model, result.model)


def test_a_softmax_over_a_flattened_tensor_loses_the_detour():
    model = model_of(
        "g (float[batch,2,3,4] x) => (float[batch,2,3,4] y) "
        "{ s = Shape(x) f = Flatten<axis = 3>(x) p = Softmax<axis = -1>(f) y = Reshape(p, s) }"
    )
    result = fuse(model)
    assert op_types(result.model) == ["Softmax"]
    assert_same(model, result.model)


def test_a_softmax_over_two_flattened_axes_stays():
    model = model_of(
        "g (float[batch,2,3,4] x) => (float[batch,2,3,4] y) "
        "{ s = Shape(x) f = Flatten<axis = 2>(x) p = Softmax<axis = -1>(f) y = Reshape(p, s) }"
    )
    result = fuse(model)
    assert op_types(result.model) == ["Flatten", "Softmax", "Reshape"]
    assert_same(model, result.model)


def test_two_transposes_become_one_or_none():
    model = model_of(
        "g (float[2,3,4] x) => (float[2,3,4] y) "
        "{ a = Transpose<perm = [0,2,1]>(x) b = Transpose<perm = [0,2,1]>(a) y = Relu(b) }"
    )
    result = fuse(model)
    assert op_types(result.model) == ["Relu"]


def test_rules_reach_into_branches():
    model = model_of(
        """g (bool c, float[2,4] x) => (float[2,4] y) {
            y = If (c) <then_branch = t () => (float[2,4] a) {
                    h = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x) a = Mul(h, x) },
                else_branch = e () => (float[2,4] b) { b = Neg(x) }>
        }"""
    )
    assert sorted(op_types(fuse(model).model)) == ["HardSwish", "If", "Neg"]
