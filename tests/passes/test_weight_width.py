"""Integer weights that begin on a finer grid: the grid, when it is left, and what it changes."""

import dataclasses

import graphs
import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgec.passes import PassError, QuantizeStatic, Recover
from edgec.passes.execution import graph_bytes
from edgec.passes.lesson import Lesson, Outcome
from edgec.passes.torch_graph import TorchGraph, to_torch
from edgec.passes.training_task import Task

SETTINGS = Recover(
    steps=12, batch=2, rate=0.1, bits_from=8, save_every=3, splice=False, features=0, judgements=4
)
SCALE = 0.5


def rounded(places: list[float], wider: float) -> tuple[list[float], list[float]]:
    """Where the twin puts int4 weights, in units of their scale, and their gradients."""
    model = graphs.graph(
        "net (float[1] x) => (float[k] y) { d = DequantizeLinear (w, s)\n y = Mul (x, d) }",
        {"w": np.zeros(len(places), ml_dtypes.int4), "s": np.asarray(SCALE, np.float32)},
    )
    twin = to_torch(model, bits_from=8)
    assert twin.widened() == {"w": 4}
    weight = twin.initializer("w")
    with torch.no_grad():
        weight.copy_(torch.tensor(places) * SCALE)
    y = twin({"x": torch.ones(1)}, wider=wider)["y"]
    y.sum().backward()
    assert weight.grad is not None
    return (y / SCALE).tolist(), weight.grad.tolist()


def test_a_grid_of_more_bits_has_points_between_the_integers():
    places = [0.03, 0.26, -2.6, 5.55]
    assert rounded(places, 1.0)[0] == [0.0, 0.25, -2.625, 5.5625]  # sixteenths
    assert rounded(places, 0.5)[0] == [0.0, 0.25, -2.5, 5.5]  # quarters
    assert rounded(places, 0.01)[0] == [0.0, 0.5, -2.5, 5.5]  # a bit is there or not
    assert rounded(places, 0.0)[0] == [0.0, 0.0, -3.0, 6.0]


def test_a_finer_grid_ends_where_the_integers_end():
    places = [-8.2, -8.0, 7.0, 7.2]
    assert rounded(places, 1.0) == ([-8.0, -8.0, 7.0, 7.0], [0.0, 1.0, 1.0, 0.0])
    # half a step beyond is rounded back, and learns
    assert rounded(places, 0.0) == ([-8.0, -8.0, 7.0, 7.0], [1.0, 1.0, 1.0, 1.0])


