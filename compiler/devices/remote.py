"""Devices elsewhere that run Python: reached by a command that carries bytes both ways.

The command (``ssh HOST …``, ``adb shell …``) starts Python on the device with ``agent.py`` as
its program; files and requests go to its input and come back from its output. So one
connection serves all jobs, nothing is installed there, and nothing stays: the agent removes
its folder as soon as its input ends, whatever ended it.

Left out on purpose: passwords and keys (the user's ssh and adb know them), Windows as the
other side, and reconnecting (a run that was cut off is no measurement).
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from edgec.devices import agent, guest, probe
from edgec.devices.job import (
    GUEST,
    Device,
    Job,
    Outcome,
    last_line,
    read_outcome,
    write_guest,
    write_job,
)
from edgec.errors import DeviceError, DeviceMissingError
from edgec.targets import Profile

# no quotes but these and nothing to expand: every shell takes it as it is
BOOTSTRAP = '-c "import sys;exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))"'

_PROBE = "probe.py"
_START_S, _RUN_S = 120, 3600  # to connect and look around; for one job
_CLOSE_S = 10  # for the other side to tidy up
_GREETING = 1000  # lines that a login shell may print before the agent speaks
_CHUNK = 1 << 20  # bytes
_NOT_FOUND = (126, 127)  # exit codes of a shell that cannot start a program

Explain = Callable[[str], str]


class RemotePython(Device):
    """Runs jobs by the Python on the other side of a command.

    command: starts Python there with BOOTSTRAP. explain: what that which the command printed
    means, and what to do; for errors before Python runs.
    """

    def __init__(self, name: str, command: Sequence[str], explain: Explain) -> None:
        """Connect, and ask the device what it is.

        Raises DeviceMissingError if the command is not installed, DeviceError if the device
        cannot be reached or lacks what a bundle needs.
        """
        self._name = name
        self._connection = _Connection(name, command, explain)
        try:
            self.profile = self._probe()
        except BaseException:
            self._connection.close()
            raise

    def run(self, job: Job) -> Outcome:
        """Run a job. Raises DeviceError if the device or the connection fails."""
        with tempfile.TemporaryDirectory(prefix="edgec-") as name:
            folder = pathlib.Path(name)
            write_job(job, folder)
            log = self._connection.ask(folder, GUEST, (guest.OUTCOME, guest.OUTPUTS), _RUN_S)
            return read_outcome(job, folder, self.profile, log)

    def close(self) -> None:
        """Hang up; the other side removes its folder."""
        self._connection.close()

    def _probe(self) -> Profile:
        with tempfile.TemporaryDirectory(prefix="edgec-") as name:
            folder = pathlib.Path(name)
            write_guest(folder)
            (folder / _PROBE).write_bytes(pathlib.Path(probe.__file__).read_bytes())
            log = self._connection.ask(folder, _PROBE, (probe.OUTCOME,), _START_S)
            try:
                facts = json.loads((folder / probe.OUTCOME).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                reason = f"it does not tell what it is: {last_line(log)}"
                raise DeviceError(f"device {self._name}: {reason}") from error
        if facts["lacking"] or facts["broken"]:
            raise DeviceError(f"device {self._name}: {_repair(facts)}")
        return Profile(
            name=self._name,
            description=f"a real device, by {facts['python']}",
            arch=facts["arch"],
            os=(facts["os"],),
            features=tuple(facts["features"]),
            runner="native",
        )


class _Connection:
    """An agent on the other side of a command's pipes."""

    def __init__(self, name: str, command: Sequence[str], explain: Explain) -> None:
        self._where, self._explain = f"device {name}", explain
        self._heard, self._late = False, 0
        self._errors = tempfile.TemporaryFile()
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                command,
                stdin=pipe,
                stdout=pipe,
                stderr=self._errors,
                start_new_session=True,  # Ctrl-C is for us: we hang up and see it tidy up
            )
        except OSError as error:
            self._errors.close()
            raise DeviceMissingError(
                f"{self._where}: there is no {command[0]} on this machine; install it"
            ) from error
        program = pathlib.Path(agent.__file__).read_bytes()
        self._greeting = b"%d\n%b" % (len(program), program)

    def ask(
        self, folder: pathlib.Path, program: str, results: Sequence[str], timeout_s: int
    ) -> str:
        """Send the files of a folder, run one of them there, put its results into the folder.

        Returns what the program printed. Raises DeviceError.
        """
        watch = threading.Timer(timeout_s, self._give_up, [timeout_s])
        watch.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # what it said before tells why
                self._send(folder, program, results, timeout_s)
            reply = self._receive(folder, results)
        except EOFError as error:
            raise DeviceError(f"{self._where}: {self._why_it_ended()}") from error
        finally:
            watch.cancel()
        if "error" in reply:
            raise DeviceError(f"{self._where}: on the device: {reply['error']}")
        if reply["code"] < 0:
            name = signal.Signals(-reply["code"]).name
            raise DeviceError(f"{self._where}: {program} died of {name}: {last_line(reply['log'])}")
        return str(reply["log"])

    def close(self) -> None:
        """Hang up and wait until the other side has tidied up."""
        watch = threading.Timer(_CLOSE_S, self._process.kill)
        watch.start()
        with contextlib.suppress(BrokenPipeError), _open(self._process.stdin):
            pass
        with _open(self._process.stdout) as stdout:
            while stdout.read(_CHUNK):
                pass
        self._process.wait()
        watch.cancel()
        self._errors.close()

    def _send(
        self, folder: pathlib.Path, program: str, results: Sequence[str], timeout_s: int
    ) -> None:
        files = {path.name: path for path in sorted(folder.iterdir())}
        request = {
            "files": {name: path.stat().st_size for name, path in files.items()},
            "program": program,
            "results": list(results),
            "timeout_s": timeout_s,
        }
        stdin = _open(self._process.stdin)
        stdin.write(self._greeting + json.dumps(request).encode("ascii") + b"\n")
        self._greeting = b""
        for path in files.values():
            with open(path, "rb") as stream:
                while data := stream.read(_CHUNK):
                    stdin.write(data)
        stdin.flush()

    def _receive(self, folder: pathlib.Path, results: Sequence[str]) -> dict[str, Any]:
        stdout = _open(self._process.stdout)
        for _ in range(_GREETING):
            line = stdout.readline()
            if not line:
                raise EOFError
            if line.startswith(b"edgec "):
                break
        else:
            raise EOFError
        self._heard = True
        reply: dict[str, Any] = json.loads(line.removeprefix(b"edgec "))
        sizes = reply.get("files", {})
        for name in filter(sizes.__contains__, results):
            size = sizes[name]
            with open(folder / name, "wb") as stream:
                while size:
                    data = stdout.read(min(size, _CHUNK))
                    if not data:
                        raise EOFError
                    size -= stream.write(data)
        return reply

    def _give_up(self, timeout_s: int) -> None:
        self._late = timeout_s
        self._process.kill()

    def _why_it_ended(self) -> str:
        """Why there is no answer, in words."""
        try:
            code = self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            code = 0
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace")
        if self._late:
            return f"no answer within {self._late} s"
        if self._heard:
            return f"the connection was lost: {last_line(said)}; run it again"
        if code in _NOT_FOUND:
            return f"there is no Python: {last_line(said)}; its path goes behind the address"
        return self._explain(said)


def _repair(facts: Mapping[str, Any]) -> str:
    """What the Python on the device lacks and how to get it."""
    if facts["broken"]:
        return f"its Python {facts['python']} is not able to run a bundle: {facts['broken']}"
    absent = facts["lacking"]
    return (
        f"its Python {facts['python']} has no {' and no '.join(absent)}; install what is missing "
        "there (python3 -m pip install numpy onnxruntime), or give the path of another Python "
        "behind the address"
    )


def _open(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # Popen was asked for pipes
    return stream
