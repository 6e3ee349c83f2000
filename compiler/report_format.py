"""How a report's numbers read, the same in the terminal and on the page.

Two rules hold everywhere. What was not measured says so and is never shown as 0; rounding
never turns a broken limit into a kept one (100 % means all, a value beside its limit keeps
enough digits to differ from it). The text is ASCII, so any terminal can print it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from edgec.report import Coverage, Layer, Measurement, Promise, Report, Step, Trial

NOT_MEASURED = "not measured"
LOW_SQNR_DB = 10.0  # below it the noise has more than a tenth of the signal's power
SQNR_CAP_DB = 200.0  # what equal arrays are given; -200 stands for NaN or a dead signal


Rows = tuple[tuple[str, ...], list[tuple[str, ...]]]  # head and body of a table


@dataclass(frozen=True)
class SkipGroup:
    """The nodes that were left alone for one reason.

    nodes: (step, node), in the order of the report.
    """

    reason: str
    nodes: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Point:
    """The model at one moment of the build: the reference, after a step, or the bundle."""

    label: str
    kind: str  # "reference", "step" or "bundle"
    size_bytes: int
    latency_ms: float | None


def is_measured(value: float | None) -> TypeGuard[float]:
    """True for a finite number: NaN and infinity are no measurement."""
    return value is not None and math.isfinite(value)


def printable(text: str) -> str:
    """The text with control, format and surrogate characters written as escapes.

    Names come from third parties' graphs: none may move the cursor or reorder a line.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def shorten(text: str, width: int) -> str:
    """At most ``width`` characters: the middle is left out, since both ends of a name tell."""
    if len(text) <= width:
        return text
    head = max(0, (width - 3) // 3)
    return text[:head] + "..." + text[len(text) - (width - 3 - head) :]


def size(size_bytes: float | None) -> str:
    """Bytes in decimal units with three digits: ``4.94 MB``."""
    if not is_measured(size_bytes):
        return NOT_MEASURED
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{_digits(size_bytes / factor)} {unit}"
    return f"{size_bytes:.0f} B"


def latency(milliseconds: float | None) -> str:
    """Milliseconds with three digits; seconds from 1000 ms on."""
    if not is_measured(milliseconds):
        return NOT_MEASURED
    if milliseconds >= 1000:
        return f"{_digits(milliseconds / 1000)} s"
    return f"{_digits(milliseconds)} ms"


def seconds(value: float) -> str:
    """Seconds of work: ``0.42 s``, ``41 s``, ``3 min 5 s``."""
    if not is_measured(value):
        return NOT_MEASURED
    if value >= 60:
        return f"{int(value) // 60} min {int(value) % 60} s"
    return f"{value:.0f} s" if value >= 10 else f"{value:.2f} s"


def decibels(value: float | None) -> str:
    """Signal to noise ratio; the caps of ``passes.execution.sqnr_db`` in words."""
    if not is_measured(value):
        return NOT_MEASURED
    if value >= SQNR_CAP_DB:
        return "identical"
    return "no signal" if value <= -SQNR_CAP_DB else f"{value:.1f} dB"


def percent(share: float | None) -> str:
    """A share 0..1 in percent; 100 % and 0 % only where it is exactly that."""
    if not is_measured(share):
        return NOT_MEASURED
    if share in (0.0, 1.0):
        return f"{share:.0%}".replace("%", " %")
    return f"{min(max(share * 100, 0.01), 99.99) if 0 < share < 1 else share * 100:.2f} %"


def times(ratio: float | None) -> str:
    """A ratio: ``2.12x``."""
    return f"{_digits(ratio)}x" if is_measured(ratio) else NOT_MEASURED


def number(value: float | None) -> str:
    """Any other figure, four digits."""
    return f"{value:.4g}" if is_measured(value) else NOT_MEASURED


def count(amount: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{amount} {noun}" if amount == 1 else f"{amount} {noun}s"


def parameters(step: Step) -> str:
    """A step's parameters as ``name = value``, sorted by name."""
    return ", ".join(f"{name} = {_value(value)}" for name, value in sorted(step.parameters.items()))


def limit_and_value(promise: Promise) -> tuple[str, str]:
    """``(">= 1.7", "1.696")``: the limit with its direction, and what was measured.

    Both get as many digits as it takes to tell them apart.
    """
    sign = {"max": "<= ", "min": ">= "}.get(promise.name.lstrip("-")[:3], "")
    value = promise.value
    if not is_measured(promise.limit):
        return "", number(value)
    if not is_measured(value):
        return sign + number(promise.limit), number(value)
    for digits in range(4, 18):
        limit_text, value_text = f"{promise.limit:.{digits}g}", f"{value:.{digits}g}"
        if limit_text != value_text or value == promise.limit:
            break
    return sign + limit_text, value_text


def promise_state(promise: Promise) -> str:
    """``kept``, ``broken`` or ``not judged`` (which counts as not kept)."""
    if promise.kept:
        return "kept"
    return "broken" if is_measured(promise.value) else "not judged"


def verdict(report: Report) -> str:
    """One line about the promises: ``1 of 3 promises broken, 1 not judged``."""
    states = [promise_state(promise) for promise in report.promises]
    if not states:
        return "no promises made"
    if all(state == "kept" for state in states):
        return f"all {len(states)} promises kept" if len(states) > 1 else "the promise is kept"
    broken, unjudged = states.count("broken"), states.count("not judged")
    of = f"of {count(len(states), 'promise')}"
    if not broken:
        return f"{unjudged} {of} not judged"
    return f"{broken} {of} broken" + (f", {unjudged} not judged" if unjudged else "")


def size_change(report: Report) -> str:
    """``3.77x smaller``; empty where a side has no bytes."""
    before, after = report.reference.size_bytes, report.bundle.size_bytes
    if before <= 0 or after <= 0:
        return ""
    if before == after:
        return "same size"
    return (
        f"{times(before / after)} smaller" if before > after else f"{times(after / before)} larger"
    )


def speed_change(report: Report) -> str:
    """``2.12x faster``, ``1.25x slower`` or that it was not measured."""
    if not is_measured(report.speedup) or report.speedup <= 0:
        return f"speedup {NOT_MEASURED}"
    return change_of_speed(report.speedup)


def change_of_speed(speedup: float) -> str:
    """A positive ratio of latencies, before to after, in words."""
    return f"{times(speedup)} faster" if speedup >= 1 else f"{times(1 / speedup)} slower"


def latency_caveat(report: Report) -> str:
    """Why the latencies are only a hint; empty if they are the target's or were not taken."""
    latencies = [point.latency_ms for point in points(report)]
    if not any(is_measured(value) for value in [*latencies, report.speedup]):
        return ""
    machine = report.measured_on
    if machine is None:
        return "Latencies are a hint: the machine they were taken on is not recorded."
    if machine.is_target:
        return ""
    return (
        f"Latencies are a hint: they were taken on {printable(machine.cpu)} ({machine.arch}), "
        f"which is not of the kind that target {printable(report.target)} stands for."
    )


def measured_how(report: Report) -> str:
    """CPU, threads and runs in one line."""
    return NOT_MEASURED if report.measured_on is None else machine_line(report.measured_on)


def machine_line(machine: Measurement) -> str:
    """CPU, architecture, threads and runs."""
    return (
        f"{printable(machine.cpu)} ({machine.arch}), {count(machine.threads, 'thread')}, "
        f"median of {count(machine.runs, 'run')}, both sides interleaved"
    )


def parity(report: Report) -> str:
    """How far the reference is from eager torch, in one line."""
    measured = report.parity
    if measured is None:
        return NOT_MEASURED
    return (
        f"{decibels(measured.sqnr_db)}, largest difference {number(measured.max_abs_error)}, "
        f"on {count(measured.samples, 'sample')}"
    )


def coverage(found: Coverage) -> str:
    """How much ONNX Runtime executes in integers, in one line."""
    return (
        f"integer kernels: {found.integer_nodes} of {count(found.nodes, 'executed node')}, "
        f"{percent(found.integer_time_share)} of the time; "
        f"quantizing and dequantizing {percent(found.conversion_time_share)}"
    )


def kernel_rows(found: Coverage, amount: int) -> Rows:
    """Head and rows of the operators that take the most time."""
    rows: list[tuple[str, ...]] = [
        (k.op, "integer" if k.integer else "float", str(k.nodes), percent(k.time_share))
        for k in found.kernels[:amount]
    ]
    return ("most time in", "computes in", "nodes", "time"), rows


def trial_rows(report: Report) -> Rows:
    """Head and rows of the recipes that the search tried, in order; no column of nothing."""
    pruned = any(trial.ratio is not None for trial in report.trials)
    promoted = any(trial.kept_float for trial in report.trials)
    rows: list[tuple[str, ...]] = [
        (
            _told_apart(trial.recipe),
            *([number(trial.ratio) if trial.ratio else ""] if pruned else []),
            *([str(trial.kept_float)] if promoted else []),
            size(trial.size_bytes),
            times(trial.speedup) if is_measured(trial.speedup) else NOT_MEASURED,
            number(trial.drop) if is_measured(trial.drop) else NOT_MEASURED,
            decibels(trial.sqnr_db) if is_measured(trial.sqnr_db) else NOT_MEASURED,
            _outcome(trial),
        )
        for trial in report.trials
    ]
    chosen = (("pruned share",) if pruned else ()) + (("kept float",) if promoted else ())
    return ("tried", *chosen, "size", "speed", "held-out drop", "SQNR", "outcome"), rows


def _outcome(trial: Trial) -> str:
    """What became of a trial: chosen or not, and the promises that it breaks."""
    words = ["chosen"] if trial.chosen else []
    words += ["size and speed alone"] if trial.untrained else []
    return "; ".join([*words, *trial.reasons])


def _told_apart(recipe: Sequence[str]) -> str:
    """The passes that tell a recipe from others: not those that every one has."""
    return ", ".join(p for p in recipe if p not in ("cleanup", "fuse", "lower")) or "float32"


def points(report: Report) -> tuple[Point, ...]:
    """The model's size and latency from the reference through every step to the bundle."""
    before, after = report.reference, report.bundle
    return (
        Point("reference", "reference", before.size_bytes, before.latency_ms),
        *(Point(printable(s.name), "step", s.size_bytes, s.latency_ms) for s in report.steps),
        Point("bundle", "bundle", after.size_bytes, after.latency_ms),
    )


def worst_layers(report: Report, amount: int = 10) -> tuple[tuple[int, Layer], ...]:
    """(position in the graph from 1, layer), noisiest first; ties in graph order."""
    ranked = sorted(enumerate(report.layers, start=1), key=lambda pair: layer_order(pair[1]))
    return tuple(ranked[:amount])


def layer_order(layer: Layer) -> float:
    """Sort key of a layer; one that could not be measured is worst."""
    return layer.sqnr_db if is_measured(layer.sqnr_db) else -math.inf


def skip_groups(report: Report) -> tuple[SkipGroup, ...]:
    """What was left alone, by reason: the most frequent first, then by text."""
    nodes: dict[str, list[tuple[str, str]]] = {}
    for skip in report.skipped:
        nodes.setdefault(skip.reason, []).append((skip.step, skip.node))
    groups = [SkipGroup(reason, tuple(found)) for reason, found in nodes.items()]
    return tuple(sorted(groups, key=lambda group: (-len(group.nodes), group.reason)))


def _digits(value: float) -> str:
    """Three significant digits without an exponent; all digits of a whole part above 999."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        value = {str(k): value[k] for k in sorted(value, key=str)}
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    return json.dumps(value, ensure_ascii=False, default=str)
