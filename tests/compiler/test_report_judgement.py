"""Slices, robustness and confidence in the terminal, on the page and in the JSON."""

from __future__ import annotations

import dataclasses
import io
import json

from made_up_report import HOSTILE, full_report, minimal_report
from rich.console import Console

from edgec.report import Slices
from edgec.report_html import render_html
from edgec.report_judgement import robustness_rows, slice_rows
from edgec.report_terminal import print_report


def printed(width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_report(full_report(), console)
    return console.file.getvalue()


def test_the_terminal_names_the_worst_slice_the_worst_disturbance_and_the_error() -> None:
    lines = printed(140).splitlines()
    (slice_line,) = [line for line in lines if line.startswith("worst slice")]
    assert "0.8065" in slice_line and "0.6129" in slice_line and "+- 0.072" in slice_line
    (attack,) = [line for line in lines if line.startswith("under pgd")]
    assert "0.25" in attack and "0.125" in attack and "epsilon 0.0157 of the range" in attack
    assert any(line.startswith("calibration error") and "0.052" in line for line in lines)
    assert "\x1b[2J" not in printed() and "\u202e" not in printed()


def test_the_page_has_every_slice_and_disturbance() -> None:
    page = render_html(full_report())
    for text in ("Slice by slice", "4 small slices together", "dusk", "Robustness", "PGD attack"):
        assert text in page
    assert "not judged alone: under 30 samples" in page and "0.052" in page
    assert "<script>alert" not in page and HOSTILE not in page
    plain = render_html(minimal_report())
    assert not any(t in plain for t in ("Slice by slice", "Robustness", "Confidence"))


def test_a_slice_without_a_figure_is_not_measured_and_never_zero() -> None:
    slices = full_report().slices
    assert slices is not None
    _, rows = slice_rows(slices)
    assert rows[3][1:6] == ("1", "not measured", "not measured", "not measured", "-")
    data = json.loads(full_report().to_json())
    assert data["slices"]["rows"][3]["drop"] is None


def test_figures_have_their_error_beside_them() -> None:
    robustness = full_report().robustness
    assert robustness is not None
    columns, rows = robustness_rows(robustness)
    assert columns[-1] == "standard error"
    assert [row[-1] for row in rows] == ["0.02", "0.05", "-"]


def test_no_judged_slice_is_no_line() -> None:
    report = full_report()
    assert report.slices is not None
    small = Slices("light", "top1", 30, report.slices.rows[2:])
    console = Console(file=io.StringIO(), width=100)
    print_report(dataclasses.replace(report, slices=small), console)
    assert "worst slice" not in console.file.getvalue()
