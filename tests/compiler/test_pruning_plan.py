"""What one build pruned, cut again in another: from its lock file, its report, or a plan alone."""

from __future__ import annotations

import json
import pathlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import graphs
import onnx_ir as ir
import pytest
import small_models
import torch
from made_up_report import HOSTILE, full_report
from residual_graphs import custom
from torch import nn

import edgec
from edgec.errors import EdgecError, LockError, PassError, PlanError
from edgec.journal import Journal
from edgec.lock import Lock, check_lock
from edgec.passes import PruneBlocks, PruneStructured
from edgec.passes.execution import graph_bytes
from edgec.pipeline import run_passes
from edgec.promise import Limits
from edgec.pruning_plan import as_decisions, check_plan, read_plan
from edgec.recipe import load_recipe
from edgec.report import Trial
from edgec.report_format import trial_rows
from edgec.report_html import render_html
from edgec.report_plans import DepthPlan, PrunedGroup, PruningPlan, ResidualBlock
from edgec.search import search

RECIPE = "cleanup,fuse,prune-structured"
OPTIONS: dict[str, Any] = {"target": "x86-64", "verify": False, "keep_reference": True}


def source(module: nn.Module) -> edgec.Source:
    return edgec.Source(module, (small_models.image(),), input_names=("image",), name="cnn")


def retrained() -> nn.Module:
    """The same architecture with other weights, whose units matter in another order."""
    module = small_models.cnn()
    generator = torch.Generator().manual_seed(77)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    return module


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A build whose plan the tests apply: a quarter of the units, in steps of 4."""
    folder = tmp_path_factory.mktemp("earlier")
    settings = ("prune-structured.ratio=0.25", "prune-structured.round_to=4")
    edgec.build(
        source(small_models.cnn()), output=folder, recipe=RECIPE, settings=settings, **OPTIONS
    )
    return folder


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Lock file, report and bare plan of a build."""
    (lock,) = folder.glob("*.lock.json")
    steps = json.loads((folder / "report.json").read_text())["steps"]
    bare = folder / "plan.json"
    bare.write_text(json.dumps(steps[2]["plan"]))
    return [lock, folder / "report.json", bare]


def kept(folder: pathlib.Path) -> dict[str, list[int]]:
    steps = json.loads((folder / "report.json").read_text())["steps"]
    return {group["name"]: group["kept"] for group in steps[2]["plan"]["groups"]}


def test_lock_report_and_bare_plan_say_the_same(earlier: pathlib.Path) -> None:
    lock, report, bare = map(read_plan, files(earlier))
    assert lock == report == bare
    assert [(g["units"], len(g["kept"])) for g in lock["groups"]] == [(16, 12), (32, 24)]
    page = (earlier / "report.html").read_text()
    assert "What was pruned" in page and "--plan report.json" in page


def test_a_search_is_over_where_a_plan_says_what_goes(tmp_path: pathlib.Path) -> None:
    """No share is looked for, not even with a promise; other weights are cut alike."""
    model, feeds = graphs.cnn()
    context = graphs.context(model)
    (step,) = run_passes((PruneStructured(ratio=0.5),), context, [feeds])
    plan = dict(step.result.decisions)
    for value in model.graph.initializers.values():
        array = value.const_value.numpy()  # type: ignore[union-attr]
        if array.ndim > 1:
            value.const_value = ir.tensor(graphs.weight(*array.shape, seed=77))
    judge: Any = SimpleNamespace(limits=Limits(min_speedup=99.0))
    found = search(
        [(PruneStructured(),)],
        graphs.context(model),
        [feeds],
        judge,
        journal=Journal(None, "key"),
        seconds=9.0,
        plan=plan,
    )
    assert found.steps[0].result.decisions == plan and not found.trials
    own = PruneStructured(ratio=0.5).run(model.clone(), graphs.context(model))
    assert own.decisions != plan


