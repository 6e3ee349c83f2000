"""Passes that look at calibration data hold the activations of one sample, not of all."""

import weakref
from collections.abc import Iterator

import graphs
import numpy as np
import pytest

from edgec.passes import (
    Pass,
    QuantizeDynamic,
    QuantizeStatic,
    QuantizeWeights,
    SmoothActivations,
    execution,
)

TEXT = """block (float[8, 64] x) => (float[8, 64] y) {
    h = LayerNormalization <axis = -1> (x, gamma, beta)
    [a] m = MatMul (h, w1)
    r = Relu (m)
    [b] y = MatMul (r, w2)
}"""


class Samples:
    """Feeds made when they are asked for."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return ({"x": graphs.feed(8, 64, seed=i)} for i in range(self._count))


@pytest.mark.parametrize(
    "pass_",
    [
        QuantizeStatic(),
        QuantizeDynamic(min_weights=100),
        QuantizeWeights(bits=4, method="gptq", min_weights=100),
        SmoothActivations(),
    ],
    ids=lambda pass_: pass_.name,
)
def test_activations_of_earlier_samples_are_let_go(
    pass_: Pass, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, born, held = execution.run_feeds, [], []

    def watched(*given: object) -> list[np.ndarray]:
        # a view of an activation, however small, holds all of it
        held.append(sum(ref() is not None for ref in born))
        values = run(*given)
        born.extend(map(weakref.ref, values))
        return values

    monkeypatch.setattr(execution, "run_feeds", watched)
    weights = {
        "gamma": np.linspace(1, 50, 64, dtype=np.float32),
        "beta": np.zeros(64, np.float32),
        "w1": graphs.weight(64, 64),
        "w2": graphs.weight(64, 64, seed=1),
    }
    model = graphs.graph(TEXT, weights)
    pass_.run(model.clone(), graphs.context(model, calibration=Samples(40)))
    values = len(born) / len(held)  # of each run
    assert len(held) >= 16
    assert max(held) <= 2 * values  # while the next sample runs, the names of the last still hold
