"""What pruning costs in accuracy and what it gains in latency: a curve for each model.

    python benchmarks/pruning_curve.py --models residual [--work DIR] [--plot docs/pruning.svg]
    python benchmarks/pruning_curve.py --models efficientnet-lite0 minilm [--held-out]

For each share of units one recipe runs: prune, recover, quantize to int8, and recover the int8
graph, too (QAT; not where int8 is dynamic). Every stage is a row, so each can be compared
with what it does alone: the dense model is quantized and recovered with the same settings, and
trained on as long as the pruned ones.

    residual            residual CNN of width 64, trained here on Fashion-MNIST: accuracy on
                        the 10,000 test images; labels are used to recover
    efficientnet-lite0  agreement with float32 on 296 photographs, recovered without labels
    minilm              Spearman's correlation on WordSim-353, recovered without labels on news

Speeds are ratios of CPU time in ONNX Runtime, one thread, batch 1, all models of a table in
turns, ± one standard error. ``--work`` keeps every model and its score: a second run only times.
``--held-out`` judges on data for trying settings. The images, photographs and pairs of the
tables are looked at for the tables alone.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import onnx_ir as ir  # noqa: E402
import torch  # noqa: E402
from pruning_tasks import TASKS, Task  # noqa: E402

from edgec.passes import Cleanup, Fuse, Lower, Pass  # noqa: E402
from edgec.passes.execution import graph_bytes, open_session, run_feeds  # noqa: E402
from edgec.passes.timing import Speedup, interleave, speedup_of  # noqa: E402
from edgec.pipeline import run_passes  # noqa: E402

FORMS = ("float32", "float32 recovered", "int8", "int8 recovered")
_CHECKED = 2  # samples on which the passes are checked
_MARKS = dict(zip(FORMS, "xosD", strict=True))


@dataclass(frozen=True)
class Row:
    """One model. score, drop: in the task's unit.

    ratio: the share that was asked for, of the units, or of the latency where that ranks.

    speed: CPU time of the dense float32 model over its own. over_dense: of the dense model in the
    same form over its own.
    """

    ratio: float
    form: str
    score: float
    drop: float
    size_mb: float
    speed: Speedup
    over_dense: Speedup


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(TASKS), required=True)
    parser.add_argument("--ratios", nargs="*", type=float, help="shares; default: the model's")
    parser.add_argument("--ranking", help="of prune-structured; default: the model's")
    parser.add_argument("--held-out", action="store_true", help="judge on data for choices")
    parser.add_argument("--work", type=pathlib.Path, metavar="DIR", help="keep the models")
    parser.add_argument("--seconds", type=float, default=60.0, help="for a table's timings")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="SVG of the curves")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tables = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = asked.work or pathlib.Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        for name in asked.models:
            task = TASKS[name](work, asked.held_out)
            if asked.ranking:
                task = replace(task, prune=replace(task.prune, ranking=asked.ranking))
            ratios = asked.ratios or task.ratios
            tables[task] = curve(task, ratios, work, asked.seconds)
            if not asked.json:
                print(table(task, tables[task]), flush=True)
    if asked.json:
        found = {task.name: [asdict(row) for row in rows] for task, rows in tables.items()}
        print(json.dumps(found, indent=2))
    if asked.plot:
        plot(tables, asked.plot)
    return int(any(slower(rows) for rows in tables.values()))


def curve(task: Task, ratios: Iterable[float], work: pathlib.Path, seconds: float) -> list[Row]:
    """The rows of one model: the dense one (ratio 0) and every ratio, in every form."""
    models: dict[tuple[float, str], ir.Model] = {}
    for ratio in (0.0, *ratios):
        for form, model in kept_forms(task, ratio, work).items():
            models[ratio, form] = model
    calls = []
    for (ratio, form), model in models.items():
        session = open_session(model, settings=task.context.target.session)
        calls.append((f"{ratio} {form}", _call(session, task.timed)))
    taken = interleave(calls, seconds=seconds, max_runs=50_000, clock=time.thread_time)
    timings = dict(zip(models, taken, strict=True))
    scores = {key: kept_score(task, *key, model, work) for key, model in models.items()}
    rows = []
    for (ratio, form), model in models.items():
        score = scores[ratio, form]
        dense = timings[0.0, form.replace("float32 recovered", "float32")]
        rows.append(
            Row(
                ratio,
                form,
                score,
                scores[0.0, "float32"] - score,
                len(graph_bytes(model)) / 1e6,
                speedup_of(timings[0.0, "float32"], timings[ratio, form]),
                speedup_of(dense, timings[ratio, form]),
            )
        )
    return rows


def kept_forms(task: Task, ratio: float, work: pathlib.Path) -> dict[str, ir.Model]:
    """The model in every form, from the folder if it was made before with the same settings."""
    recipe = passes_of(task, ratio)
    folder = folder_of(task, ratio, work)
    told = folder / "recipe.txt"
    if told.is_file() and told.read_text() == repr(recipe):
        return {form: ir.load(folder / f"{form}.onnx") for form, _ in recipe if form}
    made = forms(task, recipe, f"{task.name} {ratio:g}")
    folder.mkdir(parents=True, exist_ok=True)
    for form, model in made.items():
        (folder / f"{form}.onnx").write_bytes(graph_bytes(model))
        (folder / f"{form}.json").unlink(missing_ok=True)
    told.write_text(repr(recipe))
    return made


def kept_score(task: Task, ratio: float, form: str, model: ir.Model, work: pathlib.Path) -> float:
    """The model's score, from the folder if it was judged before on the same data."""
    path = folder_of(task, ratio, work) / f"{form}.json"
    known: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
    if task.measure not in known:
        known[task.measure] = task.judge(model)
        path.write_text(json.dumps(known))
    return known[task.measure]


