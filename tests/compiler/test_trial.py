"""What one trial of a search is held against: speed, latency, size, drop and noise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import graphs
import pytest

from edgec import trial
from edgec.bench import Timing
from edgec.evaluate import Judgement
from edgec.passes import Cleanup, PruneStructured
from edgec.pipeline import run_passes
from edgec.promise import Limits
from edgec.targets import load_target

REFERENCE_MS, OWN_MS = 6.0, 3.0


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Latencies that do not depend on this machine; the seconds that were asked for."""
    asked: list[float] = []

    def interleave(calls, *, seconds, **_):  # type: ignore[no-untyped-def]
        asked.append(seconds)
        figures = (REFERENCE_MS, OWN_MS)
        return [
            Timing(name, ms, ms, ms, 20, tuple(ms * (1 + 0.02 * (i // 10)) for i in range(20)))
            for (name, _), ms in zip(calls, figures, strict=True)
        ]

    monkeypatch.setattr(trial, "interleave", interleave)
    monkeypatch.setattr(trial, "is_kind_of", lambda machine, target: True)
    return asked


def judge(limits: Limits, **rest: Any) -> trial.Judge:
    model, feeds = graphs.cnn()
    inputs: Any = SimpleNamespace(checks=[feeds], validation=rest.pop("validation", None))
    return trial.Judge(model, load_target("x86-64"), inputs, limits, **rest)


@pytest.mark.parametrize(
    ("limits", "reasons"),
    [
        (Limits(max_latency_ms=3.01, min_speedup=1.99), ()),
        (Limits(max_latency_ms=2.99), ("above 2.99 ms",)),
        (Limits(max_latency_ms=2.9, min_speedup=2.1), ("below 2.1x", "above 2.9 ms")),
    ],
)
def test_a_trial_is_held_against_speed_and_latency(
    timed: list[float], limits: Limits, reasons: tuple[str, ...]
) -> None:
    found = judge(limits)(("cleanup",), 0, ())
    assert (found.speedup, found.latency_ms) == (2.0, 3.0)
    assert found.reasons == reasons


def test_without_a_machine_of_the_targets_kind_no_latency_is_known(
    timed: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "is_kind_of", lambda machine, target: False)
    found = judge(Limits(max_latency_ms=0.1))(("cleanup",), 0, ())
    assert found.latency_ms is None and found.reasons == () and not timed


def test_the_size_of_a_trial_is_that_of_the_bundle_with_its_graph(timed: list[float]) -> None:
    """Weights of 6 kB come in a file of 70: a header of 64 kB and the graph."""
    held = judge(Limits(max_size_mb=0.06))
    model = held.reference
    context = graphs.context(model)
    steps = run_passes((Cleanup(),), context, held.inputs.checks)
    assert steps[-1].size_bytes < 60_000
    assert held(("cleanup",), 0, steps).reasons == ("bundle above 0.06 MB",)


@pytest.mark.parametrize(
    ("limits", "pruned", "reasons"),
    [
        (Limits(), True, ("drowns in noise: 4.0 dB",)),
        (Limits(max_drop=0.1), False, ("drowns in noise: 4.0 dB",)),
        # a promise says what is too much, and the pruned network need not say it alike
        (Limits(max_drop=0.1), True, ()),
        (Limits(max_drop=0.01), True, ("drop above 0.01",)),
    ],
)
def test_a_pruned_network_is_judged_by_the_promised_drop_not_by_its_noise(
    timed: list[float],
    monkeypatch: pytest.MonkeyPatch,
    limits: Limits,
    pruned: bool,
    reasons: tuple[str, ...],
) -> None:
    def judged(*_: object, **__: object) -> Judgement:
        return Judgement(samples=9, sqnr_db=4.0, agreement=0.95, rule="", metric=None)

    monkeypatch.setattr(trial, "judge_outputs", judged)
    validation = SimpleNamespace(samples=lambda: iter([SimpleNamespace(labels={})]))
    held = judge(limits, validation=validation)
    recipe = (PruneStructured(ratio=0.5),) if pruned else (Cleanup(),)
    steps = run_passes(recipe, graphs.context(held.reference), held.inputs.checks)
    assert held([p.name for p in recipe], 0, steps).reasons == reasons
