"""``edgec devices``: environments appear complete or not at all, and are made anew if altered."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
from dataclasses import replace

import pytest
from click.testing import CliRunner

from edgec.cli import main
from edgec.devices import fetch_packages
from edgec.devices import install as installing
from edgec.devices.fetch_packages import fetch_wheels
from edgec.devices.install import install, installed_folder, missing
from edgec.errors import DeviceError, TargetError
from edgec.targets import (
    Environment,
    File,
    Modules,
    Wheels,
    load_environment,
    load_profile,
    profile_names,
)

PROFILE = load_profile("cortex-a72")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Environment:
    """An environment of one text file, in a cache of its own."""
    made = Environment("linux-arm64", "one file", 1, files=(File("root/note", "made"),))
    monkeypatch.setenv("EDGEC_DEVICES", str(tmp_path / "cache"))
    monkeypatch.setattr(installing, "load_environment", lambda name: made)
    return made


def test_what_is_missing_is_installed_once(environment: Environment) -> None:
    assert "edgec devices install cortex-a72" in str(missing(PROFILE))
    folder = install("cortex-a72")
    assert missing(PROFILE) is None
    assert (folder / "root/note").read_text() == "made"
    before = (folder / "installed.json").stat().st_mtime_ns
    assert install("cortex-a72") == installed_folder(PROFILE)
    assert (folder / "installed.json").stat().st_mtime_ns == before
    assert [p.name for p in folder.parent.iterdir()] == ["linux-arm64"]  # no downloads, no partial


def test_an_altered_file_is_noticed_and_made_anew(environment: Environment) -> None:
    folder = install("cortex-a72")
    (folder / "root/note").write_text("altered")
    install("cortex-a72")
    assert (folder / "root/note").read_text() == "made"


def test_another_edition_of_an_environment_has_to_be_installed_again(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("cortex-a72")
    newer = Environment("linux-arm64", "another file", 1, files=(File("root/note", "newer"),))
    monkeypatch.setattr(installing, "load_environment", lambda name: newer)
    assert "by another edgec" in str(missing(PROFILE))


def test_wheels_for_this_python_are_installed_again_after_an_upgrade(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    own = replace(environment, wheels=(Wheels("site", ("numpy==2.3.5",)),))
    monkeypatch.setattr(installing, "load_environment", lambda name: own)
    monkeypatch.setattr(installing, "fetch_wheels", lambda wanted, folder: fetched.append(wanted))
    monkeypatch.setattr(
        installing, "unpack_wheels", lambda wheels, folder: folder.mkdir(parents=True)
    )
    folder = install("cortex-a72")
    assert install("cortex-a72") == folder
    assert missing(PROFILE) is None and len(fetched) == 1
    monkeypatch.setattr(installing, "own_python", lambda: "3.99")
    assert "for another Python; run: edgec devices install cortex-a72" in str(missing(PROFILE))
    assert install("cortex-a72") == folder
    assert missing(PROFILE) is None and len(fetched) == 2


@pytest.mark.parametrize(
    ("name", "depends"),
    [
        ("coreml", True),
        ("openvino", True),
        ("qnn", True),
        ("linux-arm64", False),
        ("linux-armhf", False),
        ("qemu-x86-64", False),
        ("web", False),
        ("windows-x64", False),
    ],
)
def test_only_wheels_for_this_python_depend_on_its_version(
    monkeypatch: pytest.MonkeyPatch, name: str, depends: bool
) -> None:
    environment = load_environment(name)
    before = installing._digest_of(environment)
    monkeypatch.setattr(installing, "own_python", lambda: "3.99")
    assert (installing._digest_of(environment) != before) == depends


def test_wheels_that_were_fetched_for_another_python_are_not_unpacked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    def bring(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        folder = pathlib.Path(command[command.index("-d") + 1])
        (folder / f"numpy-{fetch_packages.own_python()}.whl").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", bring)
    wanted = Wheels("site", ("numpy",))
    monkeypatch.setattr(fetch_packages, "own_python", lambda: "3.11")
    assert [file.name for file in fetch_wheels(wanted, tmp_path)] == ["numpy-3.11.whl"]
    monkeypatch.setattr(fetch_packages, "own_python", lambda: "3.12")
    assert [file.name for file in fetch_wheels(wanted, tmp_path)] == ["numpy-3.12.whl"]


def test_an_installation_that_fails_leaves_the_old_one(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install("cortex-a72")
    (folder / "root/note").write_text("altered")

    def no_space(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(installing, "tree_digest", no_space)
    with pytest.raises((DeviceError, OSError), match="No space left"):
        install("cortex-a72")
    assert (folder / "root/note").read_text() == "altered"
    assert [p.name for p in folder.parent.iterdir() if "partial" in p.name] == []


def test_a_package_that_cannot_be_fetched_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    def refuse(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 100, "", "E: Unable to locate package x\n")

    monkeypatch.setenv("EDGEC_DEVICES", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(DeviceError, match=r"cortex-a72: .* Unable to locate package x"):
        install("cortex-a72")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "npm error code ENOSPC\nnpm error syscall write\nnpm error errno -28\n"
            "npm error nospc ENOSPC: no space left on device, write\n"
            "npm error A complete log of this run can be found in: /x\n",
            "web@1, core@2 cannot be fetched: ENOSPC: no space left on device, write; npm has to",
        ),
        (
            "npm ERR! code ETARGET\nnpm ERR! notarget No matching version found for web@1.\n",
            "cannot be fetched: No matching version found for web@1.; npm has to reach",
        ),
        ("", "cannot be fetched: no reason was given; npm has to reach"),
    ],
)
def test_why_npm_failed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, said: str, reason: str
) -> None:
    def refuse(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setattr(fetch_packages.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(DeviceError) as caught:
        fetch_packages.fetch_modules(Modules("modules", ("web@1", "core@2")), tmp_path)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(shutil.which("npm") is None, reason="there is no npm")
def test_npm_itself_says_why_it_failed(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DeviceError, match=r"no-such-folder cannot be fetched: .*(?i:no such file)"):
        fetch_packages.fetch_modules(Modules("modules", ("file:no-such-folder",)), tmp_path)


def test_an_unknown_device_is_named_with_what_was_meant() -> None:
    result = CliRunner().invoke(main, ["devices", "install", "cortex-a73"])
    assert result.exit_code == 1 and "did you mean 'cortex-a7" in result.output
    with pytest.raises(TargetError, match="unknown environment"):
        load_environment("nowhere")


def test_every_profile_names_an_environment_that_exists() -> None:
    for name in profile_names():
        profile = load_profile(name)
        assert profile.name == name
        if profile.environment:
            assert load_environment(profile.environment).name == profile.environment


def test_devices_are_listed_with_what_they_lack(environment: Environment) -> None:
    listed = json.loads(CliRunner().invoke(main, ["devices", "--json"]).stdout)
    state = {entry["name"]: entry["missing"] for entry in listed}
    assert "edgec devices install" in state["cortex-a72"]
    assert "cortex-a72" in CliRunner().invoke(main, ["devices"]).stdout


def test_a_profile_for_another_instruction_set_of_this_machine_cannot_be_used(
    environment: Environment,
) -> None:
    install("cortex-a72")
    elsewhere = replace(PROFILE, host="riscv64")
    assert "it needs a machine with riscv64" in str(missing(elsewhere))


def test_a_program_that_edgec_does_not_fetch_is_told_by_install(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = replace(PROFILE, programs=("no-such-program",))
    monkeypatch.setattr(installing, "load_profile", lambda name: without)
    monkeypatch.setattr("edgec.targets.load_profile", lambda name: without)
    told = CliRunner().invoke(main, ["devices", "install", "cortex-a72"])
    assert told.exit_code == 1 and "there is no no-such-program" in told.stderr
    assert "is installed" not in told.stdout
