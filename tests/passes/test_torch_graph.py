"""The differentiable twin of a graph: what is trained, what is written back, what is refused."""

import graphs
import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgec.passes.contract import PassError
from edgec.passes.execution import open_session, run_feeds
from edgec.passes.torch_graph import to_torch

QDQ = """
<ir_version: 10, opset_import: ["" : 21]>
qdq (float[1,2,4,4] x) => (float[1,3,4,4] y)
<float s = {0.05}, uint8 z = {128}, float ws = {0.02}, int8 wz = {0}, float bs = {0.001},
 int32 bz = {0}>
{
    xq = QuantizeLinear (x, s, z)
    xd = DequantizeLinear (xq, s, z)
    wd = DequantizeLinear (w, ws, wz)
    bd = DequantizeLinear (b, bs, bz)
    c = Conv <pads = [1,1,1,1]> (xd, wd, bd)
    r = Relu (c)
    rq = QuantizeLinear (r, s, z)
    y = DequantizeLinear (rq, s, z)
}
"""


def quantized_model() -> ir.Model:
    model = ir.from_onnx_text(QDQ)
    random = np.random.RandomState(0)
    arrays = {
        "w": random.randint(-127, 128, (3, 2, 3, 3)).astype(np.int8),
        "b": random.randint(-500, 500, 3).astype(np.int32),
    }
    for name, array in arrays.items():
        value = next(v for n in model.graph for v in n.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array, name=name)
        value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        model.graph.register_initializer(value)
    return model


def test_quantized_graph_equals_onnx_runtime():
    model = quantized_model()
    x = np.random.RandomState(1).randn(1, 2, 4, 4).astype(np.float32)
    expected = run_feeds(open_session(model, optimized=False), {"x": x})[0]
    actual = to_torch(model)({"x": torch.from_numpy(x)})["y"].detach().numpy()
    # equal up to one quantization step where a value lies on a rounding boundary
    assert np.mean(actual != expected) < 0.05
    assert np.abs(actual - expected).max() <= 0.0501


def test_untrained_twin_writes_back_the_same_bytes():
    model = quantized_model()
    assert to_torch(model).write_back(model) == 0


def test_training_changes_integer_weights_and_keeps_names_and_scales():
    model = quantized_model()
    before = {n: v.const_value.numpy().copy() for n, v in model.graph.initializers.items()}
    twin = to_torch(model)
    assert set(twin.trained()) == {"w", "b"}
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(twin.parameters(), lr=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        twin({"x": x})["y"].square().sum().backward()
        optimizer.step()
    assert twin.write_back(model) == 2
    after = {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}
    assert set(after) == set(before)
    assert after["w"].dtype == np.int8 and (after["w"] != before["w"]).any()
    assert all((after[n] == before[n]).all() for n in ("s", "z", "ws", "bs"))
    # what was trained is what ships
    shipped = run_feeds(open_session(model, optimized=False), {"x": x.numpy()})[0]
    assert np.abs(twin({"x": x})["y"].detach().numpy() - shipped).max() <= 0.0501


def test_a_pair_with_two_scales_gives_what_onnx_runtime_gives():
    """An affine map folded into a pair: quantized by one scale, dequantized by another."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[2, 64] x) => (float[2, 64] y)
    <float s = {0.05}, uint8 z = {100}, float t = {0.02}, uint8 o = {90}> {
        q = QuantizeLinear (x, s, z)
        y = DequantizeLinear (q, t, o)
    }"""
    model = ir.from_onnx_text(text)
    x = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32) * 5
    given = torch.from_numpy(x).requires_grad_()
    actual = to_torch(model)({"x": given})["y"]
    [expected] = run_feeds(open_session(model), {"x": x})
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    actual.sum().backward()
    inside = (np.rint(x / 0.05) >= -100) & (np.rint(x / 0.05) <= 155)
    np.testing.assert_allclose(given.grad.numpy(), inside * (0.02 / 0.05), rtol=1e-5)


def test_rounding_passes_the_gradient_and_clamping_stops_it():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        q (float[3] x) => (float[3] y) <float s = {0.5}, uint8 z = {0}>
        { a = QuantizeLinear (x, s, z)  y = DequantizeLinear (a, s, z) }
    """)
    x = torch.tensor([1.3, -2.0, 500.0], requires_grad=True)
    y = to_torch(model)({"x": x})["y"]
    y.sum().backward()
    assert y.tolist() == [1.5, 0.0, 127.5]
    assert x.grad.tolist() == [1.0, 0.0, 0.0]


def test_control_flow_is_refused_with_the_node():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (bool c, float[2] x) => (float[2] y) {
            [choice] y = If (c) <
                then_branch = a () => (float[2] p) { p = Relu (x) },
                else_branch = b () => (float[2] q) { q = Neg (x) }>
        }
    """)
    with pytest.raises(PassError, match="'choice' \\(If\\).*control flow"):
        to_torch(model)


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ("[places] y = NonZero (x)", r"'places' \(NonZero\).*depends on data"),
        ("[fused] y = com.microsoft.Gelu (x)", r"'fused' \(com.microsoft::Gelu\).*optimizer"),
        ("[many] y = SequenceConstruct (x)", r"'many' \(SequenceConstruct\).*docs/twin.md"),
    ],
)
def test_nodes_that_have_no_differentiable_form_are_refused_with_advice(node, reason):
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[4] x) => (float[4] y) {{ {node} }}
    """)
    with pytest.raises(PassError, match=reason):
        to_torch(model)


def test_numbers_of_formulas_settings_and_masks_are_no_parameters():
    model = graphs.graph(
        """g (float[1, 4] x) => (float[1, 4] y) {
            a = Clip (x, low, high)  b = Mul (a, scale)  c = Mul (b, weight)  d = Add (c, mask)
            y = Resize (d, , sizes)
        }""",
        {
            "sizes": np.array([1, 1], np.float32),
            "low": np.array(-1, np.float32),
            "high": np.array(6, np.float32),
            "scale": np.array(0.125, np.float32),
            "weight": np.ones(4, np.float32),
            "mask": np.full((1, 4), np.finfo(np.float32).min),
        },
    )
    assert to_torch(model).trained() == ("weight",)


def twin_and_onnx_runtime(model: ir.Model, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        twin = to_torch(model)({"x": torch.from_numpy(x)})["y"].numpy()
    return twin, run_feeds(open_session(model), {"x": x})[0]


def test_integers_read_under_two_scales_are_a_constant():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[1, 2] x) => (float[1, 2] y) <int32[2] b = {5, 7}, float s = {0.5}, float t = {2}> {
            p = DequantizeLinear(b, s)
            q = DequantizeLinear(b, t)
            a = Add(x, p)
            y = Add(a, q)
        }""")
    twin, expected = twin_and_onnx_runtime(model, np.zeros((1, 2), np.float32))
    np.testing.assert_array_equal(twin, expected)
    assert to_torch(model).trained() == ()


