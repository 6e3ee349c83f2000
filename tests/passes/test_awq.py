"""Where the scales of input channels can go, and that they help where channels differ."""

import graphs
import numpy as np
import pytest

from edgec.passes import QuantizeWeights, awq
from edgec.passes.execution import graph_bytes
from edgec.passes.grids import Scheme, fit
from edgec.passes.matching import with_new_numbers
from edgec.passes.weights import Refused, constant

WIDTH = 32


def powers():
    """Root mean squares of channels as in language models: few are much stronger."""
    power = np.ones(64, np.float32)
    power[::16] = 20
    return power


def test_scales_reduce_the_output_error_of_strong_channels():
    weight, scheme = graphs.weight(48, 64), Scheme(3, True, 32)
    moments = np.diag(powers() ** 2)
    scales = awq.channel_scales([weight], scheme, moments)
    assert (scales > 0).all() and scales[0] > 2 * scales[1]

    def error(scales):
        grid = fit(weight * scales, scheme, "rtn")
        change = grid.weight(grid.nearest(weight * scales)) / scales - weight
        return np.vdot(change @ moments, change)

    assert error(scales) < 0.6 * error(np.ones_like(scales))


def test_equal_channels_get_no_scales():
    scales = awq.channel_scales([graphs.weight(8, 64)], Scheme(4, True, 32), np.eye(64))
    assert (scales == 1).all()


SOURCES = {
    "layer norm": "n = LayerNormalization <axis = -1> (x, g, b)",
    "layer norm without beta": "n = LayerNormalization <axis = -1> (x, g)",
    "rms norm": "s = Softsign (x) n = Mul (s, g)",
    "layer": "m = MatMul (x, w) n = Add (m, b)",
    "layer without bias": "n = MatMul (x, w)",
    "gemm": "n = Gemm <transB = 1> (x, w, b)",
    "relu": "m = MatMul (x, w) a = Add (b, m) n = Relu (a)",
    "gate": "m = MatMul (x, w) s = Sigmoid (x) n = Mul (s, m)",
}
REFUSED = {
    "gelu": ("m = MatMul (x, w) n = Sigmoid (m)", "made by Sigmoid"),
    "residual": ("m = MatMul (x, w) n = Add (m, x)", "made by Add"),
    "square": ("m = MatMul (x, w) n = Mul (m, m)", "made by Mul"),
    "other reader": ("n = MatMul (x, w) z = Neg (n)", "also read by Neg"),
}


def reader(text):
    text = f"g (float[n, {WIDTH}] x) => (float[n, {WIDTH}] y) {{ {text} [r] y = MatMul (n, v) }}"
    made = {
        "g": graphs.feed(WIDTH, seed=1),
        "b": graphs.feed(WIDTH, seed=2),
        "w": graphs.weight(WIDTH, WIDTH, seed=3),
        "v": graphs.weight(WIDTH, WIDTH, seed=4),
    }
    model = graphs.graph(text, {k: v for k, v in made.items() if k in text.replace("=", " ")})
    return model, next(node for node in model.graph if node.name == "r")


@pytest.mark.parametrize("text", SOURCES.values(), ids=SOURCES)
def test_division_folds_into_what_made_the_value(text):
    model, node = reader(text)
    x = graphs.feed(5, WIDTH)
    scales = np.linspace(0.5, 4, WIDTH, dtype=np.float32)
    before = graphs.run(model, x=x)[0]
    awq.source_of(node.inputs[0], {node}, WIDTH).divide(scales)
    assert graphs.operators(model) == graphs.operators(reader(text)[0])
    v = model.graph.initializers["v"]
    with_new_numbers(v, constant(v) * scales[:, None])
    # one more float32 rounding of each weight
    np.testing.assert_allclose(graphs.run(model, x=x)[0], before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("text", "reason"), REFUSED.values(), ids=REFUSED)
def test_values_that_take_no_scale_are_refused(text, reason):
    _, node = reader(text)
    with pytest.raises(Refused, match=reason):
        awq.source_of(node.inputs[0], {node}, WIDTH)


def test_inputs_and_outputs_of_the_model_are_refused():
    text = f"g (float[n, {WIDTH}] x) => (float[n, {WIDTH}] h, float[n, {WIDTH}] y)"
    text += "{ [a] h = MatMul (x, w) [b] y = MatMul (h, w) }"
    model = graphs.graph(text, {"w": graphs.weight(WIDTH, WIDTH)})
    first, second = model.graph
    with pytest.raises(Refused, match="an input of the model"):
        awq.source_of(first.inputs[0], {first}, WIDTH)
    with pytest.raises(Refused, match="an output of the model"):
        awq.source_of(second.inputs[0], {second}, WIDTH)


def test_a_factor_that_broadcasts_over_the_channels_takes_no_scale():
    text = f"g (float[n, {WIDTH}] x) => (float[n, {WIDTH}] y)"
    text += "{ a = MatMul (x, w) s = Sigmoid (x) n = Mul (a, s) [r] y = MatMul (n, v) }"
    made = {"w": graphs.weight(WIDTH, 1), "v": graphs.weight(WIDTH, WIDTH)}
    node = next(node for node in graphs.graph(text, made).graph if node.name == "r")
    with pytest.raises(Refused, match="made by Mul"):
        awq.source_of(node.inputs[0], {node}, WIDTH)


def test_divided_values_get_other_names():
    text = """g (float[n, 64] x) => (float[n, 64] y) {
        h = MatMul (x, w) r = Relu (h) y = MatMul (r, v)
    }"""
    made = {"w": graphs.weight(64, 64) * powers(), "v": graphs.weight(64, 64, seed=1)}
    model = graphs.graph(text, made)
    data = [{"x": graphs.feed(16, 64, seed=i)} for i in range(4)]
    chosen = QuantizeWeights(bits=4, method="awq")
    result = chosen.run(model.clone(), graphs.context(model, calibration=data))
    names = {value.name for node in result.model.graph for value in node.outputs}
    assert {"h_scaled", "r_scaled", "y"} <= names and not {"h", "r"} & names
    again = chosen.run(model.clone(), graphs.context(model, lock=result.decisions))
    assert graph_bytes(again.model) == graph_bytes(result.model)