@pytest.mark.slow
def test_a_retrained_model_is_cut_in_the_same_places(
    earlier: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    model = source(retrained())
    own = ("prune-structured.ratio=0.25", "prune-structured.round_to=4")
    edgec.build(model, output=tmp_path / "own", recipe=RECIPE, settings=own, **OPTIONS)
    assert kept(tmp_path / "own") != kept(earlier)
    # no ratio and no promise: the plan says how much
    plan = files(earlier)[0]
    report = edgec.build(model, output=tmp_path / "new", recipe=RECIPE, plan=plan, **OPTIONS)
    assert kept(tmp_path / "new") == kept(earlier)
    assert report.size_bytes == pytest.approx((earlier / "cnn.x86-64.edgec").stat().st_size, abs=99)
    # and its own lock repeats it
    (lock,) = (tmp_path / "new").glob("*.lock.json")
    again = edgec.build(model, output=tmp_path / "again", lock=lock, **OPTIONS)
    assert again.bundle_sha256 == report.bundle_sha256


def test_the_plan_of_rounds_is_one_cut(tmp_path: pathlib.Path) -> None:
    """The second round counts the units that the first one left."""
    model, feeds = graphs.cnn()
    context = graphs.context(model)
    first = PruneStructured(ratio=0.25, round_to=8)
    rounds = (first, replace(first, ratio=0.5, importance="l2"))
    steps = run_passes(rounds, context, [feeds])
    plans = [dict(step.result.decisions) for step in steps]
    assert [plan["groups"][0]["units"] for plan in plans] == [32, 24]
    path = tmp_path / "report.json"
    entries = [{"name": "prune-structured", "plan": plan} for plan in plans]
    path.write_text(json.dumps({"steps": entries}))
    whole = read_plan(path)
    assert whole["groups"][0]["units"] == 32 and len(whole["groups"][0]["kept"]) == 16
    (step,) = run_passes((PruneStructured(),), context, [feeds], [whole])
    assert graph_bytes(step.model) == graph_bytes(steps[-1].model)
    entries[1]["plan"]["groups"][0]["units"] = 25
    path.write_text(json.dumps({"steps": entries}))
    with pytest.raises(PlanError, match="damaged: group 'conv1' has 25 units where 24 were kept"):
        read_plan(path)


def test_the_page_tells_what_is_left_of_each_group_and_folds_long_lists() -> None:
    def page(amount: int) -> str:
        groups = [PrunedGroup(HOSTILE, "channel", 64, (0, 2, 5)) for _ in range(amount)]
        report = full_report()
        step = replace(report.steps[0], plan=PruningPlan(tuple(groups)))
        text = render_html(replace(report, steps=(step, *report.steps[1:])))
        return text[text.index("What was pruned") :].partition("</section>")[0]

    short, long = page(12), page(13)
    assert "<details>" not in short and "<summary>13 groups</summary>" in long
    assert ">64<" in short and ">3<" in short and "<script>alert" not in short
    assert "What was pruned" not in render_html(full_report())


def test_trials_of_shares_show_them() -> None:
    trial = Trial(("prune-structured",), 0, 9_000, 1.5, None, ratio=0.125, untrained=True)
    report = replace(full_report(), trials=(trial, replace(trial, ratio=None, chosen=True)))
    columns, rows = trial_rows(report)
    share, outcome = columns.index("pruned share"), columns.index("outcome")
    assert [(row[share], row[outcome]) for row in rows] == [
        ("0.125", "size and speed alone"),
        ("", "chosen; size and speed alone"),
    ]
    given = replace(report, trials=(replace(trial, ratio=None),))
    assert "pruned share" not in trial_rows(given)[0]


def block(name: str, *, removed: bool, importance: float | None = 0.01) -> ResidualBlock:
    return ResidualBlock(name, f"{name}_sum", "x", 2, 1024, importance, removed)


def test_the_page_tells_which_blocks_went() -> None:
    report = full_report()
    plan = DepthPlan((block(HOSTILE, removed=True), block("b", removed=False, importance=None)))
    steps = (replace(report.steps[0], plan=plan), *report.steps[1:])
    page = render_html(replace(report, steps=steps))
    text = page[page.index("What was pruned") :].partition("</section>")[0]
    assert ">gone<" in text and ">kept<" in text and ">0.01<" in text and ">1,024<" in text
    assert "Blocks: " in text and "Groups: " not in text and "--plan report.json" in text
    assert "<script>alert" not in text
    kept = replace(steps[0], plan=DepthPlan((block("b", removed=False),)))
    assert "What was pruned" not in render_html(replace(report, steps=(kept,)))


def wide_tower(seed: int) -> ir.Model:
    """Two residual branches of two layers; the width within a branch is a group."""
    text = " ".join(
        f"[up{i}] u{i} = MatMul (s{i}, w{a}) [down{i}] d{i} = MatMul (u{i}, w{b}) "
        f"[block{i}] s{i + 1} = Add (s{i}, d{i})"
        for i, (a, b) in enumerate(("ab", "cd"))
    )
    shapes = {"wa": (16, 32), "wb": (32, 16), "wc": (16, 32), "wd": (32, 16)}
    weights = {
        n: graphs.weight(*shape, seed=seed + i) for i, (n, shape) in enumerate(shapes.items())
    }
    return custom(f"s0 = Relu (x) {text} y = Relu (s2)", **weights)


def test_one_file_has_the_plan_of_both_prunings(tmp_path: pathlib.Path) -> None:
    """Blocks and units of a model go from another one of its architecture, without data."""
    model, other = wide_tower(0), wide_tower(40)
    feeds = {"x": graphs.feed(2, 5, 16)}
    recipe = (PruneBlocks(blocks=1), PruneStructured(ratio=0.5))
    first = run_passes(recipe, graphs.context(model, calibration=[feeds]), [feeds])
    steps = [{"name": s.pass_.name, "plan": dict(s.result.decisions)} for s in first]
    (tmp_path / "report.json").write_text(json.dumps({"steps": steps}))
    plan = read_plan(tmp_path / "report.json")
    (tmp_path / "bare.json").write_text(json.dumps(plan))
    assert read_plan(tmp_path / "bare.json") == plan and sorted(plan) == ["blocks", "groups"]
    asked = (PruneBlocks(), PruneStructured())
    check_plan(plan, asked, tmp_path / "report.json", None)
    again = run_passes(asked, graphs.context(other), [feeds], as_decisions(plan, asked))
    shapes = [
        {n: v.shape for n, v in steps[-1].model.graph.initializers.items()}
        for steps in (first, again)
    ]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 2
    (gone,) = (entry["name"] for entry in plan["blocks"] if entry["removed"])
    assert gone not in {node.name for node in again[0].model.graph}


def test_blocks_of_two_steps_are_one_plan(tmp_path: pathlib.Path) -> None:
    model, feeds = wide_tower(0), {"x": graphs.feed(2, 5, 16)}
    context = graphs.context(model, calibration=[feeds])
    steps = run_passes((PruneBlocks(blocks=1), PruneBlocks(blocks=2)), context, [feeds])
    entries = [{"name": "prune-blocks", "plan": dict(s.result.decisions)} for s in steps]
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"steps": entries}))
    plan = read_plan(path)
    assert [entry["removed"] for entry in plan["blocks"]] == [True, True]
    recipe = (PruneBlocks(), PruneBlocks())
    assert as_decisions(plan, recipe) == [plan, {"blocks": []}]
    again = run_passes(recipe, graphs.context(model), [feeds], as_decisions(plan, recipe))
    assert graph_bytes(again[-1].model) == graph_bytes(steps[-1].model)
    entries[1]["plan"]["blocks"].append(entries[1]["plan"]["blocks"][0] | {"result": "new"})
    path.write_text(json.dumps({"steps": entries}))
    with pytest.raises(PlanError, match="became one only when others had gone"):
        read_plan(path)


