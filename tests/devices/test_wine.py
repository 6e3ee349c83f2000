"""Bundles under ONNX Runtime's Windows library: equal to this machine's outputs, bit for bit."""

from __future__ import annotations

import pathlib
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from bundle_samples import write_sample
from devices import bundles

from edgec.devices import wine
from edgec.devices.check import verify_on
from edgec.devices.connect import open_device
from edgec.devices.install import installed_folder, missing
from edgec.devices.job import Job
from edgec.devices.local import open_native
from edgec.errors import DeviceError
from edgec.targets import load_profile
from edgec_runtime.manifest import Session

PROFILE = load_profile("windows-x64")


@pytest.fixture(autouse=True)
def _installed(_installed_devices: None) -> None:
    reason = missing(PROFILE)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.slow
def test_an_int8_bundle_passes_and_equals_linux_bit_for_bit(tmp_path: pathlib.Path) -> None:
    path = bundles.build("x86-64", tmp_path)
    [verdict] = verify_on(path, ["windows-x64"])
    assert verdict.status == "passed", verdict.reason
    assert verdict.outcome is not None and verdict.outcome.os == "windows"
    job = Job(path, bundles.samples(), repeats=1)
    with open_device("windows-x64") as device:
        assert device.profile.features == open_native().profile.features
        there = device.run(job)
    here = open_native().run(job)
    for mine, expected in zip(there.outputs, here.outputs, strict=True):
        np.testing.assert_array_equal(mine["y"], expected["y"], strict=True)
    assert len(there.latency_ms) == 1


def test_a_bundle_of_another_device_is_refused(tmp_path: pathlib.Path) -> None:
    [verdict] = verify_on(bundles.build("arm64", tmp_path), ["windows-x64"])
    assert verdict.status == "refused" and "device windows-x64 is x86_64" in verdict.reason


def test_a_bundle_that_the_library_refuses_is_one_clear_error(tmp_path: pathlib.Path) -> None:
    session = Session(providers=("QNNExecutionProvider",))
    path = write_sample(tmp_path / "a", session=session)
    with (
        open_device("windows-x64") as device,
        pytest.raises(DeviceError, match="windows-x64: bundle .*CPU execution provider"),
    ):
        device.run(Job(path, [{"x": np.zeros((1, 8), np.float32)}]))


@pytest.mark.slow
def test_the_program_is_compiled_once_and_nothing_is_left_behind(tmp_path: pathlib.Path) -> None:
    folder = installed_folder(PROFILE)
    path = write_sample(tmp_path / "a")
    compiled = set()
    for _ in range(2):
        with open_device("windows-x64") as device:
            device.run(Job(path, [{"x": np.zeros((1, 8), np.float32)}]))
        [built] = folder.glob("built-*")
        compiled.add((built / "run_bundle.exe").stat().st_mtime_ns)
    assert len(compiled) == 1
    assert not list(folder.glob("building-*"))


def test_a_compiler_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    def fail(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, 1, b"", b"no such header")

    (tmp_path / "e").mkdir()
    monkeypatch.setattr(wine, "_digest", lambda: "0")
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(DeviceError, match="mingw32-gcc failed: no such header"):
        wine.open_wine(replace(PROFILE, name="w"), tmp_path / "e")
    assert not list((tmp_path / "e").iterdir())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(2, "No such file or directory"), "cannot be started: No such file"),
        (subprocess.TimeoutExpired("wine", 600), "did not end within 600 s"),
    ],
)
def test_a_program_that_does_not_start_or_end_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, error: Exception, message: str
) -> None:
    def fail(command: list[str], **options: object) -> None:
        raise error

    monkeypatch.setattr(wine, "_digest", lambda: "0")
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(DeviceError, match=message):
        wine.open_wine(PROFILE, tmp_path)
    assert not list(tmp_path.iterdir())
