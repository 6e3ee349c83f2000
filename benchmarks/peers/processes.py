"""Starts tools and runtimes in their environments, and times open files in turns."""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from peers.tools import Tool

ROOT = pathlib.Path(__file__).resolve().parents[2]
_BLOCK_MS = 60.0  # of inferences that a worker runs before the next one's turn
_MIN_ROUNDS = 5


class Unavailable(Exception):
    """A tool cannot make or run this model; the message is the reason that its row gives."""


@dataclass(frozen=True)
class Peers:
    """Where the environments are, and the cores that every process is bound to: "0" or "0,1"."""

    folder: pathlib.Path
    cores: str

    def python(self, environment: str) -> str:
        """The interpreter of an environment; "" is this one. Raises Unavailable."""
        if not environment:
            return sys.executable
        python = self.folder / environment / "bin" / "python"
        reason = self.folder / f"{environment}.failed"
        if reason.exists():
            raise Unavailable(f"not installable: {reason.read_text(encoding='utf-8').strip()}")
        if not python.exists():
            raise Unavailable(
                f"no environment '{environment}' in {self.folder}; run: "
                f"python benchmarks/peers/install.py --into {self.folder} {environment}"
            )
        return str(python)

    def start(self, environment: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """A Python of an environment that finds this package, one thread per library."""
        paths = [ROOT / "benchmarks", ROOT / "runtime", ROOT / "tests"]
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        return subprocess.Popen(
            ["taskset", "-c", self.cores, self.python(environment), *arguments],
            env={
                **os.environ,
                **threads,
                "ORT_DISABLE_TELEMETRY": "1",
                "PYTHONPATH": os.pathsep.join(map(str, paths)),
            },
            text=True,
            **options,
        )


def quantize(
    peers: Peers,
    tool: Tool,
    quantizer: str,
    case: pathlib.Path,
    out: pathlib.Path,
    samples: int | None = None,
    seconds: float = 1800.0,
) -> dict[str, Any]:
    """Cost of one tool on one case, see ``quantize.py``. Raises Unavailable with its reason."""
    arguments = [quantizer, str(case), str(out), *([str(samples)] if samples else [])]
    log = out.with_name(f"{quantizer}.log")
    with log.open("w", encoding="utf-8") as errors:
        process = peers.start(
            tool.made_in,
            *("-m", "peers.quantize", *arguments),
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        try:
            text, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise Unavailable(f"not finished after {seconds:.0f} s") from None
    if not text.strip():
        raise Unavailable(f"its process ended with code {process.returncode}; see {log}")
    cost: dict[str, Any] = json.loads(text.splitlines()[-1])
    if "error" in cost:
        raise Unavailable(cost["error"])
    return cost


class Process:
    """A module of this package that answers a line of JSON with a line of JSON."""

    def __init__(
        self, peers: Peers, environment: str, log: pathlib.Path, module: str, *arguments: str
    ) -> None:
        """Start it; its first line says whether it could open its file. Raises Unavailable."""
        self._log = log.open("w", encoding="utf-8")
        self._process = peers.start(
            environment,
            *("-m", module, *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises Unavailable."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise Unavailable(f"its process ended with code {code}; see {self._log.name}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Unavailable(answer["error"])
        return answer


class Worker(Process):
    """A file open in its runtime in a process of its own (``worker.py``)."""

    def __init__(self, peers: Peers, tool: Tool, file: pathlib.Path, case: pathlib.Path) -> None:
        """Open the file. Raises Unavailable with the runtime's reason."""
        log = file.with_name(f"{tool.engine}.{file.name}.log")
        arguments = (tool.engine, str(file), peers.cores)
        super().__init__(peers, tool.run_in, log, "peers.worker", *arguments)
        self._case = str(case)
        self.ask(do="load", case=self._case)

    def outputs(self, scratch: pathlib.Path, limit: int | None) -> np.ndarray[Any, Any]:
        """The judged output on the first ``limit`` evaluation samples, float32 [samples, ...]."""
        to = scratch / "outputs.npy"
        self.ask(do="outputs", case=self._case, to=str(to), limit=limit)
        array: np.ndarray[Any, Any] = np.load(to)
        to.unlink()
        return array


def interleave(workers: Mapping[str, Worker], seconds: float) -> dict[str, float]:
    """Median CPU milliseconds per inference, the workers taking turns block by block.

    A block is some 60 ms of inferences, so that a worker runs with warm caches as it would
    alone; all are bound to one core, so only one ever computes.
    """
    calls = {}
    for name, worker in workers.items():
        worker.ask(do="time", calls=2)
        once = worker.ask(do="time", calls=2)["wall_ms"]
        calls[name] = max(1, round(_BLOCK_MS / max(once, 1e-3)))
    taken: dict[str, list[float]] = {name: [] for name in workers}
    end = time.monotonic() + seconds
    rounds = 0
    while time.monotonic() < end or rounds < _MIN_ROUNDS:
        order = list(workers) if rounds % 2 == 0 else list(reversed(workers))
        for name in order:
            taken[name].append(workers[name].ask(do="time", calls=calls[name])["cpu_ms"])
        rounds += 1
    return {name: statistics.median(times) for name, times in taken.items()}
