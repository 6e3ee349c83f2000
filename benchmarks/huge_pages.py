"""What huge pages do for a bundle: how long it takes to open, and to run, with and without.

    python benchmarks/huge_pages.py model.x86-64.edgec ... [--threads 1] [--rounds 9] [--json]

open: wall time of ``edgec_runtime.load``, Python and its imports not counted. run: of a language
model a token of an answer, of any other a call on zeros, 1 for axes of any length; the median of
a process. speed: that without them is 1. resident: MB (1e6 bytes) of the process behind that.
huge: MB of it in huge pages.
Every measurement is a process of its own, bound to as many cores as it has threads; those with
and without take turns, medians. Linux only.

How long opening takes depends on where the kernel finds free huge pages: a virtual machine may
have to ask its host for them first.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime  # noqa: F401 - its import is not part of what opening takes

import edgec_runtime

_PROMPT, _ANSWER, _CALLS = 32, 64, 30


@dataclass(frozen=True)
class Taken:
    """Of one process, or the medians of several."""

    open_ms: float
    run_ms: float
    resident_mb: float
    huge_mb: float


def main() -> None:
    asked = _arguments()
    if asked.measure:
        print(json.dumps(asdict(measured(asked.bundles[0], asked.threads, asked.measure == "on"))))
        return
    found = {}
    for bundle in asked.bundles:
        taken: dict[str, list[Taken]] = {"off": [], "on": []}
        for turn in range(asked.rounds):
            for which in sorted(taken, reverse=bool(turn % 2)):
                taken[which].append(in_process(bundle, asked.threads, which))
        found[str(bundle)] = {which: medians(each) for which, each in taken.items()}
    if asked.json:
        plain = {
            name: {which: asdict(one) for which, one in each.items()}
            for name, each in found.items()
        }
        print(json.dumps(plain, indent=2))
        return
    print("| bundle | huge pages | open ms | run ms | speed | resident MB | huge MB |")
    print("|---|---|---|---|---|---|---|")
    for name, each in found.items():
        for which, one in each.items():
            speed = each["off"].run_ms / one.run_ms
            cells = f"{one.open_ms:.0f} | {one.run_ms:.3f} | {speed:.2f} | {one.resident_mb:.0f}"
            print(f"| {pathlib.Path(name).name} | {which} | {cells} | {one.huge_mb:.0f} |")


def in_process(bundle: pathlib.Path, threads: int, which: str) -> Taken:
    """``measured`` in a process of its own."""
    command = [sys.executable, __file__, str(bundle), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--measure", which], env=environment, stdout=subprocess.PIPE, text=True
    )
    if result.returncode:
        raise SystemExit(f"{bundle}: it does not run")
    return Taken(**json.loads(result.stdout))


def measured(bundle: pathlib.Path, threads: int, huge_pages: bool) -> Taken:
    """Of this process."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: max(threads, 1)])
    started = time.perf_counter()
    model = edgec_runtime.load(bundle, threads=threads, huge_pages=huge_pages)
    open_ms = 1e3 * (time.perf_counter() - started)
    times = []
    if model.manifest.generation is not None and model.manifest.generation.encoder is None:
        prompt = list(range(100, 100 + _PROMPT))
        for _ in range(4):
            marks = [time.perf_counter()]
            for _ in model.generate(prompt, max_new_tokens=_ANSWER, stream="tokens"):
                marks.append(time.perf_counter())
            times += [1e3 * (b - a) for a, b in zip(marks[1:], marks[2:], strict=False)]
    else:
        feeds = {
            value.name: np.zeros([n if isinstance(n, int) else 1 for n in value.shape], value.dtype)
            for value in model.inputs
        }
        for _ in range(_CALLS):
            started = time.perf_counter()
            model.run(feeds)
            times.append(1e3 * (time.perf_counter() - started))
    memory = pathlib.Path("/proc/self/smaps_rollup").read_text()
    resident, huge = (
        int(match[1]) * 1024 / 1e6
        for name in ("Rss", "AnonHugePages")
        if (match := re.search(rf"^{name}:\s+(\d+) kB", memory, re.MULTILINE))
    )
    return Taken(open_ms, statistics.median(times), resident, huge)


def medians(taken: Sequence[Taken]) -> Taken:
    """Of several processes, each figure for itself."""
    rows = zip(*(asdict(one).values() for one in taken), strict=True)
    return Taken(*(statistics.median(row) for row in rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=pathlib.Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9, help="processes with, and without")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--measure", choices=("on", "off"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