@pytest.mark.slow
def test_a_build_reports_its_blocks_and_another_removes_them_from_a_retrained_model(
    tmp_path: pathlib.Path,
) -> None:
    def tower(seed: int) -> edgec.Source:
        torch.manual_seed(seed)
        module = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

        class Tower(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = module

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for layer in self.layers:
                    x = x + layer(x).relu()
                return x

        return edgec.Source(Tower(), (torch.zeros(1, 16),), input_names=("x",), name="tower")

    data = [{"x": graphs.feed(1, 16, seed=seed)} for seed in range(8)]
    options = {**OPTIONS, "recipe": "cleanup,fuse,prune-blocks"}
    edgec.build(
        tower(0),
        output=tmp_path / "first",
        calibration=lambda: data,
        settings=["prune-blocks.blocks=1"],
        **options,
    )

    def blocks(folder: str) -> list[tuple[str, bool]]:
        steps = json.loads((tmp_path / folder / "report.json").read_text())["steps"]
        return [(b["name"], b["removed"]) for b in steps[2]["plan"]["blocks"]]

    assert sum(removed for _, removed in blocks("first")) == 1
    assert "What was pruned" in (tmp_path / "first/report.html").read_text()
    (lock,) = (tmp_path / "first").glob("*.lock.json")
    for number, plan in enumerate((tmp_path / "first/report.json", lock)):
        edgec.build(tower(number + 1), output=tmp_path / f"new{number}", plan=plan, **options)
        assert blocks(f"new{number}") == blocks("first")


def group(kept: str) -> str:
    return f'{{"groups": [{{"name": "a", "kind": "hidden", "units": 4, "kept": {kept}}}]}}'


def step(plan: str) -> str:
    return f'{{"steps": [{{"name": "prune-structured", "plan": {plan}}}]}}'


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, PlanError, "plan.json: No such file"),
        ("{", PlanError, "plan.json: not JSON"),
        ("[1]", PlanError, "expected the lock file or report.json"),
        ('{"target": "x"}', PlanError, "expected the lock file or report.json"),
        ('{"steps": []}', PlanError, "did not prune by prune-structured or prune-blocks"),
        ('{"steps": [{"name": "fuse", "plan": null}, 7]}', PlanError, "did not prune by"),
        ('{"lock_version": 1}', LockError, "changed by hand"),
        ('{"groups": 7}', PlanError, "plan.json: groups is 7, expected a list"),
        ('{"groups": [{"kept": []}]}', PlanError, r"groups\[0\] has no name, expected a text"),
        (group("[1e400]"), PlanError, r"plan.json: .*\('a'\): kept\[0\] is inf, expected a whole"),
        (group("[1e99999, NaN]"), PlanError, r"kept\[0\] is inf, expected"),
        (group('"0123"'), PlanError, "kept is '0123', expected a list"),
        (group("[0, 0, 1]"), PlanError, "kept has 0 more than once"),
        (group("[]"), PlanError, "kept is empty, expected at least one of 4 units"),
        (group("[3, 2, 1, 0]"), PlanError, "it cuts nothing, so the model would stay as it is"),
        ('{"groups": []}', PlanError, "it cuts nothing, so the model would stay as it is"),
        ('{"blocks": []}', PlanError, "it cuts nothing, so the model would stay as it is"),
        ('{"groups": [], "blocks": 7}', PlanError, "plan.json: blocks is 7, expected a list"),
        (step('{"groups": []}'), PlanError, "it cuts nothing, so the model would stay as it is"),
    ],
)
def test_what_holds_no_plan_is_refused(
    tmp_path: pathlib.Path, content: str | None, error: type[EdgecError], message: str
) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=message):
        read_plan(path)


