"""Devices that run Python on this machine: as it is, under an emulator, or another Python."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from edgec.devices import guest_answer
from edgec.devices.counter import Counter, counts_between_marks
from edgec.devices.job import (
    GUEST,
    RUNTIME,
    Device,
    Job,
    Outcome,
    last_line,
    read_outcome,
    write_guest,
    write_job,
)
from edgec.errors import DeviceError
from edgec.machine import this_machine
from edgec.targets import Profile

# OpenBLAS's choice for this CPU may need instructions that the other one lacks
_DROPPED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "LD_PRELOAD", "PYTHONHOME", "PYTHONPATH")
_TIMEOUT_S = 3600.0


class LocalPython(Device):
    """Runs ``command guest.py FOLDER`` for every job, in a folder that is removed afterwards.

    command: the Python interpreter with what goes before it. path: folders for PYTHONPATH.
    counter: how jobs that count are counted; its options follow the command's first word.
    held: closed when the device is left.
    """

    def __init__(
        self,
        profile: Profile,
        command: Sequence[str],
        *,
        path: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        counter: Counter | None = None,
        held: contextlib.ExitStack | None = None,
    ) -> None:
        """Nothing is started yet."""
        self.profile = profile
        self._command = tuple(command)
        self._path = tuple(path)
        self._environment = dict(environment or {})
        self._counter = counter or Counter(reason=f"device {profile.name} counts no instructions")
        self._held = held or contextlib.ExitStack()

    def run(self, job: Job) -> Outcome:
        """Run a job. Raises DeviceError if the process fails."""
        with tempfile.TemporaryDirectory(prefix="edgec-") as name:
            folder = pathlib.Path(name)
            write_job(job, folder)
            write_guest(folder)
            first, *others = self._command
            options = self._counter.options if job.count else ()
            command = [first, *options, *others, str(folder / GUEST), str(folder)]
            log = execute(command, self._variables(folder), self.profile.name)
            outcome = read_outcome(job, folder, self.profile, log)
        if not job.count:
            return outcome
        if self._counter.reason:
            return replace(outcome, uncounted=self._counter.reason)
        return replace(outcome, counts=counts_between_marks(log))

    def follow(self, bundle: pathlib.Path, files: Mapping[str, str]) -> Iterator[str]:
        """The lines that ``guest_answer`` prints there, as they come.

        files: name -> text, laid beside the bundle. Whoever stops reading ends the process.
        Raises DeviceError if it cannot be started or fails.
        """
        with tempfile.TemporaryDirectory(prefix="edgec-") as name:
            folder = pathlib.Path(name)
            shutil.copyfile(bundle, folder / bundle.name)
            write_guest(folder, guest_answer)
            for file, text in files.items():
                (folder / file).write_text(text, encoding="utf-8")
            command = [*self._command, str(folder / GUEST), str(folder)]
            yield from _lines(command, self._variables(folder), self.profile.name)

    def close(self) -> None:
        """Remove what was made for the device."""
        self._held.close()

    def _variables(self, folder: pathlib.Path) -> dict[str, str]:
        """The environment of a guest whose files are in the folder."""
        search = os.pathsep.join([str(folder / RUNTIME), *self._path])
        return {**clean_environment(), "PYTHONPATH": search, **self._environment}


def open_native() -> LocalPython:
    """This machine, in a process of its own."""
    machine = this_machine()
    profile = Profile(
        name="native",
        description="this machine, in a process of its own",
        arch=machine.arch,  # type: ignore[arg-type]
        os=(machine.os,),
        features=tuple(sorted(machine.features)),
        runner="native",
    )
    return LocalPython(profile, [sys.executable])


def clean_environment() -> dict[str, str]:
    """This environment for a program of another CPU, silent and with one OpenMP thread."""
    kept = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    return {**kept, "ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}


def execute(
    command: Sequence[str],
    environment: Mapping[str, str],
    device: str,
    timeout_s: float = _TIMEOUT_S,
) -> str:
    """Run a program to its end; what it printed on standard error.

    The exit code is not judged: a guest says in its outcome what went wrong.
    Raises DeviceError if the program cannot be started, takes too long or is killed.
    """
    try:
        done = subprocess.run(
            list(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
        )
    except OSError as error:
        raise DeviceError(
            f"device {device}: {command[0]} cannot be started: {error.strerror or error}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"device {device}: no answer within {timeout_s:.0f} s") from error
    log = done.stderr.decode("utf-8", "replace")
    if done.returncode < 0:
        raise _died(device, command[0], done.returncode, log)
    return log


def _lines(command: Sequence[str], environment: Mapping[str, str], device: str) -> Iterator[str]:
    """What a program prints, line by line; it is killed if nobody reads on."""
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                list(command),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            raise DeviceError(
                f"device {device}: {command[0]} cannot be started: {error.strerror or error}"
            ) from error
        assert process.stdout is not None
        with process:
            try:
                yield from process.stdout
                code = process.wait()
            finally:
                process.kill()
        errors.seek(0)
        log = errors.read().decode("utf-8", "replace")
    if code < 0:
        raise _died(device, command[0], code, log)
    if code:
        raise DeviceError(f"device {device}: the run ended: {last_line(log)}")


def _died(device: str, program: str, code: int, log: str) -> DeviceError:
    name = signal.Signals(-code).name
    return DeviceError(
        f"device {device}: {pathlib.Path(program).name} died of {name}: {last_line(log)}"
    )
