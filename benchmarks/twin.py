"""The differentiable twin against ONNX Runtime and against ONNX's own backend node tests.

    python benchmarks/twin.py [--models minilm llama] [--no-node-tests] [--operators] [--json]

First table: the fixtures' models (tests/twin_models.py), the largest absolute error of any
output against ONNX Runtime, the same as a share of the largest output, and the operators of
the graph. Second table: the node tests of every claimed operator whose types torch computes,
passed of all. A test of several operators counts for each of them, and once in the sum.

Left out on purpose: gradients (tests/passes/test_torch_gradients.py) and speed.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from collections import Counter
from dataclasses import asdict, dataclass

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import node_tests  # noqa: E402
import torch  # noqa: E402
import twin_models  # noqa: E402
from fixtures.locate import FixtureMissing  # noqa: E402

GOAL = 0.95  # of the node tests of claimed operators


@dataclass(frozen=True)
class ModelRow:
    """One model: error over all outputs; ``reason`` says why there are no figures."""

    model: str
    max_abs_error: float | None = None
    relative: float | None = None  # error / largest output, the worst output
    nodes: int | None = None
    operators: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class NodeTests:
    """Node tests by operator: passed, total; ``failed``: name -> reason.

    skipped: those of claimed operators that do not count, by reason.
    """

    by_operator: dict[str, tuple[int, int]]
    passed: int
    total: int
    failed: dict[str, str]
    skipped: dict[str, int]


def measure(name: str) -> ModelRow:
    try:
        model, samples = twin_models.make(name)
    except FixtureMissing as missing:
        return ModelRow(name, reason=str(missing))
    found = [e for feeds in samples for e in twin_models.errors(model, feeds).values()]
    counts = Counter(node.op_type for node in model.graph)
    return ModelRow(
        name,
        max(error for error, _ in found),
        max(error / size for error, size in found),
        sum(counts.values()),
        tuple(f"{op} {count}" for op, count in counts.most_common()),
    )


def run_node_tests() -> NodeTests:
    passed: Counter[str] = Counter()
    total: Counter[str] = Counter()
    failed, count = {}, 0
    for test in node_tests.node_tests():
        count += 1
        reason = node_tests.failure(test)
        total.update(test.operators)
        if reason:
            failed[test.name] = reason
        else:
            passed.update(test.operators)
    by_operator = {name: (passed[name], total[name]) for name in sorted(total)}
    skipped = dict(node_tests.skipped())
    return NodeTests(by_operator, count - len(failed), count, failed, skipped)


def show_models(rows: list[ModelRow], *, operators: bool) -> None:
    print(f"{'model':28} {'max abs error':>14} {'relative':>9} {'nodes':>6}")
    for row in rows:
        if row.reason:
            print(f"{row.model:28} {row.reason}")
            continue
        print(f"{row.model:28} {row.max_abs_error:14.2e} {row.relative:9.1e} {row.nodes:6}")
        if operators:
            print(f"    {', '.join(row.operators)}")


def show_node_tests(found: NodeTests) -> None:
    print(f"{'operator':28} passed / total")
    for name, (passed, total) in found.by_operator.items():
        print(f"{name:28} {passed:6} / {total}")
    print(
        f"all: {found.passed} of {found.total}, {found.passed / found.total:.2%} "
        f"(goal: {GOAL:.0%} or more)"
    )
    for name, reason in found.failed.items():
        print(f"  {name}: {reason}")
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(found.skipped.items()))
    print(f"not counted: {sum(found.skipped.values())} ({reasons})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(twin_models.MODELS))
    parser.add_argument("--no-node-tests", action="store_true")
    parser.add_argument("--operators", action="store_true", help="list each model's operators")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.models) - set(twin_models.MODELS):
        parser.error(f"no model {sorted(unknown)[0]!r}; there are {', '.join(twin_models.MODELS)}")
    torch.set_num_threads(1)
    rows = [measure(name) for name in options.models]
    found = None if options.no_node_tests else run_node_tests()
    if options.json:
        tests = None if found is None else asdict(found)
        print(json.dumps({"models": [asdict(row) for row in rows], "node_tests": tests}))
        return
    show_models(rows, operators=options.operators)
    if found is not None:
        print()
        show_node_tests(found)


if __name__ == "__main__":
    main()
