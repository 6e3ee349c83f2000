"""The report as one HTML page for people: no script, no link, nothing to load.

The page answers in this order: what came out, were the promises kept, which step did what,
where the noise is, what was left alone and why, and how all of it was measured. Every text
that comes from outside goes through ``_text``; the page's own policy forbids scripts and
connections besides. The same report gives the same bytes.

Left out on purpose: the full list of a group of hundreds of nodes; report.json has it.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgec import report_format as words
from edgec.report import Layer, Promise, Report, Step
from edgec.report_charts import layers_svg, steps_svg
from edgec.report_style import STYLE

_LONGEST_LIST = 300  # names in one list; the rest is in report.json
_STATES = {"kept": ("good", "\u2713"), "broken": ("bad", "\u2717"), "not judged": ("wait", "?")}


@dataclass(frozen=True)
class _Cell:
    """A cell of a table; content is HTML. kind: its class, ``lead`` names the row."""

    content: str
    kind: str = ""


def render_html(report: Report) -> str:
    """The page as text; write it as UTF-8. Under 400 kB for 200 layers."""
    parts = (
        _header(report),
        _cards(report),
        _caveat(report),
        _promises(report),
        _steps(report),
        _layers(report),
        _skipped(report),
        _findings(report),
        _measurement(report),
    )
    title = f"{_text(report.name)} for {_text(report.target)}: edgec report"
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(report: Report) -> str:
    kind = "plain" if not report.promises else "good" if report.kept else "bad"
    mark = {"plain": "", "good": "\u2713 ", "bad": "\u2717 "}[kind]
    line = words.verdict(report)
    return (
        f'<header>\n<p class="over">edgec build report</p>\n<h1>{_text(report.name)}</h1>\n'
        f'<p class="quiet">for <b>{_text(report.target)}</b>, from {_code(report.source)}</p>\n'
        f'<p class="state verdict {kind}">{mark}{line[0].upper()}{line[1:]}</p>\n</header>'
    )


def _cards(report: Report) -> str:
    before, after = report.reference, report.bundle
    slower = words.is_measured(report.speedup) and report.speedup < 1
    cards = [
        _card(
            "Size",
            words.size_change(report) or words.size(after.size_bytes),
            f"{words.size(before.size_bytes)} \u2192 {words.size(after.size_bytes)}",
            extra=_pair(before.size_bytes, after.size_bytes),
            worse=after.size_bytes > before.size_bytes,
        ),
        _card(
            "Speed",
            words.speed_change(report) if words.is_measured(report.speedup) else words.NOT_MEASURED,
            f"{words.latency(before.latency_ms)} \u2192 {words.latency(after.latency_ms)}"
            if words.is_measured(before.latency_ms) or words.is_measured(after.latency_ms)
            else "",
            extra=_pair(before.latency_ms, after.latency_ms),
            worse=slower,
            tag="a hint" if words.latency_caveat(report) else "",
        ),
        _card(
            "Agreement with the reference",
            words.percent(report.agreement),
            _agreement_note(report) if words.is_measured(report.agreement) else "",
        ),
        _metric_card(report),
        _card(
            "Signal to noise (SQNR)",
            words.decibels(report.sqnr_db),
            "of the outputs, against the reference" if words.is_measured(report.sqnr_db) else "",
        ),
        _promise_card(report),
    ]
    return '<div class="cards">\n' + "\n".join(cards) + "\n</div>"


def _metric_card(report: Report) -> str:
    metric = report.metric
    if metric is None:
        return _card("Task metric", words.NOT_MEASURED, "")
    note = f"reference {words.number(metric.reference)}, drop {words.number(metric.drop)}"
    return _card(f"Task metric: {_text(metric.name)}", words.number(metric.bundle), note)


def _promise_card(report: Report) -> str:
    if not report.promises:
        return _card("Promises", "none made", "", none=True)
    kept = sum(promise.kept for promise in report.promises)
    missed = ", ".join(_text(p.name) for p in report.promises if not p.kept)
    figure = f"{kept} of {len(report.promises)} kept"
    return _card("Promises", figure, f"not kept: {missed}" if missed else "", worse=bool(missed))


def _card(
    title: str,
    figure: str,
    note: str,
    *,
    extra: str = "",
    worse: bool = False,
    none: bool = False,
    tag: str = "",
) -> str:
    kind = " none" if none or figure == words.NOT_MEASURED else " worse" if worse else ""
    badge = f' <span class="state wait">{tag}</span>' if tag else ""
    below = f'<p class="quiet small">{note}</p>' if note else ""
    return (
        f'<div class="card"><p class="quiet small">{title}{badge}</p>'
        f'<p class="figure{kind}">{_signs(figure)}</p>{below}{extra}</div>'
    )


def _pair(before: float | None, after: float | None) -> str:
    """Two bars to one scale; nothing unless both were measured."""
    if not words.is_measured(before) or not words.is_measured(after) or max(before, after) <= 0:
        return ""
    largest = max(before, after)
    return (
        '<div class="pair" aria-hidden="true">'
        f"{_bar(before / largest, 'first')}{_bar(after / largest)}</div>"
    )


def _agreement_note(report: Report) -> str:
    rule = f"{_text(report.agreement_rule)}, " if report.agreement_rule else ""
    return f"{rule}{words.count(report.samples, 'sample')}"


def _caveat(report: Report) -> str:
    caveat = words.latency_caveat(report)
    # the sentence is made of names that are printable already, not yet of HTML
    return f'<div class="note" role="note"><p>{html.escape(caveat)}</p></div>' if caveat else ""


def _promises(report: Report) -> str:
    if not report.promises:
        return ""
    rows = [
        [
            _Cell(f"<b>{_text(promise.name)}</b>", "lead"),
            _Cell(_state(promise), "state-cell"),
            _Cell(_signs(words.limit_and_value(promise)[0]), "right"),
            _Cell(words.limit_and_value(promise)[1], "right"),
            _Cell(
                _against_limit(promise),
                "wide" if words.is_measured(promise.value) else "wide empty",
            ),
            _Cell(_text(promise.reason), "" if promise.reason else "empty"),
        ]
        for promise in report.promises
    ]
    columns = ("Promise", "Outcome", "Limit", "Measured", "Against the limit", "Note")
    unjudged = any(words.promise_state(promise) == "not judged" for promise in report.promises)
    note = "What you asked for, and what became of it."
    note += " A promise that could not be judged counts as not kept." if unjudged else ""
    return _section("Promises", note, _table(columns, rows))


def _state(promise: Promise) -> str:
    outcome = words.promise_state(promise)
    kind, mark = _STATES[outcome]
    return f'<span class="state {kind}">{mark} {outcome}</span>'


def _against_limit(promise: Promise) -> str:
    """A bar of the value with a mark at the limit."""
    value, limit = promise.value, promise.limit
    if not words.is_measured(value) or not words.is_measured(limit):
        return ""
    full = 1.25 * max(value, limit, 0.0) or 1.0
    shares = f"--limit: {max(limit, 0.0) / full:.1%}"
    return (
        f'<div class="track" style="{shares}" aria-hidden="true">'
        f"{_bar(max(value, 0.0) / full, '' if promise.kept else 'low')}<i></i></div>"
    )


def _steps(report: Report) -> str:
    charts = steps_svg(report, "wide") + steps_svg(report, "narrow")
    timed = any(words.is_measured(point.latency_ms) for point in words.points(report))
    note = "The model's size and the time of one inference after each step of the recipe."
    if not timed:
        note = f"The model's size after each step of the recipe. Latency: {words.NOT_MEASURED}."
    columns = ("Step", "Changed", "Size", "Latency", "SQNR", "Took")
    rows = [_step_row(index, step) for index, step in enumerate(report.steps, start=1)]
    table = _table(columns, rows) if rows else '<p class="quiet">The recipe had no steps.</p>'
    return _section("Step by step", note, charts + table)


def _step_row(index: int, step: Step) -> list[_Cell]:
    settings = words.parameters(step)
    lines = [f'<span class="quiet"><code>{_text(settings)}</code></span>'] if settings else []
    lines += [f'<span class="quiet">{_text(finding)}</span>' for finding in step.findings]
    kind = "lossless" if step.lossless else "lossy"
    name = f'{index}. <b>{_text(step.name)}</b> <i class="kind">{kind}</i>'
    return [
        _Cell(name + "".join(lines), "lead"),
        _Cell(words.count(step.changed, "place"), "right"),
        _Cell(words.size(step.size_bytes), "right"),
        _Cell(words.latency(step.latency_ms), "right"),
        _Cell(words.decibels(step.sqnr_db), "right"),
        _Cell(words.seconds(step.seconds), "right"),
    ]


def _layers(report: Report) -> str:
    title = "Noise, layer by layer"
    if not report.layers:
        nothing = f"{words.NOT_MEASURED.capitalize()}: no layer was compared."
        return _section(title, "", f'<p class="quiet">{nothing}</p>')
    amount, worst = len(report.layers), words.worst_layers(report)
    low = sum(words.layer_order(layer) < words.LOW_SQNR_DB for layer in report.layers)
    limit = f"{words.LOW_SQNR_DB:g} dB"
    lead = "Signal to quantization noise at each layer's output; higher is better. "
    if low:
        lead += f"<b>{words.count(low, 'layer')}</b> of {amount} under {limit} (diamonds), "
        lead += "where noise has more than a tenth of the signal's power."
    else:
        lead += f"All {amount} at {limit} (dashed) or more, "
        lead += "where noise has at most a tenth of the signal's power."
    top = max(40.0, *(words.layer_order(layer) for _, layer in worst))
    ranked = [
        [*_layer_cells(rank, layer), _Cell(_noise_bar(layer, top), "wide")]
        for rank, (_, layer) in enumerate(worst, start=1)
    ]
    content = layers_svg(report, "wide") + layers_svg(report, "narrow")
    content += f"<h3>{f'The {len(worst)} noisiest' if len(worst) > 1 else 'The only one'}</h3>"
    content += _table(("Layer", "Op", "SQNR", ""), ranked, kind="dense")
    if amount > len(worst):
        listed = [
            _layer_cells(position, layer)
            for position, layer in enumerate(report.layers[:_LONGEST_LIST], start=1)
        ]
        table = _table(("Layer", "Op", "SQNR"), listed, kind="dense")
        rest = _rest(amount - len(listed), "layer")
        content += _details(f"All {amount} layers in graph order", table + rest)
    return _section(title, lead, content, long=True)


def _layer_cells(number: int, layer: Layer) -> list[_Cell]:
    return [
        _Cell(f'<span class="rank">{number}.</span>{_code(layer.name)}', "lead"),
        _Cell(_text(layer.op)),
        _Cell(words.decibels(layer.sqnr_db), "right"),
    ]


def _noise_bar(layer: Layer, top: float) -> str:
    value = words.layer_order(layer)
    kind = "low" if value < words.LOW_SQNR_DB else ""
    bar = _bar(min(max(value / top, 0.0), 1.0), kind)
    return f'<div class="track" aria-hidden="true">{bar}</div>'


def _skipped(report: Report) -> str:
    groups = words.skip_groups(report)
    if not groups:
        return _section("Left alone", "", '<p class="quiet">No pass left a node alone.</p>')
    note = f"{words.count(len(report.skipped), 'node')} looked at and not changed, by reason."
    blocks = []
    for group in groups:
        names = [
            f'<li>{_code(node)} <span class="quiet small">{_text(step)}</span></li>'
            for step, node in group.nodes[:_LONGEST_LIST]
        ]
        summary = f'{_text(group.reason)} <span class="state plain">{len(group.nodes)}</span>'
        rest = _rest(len(group.nodes) - len(names), "node")
        blocks.append(_details(summary, f"<ul>{''.join(names)}</ul>{rest}"))
    return _section("Left alone, and why", note, "".join(blocks), long=True)


def _findings(report: Report) -> str:
    if not report.findings:
        return ""
    items = "".join(f"<li>{_text(finding)}</li>" for finding in report.findings)
    return _section("Findings", "", f"<ul>{items}</ul>")


def _measurement(report: Report) -> str:
    judged = _text(report.judged_on) or words.NOT_MEASURED
    if report.samples:
        judged += f" ({words.count(report.samples, 'sample')})"
    machine = report.measured_on
    kind = words.NOT_MEASURED if machine is None else "yes" if machine.is_target else "no"
    facts = [
        ("Judged on", judged),
        ("Latency measured on", html.escape(words.measured_how(report))),
        ("Machine of the target's kind", kind),
        ("Reference against eager torch", words.parity(report)),
        (
            "Build time",
            words.seconds(report.build_seconds) if report.build_seconds else words.NOT_MEASURED,
        ),
        ("Bundle", _code(report.bundle_path) if report.bundle_path else "not recorded"),
        ("Bundle size", f"{words.size(report.size_bytes)} ({report.size_bytes:,} bytes)"),
        ("SHA-256", _code(report.bundle_sha256) if report.bundle_sha256 else "not recorded"),
        ("Made by", f"edgec {_text(report.edgec_version)}"),
    ]
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)
    return _section("How it was measured", "", f"<dl>{items}</dl>")


def _section(title: str, note: str, content: str, *, long: bool = False) -> str:
    kind = ' class="long"' if long else ""
    lead = f'<p class="quiet">{note}</p>' if note else ""
    return f"<section{kind}>\n<h2>{title}</h2>\n{lead}{content}\n</section>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[_Cell]], *, kind: str = "") -> str:
    """A table whose cells know their column's name, for narrow screens.

    kind: ``dense`` lets a row's short cells share a line there.
    """
    body = []
    rows = list(rows)
    for row in rows:
        cells = "".join(
            f'<td data-label="{column}"'
            + (f' class="{cell.kind}"' if cell.kind else "")
            + f">{cell.content}</td>"
            for column, cell in zip(columns, row, strict=True)
        )
        body.append(f"<tr>{cells}</tr>")
    kinds = [cell.kind if cell.kind == "right" else "" for cell in rows[0]]
    head = "".join(
        f'<th scope="col" class="{kind}">{column}</th>'
        if kind
        else f'<th scope="col">{column}</th>'
        for column, kind in zip(columns, kinds, strict=True)
    )
    opening = f'<table class="{kind}">' if kind else "<table>"
    return f"{opening}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def _rest(amount: int, noun: str) -> str:
    return (
        f'<p class="quiet">{words.count(amount, noun)} more in report.json.</p>'
        if amount > 0
        else ""
    )


def _bar(share: float, kind: str = "") -> str:
    return f'<div class="bar {kind}" style="--share: {share:.1%}"></div>'


def _text(text: str) -> str:
    return html.escape(words.printable(text))


def _code(text: str) -> str:
    return f"<code>{_text(text)}</code>"


def _signs(text: str) -> str:
    """ASCII signs of our own figures as typographic ones, escaped."""
    text = text.replace("<=", "\u2264").replace(">=", "\u2265").replace("x ", "\u00d7 ")
    return html.escape(text)
