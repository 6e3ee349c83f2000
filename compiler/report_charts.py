"""The report's charts as SVG elements that take their colours and font from the page.

matplotlib draws with stand-in colours, each of which is then replaced by a CSS variable:
one drawing serves light, dark and print. Every chart comes in a wide and a narrow form,
so that its text stays legible on a phone. No text from the user's graph enters matplotlib;
names of layers are put in as escaped ``<title>`` elements, the browser's tooltips.

The same report gives the same bytes: salted ids, no date, matplotlib's own defaults
whatever the user's matplotlibrc says, its own font for the layout.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from edgec.report import Report
from edgec.report_format import (
    LOW_SQNR_DB,
    Point,
    decibels,
    is_measured,
    latency,
    points,
    printable,
    shorten,
    size,
    worst_layers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Form = Literal["wide", "narrow"]

# stand-in colour -> CSS variable of the page
_INK, _MUTED, _LINE, _SOFT, _ACCENT, _BAD = (
    "#010203",
    "#020304",
    "#030405",
    "#040506",
    "#050607",
    "#060708",
)
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _LINE: "var(--line)",
    _SOFT: "var(--accent-soft)",
    _ACCENT: "var(--accent)",
    _BAD: "var(--bad)",
}
_WIDTH: Mapping[Form, int] = {"wide": 860, "narrow": 360}  # in SVG units, one CSS px at full size
_AXIS_DB = (-20.0, 60.0)  # the axis ends here: nothing left below, as good as exact above


def steps_svg(report: Report, form: Form) -> str:
    """Bars of size and latency: the reference, after every step, the bundle.

    The panels stand side by side when wide, one above the other when narrow. A latency
    that was not taken has words in place of its bar; with none at all there is no panel.
    """
    rows = points(report)
    panels: list[tuple[str, list[float | None], list[str]]] = [
        ("Size", [float(p.size_bytes) for p in rows], [size(p.size_bytes) for p in rows])
    ]
    if any(is_measured(p.latency_ms) for p in rows):
        times = [p.latency_ms for p in rows]
        panels.append(("Latency", times, [latency(t) for t in times]))
    row_height, head, label_width = 26, 34, 168 if form == "wide" else 132
    columns = len(panels) if form == "wide" else 1
    panel_height = head + row_height * len(rows)
    width, height = _WIDTH[form], panel_height * (len(panels) if columns == 1 else 1)

    def draw(figure: Figure) -> None:
        for index, (title, values, texts) in enumerate(panels):
            column, line = (index, 0) if columns > 1 else (0, index)
            labelled = column == 0
            panel_width = (width - label_width) / columns
            left = label_width + column * panel_width
            bottom = height - (line + 1) * panel_height
            box = (
                left / width,
                bottom / height,
                (panel_width - 8) / width,
                (panel_height - head) / height,
            )
            _bars(figure.add_axes(box), rows, values, texts, title=title, labelled=labelled)

    label = "Model size and latency from the reference through every step to the bundle"
    return _svg(draw, (width, height), form=form, name="steps", label=label)


def layers_svg(report: Report, form: Form) -> str:
    """Signal to noise ratio of every layer in graph order; the worst ten carry their rank.

    Layers under LOW_SQNR_DB are drawn as diamonds in the warning colour.
    """
    width, height = _WIDTH[form], 270 if form == "wide" else 240
    values = [_on_axis(layer.sqnr_db) for layer in report.layers]
    dot = min(max((width - 48) / len(values) * 0.7, 4.0), 6.0)
    lowest, highest = min([0.0, *values]), max([30.0, *values])

    def draw(figure: Figure) -> None:
        axes = figure.add_axes(
            (40 / width, 38 / height, (width - 48) / width, (height - 62) / height)
        )
        _plain_axes(axes)
        axes.set_xlim(0.0, len(values) + 1.0)
        axes.set_ylim(lowest - 3.0, highest + 3.0)
        axes.grid(axis="y", color=_LINE, linewidth=1)
        axes.axhline(LOW_SQNR_DB, color=_BAD, linewidth=1, linestyle=(0, (4, 3)))
        for position, value in enumerate(values, start=1):
            low = value < LOW_SQNR_DB
            color = _BAD if low else _ACCENT
            axes.plot(
                [position, position],
                [min(0.0, lowest), value],
                color=_BAD if low else _LINE,
                linewidth=1,
                marker="D" if low else "o",
                markersize=dot + 2 if low else dot,
                markevery=[1],
                markerfacecolor=color,
                markeredgewidth=0,
                clip_on=False,
                gid=f"layer-{position}",
            )
        _ranks(axes, report, values, units=(width - 48, height - 62))
        axes.set_title("SQNR in dB", loc="left", x=-32 / (width - 48), pad=8, **_text(_MUTED))
        axes.set_xlabel("layer, in graph order", labelpad=4, **_text(_MUTED))

    titles = {
        f"layer-{position}": f"{position}. {layer.name} ({layer.op}): {decibels(layer.sqnr_db)}"
        for position, layer in enumerate(report.layers, start=1)
    }
    label = "Signal to quantization noise ratio of every layer in graph order"
    return _svg(draw, (width, height), form=form, name="layers", label=label, titles=titles)


def _bars(
    axes: Axes,
    rows: tuple[Point, ...],
    values: list[float | None],
    texts: list[str],
    *,
    title: str,
    labelled: bool,
) -> None:
    colors = {"reference": _MUTED, "step": _SOFT, "bundle": _ACCENT}
    largest = max([v for v in values if is_measured(v)], default=0.0) or 1.0
    _plain_axes(axes)
    axes.set_xlim(0.0, largest * 1.34)  # room for the figure behind the longest bar
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, loc="left", x=0, pad=8, **_text(_MUTED))
    axes.axvline(0, color=_LINE, linewidth=1, clip_on=False)
    for row, (point, value, text) in enumerate(zip(rows, values, texts, strict=True)):
        ends = point.kind != "step"
        if is_measured(value):
            axes.barh(row, value, height=0.62, color=colors[point.kind], linewidth=0, clip_on=False)
        style = _text(_INK if is_measured(value) else _MUTED, bold=ends and is_measured(value))
        offset = (value if is_measured(value) else 0.0) + largest * 0.015
        axes.text(offset, row, text, va="center_baseline", **style)
        if labelled:
            axes.annotate(
                shorten(point.label, 22),
                (0, row),
                xytext=(-10, 0),
                textcoords="offset points",
                ha="right",
                va="center_baseline",
                annotation_clip=False,
                **_text(_INK, bold=ends),
            )


def _ranks(axes: Axes, report: Report, values: list[float], *, units: tuple[int, int]) -> None:
    """The rank above each of the worst ten, where no earlier rank is in the way."""
    low, high = axes.get_ylim()
    scale = units[0] / (len(values) + 1.0), units[1] / (high - low)
    placed: list[tuple[float, float]] = []
    for rank, (position, _) in enumerate(worst_layers(report), start=1):
        spot = position * scale[0], values[position - 1] * scale[1]
        if any(abs(spot[0] - x) < 15 and abs(spot[1] - y) < 14 for x, y in placed):
            continue
        placed.append(spot)
        axes.annotate(
            str(rank),
            (position, values[position - 1]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            annotation_clip=False,
            **_text(_INK, bold=True),
        )


def _on_axis(sqnr_db: float) -> float:
    """The height of a layer's dot; one that could not be measured is at the very bottom."""
    return min(max(sqnr_db, _AXIS_DB[0]), _AXIS_DB[1]) if is_measured(sqnr_db) else _AXIS_DB[0]


