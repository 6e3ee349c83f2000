"""Does a quarter of the units come off other people's .onnx files? Which refuse, and why.

    python benchmarks/pruning.py --third-party [--ratio 0.25] [--only NAME ...] [--json]
    python benchmarks/pruning.py --depth [--blocks 2] [--json]  # pruning_depth.py
    python benchmarks/pruning.py --latency [--costs int8] [...]  # options: pruning_latency.py

Each file of third_party.py is exported as edgec does it, cleaned, fused and pruned by
``prune-structured``; ``recover`` and quantization are left out. A file counts if units went,
ONNX's checker with its shape inference agrees, and ONNX Runtime gives outputs of the dense
model's shapes on real feeds. Files are fetched and cached as third_party.py does it. Accuracy and
speed are not judged here.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import pathlib
import sys
from dataclasses import asdict, dataclass

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import onnx  # noqa: E402
import onnx_ir as ir  # noqa: E402
from fixtures.locate import FixtureMissing, unpacked_folder  # noqa: E402
from third_party import FILES, File, located  # noqa: E402

from edgec.errors import EdgecError  # noqa: E402
from edgec.export import export  # noqa: E402
from edgec.passes import Cleanup, Context, Fuse, PruneStructured, Result  # noqa: E402
from edgec.passes.execution import graph_bytes, open_session, run_feeds  # noqa: E402
from edgec.source import load_source  # noqa: E402
from edgec.targets import load_target  # noqa: E402


@dataclass(frozen=True)
class Row:
    """What became of a file. kept: share of the numbers in weights. why: of layers left alone."""

    name: str
    kind: str
    outcome: str
    kept: float | None = None
    kinds: str = ""
    why: str = ""

    @property
    def works(self) -> bool:
        """True if units went and the rest runs in the right shapes."""
        return self.outcome == "pruned"


def main() -> int:
    if "--latency" in sys.argv[1:]:
        from pruning_latency import main as latency

        return latency([argument for argument in sys.argv[1:] if argument != "--latency"])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--third-party", action="store_true")
    kind.add_argument("--depth", action="store_true", help="MiniLM without residual blocks")
    parser.add_argument("--blocks", type=int, default=2, help="how many go, of 12")
    parser.add_argument("--importance", default="output", help="how the blocks are ranked")
    parser.add_argument("--cache", type=pathlib.Path, default=unpacked_folder() / "third_party")
    parser.add_argument("--only", nargs="*", default=[], help="names of files")
    parser.add_argument("--target", default="x86-64")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    asked = parser.parse_args()
    if asked.depth:
        from pruning_depth import depth

        print(depth(asked))
        return 0
    rows = []
    for file in FILES:
        if not asked.only or file.name in asked.only:
            print(f"{file.name} ...", file=sys.stderr)
            rows.append(pruned(file, asked.cache, asked.target, asked.ratio))
            print(f"    {rows[-1].outcome}, {rows[-1].kinds or 'no groups'}", file=sys.stderr)
    print(json.dumps([asdict(row) for row in rows], indent=2) if asked.json else table(rows))
    return int(any(row.outcome.startswith("DEFECT") for row in rows))


def pruned(file: File, cache: pathlib.Path, target: str, ratio: float) -> Row:
    """The row of one file."""
    try:
        path = located(file, cache)
        feeds = list(itertools.islice(file.feeds(path), 2))
    except FixtureMissing as missing:
        return Row(file.name, file.kind, f"not run: {missing}")
    try:
        chosen = load_target(target)
        dense = export(load_source(path), chosen).model
        context = Context(target=chosen, reference=dense)
        for step in (Cleanup(), Fuse()):
            dense = step.run(dense.clone(), context).model
        result = PruneStructured(ratio=ratio).run(dense.clone(), context)
    except EdgecError as refusal:
        return Row(file.name, file.kind, f"refused: {refusal}")
    except Exception as error:  # the table has to name it
        return Row(file.name, file.kind, f"DEFECT: {type(error).__name__}: {error}")
    why = _reasons(result)
    if not result.changed:
        return Row(file.name, file.kind, "nothing could go", why=why)
    kinds = collections.Counter(entry["kind"] for entry in result.decisions["groups"])
    shown = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    kept = _numbers(result.model) / max(_numbers(dense), 1)
    outcome = _fault(dense, result.model, feeds)
    return Row(file.name, file.kind, outcome or "pruned", kept, shown, why)


def _fault(dense: ir.Model, small: ir.Model, feeds: list[object]) -> str:
    """What is wrong with the pruned model; empty if nothing is."""
    try:
        _check(small, full=_states_its_shapes(dense))
        sessions = [open_session(model) for model in (dense, small)]
        for sample in feeds:
            expected, actual = (run_feeds(session, sample) for session in sessions)  # type: ignore
            shapes = [[array.shape for array in arrays] for arrays in (expected, actual)]
            if shapes[0] != shapes[1]:
                return f"DEFECT: shapes {shapes[1]} instead of {shapes[0]}"
    except Exception as error:  # the table has to name it
        return f"DEFECT: {type(error).__name__}: {error}"
    return ""


def _check(model: ir.Model, *, full: bool) -> None:
    onnx.checker.check_model(onnx.load_from_string(graph_bytes(model)), full_check=full)


def _states_its_shapes(model: ir.Model) -> bool:
    """False for a file that declares outputs of shapes that it does not have."""
    try:
        _check(model, full=True)
    except onnx.shape_inference.InferenceError:
        return False
    return True


def _reasons(result: Result) -> str:
    """Reasons of layers left alone, the most frequent first, without names of nodes."""
    texts = [
        skip.reason.split(" ('")[0].removeprefix("its outputs stay: ") for skip in result.skipped
    ]
    counts = collections.Counter(texts).most_common(4)
    return "; ".join(f"{count} x {text}" for text, count in counts)


def _numbers(model: ir.Model) -> int:
    values = [v for graph in model.graphs() for v in graph.initializers.values()]
    return sum(int(v.const_value.size) for v in values if v.const_value is not None)


def table(rows: list[Row]) -> str:
    """The rows as Markdown, and the share that works."""
    lines = ["| file | kind | outcome | weights kept | groups | left alone |", "|---" * 6 + "|"]
    for row in rows:
        kept = "-" if row.kept is None else f"{row.kept:.0%}"
        outcome, why = (" ".join(text.split())[:200] for text in (row.outcome, row.why))
        cells = (row.name, row.kind, outcome, kept, row.kinds or "-", why or "-")
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    run = [row for row in rows if not row.outcome.startswith("not run")]
    works = sum(row.works for row in run)
    share = works / max(len(run), 1)
    return "\n".join([*lines, "", f"{works} of {len(run)} files are pruned and run ({share:.0%})"])


if __name__ == "__main__":
    sys.exit(main())