def test_the_width_falls_over_the_first_half_of_the_steps():
    shares = [dataclasses.replace(SETTINGS, steps=9).wider(step) for step in range(9)]
    assert shares == [1.0, 0.421875, 0.125, 0.015625, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert dataclasses.replace(SETTINGS, bits_from=0).wider(0) == 0.0


@pytest.fixture(scope="module")
def quantized() -> tuple[ir.Model, object]:
    """A CNN with int4 weights, and the context of it."""
    reference, _ = graphs.cnn()
    data = [{"x": graphs.feed(1, 4, 12, 12, seed=i)} for i in range(12)]
    context = graphs.context(reference, calibration=data[:8], validation=data[8:])
    return QuantizeStatic(weight_bits=4).run(reference.clone(), context).model, context


def trained(quantized, settings: Recover, **rest) -> tuple[Outcome, ir.Model]:
    model = quantized[0].clone()
    twin = settings.twin(model)
    outcome = Lesson(twin, Task.of(model, quantized[1], settings), **rest).train()
    twin.write_back(model)
    return outcome, model


def test_steps_see_the_schedule_and_judgements_the_own_width(quantized, monkeypatch):
    seen: dict[bool, list[float]] = {True: [], False: []}
    forward = TorchGraph.forward

    def spied(twin, *args, wider=0.0, **rest):
        seen[torch.is_grad_enabled()].append(wider)
        return forward(twin, *args, wider=wider, **rest)

    monkeypatch.setattr(TorchGraph, "forward", spied)
    trained(quantized, SETTINGS)
    assert [w for w in seen[True] if w] == [SETTINGS.wider(step) for step in range(6)]
    assert seen[True][-6:] == [0.0] * 6
    assert len(seen[False]) >= 5 and not any(seen[False])


def test_a_training_from_more_bits_is_another_one_with_the_same_bytes_every_time(quantized):
    model = quantized[0]
    outcome, made = trained(quantized, SETTINGS)
    again = trained(quantized, SETTINGS)
    direct = trained(quantized, dataclasses.replace(SETTINGS, bits_from=0))
    assert again[0] == outcome and graph_bytes(again[1]) == graph_bytes(made)
    assert outcome.improved and direct[0].improved
    assert outcome.before == direct[0].before  # the same grid is judged
    assert graph_bytes(made) != graph_bytes(direct[1])
    # what ships has the types and the nodes that it had
    assert len(graph_bytes(made)) == len(graph_bytes(model))


@pytest.mark.parametrize("step", [4, 10])  # with bits to spare, and behind them
def test_an_interrupted_training_goes_on_at_the_same_width(quantized, tmp_path, step):
    class Killed(BaseException):
        """In place of a signal that cannot be caught."""

    def announce(what: str, done: int, total: int) -> None:
        if done == step:
            raise Killed

    wanted, expected = trained(quantized, SETTINGS)
    with pytest.raises(Killed):
        trained(quantized, SETTINGS, folder=tmp_path, announce=announce)
    outcome, made = trained(quantized, SETTINGS, folder=tmp_path)
    assert "went on at step" in outcome.findings[0]
    assert outcome.losses == wanted.losses
    assert graph_bytes(made) == graph_bytes(expected)


def test_patience_begins_when_the_weights_have_their_own_width(quantized):
    harmful = dataclasses.replace(
        SETTINGS, steps=40, rate=500.0, bias_rate=50.0, judgements=20, patience=3
    )
    # judged every second step; 20 steps have bits to spare
    assert trained(quantized, harmful)[0].steps == 26
    assert trained(quantized, dataclasses.replace(harmful, bits_from=0))[0].steps == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits_from": 17}, "bits_from is 17, expected up to 16 bits, or 0"),
        ({"bits_from": -1}, "bits_from is -1, expected up to 16 bits, or 0"),
        ({"rate": 0.0}, "bits_from is 8, but rate is 0, so no weight moves"),
        ({"steps": 1}, "bits_from takes the first half of the steps, and there is but one"),
    ],
)
def test_a_width_without_effect_is_refused(settings, message):
    with pytest.raises(PassError, match=message):
        dataclasses.replace(SETTINGS, **settings)


@pytest.mark.parametrize("bits_from", [3, 4])
def test_a_graph_without_weights_of_fewer_bits_is_refused(quantized, bits_from):
    model, context = quantized
    settings = dataclasses.replace(SETTINGS, bits_from=bits_from)
    with pytest.raises(PassError, match="no integer weights of fewer bits"):
        settings.run(model.clone(), context)
    with pytest.raises(PassError, match="put recover behind a quantization to fewer bits"):
        SETTINGS.run(context.reference.clone(), context)


def test_int8_weights_stay_on_their_grid_beside_int4_ones():
    text = """net (float[1] x) => (float[2] y, float[2] z) {
        a = DequantizeLinear (v, s)
        y = Mul (x, a)
        b = DequantizeLinear (w, s)
        z = Mul (x, b)
    }"""
    weights = {"v": np.zeros(2, np.int8), "w": np.zeros(2, ml_dtypes.int4)}
    model = graphs.graph(text, weights | {"s": np.asarray(SCALE, np.float32)})
    assert to_torch(model, bits_from=8).widened() == {"w": 4}
    assert to_torch(model, bits_from=10).widened() == {"v": 2, "w": 6}
    assert to_torch(model).widened() == {}
