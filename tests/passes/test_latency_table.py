"""The table: measured once, kept for this machine and this setup of sessions only."""

import dataclasses
import json

import numpy as np
import pytest

from edgec.passes import latency_table
from edgec.passes.latency_table import LatencyTable
from edgec.passes.operator_latency import Operand, Operator
from edgec.targets import load_target

SESSION = load_target("x86-64").session


def operators(*lengths):
    float32 = np.dtype(np.float32)
    return [
        Operator("", "Neg", 21, {}, (Operand(float32, (n,), constant=False),), 1) for n in lengths
    ]


class Clock:
    """Says how long an operator takes: its length, in milliseconds; 13 cannot be measured."""

    def __init__(self):
        self.taken = []

    def __call__(self, asked, settings):
        lengths = [one.operands[0].shape[0] for one in asked]
        self.taken += lengths
        return [None if n == 13 else float(n) for n in lengths]


def table(folder, settings=SESSION):
    clock = Clock()
    return LatencyTable(settings, folder, clock), clock


def measured(folder, *lengths, settings=SESSION):
    """What another build had to measure of these."""
    known, clock = table(folder, settings)
    assert known.milliseconds(operators(*lengths)) == [None if n == 13 else n for n in lengths]
    known.save()
    assert known.measured == len(clock.taken)
    return clock.taken, known.findings


def test_what_was_measured_is_read_the_next_time(tmp_path):
    folder = tmp_path / "not" / "there"
    assert measured(folder, 3, 5, 3, 13) == ([3, 5, 13], [])
    assert measured(folder, 5, 7, 13, 3) == ([7], [])
    assert [file.suffix for file in folder.iterdir()] == [".json"]


def test_tables_of_two_builds_at_once_are_put_together(tmp_path):
    first, second = table(tmp_path)[0], table(tmp_path)[0]
    first.milliseconds(operators(3))
    second.milliseconds(operators(5))
    first.save()
    second.save()
    assert measured(tmp_path, 3, 5) == ([], [])


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert measured(None, 3) == ([3], [])
    assert measured(None, 3) == ([3], [])
    assert not list(tmp_path.iterdir())


def test_another_cpu_is_measured_anew(tmp_path, monkeypatch):
    measured(tmp_path, 3)
    monkeypatch.setattr(latency_table, "cpu_name", lambda: "Another CPU")
    assert measured(tmp_path, 3) == ([3], [])
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"threads": 2},
        {"prepacking": False},
        {"providers": ("XnnpackExecutionProvider",)},
        {"disabled_optimizers": ()},
        {"config": {"session.x64quantprecision": "1"}},
    ],
)
def test_another_setup_of_the_session_is_measured_anew(tmp_path, change):
    measured(tmp_path, 3)
    assert measured(tmp_path, 3, settings=dataclasses.replace(SESSION, **change)) == ([3], [])


def damage(text):
    """The table's file after a mishap."""
    known = json.loads(text)
    yield text[: len(text) // 2]
    yield "[]"
    yield json.dumps({**known, "latencies_ms": 7})
    yield json.dumps({**known, "latencies_ms": {"a": -1.0}})
    yield json.dumps({**known, "latencies_ms": {"a": "fast"}})
    yield json.dumps({**known, "latencies_ms": {"a": float("nan")}})
    yield json.dumps({**known, "machine": {"cpu": "copied from elsewhere"}})


@pytest.mark.parametrize("number", range(7))
def test_a_damaged_table_is_measured_anew_and_told(tmp_path, number):
    measured(tmp_path, 3)
    [file] = tmp_path.iterdir()
    file.write_text(list(damage(file.read_text()))[number])
    taken, findings = measured(tmp_path, 3)
    assert taken == [3]
    assert len(findings) == 1 and "are damaged" in findings[0]
    assert measured(tmp_path, 3) == ([], [])


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    taken, findings = measured(tmp_path / "file", 3)
    assert taken == [3]
    assert "could not be kept" in findings[0]
