"""The search for the promise: other recipes, float layers, time limit, resumption."""

from __future__ import annotations

import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import graphs
import numpy as np
import onnx_ir as ir
import pytest

import edgec
from edgec import trial
from edgec.bench import Timing
from edgec.errors import EdgecError
from edgec.hunt import Found
from edgec.journal import Journal
from edgec.passes import Context
from edgec.pipeline import Step
from edgec.promise import Limits
from edgec.recipe import load_recipe
from edgec.report import Trial
from edgec.search import _integer_sources, search
from edgec.targets import load_target

STATIC = load_recipe("quantize-static")
WEIGHTS = load_recipe("quantize-weights")
LOSSLESS = load_recipe("cleanup")
CLASSES = 16


class Feeds:
    """Images as calibration samples."""

    def __init__(self, count: int, seed: int) -> None:
        self.images = [graphs.feed(1, 8, 9, 9, seed=seed + i) for i in range(count)]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter({"x": image} for image in self.images)

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class Told:
    """A judge that says what the test tells it to, and counts how often it is asked."""

    verdict: Callable[[Sequence[str], int], tuple[str, ...]]
    limits: Limits = Limits(max_drop=0.01)
    asked: int = 0

    def __call__(self, recipe: Sequence[str], kept_float: int, steps: Sequence[Step]) -> Trial:
        self.asked += 1
        reasons = self.verdict(recipe, kept_float)
        return Trial(tuple(recipe), kept_float, 0, 1.0, None, reasons=reasons)


def outlier_model() -> ir.Model:
    """Five convolutions; between the second and the third one channel is 3,000 times larger.

    One scale for the activation leaves nothing of the other channels, so the third layer
    is by far the noisiest.
    """
    weights = {f"w{i}": graphs.weight(8, 8, 3, 3, seed=i) for i in range(5)}
    weights["w1"][0] *= 3000.0
    weights["w2"][:, 0] /= 3000.0
    weights["head"] = graphs.weight(8, CLASSES, seed=9)
    text = """outliers (float[1, 8, 9, 9] x) => (float[1, 16] y) {
        [c0] a = Conv <pads = [1, 1, 1, 1]> (x, w0)
        ra = Relu (a)
        [c1] b = Conv <pads = [1, 1, 1, 1]> (ra, w1)
        rb = Relu (b)
        [c2] c = Conv <pads = [1, 1, 1, 1]> (rb, w2)
        rc = Relu (c)
        [c3] d = Conv <pads = [1, 1, 1, 1]> (rc, w3)
        rd = Relu (d)
        [c4] e = Conv <pads = [1, 1, 1, 1]> (rd, w4)
        g = GlobalAveragePool (e)
        f = Flatten (g)
        [fc] y = Gemm (f, head)
    }"""
    return graphs.graph(text, weights)


@pytest.fixture(scope="module")
def context() -> Context:
    model = outlier_model()
    made = graphs.context(model, "arm64", calibration=Feeds(6, 0), validation=Feeds(3, 50))
    return replace(made, reference=model)


def hunt(
    context: Context,
    judge: Told,
    candidates: Sequence[tuple[edgec.passes.Pass, ...]] = (STATIC, WEIGHTS, LOSSLESS),
    path: pathlib.Path | None = None,
    seconds: float = 60.0,
) -> Found:
    checks = list(context.calibration)[:1]  # type: ignore[arg-type]
    with Journal(path, "key") as journal:
        return search(candidates, context, checks, judge, journal=journal, seconds=seconds)


def test_the_first_recipe_that_keeps_the_promise_is_taken(context: Context) -> None:
    found = hunt(context, Told(lambda recipe, kept: ()))
    assert found.recipe == STATIC and len(found.trials) == 1 and not found.findings


def test_a_slower_recipe_gives_way_to_the_next_and_the_report_says_so(context: Context) -> None:
    slow = {"quantize-static", "quantize-weights"}
    judge = Told(lambda recipe, kept: ("slower than float32",) if slow & set(recipe) else ())
    found = hunt(context, judge)
    assert found.recipe == LOSSLESS
    assert [trial.chosen for trial in found.trials] == [False, False, True]
    (finding,) = found.findings
    assert "quantize-static was given up (slower than float32)" in finding


