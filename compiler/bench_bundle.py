"""Times a bundle and what it is compared with, side by side, for ``edgec bench``."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import edgec_runtime
from edgec.bench import Timing, interleave
from edgec.errors import SourceError
from edgec.machine import absent_providers, cpu_name, is_kind_of, this_machine
from edgec.promise import Limits, judge
from edgec.report import Measurement, Promise
from edgec.runners import open_bundle_data, open_runner, reference_beside


@dataclass(frozen=True)
class Bench:
    """Timings: the bundle first, then what it was compared with, and the verdict."""

    timings: tuple[Timing, ...]
    measured_on: Measurement
    promises: tuple[Promise, ...]
    inputs: str

    @property
    def kept(self) -> bool:
        """True if every promise is kept."""
        return all(promise.kept for promise in self.promises)

    @property
    def speedup(self) -> float | None:
        """Latency of the first comparison over the bundle's."""
        if len(self.timings) < 2:
            return None
        return self.timings[1].median_ms / self.timings[0].median_ms

    def facts(self) -> dict[str, Any]:
        """JSON data."""
        bundle = self.timings[0]
        return {
            "cpu": self.measured_on.cpu,
            "arch": self.measured_on.arch,
            "threads": self.measured_on.threads,
            "is_target": self.measured_on.is_target,
            "runs": self.measured_on.runs,
            "inputs": self.inputs,
            "bundle": {"latency_ms": bundle.median_ms},
            "reference": (
                {"latency_ms": self.timings[1].median_ms} if len(self.timings) > 1 else None
            ),
            "speedup": self.speedup,
            "timings": [
                {
                    "name": t.name,
                    "median_ms": t.median_ms,
                    "p10_ms": t.p10_ms,
                    "p90_ms": t.p90_ms,
                    "speedup": t.median_ms / bundle.median_ms,
                }
                for t in self.timings
            ],
            "promises": [
                {"name": p.name, "limit": p.limit, "value": p.value, "kept": p.kept}
                for p in self.promises
            ],
        }


def bench_bundle(
    path: pathlib.Path,
    *,
    against: Sequence[str] = (),
    threads: int = 1,
    seconds: float = 8.0,
    data: str | None = None,
    limits: Limits | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Bench:
    """Interleaved medians of the bundle and its comparisons in this process.

    against: .onnx files or bundles; by default the reference beside the bundle, if any.
    data: the inputs to time on, the first sample is used; the golden sample otherwise.
    limits: of speed and latency.
    """
    limits = limits or Limits()
    model = edgec_runtime.load(path, threads=threads, any_target=True)
    if data is not None:
        dataset = open_bundle_data(data, path, "bench")
        feeds, inputs = next(iter(itertools.islice(dataset, 1))), f"first sample of {data}"
    else:
        feeds, inputs = model.golden_inputs(), "the golden sample of the bundle"
    others = [pathlib.Path(p) for p in against]
    if not others:
        beside = reference_beside(path)
        others = [beside] if beside is not None else []
    if not others and limits.min_speedup is not None:
        raise SourceError(
            f"no reference beside {path}; give one with --against (an .onnx file or a bundle)"
        )
    candidates: list[tuple[str, Callable[[], object]]] = [(path.name, lambda: model.run(feeds))]
    for other in others:
        run = open_runner(other, model.manifest, threads)
        candidates.append((other.name, _call(run, feeds)))
    progress("bench", 0, 1)
    timings = interleave(candidates, seconds=seconds, max_runs=100_000)
    progress("bench", 1, 1)
    machine = this_machine()
    measured = Measurement(
        cpu=cpu_name(),
        arch=machine.arch,
        threads=threads,
        runs=timings[0].runs,
        is_target=is_kind_of(machine, model.manifest.target)
        and not absent_providers(model.manifest.session.providers),
    )
    speedup = timings[1].median_ms / timings[0].median_ms if len(timings) > 1 else None
    promises = judge(
        limits,
        size_bytes=path.stat().st_size,
        metric=None,
        agreement=None,
        speedup=speedup,
        latency_ms=timings[0].median_ms,
        measured_on=measured,
        real_data=False,
    )
    return Bench(timings, measured, promises, inputs)


def _call(run: Callable[[Any], object], feeds: Any) -> Callable[[], object]:
    return lambda: run(feeds)
