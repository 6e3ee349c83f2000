"""Device profiles that this machine's own CPU executes have the features of that CPU."""

from __future__ import annotations

import pathlib

import pytest
from bundle_samples import write_sample

from edgec.devices.check import check_fits, fits
from edgec.errors import TargetMismatchError
from edgec.machine import Machine, this_machine
from edgec.targets import TargetError, load_profile, loader, profile_names
from edgec_runtime import manifest
from edgec_runtime.bundle import Bundle, read_bundle

ON_THIS_CPU = {"openvino", "windows-x64"}


@pytest.fixture
def without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine("x86_64", "linux", frozenset({"fma", "avx2"}))
    monkeypatch.setattr(loader, "this_machine", lambda: machine)


def for_openvino(folder: pathlib.Path, features: tuple[str, ...]) -> Bundle:
    engines = ("OpenVINOExecutionProvider", "CPUExecutionProvider")
    target = manifest.Target("board", "x86_64", ("linux",), features)
    session = manifest.Session(providers=engines)
    return read_bundle(write_sample(folder / "a", target=target, session=session))


def test_those_that_an_emulator_executes_state_their_own() -> None:
    hosted = {name for name in profile_names() if load_profile(name).cpu == "host"}
    assert hosted == ON_THIS_CPU
    assert load_profile("haswell").features == ("avx2", "fma")


@pytest.mark.parametrize("name", sorted(ON_THIS_CPU))
def test_features_are_those_of_this_machine(name: str) -> None:
    machine = this_machine()
    expected = machine.features if machine.arch == "x86_64" else frozenset()
    assert load_profile(name).features == tuple(sorted(expected))


@pytest.mark.usefixtures("without_vnni")
def test_openvino_does_not_claim_what_this_machine_lacks(tmp_path: pathlib.Path) -> None:
    assert load_profile("openvino").features == ("avx2", "fma")
    needs = for_openvino(tmp_path, ("avx2", "vnni"))
    with pytest.raises(TargetMismatchError, match="device openvino lacks vnni"):
        check_fits(needs, load_profile("openvino"))
    assert not fits(needs, "openvino")


@pytest.mark.usefixtures("without_vnni")
def test_openvino_takes_what_this_machine_can_run(tmp_path: pathlib.Path) -> None:
    assert fits(for_openvino(tmp_path, ("avx2", "fma")), "openvino")


def test_a_machine_of_another_instruction_set_lends_no_features(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine("arm64", "linux", frozenset({"neon"}))
    monkeypatch.setattr(loader, "this_machine", lambda: machine)
    assert load_profile("openvino").features == ()


def test_features_beside_this_machines_own_are_refused(tmp_path: pathlib.Path) -> None:
    folder = pathlib.Path(loader.__file__).parent / "profiles"
    text = (folder / "openvino.toml").read_text()
    assert text.count("features = []") == 1
    own = tmp_path / "own.toml"
    own.write_text(text.replace("features = []", 'features = ["vnni"]'))
    with pytest.raises(TargetError, match=r"own.toml: cpu is 'host'.* leave features empty"):
        load_profile(own)
