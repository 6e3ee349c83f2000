"""Runs programs in a temporary folder for whoever holds this one's standard input.

Sent to a real device as text and started there by ``python3 -c`` (``remote.py``); it needs a
POSIX system and Python's standard library. The two sides take turns, a line of JSON and the
bytes that it announces:

    request  {"files": {NAME: bytes}, "program": NAME, "results": [NAME], "timeout_s": N}
    reply    edgec {"code": N, "log": "...", "files": {NAME: bytes}}
             edgec {"error": "..."}

The folder goes when this program ends, and it ends when its input does: a lost connection, an
interrupted command and a killed one all look like that from here. It also ends if a request
takes longer than it may, or if there is none for an hour.
"""

from __future__ import annotations

import json
import os
import pathlib
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_SIGNALS = ("SIGHUP", "SIGINT", "SIGTERM", "SIGALRM")
_IDLE_S = 3600
_CHUNK, _LOG = 1 << 20, 1 << 16  # bytes


def serve() -> None:
    """Answers requests until the input ends; leaves no file and no process behind."""
    for name in _SIGNALS:
        signal.signal(getattr(signal, name), _leave)
    try:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="edgec-"))
    except OSError as error:
        _reply({"error": f"no temporary folder can be made: {error}"})
        return
    try:
        signal.alarm(_IDLE_S)
        for line in iter(sys.stdin.buffer.readline, b""):
            request = json.loads(line)
            signal.alarm(request["timeout_s"])
            _answer(request, folder)
            signal.alarm(_IDLE_S)
    except (BrokenPipeError, EOFError):  # nobody is there any more
        return
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _answer(request: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Store the files of a request, run its program and send what it left."""
    failures = [_store(folder / name, size) for name, size in request["files"].items()]
    failure = next(filter(None, failures), None)
    if failure is not None:
        _reply({"error": failure})
        return
    results = [folder / name for name in request["results"]]
    _remove(results)
    code, log = _run(request["program"], folder)
    results = [path for path in results if path.is_file()]
    _reply({"code": code, "log": log, "files": {p.name: p.stat().st_size for p in results}})
    for path in results:
        with open(path, "rb") as stream:
            shutil.copyfileobj(stream, sys.stdout.buffer, _CHUNK)
    sys.stdout.buffer.flush()
    _remove(results)


def _store(path: pathlib.Path, size: int) -> str | None:
    """Write the next ``size`` bytes of the input to a file; why that failed, or None.

    The input is read to their end even if the disk is full, so that the reply is heard.
    Raises EOFError if it ends before.
    """
    failure, chunks = None, _read(size)
    try:
        with open(path, "wb") as stream:
            for data in chunks:
                stream.write(data)
    except OSError as error:
        failure = f"{path} cannot be written: {error.strerror}"
        _remove([path])
    for _ in chunks:
        pass
    return failure


def _read(size: int) -> Iterator[bytes]:
    while size:
        data = sys.stdin.buffer.read(min(size, _CHUNK))
        if not data:
            raise EOFError
        size -= len(data)
        yield data


def _run(program: str, folder: pathlib.Path) -> tuple[int, str]:
    """Exit code of a program of the folder, and the end of what it printed.

    Raises EOFError if the input ends meanwhile; the program is dead then.
    """
    path = [str(folder / "runtime.zip"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    child = subprocess.Popen(
        [sys.executable, str(folder / program), str(folder)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert child.stdout is not None
    log = b""
    try:
        while True:
            ready, _, _ = select.select([sys.stdin.buffer, child.stdout], [], [])
            if sys.stdin.buffer in ready:
                raise EOFError  # nothing is sent before the reply, so this is the end
            data = os.read(child.stdout.fileno(), _CHUNK)
            if not data:
                return child.wait(), log.decode("utf-8", "replace")
            log = (log + data)[-_LOG:]
    finally:
        child.kill()
        child.wait()


def _remove(paths: Iterable[pathlib.Path]) -> None:
    for path in paths:
        if path.exists():
            path.unlink()


def _reply(table: Mapping[str, Any]) -> None:
    sys.stdout.buffer.write(b"edgec " + json.dumps(table).encode("ascii") + b"\n")
    sys.stdout.buffer.flush()


def _leave(number: int, frame: object) -> None:
    for name in _SIGNALS:  # a second one must not interrupt the removal
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.exit(1)


if __name__ == "__main__":
    serve()
