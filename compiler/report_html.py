"""The report as one HTML page for people: no script, no link, nothing to load.

The page answers in this order: what came out, were the promises kept, which step did what,
where the noise is, what was left alone and why, and how all of it was measured. Every text
that comes from outside goes through ``text``; the page's own policy forbids scripts and
connections besides. The same report gives the same bytes.

Left out on purpose: the full list of a group of hundreds of nodes; report.json has it.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgec import report_format as words
from edgec import report_judgement as judged
from edgec import report_markup as html
from edgec.report import Layer, Promise, Report, Step
from edgec.report_charts import layers_svg, steps_svg
from edgec.report_pruning import pruning_section
from edgec.report_style import STYLE

_MOST_KERNELS = 12  # operators in the table of kernels
_LONGEST_LIST = 300  # names in one list; the rest is in report.json
_STATES = {"kept": ("good", "\u2713"), "broken": ("bad", "\u2717"), "not judged": ("wait", "?")}


def render_html(report: Report) -> str:
    """The page as text; write it as UTF-8. Under 400 kB for 200 layers."""
    parts = (
        _header(report),
        _cards(report),
        _caveat(report),
        _promises(report),
        _slices(report),
        _robustness(report),
        _confidence(report),
        _trials(report),
        _steps(report),
        pruning_section(report),
        _kernels(report),
        _layers(report),
        _skipped(report),
        _findings(report),
        _measurement(report),
    )
    title = f"{html.text(report.name)} for {html.text(report.target)}: edgec report"
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
        f'<header>\n<p class="over">edgec build report</p>\n<h1>{html.text(report.name)}</h1>\n'
        f'<p class="quiet">for <b>{html.text(report.target)}</b>, '
        f"from {html.code(report.source)}</p>\n"
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
    return _card(f"Task metric: {html.text(metric.name)}", words.number(metric.bundle), note)


def _promise_card(report: Report) -> str:
    if not report.promises:
        return _card("Promises", "none made", "", none=True)
    kept = sum(promise.kept for promise in report.promises)
    missed = ", ".join(html.text(p.name) for p in report.promises if not p.kept)
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
        f'<p class="figure{kind}">{html.signs(figure)}</p>{below}{extra}</div>'
    )


def _pair(before: float | None, after: float | None) -> str:
    """Two bars to one scale; nothing unless both were measured."""
    if not words.is_measured(before) or not words.is_measured(after) or max(before, after) <= 0:
        return ""
    largest = max(before, after)
    return (
        '<div class="pair" aria-hidden="true">'
        f"{html.bar(before / largest, 'first')}{html.bar(after / largest)}</div>"
    )


def _agreement_note(report: Report) -> str:
    rule = f"{html.text(report.agreement_rule)}, " if report.agreement_rule else ""
    return f"{rule}{words.count(report.samples, 'sample')}"


def _caveat(report: Report) -> str:
    caveat = words.latency_caveat(report)
    return f'<div class="note" role="note"><p>{html.text(caveat)}</p></div>' if caveat else ""


def _promises(report: Report) -> str:
    if not report.promises:
        return ""
    rows = [
        [
            html.Cell(f"<b>{html.text(promise.name)}</b>", "lead"),
            html.Cell(_state(promise), "state-cell"),
            html.Cell(html.signs(words.limit_and_value(promise)[0]), "right"),
            html.Cell(words.limit_and_value(promise)[1], "right"),
            html.Cell(
                _against_limit(promise),
                "wide" if words.is_measured(promise.value) else "wide empty",
            ),
            html.Cell(html.text(promise.reason), "" if promise.reason else "empty"),
        ]
        for promise in report.promises
    ]
    columns = ("Promise", "Outcome", "Limit", "Measured", "Against the limit", "Note")
    unjudged = any(words.promise_state(promise) == "not judged" for promise in report.promises)
    note = "What you asked for, and what became of it."
    note += " A promise that could not be judged counts as not kept." if unjudged else ""
    return html.section("Promises", note, html.table(columns, rows))


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
        f"{html.bar(max(value, 0.0) / full, '' if promise.kept else 'low')}<i></i></div>"
    )


def _slices(report: Report) -> str:
    if report.slices is None:
        return ""
    columns, rows = judged.slice_rows(report.slices)
    shown = _plain_table([html.text(column) for column in columns], rows[:_LONGEST_LIST])
    note = (
        f"{html.text(report.slices.metric)} of the samples that share a value of column "
        f"{html.code(report.slices.column)}, the worst first."
    )
    rest = html.rest(len(rows) - _LONGEST_LIST, "slice")
    return html.section("Slice by slice", note, shown + rest)


def _robustness(report: Report) -> str:
    if report.robustness is None:
        return ""
    table = _plain_table(*judged.robustness_rows(report.robustness))
    return html.section("Robustness", html.text(judged.how_disturbed(report.robustness)), table)


def _confidence(report: Report) -> str:
    if report.confidence is None:
        return ""
    found = report.confidence
    note = (
        f"How far the largest probability is from being right, in {found.bins} bins; "
        f"{words.count(found.rows, 'labelled row')}. Lower is better."
    )
    return html.section("Confidence", note, _plain_table(*judged.confidence_rows(found)))


def _steps(report: Report) -> str:
    charts = steps_svg(report, "wide") + steps_svg(report, "narrow")
    timed = any(words.is_measured(point.latency_ms) for point in words.points(report))
    note = "The model's size and the time of one inference after each step of the recipe."
    if not timed:
        note = f"The model's size after each step of the recipe. Latency: {words.NOT_MEASURED}."
    columns = ("Step", "Changed", "Size", "Latency", "SQNR", "Took")
    rows = [_step_row(index, step) for index, step in enumerate(report.steps, start=1)]
    table = html.table(columns, rows) if rows else '<p class="quiet">The recipe had no steps.</p>'
    return html.section("Step by step", note, charts + table)


def _step_row(index: int, step: Step) -> list[html.Cell]:
    settings = words.parameters(step)
    lines = [f'<span class="quiet"><code>{html.text(settings)}</code></span>'] if settings else []
    lines += [f'<span class="quiet">{html.text(finding)}</span>' for finding in step.findings]
    kind = "lossless" if step.lossless else "lossy"
    name = f'{index}. <b>{html.text(step.name)}</b> <i class="kind">{kind}</i>'
    return [
        html.Cell(name + "".join(lines), "lead"),
        html.Cell(words.count(step.changed, "place"), "right"),
        html.Cell(words.size(step.size_bytes), "right"),
        html.Cell(words.latency(step.latency_ms), "right"),
        html.Cell(words.decibels(step.sqnr_db), "right"),
        html.Cell(words.seconds(step.seconds), "right"),
    ]


def _trials(report: Report) -> str:
    if not report.trials:
        return ""
    columns, rows = words.trial_rows(report)
    note = "Judged on held-out calibration data; the first that keeps every promise is taken."
    if any(trial.untrained for trial in report.trials):
        note += " How much to prune was found by size and speed, then tried in full."
    return html.section("What the search tried", note, _plain_table(columns, rows))


def _kernels(report: Report) -> str:
    if report.coverage is None:
        return ""
    columns, rows = words.kernel_rows(report.coverage, _MOST_KERNELS)
    note = html.text(words.coverage(report.coverage))
    return html.section("What runs in integers", f"{note}.", _plain_table(columns, rows))


def _plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [
        [html.Cell(html.text(text), "lead" if i == 0 else "") for i, text in enumerate(row)]
        for row in rows
    ]
    return html.table([column.capitalize() for column in columns], cells, kind="dense")


def _layers(report: Report) -> str:
    title = "Noise, layer by layer"
    if not report.layers:
        nothing = f"{words.NOT_MEASURED.capitalize()}: no layer was compared."
        return html.section(title, "", f'<p class="quiet">{nothing}</p>')
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
        [*_layer_cells(rank, layer), html.Cell(_noise_bar(layer, top), "wide")]
        for rank, (_, layer) in enumerate(worst, start=1)
    ]
    content = layers_svg(report, "wide") + layers_svg(report, "narrow")
    content += f"<h3>{f'The {len(worst)} noisiest' if len(worst) > 1 else 'The only one'}</h3>"
    content += html.table(("Layer", "Op", "SQNR", ""), ranked, kind="dense")
    if amount > len(worst):
        listed = [
            _layer_cells(position, layer)
            for position, layer in enumerate(report.layers[:_LONGEST_LIST], start=1)
        ]
        table = html.table(("Layer", "Op", "SQNR"), listed, kind="dense")
        rest = html.rest(amount - len(listed), "layer")
        content += html.details(f"All {amount} layers in graph order", table + rest)
    return html.section(title, lead, content, long=True)


def _layer_cells(number: int, layer: Layer) -> list[html.Cell]:
    return [
        html.Cell(f'<span class="rank">{number}.</span>{html.code(layer.name)}', "lead"),
        html.Cell(html.text(layer.op)),
        html.Cell(words.decibels(layer.sqnr_db), "right"),
    ]


def _noise_bar(layer: Layer, top: float) -> str:
    value = words.layer_order(layer)
    kind = "low" if value < words.LOW_SQNR_DB else ""
    bar = html.bar(min(max(value / top, 0.0), 1.0), kind)
    return f'<div class="track" aria-hidden="true">{bar}</div>'


def _skipped(report: Report) -> str:
    groups = words.skip_groups(report)
    if not groups:
        return html.section("Left alone", "", '<p class="quiet">No pass left a node alone.</p>')
    note = f"{words.count(len(report.skipped), 'node')} looked at and not changed, by reason."
    blocks = []
    for group in groups:
        names = [
            f'<li>{html.code(node)} <span class="quiet small">{html.text(step)}</span></li>'
            for step, node in group.nodes[:_LONGEST_LIST]
        ]
        summary = f'{html.text(group.reason)} <span class="state plain">{len(group.nodes)}</span>'
        rest = html.rest(len(group.nodes) - len(names), "node")
        blocks.append(html.details(summary, f"<ul>{''.join(names)}</ul>{rest}"))
    return html.section("Left alone, and why", note, "".join(blocks), long=True)


def _findings(report: Report) -> str:
    if not report.findings:
        return ""
    items = "".join(f"<li>{html.text(finding)}</li>" for finding in report.findings)
    return html.section("Findings", "", f"<ul>{items}</ul>")


def _measurement(report: Report) -> str:
    judged = html.text(report.judged_on) or words.NOT_MEASURED
    if report.samples:
        judged += f" ({words.count(report.samples, 'sample')})"
    machine = report.measured_on
    kind = words.NOT_MEASURED if machine is None else "yes" if machine.is_target else "no"
    facts = [
        ("Judged on", judged),
        ("Latency measured on", html.text(words.measured_how(report))),
        ("Machine of the target's kind", kind),
        ("Reference against eager torch", words.parity(report)),
        (
            "Build time",
            words.seconds(report.build_seconds) if report.build_seconds else words.NOT_MEASURED,
        ),
        ("Bundle", html.code(report.bundle_path) if report.bundle_path else "not recorded"),
        ("Bundle size", f"{words.size(report.size_bytes)} ({report.size_bytes:,} bytes)"),
        ("SHA-256", html.code(report.bundle_sha256) if report.bundle_sha256 else "not recorded"),
        ("Made by", f"edgec {html.text(report.edgec_version)}"),
    ]
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)
    return html.section("How it was measured", "", f"<dl>{items}</dl>")
