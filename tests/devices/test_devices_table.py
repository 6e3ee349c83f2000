"""benchmarks/devices.py: which device runs which bundle, and what an interrupted run keeps."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
INSTALLED = ["arm64-i8mm", "cortex-a72", "cortex-a76", "haswell"]
ARM = {"arm64-i8mm", "cortex-a72", "cortex-a76"}
FITS = {"arm64": ARM, "arm64-dotprod": {"arm64-i8mm", "cortex-a76"}, "x86-64": {"haswell"}}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """The benchmark as a module; a bundle is named after its target and fits what FITS says."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("devices_table", BENCHMARKS / "devices.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "devices_table", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "read_bundle", lambda path: path.name)
    monkeypatch.setattr(module, "fits", lambda target, device: device in FITS[target])
    return module


def ran(devices, target: str) -> list[str]:  # type: ignore[no-untyped-def]
    """The devices that run the bundle of a target."""
    return list(devices.of(target, pathlib.Path(target)))


def test_a_targets_own_devices_run_its_bundle_and_the_others_run_one(table) -> None:  # type: ignore[no-untyped-def]
    devices = table.Devices(INSTALLED, [], every=False)
    assert ran(devices, "arm64-dotprod") == ["arm64-i8mm", "cortex-a76"]  # nobody's, and its own
    assert ran(devices, "arm64") == ["cortex-a72"]
    assert ran(devices, "x86-64") == ["haswell"]


def test_a_device_that_ran_before_an_interruption_does_not_run_again(table) -> None:  # type: ignore[no-untyped-def]
    devices = table.Devices(INSTALLED, ["arm64-i8mm", "cortex-a76"], every=False)
    assert ran(devices, "arm64-dotprod") == ["cortex-a76"]


def test_every_bundle_runs_on_all_that_it_fits_if_asked_for(table) -> None:  # type: ignore[no-untyped-def]
    devices = table.Devices(INSTALLED, INSTALLED, every=True)
    assert set(ran(devices, "arm64")) == ARM
    assert ran(devices, "arm64-dotprod") == ["arm64-i8mm", "cortex-a76"]


def test_rows_are_kept_for_the_same_edgec_and_the_same_numbers_of_samples(
    table,  # type: ignore[no-untyped-def]
    tmp_path: pathlib.Path,
) -> None:
    row = {"kind": "ocr", "target": "web", "recipe": "", "size_mb": 1.0, "sqnr_db": 9.0}
    row |= {"cost": "-", "verdicts": [{"device": "node-wasm", "status": "passed"}]}
    file = tmp_path / "rows.jsonl"
    lines = [{"asked": {"samples": samples}, "row": row} for samples in (2, 4)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (kept,) = table.kept_rows(file, {"samples": 4})
    assert kept.target == "web" and kept.verdicts[0]["status"] == "passed"
    assert table.kept_rows(file, {"samples": 3}) == []
    assert table.kept_rows(tmp_path / "none.jsonl", {"samples": 4}) == []
