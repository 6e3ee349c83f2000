"""SwapActivations: HardSwish and SiLU become ReLU6, nothing else does."""

import graphs
import numpy as np
import pytest

from edgec.passes import PassError, SwapActivations

TEXT = "net (float[n, 4] x) => (float[n, 4] y) {{ {} }}"
SILU = "[gate] s = Sigmoid (x)  [silu] y = Mul (s, x)"


def swapped(nodes: str, **settings: object):
    model = graphs.graph(TEXT.format(nodes), {})
    return SwapActivations(**settings).run(model, graphs.context(model))


@pytest.mark.parametrize(
    "nodes",
    [
        "y = HardSwish (x)",
        "s = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x)  y = Mul (x, s)",
        SILU,
        "[gate] s = Sigmoid (x)  y = Mul (x, s)",
    ],
)
def test_a_smooth_activation_becomes_relu6(nodes):
    result = swapped(nodes)
    x = np.float32([[-4.0, -1.0, 2.0, 9.0]])
    assert graphs.run(result.model, x=x)[0].tolist() == [[0.0, 0.0, 2.0, 6.0]]
    assert graphs.operators(result.model) == ["Clip"]
    assert result.changed == 1 and result.touched == ("y",)
    assert not SwapActivations().lossless


@pytest.mark.parametrize(
    "nodes",
    [
        "y = Sigmoid (x)",
        "s = Sigmoid (x)  t = Tanh (x)  y = Mul (s, t)",  # a gate of something else
        "s = HardSigmoid <alpha = 0.2, beta = 0.5> (x)  y = Mul (x, s)",  # another slope
        "y = Gelu (x)",
        "y = Relu (x)",
    ],
)
def test_other_activations_stay(nodes):
    before = graphs.operators(graphs.graph(TEXT.format(nodes), {}))
    result = swapped(nodes)
    assert result.changed == 0 and graphs.operators(result.model) == before


def test_a_gate_that_something_else_reads_stays_beside_the_clip():
    outputs = "(float[n, 4] y, float[n, 4] s)"
    text = f"net (float[n, 4] x) => {outputs} {{ s = Sigmoid (x)  y = Mul (s, x) }}"
    model = graphs.graph(text, {})
    result = SwapActivations().run(model, graphs.context(model))
    assert sorted(graphs.operators(result.model)) == ["Clip", "Sigmoid"]


def test_an_activation_named_in_skip_stays_with_its_reason():
    result = swapped(SILU, skip=("silu",))
    assert result.changed == 0
    assert [(skip.node, skip.reason) for skip in result.skipped] == [("silu", "named in skip")]
    with pytest.raises(PassError, match="did you mean 'silu'"):
        swapped(SILU, skip=("sliu",))


def test_what_is_not_float32_stays_with_its_reason():
    model = graphs.graph("n (float16[n] x) => (float16[n] y) { y = HardSwish (x) }", {})
    result = SwapActivations().run(model, graphs.context(model))
    assert result.changed == 0 and "not float32" in result.skipped[0].reason


def test_opsets_without_bounds_as_inputs_are_left_alone():
    model = graphs.graph(TEXT.format(SILU), {}, opset=10)
    result = SwapActivations().run(model, graphs.context(model))
    assert result.changed == 0 and "11 is needed" in result.skipped[0].reason