def test_untrained_bias_beyond_float32_keeps_every_bit():
    bias = np.array([2**30 + 1, -(2**29) - 3, 12345677], np.int32)
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[1, 3] x) => (float[1, 3] y) <int32[3] b = {0, 0, 0}, float s = {0.00123}> {
            p = DequantizeLinear(b, s)
            y = Add(x, p)
        }""")
    model.graph.initializers["b"].const_value = ir.tensor(bias, name="b")
    assert to_torch(model).write_back(model) == 0
    np.testing.assert_array_equal(model.graph.initializers["b"].const_value.numpy(), bias)


def test_output_type_of_a_quantization_without_zero_point_counts():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[3] x) => (float[3] y) <float s = {0.5}> {
            q = QuantizeLinear <output_dtype = 3> (x, s)
            y = DequantizeLinear(q, s)
        }""")
    twin, expected = twin_and_onnx_runtime(model, np.array([-3, 200, 0.4], np.float32))
    np.testing.assert_array_equal(twin, expected)


def test_opset_in_which_softmax_meant_something_else_is_refused():
    model = ir.from_onnx_text("""
        <ir_version: 6, opset_import: ["" : 11]>
        g (float[2, 3, 4] x) => (float[2, 3, 4] y) { y = Softmax <axis = 1> (x) }""")
    with pytest.raises(PassError, match="training needs opset 13 or newer, the model has 11"):
        to_torch(model)


def test_a_type_that_torch_cannot_compute_is_told_with_the_node():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[2] x) => (float[2] y) {
            [to_unsigned] q = Cast <to = 12> (x)
            y = Cast <to = 1> (q)
        }""")
    with pytest.raises(PassError, match="node 'to_unsigned' \\(Cast\\) cannot run in torch"):
        to_torch(model)({"x": torch.zeros(2)})


RECURRENT = {
    "LSTM": (4, "", ", , h, h"),
    "LSTM, peepholes": (4, ', direction = "reverse"', ", , h, h, p"),
    "LSTM, lengths": (4, "", ", n"),
    "GRU": (3, ", linear_before_reset = 1", ", , h"),
    "GRU, reset before": (3, "", ", , h"),
    "RNN": (1, ', direction = "reverse"', ", n"),
}


@pytest.mark.parametrize("form", RECURRENT)
def test_gates_stand_in_the_order_of_onnx(form):
    """ONNX's node tests have the same weight in every gate; ONNX Runtime is the judge here."""
    gates, attributes, rest = RECURRENT[form]
    operator = form.split(",")[0]
    model = graphs.graph(
        f"""g (float[6, 2, 5] x) => (float[6, 1, 2, 4] y, float[1, 2, 4] last) {{
            y, last = {operator} <hidden_size = 4 {attributes}> (x, w, r, b{rest})
        }}""",
        {
            "w": graphs.weight(1, gates * 4, 5),
            "r": graphs.weight(1, gates * 4, 4, seed=1),
            "b": graphs.feed(1, gates * 8, seed=2),
            "h": graphs.feed(1, 2, 4, seed=3),
            "p": graphs.feed(1, 12, seed=4),
            "n": np.array([6, 3], np.int32),
        },
    )
    x = graphs.feed(6, 2, 5)
    with torch.no_grad():
        twin = to_torch(model)({"x": torch.from_numpy(x)})
    expected = run_feeds(open_session(model), {"x": x})
    for name, array in zip(("y", "last"), expected, strict=True):
        np.testing.assert_allclose(twin[name].numpy(), array, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent_layers_can_be_traced_as_core_mls_converter_does(directions):
    model, feeds = graphs.lstm(directions)
    twin = to_torch(model)

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twin = twin

        def forward(self, *arrays):
            return tuple(self.twin(dict(zip(feeds, arrays, strict=True))).values())

    arrays = tuple(torch.from_numpy(array) for array in feeds.values())
    traced = torch.jit.trace(Positional(), arrays, check_trace=False)
    for own, expected in zip(traced(*arrays), Positional()(*arrays), strict=True):
        assert torch.equal(own, expected)
