"""The twin gives what ONNX Runtime gives on the fixtures' models."""

import numpy as np
import pytest
import torch
import twin_models
from fixtures import models
from fixtures.locate import FixtureMissing

from edgec.passes import PassError
from edgec.passes.execution import graph_bytes, open_session, run_feeds
from edgec.passes.torch_graph import to_torch

# of the largest output: two float32 implementations that sum in another order; a wrong mask,
# gate order or epsilon costs far more
FLOAT_NOISE = 1e-4


def made(name: str):
    try:
        return twin_models.make(name)
    except FixtureMissing as missing:
        pytest.skip(str(missing))


@pytest.mark.slow
@pytest.mark.parametrize("name", twin_models.MODELS)
def test_model_gives_what_onnx_runtime_gives(name):
    model, samples = made(name)
    for feeds in samples:
        for output, (error, size) in twin_models.errors(model, feeds).items():
            assert size > 0 and error <= FLOAT_NOISE * size, output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small-cnn", "lstm", "llama"])
def test_training_writes_back_into_the_same_graph(name):
    model, samples = made(name)
    names = [str(n.name) for n in model.graph], list(model.graph.initializers)
    before = {n: v.const_value.tobytes() for n, v in model.graph.initializers.items()}
    twin = to_torch(model)
    moved = [n for n in twin.trained() if twin.initializer(n).dim() > 1][:2]
    optimizer = torch.optim.SGD([twin.initializer(n) for n in moved], lr=0.01)
    feeds = {k: torch.from_numpy(np.array(v)) for k, v in samples[0].items()}
    twin(feeds)[twin.outputs[0]].square().mean().backward()
    optimizer.step()
    assert twin.write_back(model) == 2
    after = {n: v.const_value.tobytes() for n, v in model.graph.initializers.items()}
    assert {n for n in before if before[n] != after[n]} == set(moved)
    assert names == ([str(n.name) for n in model.graph], list(model.graph.initializers))
    session = open_session(model)
    first = run_feeds(session, samples[0])[
        [o.name for o in session.get_outputs()].index(twin.outputs[0])
    ]
    actual = twin(feeds)[twin.outputs[0]].detach().numpy()
    assert np.abs(actual - first).max() <= FLOAT_NOISE * np.abs(first).max()


@pytest.mark.slow
def test_untrained_twin_of_a_real_model_changes_no_byte():
    model, _ = made("efficientnet-lite0")
    before = graph_bytes(model)
    assert to_torch(model).write_back(model) == 0
    assert graph_bytes(model) == before


def test_silero_with_control_flow_is_refused_with_the_node():
    from edgec.export_onnx import load_onnx

    path = next(p for p in models.require_silero_paths() if p.name == "silero_vad.onnx")
    with pytest.raises(PassError, match=r"node '.*' \(If\).* control flow"):
        to_torch(load_onnx(path))
