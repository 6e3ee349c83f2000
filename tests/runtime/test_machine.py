"""This machine in the words of a target."""

from __future__ import annotations

import ctypes
import pathlib
import platform
import sys

import pytest

from edgec_runtime import machine


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("AMD64", "x86_64"), ("x86_64", "x86_64"), ("aarch64", "arm64"), ("ARM64", "arm64"),
        ("arm64", "arm64"), ("armv7l", "armhf"), ("riscv64", "riscv64"), ("s390x", "s390x"),
    ],
)  # fmt: skip
def test_one_name_per_instruction_set(name: str, arch: str) -> None:
    assert machine.normal_arch(name) == arch


@pytest.mark.parametrize(
    ("name", "system"),
    [
        ("linux", "linux"), ("win32", "windows"), ("darwin", "macos"), ("android", "android"),
        ("ios", "ios"), ("emscripten", "browser"), ("freebsd14", "freebsd14"),
    ],
)  # fmt: skip
def test_operating_systems(monkeypatch: pytest.MonkeyPatch, name: str, system: str) -> None:
    monkeypatch.setattr(sys, "platform", name)
    assert machine.current_os() == system


def test_android_that_calls_itself_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "getandroidapilevel", lambda: 30, raising=False)
    assert machine.current_os() == "android"


def test_a_32_bit_process_on_a_64_bit_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert machine.this_machine().arch == "armhf"


def _cpuinfo(monkeypatch: pytest.MonkeyPatch, text: str | None) -> set[str]:
    def read_text(*args: object, **options: object) -> str:
        if text is None:
            raise PermissionError
        return text

    monkeypatch.setattr(pathlib.Path, "read_text", read_text)
    return set(machine._features("x86_64", "linux"))


def test_x86_features_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "model name: x\nflags\t\t: fpu avx2 fma avx512f avx512_vnni\n"
    assert _cpuinfo(monkeypatch, text) == {"avx2", "fma", "avx512", "vnni"}
    assert _cpuinfo(monkeypatch, "flags : avx2 avx_vnni") == {"avx2", "vnni"}
    assert _cpuinfo(monkeypatch, "processor : 0\n") == set()
    assert _cpuinfo(monkeypatch, None) == set()


def _auxiliary_vector(monkeypatch: pytest.MonkeyPatch, *entries: int) -> None:
    class Getauxval:
        argtypes: object = None
        restype: object = None

        def __call__(self, entry: int) -> int:
            return dict(zip((16, 26), entries, strict=True))[entry]

    library = type("Library", (), {"getauxval": Getauxval()})
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)


def test_arm_features_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    _auxiliary_vector(monkeypatch, 1 << 1 | 1 << 20, 1 << 13)
    assert machine._features("arm64", "linux") == {"neon", "dotprod", "i8mm"}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert machine._features("arm64", "android") == set()


def test_the_same_bits_mean_something_else_on_another_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _auxiliary_vector(monkeypatch, 0x1FB0D7, 0x1F)  # a Cortex-A7
    assert machine._features("armhf", "linux") == {"neon"}
    _auxiliary_vector(monkeypatch, 0x112D, 0)  # RV64GC
    assert machine._features("riscv64", "linux") == set()
    _auxiliary_vector(monkeypatch, 0x20112D, 0)
    assert machine._features("riscv64", "linux") == {"rvv"}
    assert machine._features("s390x", "linux") == set()


def test_other_systems_know_nothing() -> None:
    assert machine._features("wasm32", "browser") == set()


def test_this_machine_is_described() -> None:
    here = machine.this_machine()
    assert here.arch == machine.normal_arch(platform.machine())
    assert here.os == machine.current_os()
