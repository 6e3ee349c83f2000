"""Quantization in the twin: straight through, and learned scales (LSQ, Esser et al. 2020)."""

import math

import graphs
import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgec.passes.execution import graph_bytes, open_session, run_feeds
from edgec.passes.torch_graph import to_torch
from edgec.passes.torch_scales import learnable_scales

ACTIVATION = """
    a (float[3, 8] x) => (float[3, 8] y) <float s = {0.5}, uint8 z = {100}>
    { q = QuantizeLinear (x, s, z)  y = DequantizeLinear (q, s, z) }
"""
CONV = """
    c (float[1, 2, 6, 6] x) => (float[1, 3, 3, 3] y)
    <float s = {0.03}, uint8 z = {120}, float t = {0.1}, uint8 o = {90}> {
        xq = QuantizeLinear (x, s, z)
        xd = DequantizeLinear (xq, s, z)
        wd = DequantizeLinear <axis = 0> (w, ws, wz)
        bd = DequantizeLinear <axis = 0> (b, bs, bz)
        c = Conv <pads = [1, 1, 1, 1]> (xd, wd, bd)
        cq = QuantizeLinear (c, t, o)
        cd = DequantizeLinear (cq, t, o)
        p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (cd)
        pq = QuantizeLinear (p, u, o)
        y = DequantizeLinear (pq, u, o)
    }
"""


def parsed(text: str) -> ir.Model:
    return ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 21]>' + text)


def conv_model() -> ir.Model:
    """int8 Conv per channel with int32 bias, and a MaxPool under a scale of the same value."""
    random = np.random.default_rng(0)
    scales = np.array([0.011, 0.007, 0.02], np.float32)
    weights = {
        "w": random.integers(-127, 128, (3, 2, 3, 3)).astype(np.int8),
        "ws": scales,
        "wz": np.zeros(3, np.int8),
        "b": random.integers(-900, 900, 3).astype(np.int32),
        "bs": np.float32(0.03) * scales,
        "bz": np.zeros(3, np.int32),
        "u": np.array(0.1, np.float32),
    }
    return graphs.graph(CONV, weights)


def trained(model: ir.Model, x: np.ndarray, *, steps: int = 20, rate: float = 1e-3):
    """A twin with learned scales, some steps away from where it began."""
    twin = to_torch(model, learn_scales=True)
    optimizer = torch.optim.Adam(twin.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (twin({"x": torch.from_numpy(x)})["y"] - 1).square().mean().backward()
        optimizer.step()
    return twin


def lsq(x: np.ndarray, scale: np.ndarray, low: int, high: int, count: float) -> np.ndarray:
    """Equations 3 and of section 2.2 of the paper for a gradient of ones, element by element."""
    ratio = x / scale
    inside = (np.rint(ratio) >= low) & (np.rint(ratio) <= high)
    each = np.where(inside, np.rint(ratio) - ratio, np.clip(np.rint(ratio), low, high))
    return each / math.sqrt(count * high)


def of_scale(twin, scale: np.ndarray) -> np.ndarray:
    """The gradient of a scale s, whose factor is learned: d/d(factor) = s d/ds."""
    return twin.initializer("s").grad.numpy() / scale


def test_gradient_of_an_activation_scale_is_that_of_lsq():
    twin = to_torch(parsed(ACTIVATION), learn_scales=True)
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32) * 60
    given = torch.from_numpy(x).requires_grad_()
    twin({"x": given})["y"].sum().backward()
    expected = lsq(x, np.float32(0.5), -100, 155, 8).sum()  # 8 features of a sample
    assert twin.scales() == ("s",)
    found = of_scale(twin, np.float32(0.5))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    inside = (np.rint(x / 0.5) >= -100) & (np.rint(x / 0.5) <= 155)
    np.testing.assert_array_equal(given.grad.numpy(), inside)
    assert 0 < inside.mean() < 1


WEIGHTS = {
    "int8 per tensor": (np.int8, "", (), 6 * 8),
    "int4 per channel": ("int4", "<axis = 0>", (6,), 8),
    "uint4 per block": ("uint4", "<axis = 1, block_size = 4>", (6, 2), 4),
    "int16 per channel": (np.int16, "<axis = 1>", (8,), 6),
}


@pytest.mark.parametrize("way", WEIGHTS)
def test_integers_that_are_kept_are_multiplied_by_what_their_scale_becomes(way):
    kind, attributes, shape, _ = WEIGHTS[way]
    model, integers, scale, zero = weight_model(kind, attributes, shape)
    twin = to_torch(model, learn_scales=True, keep_integers=True)
    assert set(twin.trained()) == {"s"} == set(twin.scales())
    with torch.no_grad():
        twin.initializer("s").mul_(1.25)
    y = twin({"x": torch.zeros(6, 8)})["y"]
    y.sum().backward()
    whole = integers.astype(np.float32) - zero
    expected = whole * spread_over(np.float32(1.25) * scale, attributes)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-5)
    # all of it, times one factor that the size of the tensor gives
    found, sums = of_scale(twin, scale), summed(whole, attributes, shape)
    np.testing.assert_allclose(found * np.abs(sums).max() / np.abs(found).max(), sums, rtol=1e-4)
    assert twin.write_back(model) == 1  # the scale alone


