"""Are pruned models faster, and by as much as was predicted? Called by pruning.py --latency.

Each fixture model is pruned by each ranking and ratio, and takes turns with its dense parent:
CPU time of one thread, medians, with the standard error of their ratio. The prediction is that of
the table of operators which ranking ``latency`` chooses by. Accuracy is not judged here.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import graphs
import onnx_ir as ir
import torch
import twin_models
from fixtures import models
from fixtures.locate import FixtureMissing

from edgec.errors import EdgecError
from edgec.passes import Context, Feeds, PruneStructured
from edgec.passes.dimension_groups import coupled_groups
from edgec.passes.execution import open_session, run_feeds
from edgec.passes.latency_table import LatencyTable
from edgec.passes.pruned_latency import quickly_quantized
from edgec.passes.timing import interleave, speedup_of
from edgec.passes.width_latency import WidthLatency
from edgec.targets import load_target

RANKINGS = ("local", "global", "isomorphic", "latency")
NAMES = (
    "efficientnet-lite0",
    "small-cnn 64",
    "ocr recogniser",
    "ocr detector",
    "minilm sdpa",
    "whisper encoder",
    "lstm",
)


@dataclass(frozen=True)
class Row:
    """One pruned model beside its dense parent. why: what went wrong; then nothing else holds."""

    model: str
    ranking: str
    ratio: float
    predicted: float = 0.0
    measured: float = 0.0
    standard_error: float = 0.0
    dense_ms: float = 0.0
    pruned_ms: float = 0.0
    error: float = 0.0  # of the predicted latency of the pruned model
    slower: bool = False  # by more than two standard errors
    seconds: float = 0.0  # that pruning took
    why: str = ""


def main(arguments: Sequence[str]) -> int:
    """Print the table; 1 if a pruned model is slower than its dense parent."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=NAMES, help="names of models")
    parser.add_argument("--ratios", nargs="*", type=float, default=(0.25, 0.5))
    parser.add_argument("--rankings", nargs="*", default=RANKINGS)
    parser.add_argument("--costs", choices=("float32", "int8"), default="float32")
    parser.add_argument("--round-to", type=int, default=0, help="0: as the target says")
    parser.add_argument("--target", default="x86-64")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each pair of models")
    parser.add_argument(
        "--tables", type=pathlib.Path, help="folder of latencies to go on from; else a fresh one"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgec-") as fresh:
        for name in asked.only:
            for row in _rows(name, asked, asked.tables or pathlib.Path(fresh)):
                print(_line(row), file=sys.stderr, flush=True)
                rows.append(row)
    print(json.dumps([asdict(row) for row in rows], indent=2) if asked.json else _table(rows))
    return int(any(row.slower for row in rows))


def _rows(name: str, asked: argparse.Namespace, folder: pathlib.Path) -> Iterator[Row]:
    try:
        dense, [feeds, *_] = _made(name)
    except (FixtureMissing, ImportError) as missing:
        yield Row(name, "-", 0.0, why=f"not run: {missing}")
        return
    target = load_target(asked.target)
    context = Context(target=target, reference=dense, calibration=[feeds], cache=folder)
    for ratio in asked.ratios:
        for ranking in asked.rankings:
            pruning = PruneStructured(ratio=ratio, ranking=ranking, round_to=asked.round_to)
            if ranking == "latency":
                pruning = replace(pruning, costs=asked.costs)
            try:
                yield _judged(name, dense, feeds, pruning, asked, context)
            except EdgecError as refusal:
                yield Row(name, ranking, ratio, why=" ".join(str(refusal).split()))


def _made(name: str) -> tuple[ir.Model, list[Feeds]]:
    if name != "small-cnn 64":
        return twin_models.make(name)
    torch.manual_seed(0)
    image = {"image": graphs.feed(1, 1, 28, 28)}
    model, feeds = twin_models._exported(models.small_cnn(64), image)
    return twin_models._cleaned(model), feeds


def _judged(
    name: str,
    dense: ir.Model,
    feeds: Feeds,
    pruning: PruneStructured,
    asked: argparse.Namespace,
    context: Context,
) -> Row:
    started = time.perf_counter()
    result = pruning.run(dense.clone(), context)
    took = time.perf_counter() - started
    quantized = asked.costs == "int8"
    integers = context.target.int8 if quantized else None
    assert context.cache is not None  # given above
    table = LatencyTable(context.target.session, context.cache / "latencies")
    widths = WidthLatency(dense, coupled_groups(dense).found, feeds, table, integers)
    entries = result.decisions["groups"]
    gone = {entry["name"]: entry["units"] - len(entry["kept"]) for entry in entries}
    before, after = widths.milliseconds([(None, {}), (None, gone)])
    table.save()
    calls = [
        ("dense", _call(dense, feeds, quantized, context)),
        ("pruned", _call(result.model, feeds, quantized, context)),
    ]
    slow, fast = interleave(calls, seconds=asked.seconds, max_runs=100_000, clock=time.thread_time)
    speedup = speedup_of(slow, fast)
    return Row(
        name,
        pruning.ranking,
        pruning.ratio,
        predicted=before / after,
        measured=speedup.ratio,
        standard_error=speedup.error,
        dense_ms=slow.median_ms,
        pruned_ms=fast.median_ms,
        error=after / fast.median_ms - 1,
        slower=bool(result.changed) and speedup.is_below(1.0),
        seconds=took,
        why="" if result.changed else "nothing was cut",
    )


def _call(model: ir.Model, feeds: Feeds, quantized: bool, context: Context) -> Callable[[], object]:
    form = quickly_quantized(model, feeds, context) if quantized else model
    session = open_session(form, settings=context.target.session, threads=1)
    return lambda: run_feeds(session, feeds)


def _line(row: Row) -> str:
    if not row.measured:
        return f"| {row.model} | {row.ranking} | {row.ratio:.2f} |" + " - |" * 6 + f" {row.why} |"
    return (
        f"| {row.model} | {row.ranking} | {row.ratio:.2f} | {row.dense_ms:.2f} | "
        f"{row.pruned_ms:.2f} | {row.predicted:.2f}x | {row.measured:.2f} ± "
        f"{row.standard_error:.2f}x | {row.error:+.0%} | {row.seconds:.0f} s | "
        f"{'SLOWER' if row.slower else row.why} |"
    )


def _table(rows: list[Row]) -> str:
    """Markdown, and how many of the pruned models are slower than their dense parents."""
    head = "model ranking ratio dense_ms pruned_ms predicted measured error pruning note".split()
    run = [row for row in rows if row.measured and not row.why]
    off = sorted(abs(row.error) for row in run)
    middle = off[len(off) // 2] if off else 0.0
    return "\n".join(
        [
            "| " + " | ".join(word.replace("_", " ") for word in head) + " |",
            "|---" * len(head) + "|",
            *map(_line, rows),
            "",
            f"{sum(row.slower for row in run)} of {len(run)} pruned models are slower than their "
            f"dense parents; the median error of the prediction is {middle:.0%}",
        ]
    )


__all__ = ["NAMES", "RANKINGS", "Row", "main"]