def test_as_few_layers_stay_float_as_the_promise_allows(context: Context) -> None:
    judge = Told(lambda recipe, kept: () if kept >= 4 else ("drop above 0.01",))
    found = hunt(context, judge)
    # all in integers, then 1, 2 and 4 more choices, then the one between the last two
    kept = [trial.kept_float for trial in found.trials]
    assert kept[0] == 0 and kept[1] < kept[2] < kept[4] < kept[3]
    chosen = next(trial for trial in found.trials if trial.chosen)
    assert chosen.kept_float == 4 and "noisiest 4 layers stay in float" in found.findings[0]


def test_the_noisiest_layer_stays_float_with_what_it_reads(context: Context) -> None:
    found = hunt(context, Told(lambda recipe, kept: () if kept else ("drop above 0.01",)))
    assert found.recipe[0].skip == ("c1", "c2")  # type: ignore[attr-defined]
    assert found.steps[0].sqnr_db > 20.0  # with c2 in integers it is under 10 dB
    assert hunt(context, Told(lambda recipe, kept: ())).steps[0].sqnr_db < 10.0


def test_a_search_without_time_takes_the_first_try_and_says_why(context: Context) -> None:
    judge = Told(lambda recipe, kept: ("drop above 0.01",))
    found = hunt(context, judge, seconds=0.0)
    assert judge.asked == 1 and found.recipe == STATIC
    found = hunt(context, judge, seconds=60.0)
    assert "no candidate keeps every promise" in found.findings[-1]