@pytest.mark.parametrize("way", WEIGHTS)
def test_gradient_of_a_weight_scale_is_that_of_lsq(way):
    kind, attributes, shape, count = WEIGHTS[way]
    model, integers, scale, zero = weight_model(kind, attributes, shape)
    twin = to_torch(model, learn_scales=True)
    assert set(twin.trained()) == {"w", "s"} and twin.scales() == ("s",)
    low, high = {"int8": (-128, 127), "int4": (-8, 7), "uint4": (0, 15), "int16": (-32768, 32767)}[
        str(integers.dtype)
    ]
    spread = spread_over(scale, attributes)
    noise = np.random.default_rng(1).standard_normal((6, 8)).astype(np.float32)
    weight = ((integers.astype(np.float32) - zero) + noise * (high - low) / 6) * spread
    with torch.no_grad():
        twin.initializer("w").copy_(torch.from_numpy(weight))
    twin({"x": torch.zeros(6, 8)})["y"].sum().backward()
    top = high - zero
    each = lsq(weight, spread, low - zero, top, count)
    found = of_scale(twin, scale)
    np.testing.assert_allclose(found, summed(each, attributes, shape), rtol=1e-3, atol=1e-5)


def weight_model(kind, attributes: str, shape: tuple[int, ...]):
    """x + dequantized weight [6, 8]."""
    import ml_dtypes

    dtype = np.dtype(getattr(ml_dtypes, kind) if isinstance(kind, str) else kind)
    random = np.random.default_rng(0)
    zero = 8 if "uint4" in str(dtype) else 0
    integers = random.integers(*((0, 16) if zero else (-8, 8)), (6, 8)).astype(dtype)
    scale = random.uniform(0.5, 1.5, shape).astype(np.float32)
    model = parsed(f"""m (float[6, 8] x) => (float[6, 8] y) {{
        d = DequantizeLinear {attributes} (w, s, z)  y = Add (x, d)
    }}""")
    zeros = np.full(shape, zero).astype(dtype)
    for name, array in {"w": integers, "s": scale, "z": zeros}.items():
        value = next(v for n in model.graph for v in n.inputs if v.name == name)
        value.const_value = ir.tensor(array, name=name)
        value.dtype, value.shape = value.const_value.dtype, ir.Shape(array.shape)
        model.graph.register_initializer(value)
    return model, integers, scale, zero


def spread_over(scale: np.ndarray, attributes: str) -> np.ndarray:
    """Scales in the shape of the weight [6, 8]."""
    if "block" in attributes:
        return np.repeat(scale, 4, axis=1)
    if "axis = 0" in attributes:
        scale = scale[:, None]
    return np.broadcast_to(scale, (6, 8))


def summed(each: np.ndarray, attributes: str, shape: tuple[int, ...]) -> np.ndarray:
    """Sums over what shares a scale."""
    if "block" in attributes:
        return each.reshape(6, 2, 4).sum(2)
    if not shape:
        return each.sum()
    return each.sum(1 if "axis = 0" in attributes else 0)


@pytest.mark.parametrize("way", WEIGHTS)
def test_trained_weight_and_scale_ship_as_the_twin_sees_them(way):
    kind, attributes, shape, _ = WEIGHTS[way]
    model, *_ = weight_model(kind, attributes, shape)
    x = graphs.feed(6, 8)
    twin = trained(model, x, rate=0.05)
    assert twin.write_back(model) == 2
    scale = model.graph.initializers["s"].const_value
    assert scale.dtype == ir.DataType.FLOAT and (scale.numpy() > 0).all()
    expected = run_feeds(open_session(model, optimized=False), {"x": x})[0]
    actual = twin({"x": torch.from_numpy(x)})["y"].detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_learned_scale_fits_better_than_the_one_it_started_from():
    model, *_ = weight_model("int4", "<axis = 0>", (6,))
    target = torch.from_numpy(graphs.feed(6, 8) * 9)

    def error(learn_scales: bool) -> float:
        twin = to_torch(model, learn_scales=learn_scales)
        groups = [
            {"params": [twin.initializer(n)], "lr": 0.02 if n in twin.scales() else 0.1}
            for n in twin.trained()
        ]
        optimizer = torch.optim.Adam(groups)
        for _ in range(300):
            optimizer.zero_grad()
            loss = (twin({"x": torch.zeros(6, 8)})["y"] - target).square().mean()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    assert error(True) < 0.5 * error(False)


def test_scales_of_any_size_move_by_the_same_share():
    model, _, scale, _ = weight_model("uint4", "<axis = 1, block_size = 4>", (6, 2))
    scale = scale * np.float32([[1e-3, 1e3]])
    model.graph.initializers["s"].const_value = ir.tensor(scale, name="s")
    twin = to_torch(model, learn_scales=True, keep_integers=True)
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.01)
    twin({"x": torch.zeros(6, 8)})["y"].sum().backward()
    optimizer.step()
    twin.write_back(model)
    after = model.graph.initializers["s"].const_value.numpy()
    np.testing.assert_allclose(np.abs(after / scale - 1), 0.01, rtol=1e-3)


