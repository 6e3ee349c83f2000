"""Counts the instructions that an emulated CPU executes: a plugin of qemu, made when first used.

The plugin is C (``hosts/count_ARCH.c``) and is compiled by this machine's ``cc`` into the
cache of devices, under the digest of its text. Where it cannot be made or loaded, there are
no counts, and the reason is told; the run itself needs none of it.

Left out on purpose: cycles. No pipeline and no cache is modelled, so counts compare programs
on one CPU, and CPUs only by what was recorded on a real one (``edgec.devices.cost_model``).
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgec.devices.install import cache_folder
from edgec.errors import DeviceError

HOSTS = pathlib.Path(__file__).parent / "hosts"
_START, _END = 1, 2  # the guest's labels around the call that counts
_LINE = re.compile(r"edgec-count (\d+)((?: \w+=\d+)+)")
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Counter:
    """What an emulator's command gets to count. reason: why it cannot, empty if it can."""

    options: tuple[str, ...] = ()
    reason: str = ""


def open_counter(
    arch: str, emulator: str, guest: Sequence[str], environment: Mapping[str, str]
) -> Counter:
    """The counter of an instruction set, tried on a guest program that does nothing.

    emulator: the program. guest: its other arguments and the command of the guest.
    """
    try:
        options = ("-plugin", str(_compiled(arch)))
        _run([emulator, *options, *guest], "the counter cannot be loaded", environment)
    except _CannotCount as reason:
        return Counter(reason=f"instructions are not counted: {reason}")
    return Counter(options)


def counts_between_marks(log: str) -> dict[str, int]:
    """Instructions by class between the guest's marks, from what the plugin printed.

    Raises DeviceError if a mark is missing.
    """
    marks = {
        int(label): {name: int(number) for name, _, number in (p.partition("=") for p in pairs)}
        for label, pairs in ((m[1], m[2].split()) for m in _LINE.finditer(log))
    }
    if _START not in marks or _END not in marks:
        raise DeviceError("the counter of instructions did not see the guest's marks")
    return {name: number - marks[_START][name] for name, number in marks[_END].items()}


class _CannotCount(Exception):
    """The reason why there is no counter."""


def _compiled(arch: str) -> pathlib.Path:
    """The plugin from the cache, put there if it is not. Raises _CannotCount."""
    source = HOSTS / f"count_{arch}.c"
    if not source.is_file():
        raise _CannotCount(f"there is no counter for {arch}")
    digest = hashlib.sha256(source.read_bytes() + platform.machine().encode()).hexdigest()
    plugin = cache_folder() / "counters" / f"{source.stem}-{digest[:16]}.so"
    if plugin.is_file():
        return plugin
    compiler = shutil.which("cc")
    if compiler is None:
        raise _CannotCount("the counter is in C and there is no cc; install a C compiler")
    try:
        plugin.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=plugin.parent) as folder:
            partial = pathlib.Path(folder, plugin.name)
            command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(partial), str(source)]
            _run(command, f"{compiler} cannot compile {source.name}")
            os.replace(partial, plugin)
    except OSError as error:
        reason = f"{plugin.parent} cannot be written: {error.strerror or error}"
        raise _CannotCount(reason) from error
    return plugin


def _run(command: Sequence[str], what: str, environment: Mapping[str, str] | None = None) -> None:
    """Run a program. Raises _CannotCount with ``what`` if it fails."""
    try:
        done = subprocess.run(
            list(command),
            env=None if environment is None else dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _CannotCount(f"{what}: {error}") from error
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        errors = [line for line in lines if "error" in line.lower()]
        reason = (errors or lines or [f"exit code {done.returncode}"])[0]
        raise _CannotCount(f"{what}: {reason}")
