"""Fetches Python wheels of another platform, and modules of npm, into a folder.

Through the user's own pip and npm as configured; both check what they fetch against the
hashes of their index. Install scripts do not run.
"""

from __future__ import annotations

import compileall
import pathlib
import py_compile
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence

from edgec.errors import DeviceError
from edgec.targets import Modules, Wheels

_PIP = "pip has to reach its index (`pip config list` shows which), or try again later"
_NPM = "npm has to reach its registry (`npm config list` shows which), or try again later"
_NPM_ERROR = re.compile(r"npm (?:error|ERR!) (?P<kind>\S+) (?P<words>.+)")
_NPM_CODES = ("code", "syscall", "errno", "path", "dest")  # said before the words


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
    _run([*command, *wanted.requirements], f"wheels {', '.join(wanted.requirements)}", _PIP)
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
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    command += ["--prefix", str(folder), *wanted.packages]
    _run(command, f"modules {', '.join(wanted.packages)}", _NPM)


def _run(command: Sequence[str], what: str, advice: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise DeviceError(f"{what} cannot be fetched: {_cause(done.stderr)}; {advice}")


def _cause(text: str) -> str:
    """npm's first error in words (``npm error KIND words``), else the last line of ``text``."""
    lines = [line.strip() for line in text.strip().splitlines()]
    for line in lines:
        found = _NPM_ERROR.match(line)
        if found and found["kind"] not in _NPM_CODES:
            return found["words"]
    return lines[-1] if lines else "no reason was given"
