from __future__ import annotations

import dataclasses
import functools
import hashlib
import html.parser
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest
from made_up_report import full_report, minimal_report

from edgec.report import Layer, Promise, Report, Side, Skipped
from edgec.report_html import render_html

_VOID = {"meta", "br", "hr", "img", "link", "input"}
_SVG_LEAVES = {"path", "use", "rect"}  # matplotlib closes them itself: <path/>


@functools.cache
def _full_page() -> str:
    return render_html(full_report())


class _Page(html.parser.HTMLParser):
    """Collects tags, ids, references and text; notes every tag that is not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.mistakes: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag not in _SVG_LEAVES | _VOID:
            self.mistakes.append(f"<{tag}/>")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.mistakes.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.references.append(value or "")
            self.references += re.findall(r"url\((.*?)\)", value or "")


REPORTS = {
    "full": full_report(),
    "minimal": minimal_report(),
    "one layer": full_report(layers=1),
    "no bytes": dataclasses.replace(full_report(), reference=Side(0), bundle=Side(0), size_bytes=0),
    "not finite": dataclasses.replace(
        full_report(),
        layers=(Layer("a", "Conv", math.nan), Layer("b", "Conv", -200.0), Layer("c", "Add", 200.0)),
        sqnr_db=math.nan,
        promises=(Promise("max-drop", 0.0, -0.5, True), Promise("limit", math.nan, 1.0, False)),
    ),
}


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS.keys())
def test_page_is_balanced_and_loads_nothing(report: Report) -> None:
    text = render_html(report)
    page = _Page(text)
    assert page.mistakes == [] and page.open == []
    assert not {"script", "link", "img", "iframe", "object", "a"} & set(page.tags)
    assert len(page.ids) == len(set(page.ids))
    assert all(reference.lstrip("#") in page.ids for reference in page.references)
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert "nan" not in " ".join(page.texts).lower().split()
    assert "#0" not in text.split("</style>")[1]  # no stand-in colour is left in the charts


def test_names_from_the_graph_cannot_become_tags_or_control_codes() -> None:
    text = _full_page()
    assert "<script" not in text.lower()
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;" in text
    assert "\x1b" not in text and "\u202e" not in text
    assert "bounds are &lt;not&gt; constant" in text


def test_every_text_field_is_escaped() -> None:
    evil = "<b id=evil>&"
    report = full_report()
    step = dataclasses.replace(
        report.steps[0], name=evil, parameters={evil: evil}, findings=(evil,)
    )
    measured = dataclasses.replace(report.measured_on, cpu=evil, arch=evil)
    report = dataclasses.replace(
        report,
        **dict.fromkeys(
            ("name", "target", "source", "edgec_version", "judged_on", "agreement_rule"), evil
        ),
        **dict.fromkeys(("bundle_path", "bundle_sha256"), evil),
        metric=dataclasses.replace(report.metric, name=evil),
        measured_on=measured,
        steps=(step,),
        skipped=(Skipped(evil, evil, evil),),
        layers=(Layer(evil, evil, 3.0),),
        promises=(Promise(evil, 1.0, None, False, evil),),
        findings=(evil,),
    )
    page = _Page(render_html(report))
    assert "evil" not in page.ids
    assert page.mistakes == [] and page.open == []


def test_unmeasured_figures_say_so_and_draw_no_bar() -> None:
    text = render_html(minimal_report())
    for title in ("Speed", "Agreement with the reference", "Task metric", "Signal to noise (SQNR)"):
        card = re.search(rf'<div class="card"><p [^>]*>{re.escape(title)}</p>(.*?)</div>', text)
        assert card and "not measured" in card.group(1)
        assert "bar" not in card.group(1) and not re.search(r">[^<]*\d", card.group(1))
    assert "Latency: not measured" in text


def test_a_step_without_latency_has_words_in_place_of_its_bar() -> None:
    report = full_report()
    steps = (dataclasses.replace(report.steps[0], latency_ms=None), *report.steps[1:])
    wide = _wide_steps_chart(dataclasses.replace(report, steps=steps))
    whole = _wide_steps_chart(report)
    assert "not measured" in wide and "not measured" not in whole
    assert whole.count("var(--accent-soft)") - wide.count("var(--accent-soft)") == 1


def _wide_steps_chart(report: Report) -> str:
    return render_html(report).split('<svg class="chart wide"')[1].split("</svg>")[0]


def test_latency_of_another_machine_carries_a_visible_note() -> None:
    assert "Latencies are a hint" in _full_page()
    assert "a hint" not in render_html(full_report(layers=2, is_target=True))


def test_promise_that_was_not_judged_is_neither_kept_nor_given_a_value() -> None:
    text = _full_page()
    (row,) = re.findall(r"<tr><td[^>]*><b>min-speedup</b>.*?</tr>", text)
    assert "not judged" in row and "not measured" in row and "track" not in row
    assert "1 of 3 kept" in text


def test_every_layer_has_a_tooltip_and_the_worst_is_ranked_first() -> None:
    text = _full_page()
    assert text.count("<title>") == 1 + 2 * 50  # the page, and both forms of the chart
    table = text.split("The 10 noisiest")[1].split("</table>")[0]
    assert table.count("<tr>") == 11
    assert "/blocks.5/blocks.5.3/conv_dw/Conv" in table.split("</tr>")[1]
    assert table.count("bar low") == 1


def test_skipped_nodes_are_listed_under_their_reason() -> None:
    text = _full_page()
    group = text.split("no int8 kernel")[1].split("</details>")[0]
    assert group.count("<li>") == 13


def test_a_very_long_list_of_skipped_nodes_is_cut_and_says_so() -> None:
    skipped = tuple(Skipped("fuse", f"/n{i}", "why") for i in range(1000))
    text = render_html(dataclasses.replace(minimal_report(), skipped=skipped))
    assert "700 nodes more in report.json" in text


def test_page_of_200_layers_is_under_400_kilobytes() -> None:
    assert len(render_html(full_report(layers=200)).encode()) < 400_000


def test_same_report_gives_same_bytes_in_any_process(tmp_path: pathlib.Path) -> None:
    here = pathlib.Path(__file__).parents[1]
    (tmp_path / "matplotlibrc").write_text("lines.solid_capstyle: round\nsvg.fonttype: path\n")
    program = (
        "import hashlib\nfrom made_up_report import full_report\n"
        "from edgec.report_html import render_html\n"
        "print(hashlib.sha256(render_html(full_report()).encode()).hexdigest())"
    )
    digests = {hashlib.sha256(_full_page().encode()).hexdigest()}
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(here)}
        environment["MATPLOTLIBRC"] = str(tmp_path) if seed == "2" else ""
        run = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(run.stdout.strip())
    assert len(digests) == 1


def test_reading_and_printing_a_report_imports_no_matplotlib() -> None:
    program = (
        "import sys, edgec.report_terminal, edgec.report_html\n"
        "print(sorted({'matplotlib', 'rich', 'torch', 'onnx', 'onnx_ir'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
