"""Reports and lists for the terminal, drawn with rich.

``table`` makes every table of the command line look alike; the other functions say which
columns there are. Only ASCII is drawn, colour repeats what a word already says, and names
are shortened in the middle instead of wrapped, so that 80 columns, a pipe and NO_COLOR all
give a clean page. Text from outside is never read as rich markup.

Left out on purpose: full lists of layers and skipped nodes; report.html and report.json
have them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgec import report_format as words
from edgec import report_judgement as judged
from edgec.report import Promise, Report

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from edgec.bench_bundle import Bench

_MEASURED = ("_ms", "_db", "_bytes", "value", "speedup", "agreement")  # keys of measurements
_WORST = 5  # layers named in the terminal
_STYLES = {"kept": "green", "broken": "bold red", "not judged": "yellow"}


def print_report(report: Report, console: Console) -> None:
    """Print what a build measured: the outcome first, how it was measured last."""
    _print_head(report, console)
    _print_comparison(report, console)
    _print_promises(report, console)
    _print_trials(report, console)
    _print_steps(report, console)
    _print_kernels(report, console)
    _print_layers(report, console)
    _print_skipped(report, console)
    _print_findings(report, console)
    _print_origin(report, console)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[str] = (),
    wrap: Collection[str] = (),
    styles: Mapping[str, str] | None = None,
) -> Table:
    """A table of plain text with a head and no frame.

    right: columns aligned to the right. wrap: columns whose text may take several lines;
    the others stay on one. styles: a cell's whole text -> the rich style it is drawn in.
    """
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        drawn.add_column(
            Text(column),
            justify="right" if column in right else "left",
            no_wrap=column not in wrap,
            overflow="fold" if column in wrap else "crop",
        )
    for row in rows:
        drawn.add_row(*(Text(words.printable(cell), (styles or {}).get(cell, "")) for cell in row))
    return drawn


def bench_table(bench: Bench) -> Table:
    """Latency of the bundle and of what it was timed against, side by side."""
    own = bench.timings[0].median_ms
    rows = [
        (
            timing.name,
            words.latency(timing.median_ms),
            words.latency(timing.p10_ms),
            words.latency(timing.p90_ms),
            f"bundle is {words.change_of_speed(timing.median_ms / own)}" if index else "",
        )
        for index, timing in enumerate(bench.timings)
    ]
    columns = ("model", "median", "10 %", "90 %", "")
    return table(columns, rows, right=columns[1:4], wrap=("model",))


def print_bench(bench: Bench, console: Console) -> None:
    """Print the timings, what became of the promises, and how it was measured."""
    machine = bench.measured_on
    console.print(bench_table(bench))
    if bench.promises:
        console.print()
        console.print(_promise_table(bench.promises))
    console.print()
    console.print(plain_text(f"on {words.machine_line(machine)}; {bench.inputs}"))
    if not machine.is_target:
        note = "This machine is not of the target's kind: take the latencies as a hint."
        console.print(plain_text(note), style="yellow")


def print_facts(facts: Mapping[str, Any], console: Console) -> None:
    """Print JSON data for people: one line a fact, nested ones indented, lists as tables."""
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    drawn.add_column(no_wrap=True, style="bold")
    drawn.add_column(overflow="fold")
    _add_facts(drawn, facts, "", max(12, console.width // 5))
    console.print(drawn)


def _print_head(report: Report, console: Console) -> None:
    from rich.text import Text

    style = "" if not report.promises else "green" if report.kept else "bold red"
    title = f"{words.printable(report.name)} for {words.printable(report.target)}"
    console.print(Text.assemble((title, "bold"), ": ", (words.verdict(report), style)))


def _print_comparison(report: Report, console: Console) -> None:
    before, after, metric = report.reference, report.bundle, report.metric
    hint = " (a hint, see below)" if words.latency_caveat(report) else ""
    rule = f"{report.agreement_rule}, " if report.agreement_rule else ""
    samples = f"{rule}{words.count(report.samples, 'sample')}"
    measured_latency = any(words.is_measured(v) for v in (before.latency_ms, after.latency_ms))
    rows = [
        (
            "size",
            words.size(before.size_bytes),
            words.size(after.size_bytes),
            words.size_change(report),
        ),
        (
            "latency",
            words.latency(before.latency_ms),
            words.latency(after.latency_ms),
            words.speed_change(report) + hint
            if measured_latency or words.is_measured(report.speedup)
            else "",
        ),
        (
            "agreement",
            "",
            words.percent(report.agreement),
            samples if words.is_measured(report.agreement) else "",
        ),
        ("SQNR", "", words.decibels(report.sqnr_db), ""),
    ]
    if metric is not None:
        drop = f"drop {words.number(metric.drop)}"
        rows.insert(
            2, (metric.name, words.number(metric.reference), words.number(metric.bundle), drop)
        )
    rows += judged.comparison_rows(report)
    columns = ("", "reference", "bundle", "change")
    console.print()
    console.print(table(columns, rows, right=("reference", "bundle"), wrap=("", "change")))


def _print_promises(report: Report, console: Console) -> None:
    if report.promises:
        console.print()
        console.print(_promise_table(report.promises))


def _promise_table(promises: Iterable[Promise]) -> Table:
    rows = []
    for promise in promises:
        limit, value = words.limit_and_value(promise)
        rows.append((promise.name, limit, value, words.promise_state(promise), promise.reason))
    columns = ("promise", "limit", "measured", "outcome", "note")
    return table(columns, rows, right=("limit", "measured"), wrap=("note",), styles=_STYLES)


def _print_steps(report: Report, console: Console) -> None:
    if not report.steps:
        return
    rows = [
        (
            words.shorten(words.printable(step.name), 24),
            "lossless" if step.lossless else "lossy",
            str(step.changed),
            words.size(step.size_bytes),
            words.latency(step.latency_ms) if words.is_measured(step.latency_ms) else "-",
            words.decibels(step.sqnr_db) if words.is_measured(step.sqnr_db) else "-",
            words.seconds(step.seconds),
        )
        for step in report.steps
    ]
    columns = ("step", "effect", "changed", "size", "latency", "SQNR", "took")
    console.print()
    console.print(table(columns, rows, right=columns[2:]))
    if any("-" in row for row in rows):
        console.print(f"- {words.NOT_MEASURED}", style="dim", markup=False, highlight=False)


def _print_trials(report: Report, console: Console) -> None:
    if report.trials:
        columns, rows = words.trial_rows(report)
        console.print()
        console.print(table(columns, rows, right=columns[1:-1], wrap=("outcome",)))


def _print_kernels(report: Report, console: Console) -> None:
    if report.coverage is None:
        return
    columns, rows = words.kernel_rows(report.coverage, _WORST)
    console.print()
    console.print(words.coverage(report.coverage), markup=False, highlight=False)
    console.print(table(columns, rows, right=("nodes", "time")))


def _print_layers(report: Report, console: Console) -> None:
    if not report.layers:
        return
    worst = words.worst_layers(report, _WORST)
    width = max(20, console.width - 34)
    rows = [
        (
            words.shorten(words.printable(layer.name), width),
            words.shorten(words.printable(layer.op), 16),
            words.decibels(layer.sqnr_db),
            "low" if words.layer_order(layer) < words.LOW_SQNR_DB else "",
        )
        for _, layer in worst
    ]
    title = f"noisiest of {words.count(len(report.layers), 'layer')}"
    console.print()
    styles = {"low": "bold red"}
    console.print(table((title, "op", "SQNR", ""), rows, right=("SQNR",), styles=styles))


def _print_skipped(report: Report, console: Console) -> None:
    groups = words.skip_groups(report)
    if not groups:
        return
    rows = [(str(len(group.nodes)), group.reason) for group in groups]
    console.print()
    console.print(
        table(("nodes", "left alone because"), rows, right=("nodes",), wrap=("left alone because",))
    )


def _print_findings(report: Report, console: Console) -> None:
    texts = [f"{step.name}: {text}" for step in report.steps for text in step.findings]
    texts += report.findings
    if texts:
        console.print()
        console.print(table(("findings",), [(text,) for text in texts], wrap=("findings",)))


def _print_origin(report: Report, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    facts = {
        "judged on": report.judged_on or words.NOT_MEASURED,
        "timed on": words.measured_how(report),
        "note": words.latency_caveat(report),
        "vs torch": words.parity(report),
        "built": f"from {report.source}"
        + (f" in {words.seconds(report.build_seconds)}" if report.build_seconds else "")
        + f", edgec {report.edgec_version}",
        "bundle": report.bundle_path,
        "sha256": report.bundle_sha256,
    }
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    drawn.add_column(no_wrap=True, style="bold")
    drawn.add_column(overflow="fold")
    for name, fact in facts.items():
        if fact:
            drawn.add_row(name, Text(words.printable(fact), "yellow" if name == "note" else ""))
    console.print()
    console.print(drawn)


def _add_facts(drawn: Table, facts: Mapping[str, Any], indent: str, cell_width: int) -> None:
    for key, value in facts.items():
        label = plain_text(f"{indent}{key}")
        if isinstance(value, Mapping) and value:
            drawn.add_row(label, "")
            _add_facts(drawn, value, indent + "  ", cell_width)
        elif _is_records(value):
            columns = tuple(value[0])
            rows = [
                [words.shorten(words.printable(fact(c, row[c])), cell_width) for c in columns]
                for row in value
            ]
            drawn.add_row(label, table(columns, rows))
        elif isinstance(value, (list, tuple)) and any(isinstance(v, Mapping) for v in value):
            for index, item in enumerate(value):
                nested = item if isinstance(item, Mapping) else {"": item}
                _add_facts(drawn, {f"{key} {index + 1}": nested}, indent, cell_width)
        else:
            drawn.add_row(label, plain_text(fact(key, value)))


def _is_records(value: Any) -> bool:
    """True for a list of mappings that have the same keys and no mapping inside."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(item, Mapping) and set(item) == set(value[0]) for item in value)
        and not any(
            isinstance(cell, Mapping)
            or (isinstance(cell, (list, tuple)) and any(isinstance(c, Mapping) for c in cell))
            for item in value
            for cell in item.values()
        )
    )


def fact(key: str, value: Any) -> str:
    """A value as people read it; the key's ending tells the unit."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return words.NOT_MEASURED if key.endswith(_MEASURED) else "none"
    if isinstance(value, (int, float)) and key.endswith("_bytes"):
        return words.size(value)
    if isinstance(value, (int, float)) and key.endswith("_ms"):
        return words.latency(value)
    if isinstance(value, (int, float)) and key.endswith("_db"):
        return words.decibels(value)
    if isinstance(value, float):
        return words.number(value)
    if key == "shape":
        return "x".join(str(v) for v in value) or "scalar"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} = {fact(str(k), v)}" for k, v in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(fact("", v) for v in value) or "none"
    return str(value)


def plain_text(text: str) -> Text:
    """Text that is not markup; lines stay lines."""
    from rich.text import Text

    return Text("\n".join(words.printable(line) for line in text.split("\n")))
