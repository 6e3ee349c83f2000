"""What machine latencies are taken on, and whether it is of a target's kind."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import platform
from collections.abc import Iterable
from typing import Protocol

from edgec_runtime.machine import Machine, this_machine


class DeviceClass(Protocol):
    """What a target file and a bundle's manifest both state about a device."""

    @property
    def arch(self) -> str:
        """Instruction set."""
        ...

    @property
    def os(self) -> tuple[str, ...]:
        """Operating systems."""
        ...

    @property
    def features(self) -> tuple[str, ...]:
        """CPU features that kernels were chosen for."""
        ...


def cpu_name() -> str:
    """The CPU's name as the system tells it."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Model", "Hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def is_kind_of(machine: Machine, target: DeviceClass) -> bool:
    """True if latencies taken on the machine are those of the target: arch, OS, features."""
    same = machine.arch == target.arch and machine.os in target.os
    return same and set(target.features) <= machine.features


def absent_providers(wanted: Iterable[str]) -> tuple[str, ...]:
    """The execution providers among ``wanted`` that the installed onnxruntime lacks."""
    if importlib.util.find_spec("onnxruntime") is None:
        return tuple(wanted)
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    available = onnxruntime.get_available_providers()
    return tuple(name for name in wanted if name not in available)


__all__ = ["Machine", "absent_providers", "cpu_name", "is_kind_of", "this_machine"]
