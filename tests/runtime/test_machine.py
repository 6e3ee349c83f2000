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


def test_arm_features_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    class Getauxval:
        argtypes: object = None
        restype: object = None

        def __call__(self, entry: int) -> int:
            return {16: 1 << 1 | 1 << 20, 26: 1 << 13}[entry]

    library = type("Library", (), {"getauxval": Getauxval()})
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert machine._features("arm64", "linux") == {"neon", "dotprod", "i8mm"}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert machine._features("arm64", "android") == set()


def test_other_systems_know_nothing() -> None:
    assert machine._features("wasm32", "browser") == set()


def test_this_machine_is_described() -> None:
    here = machine.this_machine()
    assert here.arch == machine.normal_arch(platform.machine())
    assert here.os == machine.current_os()
