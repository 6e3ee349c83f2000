"""Compiles the hosts in C for the tests."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
from collections.abc import Sequence

import onnxruntime
import pytest

from edgec.devices.install import installed_folder
from edgec.devices.wine import HOSTS, INCLUDE, SOURCES
from edgec.targets import load_profile

STRICT = ("-std=c11", "-O1", "-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror")
SANITIZED = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
READER = tuple(str(HOSTS / f"edgec_{name}.c") for name in ("bundle", "json", "sha256"))


def compile_program(command: Sequence[str], goal: pathlib.Path) -> pathlib.Path:
    """Skips the test where there is no such compiler."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]} on this machine")
    done = subprocess.run([*command, "-o", str(goal)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return goal


def include_folder() -> pathlib.Path:
    """Where onnxruntime_c_api.h is; skips the test where it is nowhere."""
    installed = installed_folder(load_profile("windows-x64")) / INCLUDE
    for folder in (installed, pathlib.Path("/usr/include/onnxruntime")):
        if (folder / "onnxruntime_c_api.h").is_file():
            return folder
    pytest.skip("there is no onnxruntime_c_api.h: edgec devices install windows-x64 brings it")


def library_options(folder: pathlib.Path) -> list[str]:
    """Options that link a program with the library of the installed Python package."""
    capi = pathlib.Path(onnxruntime.__file__).parent / "capi"
    found = sorted(capi.glob("libonnxruntime.so.*"))
    if not found:
        pytest.skip("this onnxruntime package has no libonnxruntime.so")
    link = folder / "libonnxruntime.so.1"  # the name that the library gives itself
    if not link.exists():
        link.symlink_to(found[0])
    return [f"-L{folder}", "-l:libonnxruntime.so.1", f"-Wl,-rpath,{folder}"]


def run_bundle(folder: pathlib.Path) -> pathlib.Path:
    """The program that runs jobs, under the sanitizers; compiled once per folder."""
    goal = folder / "run_bundle"
    command = ["cc", *STRICT, *SANITIZED, "-isystem", str(include_folder())]
    command += [str(HOSTS / name) for name in SOURCES]
    if goal.exists():
        return goal
    return compile_program([*command, *library_options(folder)], goal)