def test_a_killed_search_goes_on_where_it_stopped(context: Context, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out" / ".model.search.json"
    whole = Told(lambda recipe, kept: () if kept >= 4 else ("drop above 0.01",))
    expected = hunt(context, whole)

    def killed(recipe: Sequence[str], kept: int) -> tuple[str, ...]:
        if kept > 4:
            raise KeyboardInterrupt
        return whole.verdict(recipe, kept)

    with pytest.raises(KeyboardInterrupt):
        hunt(context, Told(killed), path=path)
    assert path.is_file()
    resumed = Told(whole.verdict)
    found = hunt(context, resumed, path=path)
    assert resumed.asked == whole.asked - 3  # 0, 1 and 2 layers were known
    assert found.recipe == expected.recipe and found.trials == expected.trials
    assert found.steps[0].result.decisions == expected.steps[0].result.decisions
    assert not path.exists()  # the lock has what is worth keeping


@pytest.mark.parametrize("content", ['{"key": "another", "entries": []}', "{", "[1]"])
def test_another_builds_journal_is_ignored(
    context: Context, tmp_path: pathlib.Path, content: str
) -> None:
    path = tmp_path / ".model.search.json"
    path.write_text(content)
    judge = Told(lambda recipe, kept: ())
    assert hunt(context, judge, path=path).trials[0].kept and judge.asked == 1


def test_an_error_in_a_search_leaves_no_journal(context: Context, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out" / ".model.search.json"

    def failing(recipe: Sequence[str], kept: int) -> tuple[str, ...]:
        if kept:
            raise EdgecError("the disk is full")
        return ("drop above 0.01",)

    with pytest.raises(EdgecError):
        hunt(context, Told(failing), path=path)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_drowns_in_noise_is_not_delivered(tmp_path: pathlib.Path) -> None:
    model = tmp_path / "outliers.onnx"
    ir.save(outlier_model(), model)
    np.savez(tmp_path / "calibration.npz", x=np.concatenate(Feeds(48, 0).images))
    report = edgec.build(
        model,
        target="arm64",
        output=tmp_path / "out",
        calibration=tmp_path / "calibration.npz",
    )
    first = report.trials[0]
    assert first.sqnr_db < 10.0 and "drowns in noise" in first.reasons[0]  # type: ignore[operator]
    assert report.sqnr_db > 10.0 and any(t.kept_float and t.chosen for t in report.trials)


def test_a_build_keeps_its_promise_by_leaving_a_layer_in_float(tmp_path: pathlib.Path) -> None:
    model = tmp_path / "outliers.onnx"
    ir.save(outlier_model(), model)
    for name, seed, count in (("calibration", 0, 48), ("evaluation", 500, 64)):
        np.savez(tmp_path / f"{name}.npz", x=np.concatenate(Feeds(count, seed).images))
    report = edgec.build(
        model,
        target="arm64",
        output=tmp_path / "out",
        calibration=tmp_path / "calibration.npz",
        evaluation=tmp_path / "evaluation.npz",
        limits=Limits(max_drop=0.2),
    )
    assert report.kept, report.promises
    assert report.trials[0].drop > 0.2  # type: ignore[operator]
    assert any(trial.kept_float and trial.chosen for trial in report.trials)
    # the lock holds the choice: no second search, the same bytes
    again = edgec.build(
        model,
        target="arm64",
        output=tmp_path / "again",
        calibration=tmp_path / "calibration.npz",
        evaluation=tmp_path / "evaluation.npz",
        lock=tmp_path / "out" / "outliers.arm64.lock.json",
    )
    assert again.bundle_sha256 == report.bundle_sha256 and not again.trials


def test_the_search_finds_layers_without_names() -> None:
    model = outlier_model()
    for node in model.graph:
        node.name = None
    sources = _integer_sources(model, {"Conv -> b", "Conv -> c"}, {"Relu"})
    assert sources == {"Conv -> b": (), "Conv -> c": ("Conv -> b",)}


def test_providers_that_compute_on_threads_of_their_own_are_timed_by_the_clock(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = []

    def noted(calls, *, clock, **_):  # type: ignore[no-untyped-def]
        clocks.append(clock)
        return [Timing(name, 1.0, 1.0, 1.0, 11, (1.0,) * 11) for name, _ in calls]

    monkeypatch.setattr(trial, "interleave", noted)
    monkeypatch.setattr(trial, "absent_providers", lambda providers: ())
    monkeypatch.setattr(trial, "is_kind_of", lambda machine, target: True)
    for name in ("x86-64", "x86-64-openvino"):
        inputs = SimpleNamespace(checks=list(context.calibration or ())[:1], validation=None)
        judge = trial.Judge(context.reference, load_target(name), inputs, Limits())  # type: ignore[arg-type]
        assert judge(("cleanup",), 0, ()).speedup == 1.0
    assert clocks[0] is time.thread_time and clocks[-1] is time.perf_counter


def test_slower_by_chance_is_not_slower_and_the_measurement_lasts_until_it_knows(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    own_ms = {"tie": [0.99, 1.015], "slower": [1.02, 1.02], "unsettled": [0.6, 1.5]}

    def measured(kind: str):  # type: ignore[no-untyped-def]
        def noted(calls, *, seconds, **_):  # type: ignore[no-untyped-def]
            asked.append(seconds)
            taken = [own_ms[kind][(i // 10) % 2] for i in range(100)]
            return [
                Timing("reference", 1.0, 1.0, 1.0, 100, (1.0,) * 100),
                Timing("model", statistics.median(taken), 1.0, 1.0, 100, tuple(taken)),
            ]

        return noted

    monkeypatch.setattr(trial, "is_kind_of", lambda machine, target: True)
    inputs = SimpleNamespace(checks=list(context.calibration or ())[:1], validation=None)
    judge = trial.Judge(context.reference, load_target("x86-64"), inputs, Limits())  # type: ignore[arg-type]
    told = {}
    for kind in own_ms:
        asked.clear()
        monkeypatch.setattr(trial, "interleave", measured(kind))
        told[kind] = judge(("cleanup",), 0, ()).reasons, len(asked)
    assert told["slower"] == (("slower than float32",), 1)
    assert told["unsettled"] == ((), 3)
    assert told["tie"] == ((), 1)
