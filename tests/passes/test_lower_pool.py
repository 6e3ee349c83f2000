"""`lower` gives float average pools the fast kernel of opset 18, where that says the same."""

import graphs
import numpy as np
import pytest

from edgec.passes import Lower

PADDED = "kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]"


def net(pool: str, end: str = "y = Relu (p)", opset: int = 21, **numbers: np.ndarray):
    text = f"""net (float[n, 8, 13, 13] x) => (float[n, 8, h, w] y) {{
        c = Conv <kernel_shape = [1, 1]> (x, w)
        {pool}
        {end}
    }}"""
    return graphs.graph(text, {"w": graphs.weight(8, 8, 1, 1), **numbers}, opset)


def lowered(model):
    return Lower().run(model.clone(), graphs.context(model))


@pytest.mark.parametrize("counted", [0, 1])
@pytest.mark.parametrize("opset", [19, 21, 22])
def test_a_float_pool_gets_opset_18_and_the_same_numbers(opset, counted):
    pool = f"[pool] p = AveragePool <{PADDED}, count_include_pad = {counted}> (c)"
    model, x = net(pool, opset=opset), graphs.feed(2, 8, 13, 13)
    result = lowered(model)
    assert (result.changed, result.skipped) == (1, ())
    assert result.model.opset_imports[""] == 18
    before, after = graphs.run(model, x=x)[0], graphs.run(result.model, x=x)[0]
    np.testing.assert_allclose(after, before, atol=1e-6)


def test_a_graph_of_a_later_opset_keeps_it_and_says_so():
    pool = f"[pool] p = AveragePool <{PADDED}> (c)"
    for model in (
        net(f"[pool] p = AveragePool <{PADDED}, dilations = [2, 2]> (c)"),
        net(pool, "y = Gelu (p)"),  # opset 20
    ):
        result = lowered(model)
        assert result.changed == 0
        assert result.model.opset_imports[""] == 21
        (skip,) = result.skipped
        assert skip.node == "pool"
        assert "slow kernel" in skip.reason


def test_graphs_without_such_a_pool_keep_their_opset():
    quantized = """d = QuantizeLinear (c, s, z)
        e = DequantizeLinear (d, s, z)
        f = AveragePool <kernel_shape = [2, 2]> (e)
        g = QuantizeLinear (f, s, z)
        p = DequantizeLinear (g, s, z)"""
    numbers = {"s": np.array(0.02, np.float32), "z": np.array(128, np.uint8)}
    pools = ("p = GlobalAveragePool (c)", "p = MaxPool <kernel_shape = [2, 2]> (c)", quantized)
    for model in (net(pool, **numbers) for pool in pools):
        result = lowered(model)
        assert (result.changed, result.skipped) == (0, ())
        assert result.model.opset_imports[""] == 21
