"""Emulated Linux CPUs: small bundles for a fitting target compute there what they compute here."""

from __future__ import annotations

import pathlib

import graphs
import numpy as np
import onnx_ir as ir
import pytest

import edgec
from edgec.devices.check import Samples, check_fits, verify_on
from edgec.devices.connect import open_device
from edgec.devices.install import missing
from edgec.devices.job import Job
from edgec.errors import TargetMismatchError
from edgec.targets import load_profile, load_target, profile_names
from edgec_runtime.bundle import read_bundle

MADE = {"cnn": graphs.cnn, "transformer": graphs.transformer, "lstm": graphs.lstm}
DEVICES = {  # device -> a target whose bundles are for it
    "armhf-cortex-a7": "armhf",
    "riscv64": "riscv64",
    "nehalem": "x86-64-sse",
    "sandybridge": "x86-64-sse",
    "haswell": "x86-64-avx2",
    "cortex-a72": "arm64",
    "cortex-a76": "arm64-dotprod",
    "arm64-i8mm": "arm64-dotprod",
    "arm64-sme": "arm64-dotprod",
}


def require(device: str) -> None:
    reason = missing(load_profile(device))
    if reason is not None:
        pytest.skip(f"{device}: {reason}")


def feeds(kind: str, count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Inputs like those of the model, at random."""
    rng = np.random.default_rng(seed)
    _, given = MADE[kind]()
    return [
        {name: rng.standard_normal(x.shape).astype(x.dtype) for name, x in given.items()}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("built")


def build(kind: str, target: str, folder: pathlib.Path) -> pathlib.Path:
    """The bundle that the target's own recipe makes; built once."""
    source, bundle = folder / f"{kind}.onnx", folder / f"{kind}.{target}.edgec"
    if not bundle.exists():
        ir.save(MADE[kind]()[0], source)
        edgec.build(
            source,
            target=target,
            output=bundle,
            calibration=lambda: feeds(kind, 8, seed=1),
            evaluation=lambda: feeds(kind, 4),
            verify=False,
        )
    return bundle


def test_every_emulated_linux_is_listed() -> None:
    emulated = {n for n in profile_names() if load_profile(n).runner == "qemu"}
    assert emulated == set(DEVICES)
    for device, target in DEVICES.items():
        assert set(load_target(target).features) <= set(load_profile(device).features)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("device", DEVICES)
def test_a_bundle_for_its_target_passes(device: str, kind: str, folder: pathlib.Path) -> None:
    require(device)
    bundle = build(kind, DEVICES[device], folder)
    [verdict] = verify_on(bundle, [device], Samples(tuple(feeds(kind, 3)), 4))
    assert verdict.status == "passed", verdict.reason
    assert verdict.judgement is not None and verdict.outcome is not None
    assert verdict.judgement.sqnr_db > 15  # int8 of random weights; saturated sums give 10


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_device_tells_what_its_profile_says(device: str, folder: pathlib.Path) -> None:
    require(device)
    profile = load_profile(device)
    with open_device(device) as opened:
        outcome = opened.run(Job(build("cnn", DEVICES[device], folder), feeds("cnn", 1)))
    assert outcome.arch == profile.arch
    assert outcome.os in profile.os
    assert set(profile.features) <= set(outcome.features)


def test_a_bundle_for_newer_cpus_does_not_fit_an_older_one(folder: pathlib.Path) -> None:
    bundle = read_bundle(build("cnn", "x86-64-avx2", folder))
    with pytest.raises(TargetMismatchError, match="sandybridge lacks avx2, fma"):
        check_fits(bundle, load_profile("sandybridge"))
    with pytest.raises(TargetMismatchError, match="device riscv64 is riscv64 on linux"):
        check_fits(bundle, load_profile("riscv64"))