def test_scale_stays_positive_whatever_the_optimizer_does():
    model = parsed(ACTIVATION)
    twin = to_torch(model, learn_scales=True)
    with torch.no_grad():
        twin.initializer("s").fill_(-7.0)
    y = twin({"x": torch.full((3, 8), 0.02)})["y"]
    y.sum().backward()
    assert y.isfinite().all() and twin.initializer("s").grad.isfinite()
    twin.write_back(model)
    assert 0 < float(model.graph.initializers["s"].const_value.numpy()) < 0.001


def test_without_the_option_scales_are_no_parameters():
    assert to_torch(conv_model()).scales() == ()
    assert set(to_torch(conv_model()).trained()) == {"w", "b"}


def test_scale_of_an_int32_bias_follows_its_layer():
    """ONNX Runtime's integer kernel reads the bias at input scale times weight scale."""
    model = conv_model()
    before = {n: v.const_value.numpy().copy() for n, v in model.graph.initializers.items()}
    x = graphs.feed(1, 2, 6, 6)
    twin = trained(model, x)
    assert set(twin.scales()) == {"s", "ws", "t"}
    twin.write_back(model)
    after = {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}
    for name in ("s", "ws", "bs", "t", "u"):
        assert (after[name] != before[name]).all() and (after[name] > 0).all()
        assert after[name].dtype == np.float32 and after[name].shape == before[name].shape
    np.testing.assert_array_equal(after["bs"], after["s"] * after["ws"])
    assert after["t"] == after["u"]  # a MaxPool lies between: one scale
    for name in ("z", "o", "wz", "bz"):
        np.testing.assert_array_equal(after[name], before[name])
    actual = twin({"x": torch.from_numpy(x)})["y"].detach().numpy()
    for optimized in (False, True):
        expected = run_feeds(open_session(model, optimized=optimized), {"x": x})[0]
        # up to single values that lie on a rounding boundary
        assert np.mean(np.abs(actual - expected) > 1e-5) < 0.05
        assert np.abs(actual - expected).max() <= 1.01 * after["t"]


def test_untrained_twin_with_learned_scales_writes_back_the_same_bytes():
    model = conv_model()
    before = graph_bytes(model)
    assert to_torch(model, learn_scales=True).write_back(model) == 0
    assert graph_bytes(model) == before


def test_equal_scales_of_a_pair_are_kept_equal():
    model = parsed(ACTIVATION.replace("DequantizeLinear (q, s, z)", "DequantizeLinear (q, t, z)"))
    value = next(v for n in model.graph for v in n.inputs if v.name == "t")
    value.const_value = ir.tensor(np.array(0.5, np.float32), name="t")
    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape([])
    model.graph.register_initializer(value)
    x = graphs.feed(3, 8) * 60
    twin = trained(model, x)
    assert twin.scales() == ("s",)
    assert twin.write_back(model) == 2
    s, t = (model.graph.initializers[n].const_value.numpy() for n in "st")
    assert s == t != 0.5


def test_scales_that_must_not_move_are_no_parameters():
    # a pair of two scales: an affine map is folded into it
    folded = parsed("""
        a (float[8] x) => (float[8] y) <float s = {0.5}, float t = {0.2}, uint8 z = {100}>
        { q = QuantizeLinear (x, s, z)  y = DequantizeLinear (q, t, z) }
    """)
    shared = parsed("""
        a (float[8] x) => (float[8] y) <float s = {0.5}, uint8 z = {100}>
        { q = QuantizeLinear (x, s, z)  d = DequantizeLinear (q, s, z)  y = Mul (d, s) }
    """)
    for model in (folded, shared):
        assert to_torch(model, learn_scales=True).scales() == ()
    # an int32 bias that is not at the product: its layer's scales have to stay
    odd = conv_model()
    odd.graph.initializers["bs"].const_value = ir.tensor(np.full(3, 1e-4, np.float32), name="bs")
    assert set(learnable_scales(odd).leaders) == {"t", "u"}


def test_scale_that_the_graph_computes_is_a_constant_to_the_gradient():
    model = parsed("""
        d (float[2, 8] x) => (float[2, 8] y) {
            q, s, z = DynamicQuantizeLinear (x)  y = DequantizeLinear (q, s, z)
        }
    """)
    x = torch.from_numpy(graphs.feed(2, 8)).requires_grad_()
    y = to_torch(model)({"x": x})["y"]
    y.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), 1.0, rtol=1e-6)
    expected = run_feeds(open_session(model), {"x": x.detach().numpy()})[0]
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_quantization_to_a_type_without_gradient_is_told():
    from edgec.passes import PassError

    model = parsed("""
        f (float[4] x) => (float8e4m3fn[4] y) <float s = {0.5}> {
            [to_float8] y = QuantizeLinear <output_dtype = 17> (x, s)
        }
    """)
    with pytest.raises(PassError, match="'to_float8'.*FLOAT8E4M3FN is not differentiated"):
        to_torch(model)({"x": torch.ones(4)})
