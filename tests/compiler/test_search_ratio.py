"""How much is pruned for a promise: the smallest share that is fast or small enough."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import graphs
import onnx_ir as ir
import pytest
import small_models
import torch

import edgec
from edgec.errors import RecipeError
from edgec.hunt import Found
from edgec.journal import Journal
from edgec.passes import Context, Pass, PruneStructured, Result, Stage
from edgec.pipeline import Step
from edgec.promise import Limits
from edgec.recipe import load_recipe
from edgec.report import Trial
from edgec.search import search
from edgec.targets import load_target

UNITS = 32  # of the only group
SHARES = [step / 32 for step in range(1, 32)]


@dataclass(frozen=True)
class Train:
    """Stands for a training, which leaves the shapes as they are; a real one takes seconds."""

    name: ClassVar[str] = "train"
    stage: ClassVar[Stage] = Stage.TRAIN
    lossless: ClassVar[bool] = False
    version: ClassVar[int] = 1

    def run(self, model: ir.Model, context: Context) -> Result:
        return Result(model, 0, findings=("trained",))


RECIPE = (*load_recipe("fuse,prune-structured"), Train())


def units_left(steps: Sequence[Step]) -> int:
    (conv,) = (n for n in steps[-1].model.graph if n.name == "conv1")
    return int(conv.inputs[1].shape[0])  # type: ignore[union-attr,index,arg-type]


@dataclass
class Measured:
    """A judge whose figures follow from the number of units that are left, not from a clock.

    speed, drop: of the units that are left. trained_is_slower: by that factor.
    """

    limits: Limits
    drop: Callable[[int], float] = lambda left: 0.0
    speed: Callable[[int], float | None] = lambda left: UNITS / left
    trained_is_slower: float = 1.0
    dense_ms: float = 8.0
    quick: list[int] = field(default_factory=list)
    full: list[int] = field(default_factory=list)

    def __call__(self, recipe: Sequence[str], kept_float: int, steps: Sequence[Step]) -> Trial:
        left = units_left(steps)
        self.full.append(left)
        trial = self.held(recipe, left, self.trained_is_slower)
        drop, reasons = self.drop(left), trial.reasons
        if self.limits.max_drop is not None and drop > self.limits.max_drop:
            reasons = (*reasons, f"drop above {self.limits.max_drop}")
        return replace(trial, drop=drop, reasons=reasons)

    def size_and_speed(self, recipe: Sequence[str], steps: Sequence[Step]) -> Trial:
        assert all(step.pass_.stage is not Stage.TRAIN for step in steps)
        self.quick.append(units_left(steps))
        return self.held(recipe, self.quick[-1], 1.0)

    def held(self, recipe: Sequence[str], left: int, slower: float) -> Trial:
        speed = self.speed(left)
        speedup = None if speed is None else speed / slower
        latency_ms = None if speedup is None else self.dense_ms / speedup
        size_bytes, limits, reasons = left * 10_000, self.limits, []
        if speedup is not None and speedup < (limits.min_speedup or 0.0):
            reasons.append(f"below {limits.min_speedup}x")
        if latency_ms is not None and latency_ms > (limits.max_latency_ms or 1e9):
            reasons.append(f"above {limits.max_latency_ms} ms")
        if size_bytes > (limits.max_size_mb or 1e9) * 1e6:
            reasons.append(f"bundle above {limits.max_size_mb} MB")
        return Trial(
            tuple(recipe),
            0,
            size_bytes,
            speedup,
            None,
            reasons=tuple(reasons),
            latency_ms=latency_ms,
        )


@pytest.fixture(scope="module")
def context() -> Context:
    """A CNN with one group of 32 units that may go one by one."""
    target = replace(load_target("x86-64"), channel_multiple=1)
    feeds = [[{"x": graphs.feed(1, 4, 12, 12, seed=i)} for i in n] for n in (range(9), (90, 91))]
    return graphs.context(graphs.cnn()[0], target, calibration=feeds[0], validation=feeds[1])


def hunt(
    context: Context,
    judge: Measured,
    recipe: tuple[Pass, ...] = RECIPE,
    path: pathlib.Path | None = None,
    seconds: float = 60.0,
) -> Found:
    checks = list(context.calibration)[:1]  # type: ignore[arg-type]
    with Journal(path, "key") as journal:
        return search([recipe], context, checks, judge, journal=journal, seconds=seconds)  # type: ignore[arg-type]


def share(found: Found) -> float:
    (pass_,) = (p for p in found.recipe if isinstance(p, PruneStructured))
    return pass_.ratio


def left_at(ratio: float) -> int:
    return round(UNITS * (1 - ratio))


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        # 24 of 32 units are 1.33 times as fast: no 3 % above the limit
        (Limits(min_speedup=1.3), 23),
        (Limits(max_latency_ms=3.0), 11),
        (Limits(max_size_mb=0.1), 9),
        (Limits(min_speedup=2, max_size_mb=0.3), 15),
        (Limits(min_speedup=2, max_drop=0.5), 15),
    ],
)
def test_the_smallest_share_that_clearly_keeps_size_and_speed(
    context: Context, limits: Limits, left: int
) -> None:
    judge = Measured(limits)
    found = hunt(context, judge)
    assert units_left(found.steps) == left and share(found) == (UNITS - left) / 32
    # found without training, then trained once
    assert len(judge.quick) == 5 and judge.full == [left_at(share(found))]
    assert [trial.untrained for trial in found.trials] == [True] * 5 + [False]
    assert [trial.chosen for trial in found.trials] == [False] * 5 + [True]
    assert found.trials[-1].ratio == share(found)
    assert f"ratio {share(found):g} was chosen" in found.findings[0]


def test_what_the_runtime_adds_to_a_call_counts_where_a_call_is_short(context: Context) -> None:
    # 15 units are fast enough as a graph of 47 microseconds, 10 as a bundle
    judge = Measured(Limits(min_speedup=2), dense_ms=0.1)
    assert units_left(hunt(context, judge).steps) == 10
    judge = Measured(Limits(max_latency_ms=0.05), dense_ms=0.1)
    assert units_left(hunt(context, judge).steps) == 10


@pytest.mark.parametrize("limit", [0.0, 0.1, 0.2, 0.5, 0.9, 1.0])
def test_with_a_drop_alone_the_largest_share_that_keeps_it(context: Context, limit: float) -> None:
    judge = Measured(Limits(max_drop=limit), drop=lambda left: 1 - left / UNITS)
    found = hunt(context, judge)
    kept = [ratio for ratio in SHARES if ratio <= limit]
    assert share(found) == (max(kept) if kept else SHARES[0])
    assert judge.full[0] == 24 and not judge.quick  # a quarter goes first
    assert len(judge.full) <= 7 and len(set(judge.full)) == len(judge.full)
    assert found.trials[judge.full.index(units_left(found.steps))].kept is bool(kept)
    if not kept:
        assert "no candidate keeps every promise" in found.findings[-1]


def test_shares_that_cut_alike_are_tried_once(context: Context) -> None:
    """In eights there are three widths below 32."""
    coarse = replace(context, target=replace(context.target, channel_multiple=8))
    judge = Measured(Limits(min_speedup=1.9))
    assert units_left(hunt(coarse, judge).steps) == 16
    assert sorted(set(judge.quick)) == sorted(judge.quick) and len(judge.quick) <= 4
    judge = Measured(Limits(max_drop=0.5), drop=lambda left: 1 - left / UNITS)
    assert units_left(hunt(coarse, judge).steps) == 16
    assert sorted(set(judge.full)) == sorted(judge.full)


def test_no_share_is_chosen_where_nothing_can_be_cut(context: Context) -> None:
    recipe = (PruneStructured(importance="bn-scale"), Train())
    judge = Measured(Limits(min_speedup=1.5))
    found = hunt(context, judge, recipe)
    assert units_left(found.steps) == UNITS and judge.full == judge.quick == [UNITS]
    (told,) = found.steps[0].result.findings
    assert told.startswith("nothing can be cut: no BatchNormalization scales it; ")
    (finding,) = found.findings
    assert finding.startswith("no candidate keeps every promise on held-out data (below 1.5x)")


def test_a_drop_that_is_broken_where_it_is_fast_enough_is_told(context: Context) -> None:
    judge = Measured(Limits(min_speedup=2.0, max_drop=0.1), drop=lambda left: 0.3)
    found = hunt(context, judge)
    assert 1.9 < UNITS / units_left(found.steps) < 2.3 and len(judge.full) == 1
    (chosen,) = (trial for trial in found.trials if trial.chosen)
    assert chosen.reasons == ("drop above 0.1",)
    assert "drop above 0.1" in found.findings[-1]


def test_a_speed_out_of_reach_leaves_the_largest_share_or_the_largest_that_keeps_the_drop(
    context: Context,
) -> None:
    assert share(hunt(context, Measured(Limits(min_speedup=1000.0)))) == SHARES[-1]
    drop = Measured(Limits(min_speedup=1000.0, max_drop=0.5), drop=lambda left: 1 - left / UNITS)
    assert share(hunt(context, drop)) == 0.5


def test_a_share_that_turns_out_too_slow_gives_way_to_the_next(context: Context) -> None:
    judge = Measured(Limits(min_speedup=2.0), trained_is_slower=1.1)
    found = hunt(context, judge)
    assert found.trials[-1].kept and 2 <= len(judge.full) <= 4
    assert judge.full == list(range(judge.full[0], judge.full[-1] - 1, -1))
    hopeless = Measured(Limits(min_speedup=2.0), trained_is_slower=10.0)
    hunt(context, hopeless)
    assert len(hopeless.full) == 4


def test_a_speed_that_cannot_be_judged_here_chooses_nothing(context: Context) -> None:
    elsewhere = {"speed": lambda left: None}
    for limits in (Limits(min_speedup=2.0), Limits(max_latency_ms=1.0)):
        with pytest.raises(RecipeError, match="not of the kind of target 'x86-64'.*--max-drop, or"):
            hunt(context, Measured(limits, **elsewhere))  # type: ignore[arg-type]
    by_size = Measured(Limits(min_speedup=2.0, max_size_mb=0.1), **elsewhere)  # type: ignore[arg-type]
    assert units_left(hunt(context, by_size).steps) in (9, 10)
    drop = {"drop": lambda left: 1 - left / UNITS, **elsewhere}
    by_drop = Measured(Limits(min_speedup=2.0, max_drop=0.5), **drop)  # type: ignore[arg-type]
    assert share(hunt(context, by_drop)) == 0.5


def test_a_search_without_time_looks_once_and_trains_once(context: Context) -> None:
    for limits, first in ((Limits(min_speedup=1.1), 16), (Limits(max_drop=0.9), 24)):
        judge = Measured(limits)
        assert units_left(hunt(context, judge, seconds=0.0).steps) == first
        assert len(judge.quick) == (first == 16) and judge.full == [first]


@pytest.mark.parametrize("limits", [Limits(min_speedup=1.4), Limits(max_drop=0.4)])
def test_a_killed_search_goes_on_where_it_stopped(
    context: Context, tmp_path: pathlib.Path, limits: Limits
) -> None:
    path = tmp_path / ".model.search.json"
    whole = Measured(limits, drop=lambda left: 1 - left / UNITS)
    expected = hunt(context, whole)
    asked = 0

    def figure(of: Callable[[int], float]) -> Callable[[int], float]:
        def killed(left: int) -> float:
            nonlocal asked
            asked += 1
            if asked > 3:
                raise KeyboardInterrupt
            return of(left)

        return killed

    name = "drop" if limits.max_drop else "speed"
    ended = Measured(limits, **{"drop": whole.drop, name: figure(getattr(whole, name))})
    with pytest.raises(KeyboardInterrupt):
        hunt(context, ended, path=path)
    resumed = Measured(limits, drop=whole.drop)
    found = hunt(context, resumed, path=path)
    known = len(whole.quick) + len(whole.full) - len(resumed.quick) - len(resumed.full)
    assert known == 3 and found.trials == expected.trials and found.recipe == expected.recipe
    assert [s.result.decisions for s in found.steps] == [s.result.decisions for s in expected.steps]


def test_rounds_stay_in_the_recipe_and_are_run_in_full_alone(context: Context) -> None:
    judge = Measured(Limits(min_speedup=2.0))
    found = hunt(context, judge, (*load_recipe("cleanup,fuse"), PruneStructured(rounds=2), Train()))
    names = [step.pass_.name for step in found.steps]
    assert names == ["cleanup", "fuse", *["prune-structured", "train"] * 2]
    (pass_,) = (p for p in found.recipe if isinstance(p, PruneStructured))
    assert pass_.rounds == 2 and pass_.ratio == found.trials[-1].ratio
    assert units_left(found.steps) == left_at(pass_.ratio)


def test_the_shapes_are_looked_at_with_few_samples(context: Context) -> None:
    class Counted:
        taken = 0

        def __iter__(self):  # type: ignore[no-untyped-def]
            for i in range(len(self)):
                Counted.taken += 1
                yield {"x": graphs.feed(1, 4, 12, 12, seed=i)}

        def __len__(self) -> int:
            return 500

    many = dataclasses.replace(context, calibration=Counted())
    recipe = load_recipe("cleanup,prune-structured,quantize-static")
    judge = Measured(Limits(min_speedup=2.0))
    with Journal(None, "key") as journal:
        checks = [{"x": graphs.feed(1, 4, 12, 12)}]
        search([recipe], many, checks, judge, journal=journal, seconds=0.0)  # type: ignore[arg-type]
    assert 500 + 64 <= Counted.taken < 2 * 500


@pytest.mark.parametrize(
    ("limits", "calibration", "message"),
    [
        (Limits(), True, "how much may go.*ratio=0.25, or a promise.*--max-latency-ms"),
        (Limits(max_slice_drop=0.1), True, "how much may go"),
        (Limits(max_drop=0.1), False, "no samples can be held out.*--calibration"),
    ],
)
def test_nothing_to_choose_by_is_told_before_the_export(
    tmp_path: pathlib.Path, limits: Limits, calibration: bool, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        edgec.build(
            edgec.Source(torch.nn.Linear(2, 2), ("not exported",), name="model"),
            target="arm64",
            output=tmp_path,
            recipe="cleanup,prune-structured",
            limits=limits,
            calibration="data" if calibration else None,
        )


def test_too_few_samples_to_hold_some_out_cannot_choose_by_the_drop(context: Context) -> None:
    with pytest.raises(RecipeError, match="no samples can be held out"):
        hunt(replace(context, validation=None), Measured(Limits(max_drop=0.1)))


@pytest.mark.slow
def test_a_build_prunes_until_the_bundle_is_small_enough(tmp_path: pathlib.Path) -> None:
    """For another kind of machine, so that nothing depends on a clock."""
    nn, images = torch.nn, small_models.images(16)
    common: dict[str, Any] = {
        "target": "arm64",
        "calibration": lambda: [{"image": image} for image in images],
        "verify": False,
    }
    wide = (nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU())
    torch.manual_seed(0)
    module = nn.Sequential(*wide, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
    source = edgec.Source(module, (small_models.image(),), input_names=("image",), name="cnn")
    recipe = "cleanup,fuse,prune-structured,recover,lower"
    settings = ("recover.steps=2", "prune-structured.round_to=1")
    asked = {"recipe": recipe, "settings": settings, "limits": Limits(max_size_mb=0.15)}
    dense = edgec.build(source, output=tmp_path / "dense", recipe="cleanup,fuse", **common)
    report = edgec.build(source, output=tmp_path / "small", **asked, **common)
    assert dense.size_bytes > 200_000
    assert report.kept and 130_000 < report.size_bytes <= 150_000
    trials = report.trials
    assert len([t for t in trials if t.untrained]) == 5
    assert [t.chosen for t in trials] == [False] * 5 + [True]
    (lock,) = (tmp_path / "small").glob("*.lock.json")
    again = edgec.build(source, output=tmp_path / "again", lock=lock, **common)
    assert again.bundle_sha256 == report.bundle_sha256
    assert "pruned share" in (tmp_path / "small" / "report.html").read_text().lower()
