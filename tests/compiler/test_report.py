from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
from made_up_report import HOSTILE, full_report, minimal_report
from rich.console import Console

from edgec import report_format as words
from edgec.bench import Timing
from edgec.bench_bundle import Bench
from edgec.catalogue_tables import pass_table, passes_table, target_table, targets_table
from edgec.report import Layer, Measurement, Promise, Report
from edgec.report_terminal import (
    bench_table,
    print_bench,
    print_facts,
    print_report,
    table,
)
from edgec.targets import load_target, target_names


def _printed(report: Report, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_report(report, console)
    return console.file.getvalue()


def _drawn(drawable: object, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(drawable)
    return console.file.getvalue()


def test_json_has_the_fields_scripts_rely_on() -> None:
    data = json.loads(full_report().to_json())
    assert data["schema_version"] == 1
    assert data["reference"]["latency_ms"] == 14.82
    assert {"target", "size_bytes", "bundle", "speedup", "agreement", "sqnr_db"} <= set(data)
    assert [len(data[key]) for key in ("steps", "skipped", "promises")] == [3, 14, 3]


def test_json_writes_nan_as_null() -> None:
    report = dataclasses.replace(minimal_report(), sqnr_db=math.nan, speedup=math.inf)
    data = json.loads(report.to_json())
    assert data["sqnr_db"] is None and data["speedup"] is None


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("report", [full_report(), minimal_report()], ids=["full", "minimal"])
def test_no_line_is_wider_than_the_terminal(report: Report, width: int) -> None:
    assert max(len(line) for line in _printed(report, width).splitlines()) <= width


def test_every_step_promise_and_noisy_layer_stays_on_one_line() -> None:
    lines = _printed(full_report()).splitlines()
    assert any("quantize-static" in s and "4.87 MB" in s and "24.3 dB" in s for s in lines)
    assert any("max-size-mb" in s and "<= 5.5" in s and "kept" in s for s in lines)
    assert any("/blocks.5/" in s and s.rstrip().endswith("low") for s in lines)


def test_a_pipe_gets_plain_ascii_without_escapes() -> None:
    text = _printed(full_report())
    assert text.isascii() and "\x1b" not in text


def test_no_color_keeps_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    print_report(full_report(), console)
    text = console.file.getvalue()
    assert "\x1b[3" not in text  # no foreground colour; bold stays allowed
    assert "1 of 3 promises broken, 1 not judged" in text


def test_unmeasured_figures_say_so() -> None:
    text = _printed(minimal_report())
    for name in ("latency", "agreement", "SQNR"):
        (line,) = (s for s in text.splitlines() if s.startswith(name))
        assert "not measured" in line and not any(c.isdigit() for c in line)


def test_latency_of_another_machine_is_called_a_hint() -> None:
    assert "Latencies are a hint" in _printed(full_report(is_target=False))
    assert "hint" not in _printed(full_report(is_target=True))


def test_latency_of_an_unrecorded_machine_is_called_a_hint() -> None:
    report = dataclasses.replace(full_report(), measured_on=None)
    assert "not recorded" in words.latency_caveat(report)
    assert words.latency_caveat(minimal_report()) == ""


def test_names_are_neither_markup_nor_control_codes() -> None:
    layers = (Layer(HOSTILE, "Conv", 3.0),)
    text = _printed(dataclasses.replace(full_report(), layers=layers), width=140)
    assert "[red]Conv[/red]\\x1b[2J\\u202e" in text
    assert "\x1b" not in text and "\u202e" not in text


def test_long_layer_name_keeps_both_ends() -> None:
    layers = (Layer("/start/" + "x" * 200 + "/end", "Conv", 3.0),)
    lines = _printed(dataclasses.replace(full_report(), layers=layers)).splitlines()
    (line,) = (s for s in lines if "/start/" in s)
    assert "..." in line and "/end" in line and "3.0 dB" in line


def test_skipped_nodes_are_counted_by_reason_most_frequent_first() -> None:
    groups = words.skip_groups(full_report())
    assert [(g.reason, len(g.nodes)) for g in groups] == [
        ("no int8 kernel", 13),
        ("bounds are <not> constant", 1),
    ]


def test_worst_layers_rank_unmeasured_first_and_ties_in_graph_order() -> None:
    values = (9.0, 5.0, math.nan, 5.0)
    layers = tuple(Layer(f"n{i}", "Conv", v) for i, v in enumerate(values))
    report = dataclasses.replace(minimal_report(), layers=layers)
    assert [position for position, _ in words.worst_layers(report)] == [3, 2, 4, 1]


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100 %"), (0.999999, "99.99 %"), (0.97917, "97.92 %"), (1e-9, "0.01 %"), (0.0, "0 %")],
)
def test_percent_is_whole_only_when_it_is_exact(share: float, text: str) -> None:
    assert words.percent(share) == text


def test_a_value_just_beyond_its_limit_never_looks_equal_to_it() -> None:
    limit, value = words.limit_and_value(Promise("min-speedup", 1.7, 1.69999999, False))
    assert (limit, value) == (">= 1.7", "1.69999999")


@pytest.mark.parametrize(
    ("outcomes", "line"),
    [
        ([], "no promises made"),
        ([(1.0, True)], "the promise is kept"),
        ([(1.0, True), (1.0, True)], "all 2 promises kept"),
        ([(1.0, False), (1.0, True)], "1 of 2 promises broken"),
        ([(None, False)], "1 of 1 promise not judged"),
    ],
)
def test_verdict_in_words(outcomes: list[tuple[float | None, bool]], line: str) -> None:
    promises = tuple(Promise("max-drop", 1.0, value, kept) for value, kept in outcomes)
    assert words.verdict(dataclasses.replace(minimal_report(), promises=promises)) == line


@pytest.mark.parametrize(
    ("bytes_", "text"),
    [(999, "999 B"), (1000, "1.00 kB"), (5_012_480, "5.01 MB"), (2_100_000_000, "2.10 GB")],
)
def test_sizes_are_decimal(bytes_: int, text: str) -> None:
    assert words.size(bytes_) == text


def test_capped_sqnr_reads_as_words() -> None:
    assert [words.decibels(v) for v in (200.0, -200.0, math.nan)] == [
        "identical",
        "no signal",
        "not measured",
    ]


def test_a_slower_bundle_is_called_slower() -> None:
    report = dataclasses.replace(full_report(), speedup=0.8)
    assert words.speed_change(report) == "1.25x slower"
    assert "1.25x slower" in _printed(report)


def test_table_keeps_brackets_and_aligns_numbers_right() -> None:
    lines = _drawn(
        table(("name", "n"), [("[bold]a", "1"), ("b", "100")], right=("n",))
    ).splitlines()
    assert lines[1].startswith("[bold]a")
    assert lines[1].index("1") == lines[2].index("100") + 2


def _bench(*, is_target: bool) -> Bench:
    timings = (
        Timing("ocr.edgec", 6.7, 6.5, 7.1, 40),
        Timing("reference.onnx", 14.8, 14.1, 15.9, 40),
        Timing("old.edgec", 5.4, 5.1, 5.9, 40),
    )
    promise = Promise("min_speedup", 1.7, 2.209, True, "1 thread(s)")
    machine = Measurement("Intel Xeon", "x86_64", 1, 40, is_target)
    return Bench(timings, machine, (promise,), "the golden sample of the bundle")


def test_bench_says_how_the_bundle_compares_with_each_other_model() -> None:
    lines = _drawn(bench_table(_bench(is_target=True))).splitlines()
    assert "6.70 ms" in lines[1] and "bundle" not in lines[1]
    assert "bundle is 2.21x faster" in lines[2]
    assert "bundle is 1.24x slower" in lines[3]


def test_bench_on_another_kind_of_machine_is_called_a_hint() -> None:
    for is_target in (True, False):
        console = Console(file=io.StringIO(), width=80)
        print_bench(_bench(is_target=is_target), console)
        text = console.file.getvalue()
        assert "kept" in text and "median of 40 runs" in text
        assert ("hint" in text) is not is_target


def test_targets_table_names_every_target() -> None:
    text = _drawn(targets_table([load_target(name) for name in target_names()]))
    assert all(any(s.startswith(f"{n} ") for s in text.splitlines()) for n in target_names())


def test_target_table_explains_every_capability() -> None:
    lines = _drawn(target_table(load_target("arm64")), width=140).splitlines()
    rows = {line.split()[0]: line for line in lines[1:] if not line.startswith(" ")}
    assert {"name", "opset", "int8.per_channel", "session.threads"} <= set(rows)
    assert "intra-op threads" in rows["session.threads"]  # comment beside the field
    assert "CPU feature ->" in rows["session.without"]  # comment on the line above
    assert all(line.rstrip()[-1:] for line in rows.values())


def test_passes_tables_show_stage_effect_and_parameters() -> None:
    described = {
        "name": "prune-half",
        "stage": "prune",
        "lossless": False,
        "summary": "Set half of the weights to zero.",
        "description": "Set half of the weights to zero.\n\nsparsity: share of zeros [0..1].",
        "parameters": [{"name": "sparsity", "type": "float", "default": 0.5}],
    }
    (line,) = (s for s in _drawn(passes_table([described])).splitlines() if "prune-half" in s)
    assert line.split()[:3] == ["prune-half", "prune", "lossy"]
    text = _drawn(pass_table(described))
    assert "prune-half (prune, lossy)" in text and "share of zeros [0..1]." in text
    assert any(s.split() == ["sparsity", "float", "0.5"] for s in text.splitlines())


def test_facts_show_units_nesting_and_lists() -> None:
    facts = {
        "name": "[bold]ocr",
        "size_bytes": 5_012_480,
        "sqnr_db": None,
        "labels": None,
        "golden": True,
        "target": {"name": "arm64", "os": ["linux", "macos"]},
        "inputs": [{"name": "image", "dtype": "uint8", "shape": [1, 224, 224, 3]}],
        "entries": [{"name": "graph.onnx", "size_bytes": 4096, "sha256": "a" * 64}],
        "outputs": [{"logits": {"top": [{"label": "cat", "score": 0.5312}]}}],
    }
    console = Console(file=io.StringIO(), width=80)
    print_facts(facts, console)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["name", "[bold]ocr"] in lines
    assert ["size_bytes", "5.01", "MB"] in lines
    assert ["sqnr_db", "not", "measured"] in lines and ["labels", "none"] in lines
    assert ["golden", "yes"] in lines and ["os", "linux,", "macos"] in lines
    assert ["image", "uint8", "1x224x224x3"] in lines
    assert ["graph.onnx", "4.10", "kB", "aaaa...aaaaaaaaa"] in lines
    assert ["cat", "0.5312"] in lines
