"""Android devices over adb: by a program that answers as adb does, for a folder each."""

from __future__ import annotations

import json
import os
import pathlib
import sys
import tempfile

import pytest
from devices import bundles

from edgec.devices.check import Samples, verify_on
from edgec.devices.connect import open_device
from edgec.devices.job import Job
from edgec.errors import DeviceError, DeviceMissingError
from edgec.machine import this_machine

ADB = """#!{python}
import json, os, pathlib, subprocess, sys
folder, given = pathlib.Path(__file__).parent, sys.argv[1:]
devices = json.loads((folder / "devices.json").read_text())
def fail(text):
    print("* daemon started successfully", text, sep="\\n", file=sys.stderr)
    sys.exit(1)
wanted = os.environ.get("ANDROID_SERIAL")
if given[0] == "-s":
    wanted, given = given[1], given[2:]
if given[:2] != ["shell", "-T"]:
    fail("adb: unknown command " + " ".join(given))
if not devices:
    fail("adb: no devices/emulators found")
if wanted is None and len(devices) > 1:
    fail("adb: more than one device/emulator")
serial = wanted or next(iter(devices))
state = devices.get(serial)
if state is None:
    fail(f"adb: device '{serial}' not found")
if state == "unauthorized":
    fail("error: device unauthorized.\\nThis adb server's $ADB_VENDOR_KEYS is not set")
if state != "device":
    fail(f"error: {state}")
home = folder / "phones" / serial
environment = {**os.environ, "TMPDIR": str(home)}
sys.exit(subprocess.run(["sh", "-c", " ".join(given[2:])], cwd=home, env=environment).returncode)
"""
PYTHON = sys.executable


@pytest.fixture
def phones(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The folder of the phones' files; adb on PATH, with one phone."""
    (tmp_path / "adb").write_text(ADB.replace("{python}", PYTHON))
    (tmp_path / "adb").chmod(0o755)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "here"))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    connect(tmp_path / "phones", {"PIXEL": "device"})
    return tmp_path / "phones"


def connect(phones: pathlib.Path, states: dict[str, str]) -> None:
    for serial in states:
        (phones / serial).mkdir(parents=True, exist_ok=True)
    (phones.parent / "devices.json").write_text(json.dumps(states))


def nothing_is_left(phones: pathlib.Path) -> None:
    assert [path for phone in phones.iterdir() for path in phone.iterdir()] == []
    assert list((phones.parent / "here").iterdir()) == []


def test_a_bundle_passes_on_a_phone(phones: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "built").mkdir()
    name = "arm64" if this_machine().arch == "arm64" else "x86-64"
    bundle = bundles.build(name, tmp_path / "built")
    given = Samples(tuple(bundles.samples()), 3)
    [verdict] = verify_on(bundle, [f"adb:PIXEL{PYTHON}"], given)
    assert verdict.status == "passed", verdict.reason
    assert verdict.judgement == verdict.here  # the same CPU
    nothing_is_left(phones)
    with open_device(f"adb:{PYTHON}") as device:
        assert len(device.run(Job(bundle, bundles.samples(1), repeats=3)).latency_ms) == 3
        damaged = tmp_path / "damaged.edgec"
        damaged.write_bytes(bundle.read_bytes()[:-100])
        with pytest.raises(DeviceError, match="adb:.*model.edgec"):
            device.run(Job(damaged, bundles.samples(1)))
    nothing_is_left(phones)


@pytest.mark.parametrize(
    ("states", "address", "message"),
    [
        ({}, "adb:", "adb: no devices/emulators found; connect one and allow USB debugging"),
        ({"A": "device", "B": "device"}, "adb:", "more than one .*; name one of those"),
        ({"A": "device"}, "adb:B", "device 'B' not found; `adb devices` lists"),
        ({"A": "device offline"}, "adb:", "error: device offline; connect it again"),
        ({"A": "unauthorized"}, "adb:A", "unauthorized.; allow debugging by this computer"),
        ({"A": "device only supports allocating a pty"}, "adb:", "Android 7 or later"),
        ({"A": "closed"}, "adb:", "error: closed; `adb shell true` has to work"),
        ({"A": "device"}, "adb:/opt/none/python3", r"there is no Python: .*(not found|No such)"),
        ({"A": "device"}, "adb:-A", r"expected adb:\[SERIAL\]\[/path/to/python\]"),
    ],
)
def test_a_phone_that_cannot_be_used_is_told(
    phones: pathlib.Path, states: dict[str, str], address: str, message: str
) -> None:
    connect(phones, states)
    with pytest.raises(DeviceError, match=message):
        open_device(address)
    nothing_is_left(phones)


def test_one_of_several_phones_is_chosen_as_adb_does(
    phones: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(phones, {"A": "device offline", "192.168.1.5:5555": "device"})
    monkeypatch.setenv("ANDROID_SERIAL", "192.168.1.5:5555")
    with open_device(f"adb:{PYTHON}"):
        assert list((phones / "192.168.1.5:5555").iterdir()) != []
    monkeypatch.delenv("ANDROID_SERIAL")
    with open_device(f"adb:192.168.1.5:5555{PYTHON}") as device:
        assert device.profile.arch == this_machine().arch
    nothing_is_left(phones)


def test_a_machine_without_adb_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DeviceMissingError, match="there is no adb on this machine"):
        open_device("adb:")
