"""Fetches Python wheels of another platform, and modules of npm, into a folder.

Through the user's own pip and npm as configured; both check what they fetch against the
hashes of their index. Install scripts do not run.
"""

from __future__ import annotations

import compileall
import pathlib
import py_compile
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence

from edgec.errors import DeviceError
from edgec.targets import Modules, Wheels


def own_python() -> str:
    """The version of this Python that wheels are made for: "3.11"."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def fetch_wheels(wanted: Wheels, downloads: pathlib.Path) -> list[pathlib.Path]:
    """The wheels of the requirements, without what they depend on. Raises DeviceError."""
    # what an interrupted run fetched for another Python is not taken
    version = wanted.python or own_python()
    folder = downloads / f"wheels-{wanted.folder.replace('/', '-')}-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
    command += ["--no-deps", "--only-binary=:all:", "-d", str(folder)]
    if wanted.python:
        version = wanted.python.replace(".", "")
        command += ["--python-version", wanted.python, "--implementation", "cp"]
        command += ["--abi", f"cp{version}", "--abi", "abi3", "--abi", "none"]
    for platform in wanted.platforms:
        command += ["--platform", platform]
    _run([*command, *wanted.requirements], f"wheels {', '.join(wanted.requirements)}")
    return sorted(folder.glob("*.whl"))


def unpack_wheels(wheels: Sequence[pathlib.Path], folder: pathlib.Path) -> None:
    """Unpack wheels into one folder for PYTHONPATH, compiled for this Python's version."""
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    # an emulated Python takes long to compile; its own version may differ, then it does
    compileall.compile_dir(
        folder, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )


def fetch_modules(wanted: Modules, folder: pathlib.Path) -> None:
    """Install modules of npm into ``folder``/node_modules. Raises DeviceError."""
    if shutil.which("npm") is None:
        raise DeviceError("there is no npm on this machine; install Node.js")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text('{"private": true}\n', encoding="utf-8")
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
    _run([*command, "--prefix", str(folder), *wanted.packages], f"modules {wanted.packages}")


def _run(command: Sequence[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise DeviceError(f"{what} cannot be fetched: {last}")
