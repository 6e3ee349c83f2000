"""Nothing is trained in torch that ONNX Runtime computes otherwise."""

import graphs
import numpy as np
import pytest
from labelled_samples import context as labelled

from edgec.passes import PassError, QuantizeStatic, Recover
from edgec.passes import torch_steps as twins
from edgec.passes.adapt import Adapt
from edgec.passes.curriculum import Example
from edgec.passes.execution import graph_bytes
from edgec.passes.torch_graph import to_torch
from edgec.passes.twin_check import how_apart


def samples(count):
    return [{"x": graphs.feed(1, 4, 12, 12, seed=i)} for i in range(count)]


def test_twins_of_float_and_quantized_graphs_are_trained():
    model, _ = graphs.cnn()
    context = graphs.context(model, calibration=samples(8))
    quantized = QuantizeStatic().run(model.clone(), context).model
    for one in (model, quantized):
        assert how_apart(to_torch(one), one, [Example(s) for s in samples(6)]) == ""


def test_one_percent_in_a_float_output_and_another_shape_are_told():
    model = graphs.graph(
        "g (float[n,4] x) => (float[n,4] y) { y = Mul (x, s) }", {"s": np.float32(1)}
    )
    for factor, told in ((1.005, ""), (1.02, "'y' otherwise than ONNX Runtime, 0.02 of its size")):
        other = graphs.graph(
            "g (float[n,4] x) => (float[n,4] y) { y = Mul (x, s) }", {"s": np.float32(factor)}
        )
        assert told in how_apart(to_torch(other), model, [Example({"x": graphs.feed(1, 4)})])
    wider = graphs.graph("g (float[n,4] x) => (float[n,8] y) { y = Concat <axis = 1> (x, x) }", {})
    assert "shape [1, 8]" in how_apart(to_torch(wider), model, [Example({"x": graphs.feed(1, 4)})])


def test_numbers_that_are_none_in_torch_alone_are_told():
    text = "g (float[n,4] x) => (float[n,4] y) { y = Sqrt (x) }"
    plain = graphs.graph(text.replace("Sqrt", "Relu"), {})
    assert how_apart(
        to_torch(graphs.graph(text, {})), plain, [Example({"x": -np.ones((1, 4), "f")})]
    )


@pytest.fixture
def wrong(monkeypatch):
    """A twin whose pooling gives half."""
    monkeypatch.setattr(
        twins,
        "OPERATORS",
        {**twins.OPERATORS, "GlobalAveragePool": lambda c: 0.5 * c[0].mean((2, 3), keepdim=True)},
    )


def test_recover_trains_nothing_and_says_so(wrong):
    model, _ = graphs.cnn()
    context = graphs.context(model, calibration=samples(8), validation=samples(4))
    result = Recover(steps=4, rate=0.5).run(model.clone(), context)
    assert result.changed == 0 and graph_bytes(result.model) == graph_bytes(model)
    assert "nothing was trained: this graph in torch gives output" in result.findings[0]
    assert len(result.findings) == 1


def test_adapt_refuses(wrong):
    model, _ = graphs.cnn()
    with pytest.raises(PassError, match="in torch gives output .* otherwise than ONNX Runtime"):
        Adapt(steps=4).run(model.clone(), labelled(model, 8))
