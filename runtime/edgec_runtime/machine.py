"""This machine in the words of a target: instruction set, operating system, CPU features.

Features are read from the system, never probed by executing instructions. A feature that
the system does not tell about counts as absent: the session entries for machines without a
feature are the ones that are right everywhere.
"""

from __future__ import annotations

import ctypes
import pathlib
import platform
import sys
from dataclasses import dataclass

_ARCHES = {
    "amd64": "x86_64",
    "x86_64": "x86_64",
    "x64": "x86_64",
    "aarch64": "arm64",
    "arm64": "arm64",
    "armv7l": "armhf",
    "armv8l": "armhf",
    "riscv64": "riscv64",
    "wasm32": "wasm32",
}
_NARROW = {"x86_64": "x86", "arm64": "armhf"}  # a 32-bit process on a 64-bit system
_SYSTEMS = {
    "linux": "linux",
    "win32": "windows",
    "cygwin": "windows",
    "darwin": "macos",
    "android": "android",
    "ios": "ios",
    "emscripten": "browser",
}
X86_FLAGS = {  # /proc/cpuinfo -> feature
    "avx2": "avx2",
    "fma": "fma",
    "avx512f": "avx512",
    "avx512_vnni": "vnni",
    "avx_vnni": "vnni",
}
_AT_HWCAP, _AT_HWCAP2 = 16, 26
_HWCAP_BITS = {  # (auxiliary vector entry, bit) of Linux's asm/hwcap.h -> feature
    "arm64": (
        (_AT_HWCAP, 1, "neon"),
        (_AT_HWCAP, 10, "fp16"),
        (_AT_HWCAP, 20, "dotprod"),
        (_AT_HWCAP, 22, "sve"),
        (_AT_HWCAP2, 13, "i8mm"),
        (_AT_HWCAP2, 14, "bf16"),
        (_AT_HWCAP2, 23, "sme"),
    ),
    "armhf": ((_AT_HWCAP, 12, "neon"), (_AT_HWCAP, 24, "dotprod")),
    "riscv64": ((_AT_HWCAP, ord("v") - ord("a"), "rvv"),),
}
_MAC_KEYS = {
    "hw.optional.avx2_0": "avx2",
    "hw.optional.fma": "fma",
    "hw.optional.avx512vnni": "vnni",
    "hw.optional.neon": "neon",
    "hw.optional.arm.FEAT_DotProd": "dotprod",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
}
_WINDOWS_FEATURES = {19: "neon", 40: "avx2", 43: "dotprod"}  # PF_* of winnt.h


@dataclass(frozen=True)
class Machine:
    """arch, os: as in a target file; features: the CPU features that are known to be there."""

    arch: str
    os: str
    features: frozenset[str]


def this_machine() -> Machine:
    """The machine that this process runs on."""
    arch, system = normal_arch(platform.machine()), current_os()
    if sys.maxsize < 2**32:
        arch = _NARROW.get(arch, arch)
    return Machine(arch, system, frozenset(_features(arch, system)))


def normal_arch(machine: str) -> str:
    """One name per instruction set: ``AMD64`` and ``x86_64`` are ``x86_64``."""
    return _ARCHES.get(machine.lower(), machine.lower())


def current_os() -> str:
    """The operating system; Python reports Android as Linux before version 3.13."""
    if sys.platform == "android" or hasattr(sys, "getandroidapilevel"):
        return "android"
    return _SYSTEMS.get(sys.platform, sys.platform)


def _features(arch: str, system: str) -> set[str]:
    if system in ("linux", "android"):
        return _linux_x86_features() if arch == "x86_64" else _linux_hwcap_features(arch)
    if system == "macos":
        return _mac_features()
    if system == "windows":
        return _windows_features()
    return set()


def _linux_x86_features() -> set[str]:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not readable in some sandboxes: nothing is known
        return set()
    for line in text.splitlines():
        if line.startswith("flags"):
            return {X86_FLAGS[flag] for flag in line.split() if flag in X86_FLAGS}
    return set()


def _linux_hwcap_features(arch: str) -> set[str]:
    # not /proc/cpuinfo: an emulator shows the host's there, the auxiliary vector is its own
    try:
        getauxval = ctypes.CDLL(None).getauxval
    except (OSError, AttributeError):  # a C library without it
        return set()
    getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
    bits = _HWCAP_BITS.get(arch, ())
    return {name for entry, bit, name in bits if getauxval(entry) >> bit & 1}


def _mac_features() -> set[str]:
    library = ctypes.CDLL(None)
    found = set()
    for key, name in _MAC_KEYS.items():
        value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
        status = library.sysctlbyname(
            key.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)
        )
        if status == 0 and value.value:
            found.add(name)
    return found


def _windows_features() -> set[str]:
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009 - absent on other systems
    return {
        name for code, name in _WINDOWS_FEATURES.items() if kernel.IsProcessorFeaturePresent(code)
    }