def _plain_axes(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=12, labelcolor=_MUTED)
    axes.locator_params(integer=True)
    axes.patch.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _text(color: str, *, bold: bool = False) -> dict[str, Any]:
    weight = "bold" if bold else "normal"
    return {"color": color, "fontsize": 12, "fontweight": weight, "parse_math": False}


def _svg(
    draw: Any,
    units: tuple[int, int],
    *,
    form: Form,
    name: str,
    label: str,
    titles: Mapping[str, str] | None = None,
) -> str:
    """The figure that ``draw`` fills, as one ``<svg>`` element for the page.

    titles: id of a drawn group -> text of its tooltip.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {"svg.fonttype": "none", "svg.hashsalt": f"edgec-{name}", "axes.unicode_minus": False}
        )
        # 72 dots per inch: one point of matplotlib is one unit of the drawing
        figure = Figure(figsize=(units[0] / 72, units[1] / 72), dpi=72)
        figure.patch.set_visible(False)
        FigureCanvasSVG(figure)
        draw(figure)
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    inner = buffer.getvalue().split("<svg", 1)[1].split(">", 1)[1]
    for stand_in, variable in _VARIABLES.items():
        inner = inner.replace(stand_in, variable)
    inner = _own_ids(inner, f"{name}-{form}-", titles or {})
    return (
        f'<svg class="chart {form}" role="img" aria-label="{html.escape(label)}" '
        f'viewBox="0 0 {units[0]} {units[1]}">{inner.strip()}'
    )


def _own_ids(svg: str, prefix: str, titles: Mapping[str, str]) -> str:
    """Ids made unique on the page, dropped where nothing refers to them; tooltips put in."""
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))

    def rename(match: re.Match[str]) -> str:
        tag, identity = match.group(1), match.group(2)
        if identity in titles:
            return f"<{tag}><title>{html.escape(printable(titles[identity]))}</title>"
        return f'<{tag} id="{prefix}{identity}"' if identity in used else f"<{tag}"

    svg = re.sub(r'<(g) id="(layer-\d+)">', rename, svg)
    svg = re.sub(r'<([a-zA-Z]+) id="([^"]+)"', rename, svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", svg)
    # the page sets the font, and matplotlib's own style sheet would reach beyond the drawing
    dead = r' transform="rotate\(-0 [^"]*"| font-family: [^;"]*;?|<!--.*?-->'
    dead += r"|<metadata>.*?</metadata>|<style.*?</style>"
    svg = re.sub(dead, "", svg, flags=re.DOTALL)
    svg = re.sub(r">\s+<", "><", svg)
    return re.sub(r"<g/>|<g></g>|<defs></defs>|<defs/>", "", svg)
