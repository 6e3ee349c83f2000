"""Says what this machine and its packages can do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass
from typing import Any

from edgec.devices.install import missing
from edgec.machine import absent_providers, cpu_name, is_kind_of, this_machine
from edgec.targets import load_profile, load_target, profile_names, target_names

_PACKAGES = (
    *("edgec", "edgec-runtime", "numpy", "onnx", "onnxruntime", "onnx_ir", "onnxscript"),
    *("optimum", "optimum-onnx", "torch", "transformers", "click", "rich", "matplotlib"),
)


@dataclass(frozen=True)
class Diagnosis:
    """facts: JSON data. problems: what keeps edgec from working, each with its remedy."""

    facts: dict[str, Any]
    problems: tuple[str, ...]


def examine() -> Diagnosis:
    """Look at the machine, the packages, ONNX Runtime, the targets and the devices."""
    problems: list[str] = []
    packages = {name: _version(name) for name in _PACKAGES}
    for name, version in packages.items():
        if version is None:
            problems.append(f"package {name} is missing; pip install {name}")
    for name, wanted in _requirements():
        version = packages.get(name)
        if version is not None and not _satisfies(version, wanted):
            problems.append(f"package {name} is {version}, edgec needs {wanted}; upgrade it")
    machine = this_machine()
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": packages,
        "machine": {
            "cpu": cpu_name(),
            "arch": machine.arch,
            "os": machine.os,
            "features": sorted(machine.features),
            "cores": os.cpu_count(),
        },
        "telemetry_off": os.environ.get("ORT_DISABLE_TELEMETRY") == "1",
        "targets": {name: _how(name) for name in target_names()},
        "devices": {n: missing(load_profile(n)) or "ready" for n in profile_names()},
    }
    if packages["onnxruntime"] is not None:
        import onnxruntime

        facts["providers"] = list(onnxruntime.get_available_providers())
        if "CPUExecutionProvider" not in facts["providers"]:
            problems.append("onnxruntime has no CPU execution provider; reinstall onnxruntime")
    return Diagnosis(facts, tuple(problems))


def _how(name: str) -> str:
    """How a bundle for the target can be judged on this machine."""
    target, machine = load_target(name), this_machine()
    same = machine.arch == target.arch and machine.os in target.os
    absent = absent_providers(target.session.providers)
    if same and absent:
        return f"numerics are checked here, latency is not judged (no {', '.join(absent)})"
    if is_kind_of(machine, target):
        return "runs and is timed here"
    if same:
        missing = ", ".join(sorted(set(target.features) - machine.features))
        return f"runs here, timings are a hint (this CPU lacks {missing})"
    return "numerics are checked here, latency is not judged"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> list[tuple[str, str]]:
    """(package, version range) that edgec's metadata states."""
    try:
        lines = importlib.metadata.requires("edgec") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        match = re.match(r"([A-Za-z0-9_.-]+)\s*([<>=!~,\d.\s]+)$", line.split(";")[0].strip())
        if match and "extra" not in line:
            found.append((match[1], match[2].strip()))
    return found


def _satisfies(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)