def folder_of(task: Task, ratio: float, work: pathlib.Path) -> pathlib.Path:
    """Where a task's models of one share are kept."""
    return work / task.name / f"{task.prune.ranking}-{ratio:g}"


def passes_of(task: Task, ratio: float) -> list[tuple[str, Pass]]:
    """The passes of one recipe, each with the name of the form that it ends; empty for none."""
    recipe: list[tuple[str, Pass]] = [("", Cleanup())]
    if ratio:
        recipe += [("", Fuse()), ("float32", replace(task.prune, ratio=ratio))]
    else:
        recipe.append(("float32", Fuse()))
    recipe.append(("float32 recovered", task.recover))
    recipe += [("", pass_) for pass_ in task.quantize[:-1]] + [("int8", task.quantize[-1])]
    return recipe + ([("int8 recovered", task.qat)] if task.qat else [])


def forms(task: Task, recipe: Sequence[tuple[str, Pass]], what: str) -> dict[str, ir.Model]:
    """Form -> model, lowered to the target's kernels."""
    assert task.context.calibration is not None
    checks = [f for f, _ in zip(task.context.calibration, range(_CHECKED), strict=False)]
    steps = run_passes(
        [pass_ for _, pass_ in recipe],
        task.context,
        checks,
        announce=lambda name: print(f"{what}: {name}", file=sys.stderr, flush=True),
    )
    found = {}
    for (form, _), step in zip(recipe, steps, strict=True):
        for finding in step.result.findings:
            print(f"  {step.pass_.name}: {finding}", file=sys.stderr, flush=True)
        if form:
            found[form] = Lower().run(step.model.clone(), task.context).model
    return found


def _call(session: Any, feeds: Any) -> Callable[[], object]:
    return lambda: run_feeds(session, feeds)


def table(task: Task, rows: list[Row]) -> str:
    """The rows as Markdown, and which are slower than their dense parent."""
    lines = [
        f"{task.name}: {task.measure}",
        "| share cut | form | score | drop | MB | speed, dense float32 = 1 | same form = 1 |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        lines.append(
            f"| {row.ratio:.1%} | {row.form} "
            f"| {row.score:.{task.digits}f} | {row.drop:+.{task.digits}f} "
            f"| {row.size_mb:.2f} | {row.speed} | {row.over_dense} |"
        )
    return "\n".join(
        [*lines, "", f"slower than the dense parent: {', '.join(slower(rows)) or 'none'}"]
    )


def slower(rows: list[Row]) -> list[str]:
    """The pruned models that are slower than the dense one in the same form."""
    return [f"{r.ratio:.1%} {r.form}" for r in rows if r.ratio and r.over_dense.is_below(1.0)]


def plot(tables: dict[Task, list[Row]], path: pathlib.Path) -> None:
    """One picture: score against speed, a line for each form. Same rows, same bytes."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "edgec"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(tables), figsize=(6.5 * len(tables), 4.5), squeeze=False)
    for axis, (task, rows) in zip(axes[0], tables.items(), strict=True):
        for form in FORMS:
            points = sorted((row.speed.ratio, row.score) for row in rows if row.form == form)
            if points:
                axis.plot(*zip(*points, strict=True), marker=_MARKS[form], label=form)
        axis.set_xlabel("speed, dense float32 = 1")
        axis.set_ylabel(task.measure)
        axis.set_title(task.name)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