def test_a_plan_needs_a_pass_to_apply_it_and_no_lock(
    earlier: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    lock, plan, _ = files(earlier)
    given = source(small_models.cnn())
    refused = (
        ({"recipe": "cleanup,fuse"}, "no prune-structured to apply its groups, but cleanup, fuse"),
        ({}, "no prune-structured to apply its groups, but the passes of the target"),
        ({"lock": lock, "recipe": RECIPE}, "lock file .* has the plan of its build, too"),
    )
    for options, message in refused:
        with pytest.raises(PlanError, match=message):
            edgec.build(given, output=tmp_path, plan=plan, **options, **OPTIONS)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["groups", "blocks"])
def test_a_lock_of_another_model_names_the_plan_that_it_holds(part: str) -> None:
    path, lock = pathlib.Path("a.lock.json"), Lock("digest", "x86-64", "", steps=({part: []},))
    with pytest.raises(LockError, match="another model; .*, or with --plan to prune another model"):
        check_lock(lock, path, reference="other")
    for other in (replace(lock, steps=({},)), replace(lock, reference="other", target="arm64")):
        with pytest.raises(LockError) as told:
            check_lock(other, path, target="x86-64", reference="other")
        assert "--plan" not in str(told.value)


def test_a_recipe_has_to_apply_all_of_a_plan_and_leave_nothing_open() -> None:
    path = pathlib.Path("plan.json")
    blocks = {"blocks": [{"removed": True}]}
    both = {**blocks, "groups": [{"kept": [0]}]}
    ratio = PruneStructured(ratio=0.5)
    check_plan(blocks, (PruneBlocks(), ratio), path, None)
    check_plan({"blocks": [], "groups": [{}]}, (PruneStructured(),), path, None)
    with pytest.raises(PlanError, match="no prune-blocks to apply its blocks, but prune-struc"):
        check_plan(both, (ratio,), path, None)
    with pytest.raises(PlanError, match="no groups for prune-structured, which has no ratio"):
        check_plan(blocks, (PruneBlocks(), PruneStructured()), path, None)


@pytest.mark.slow
def test_a_plan_of_another_architecture_is_one_clear_error(
    earlier: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    wider = small_models.cnn()
    wider[5], wider[9] = nn.Conv2d(16, 40, 1), nn.Linear(40, 10)
    with pytest.raises(PassError, match="32 units of kind .* which this model does not have"):
        edgec.build(
            source(wider), output=tmp_path, recipe=RECIPE, plan=files(earlier)[0], **OPTIONS
        )


def test_all_of_a_plan_goes_in_the_first_round() -> None:
    plan = {"groups": [{"name": "a"}]}
    recipe = (
        *load_recipe("cleanup"),
        PruneStructured(rounds=2),
        *load_recipe("recover,quantize-static"),
    )
    nothing = {"groups": []}
    assert as_decisions(plan, recipe) == [{}, plan, {}, nothing, {}, {}]
