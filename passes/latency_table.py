"""Latencies of operators on this machine: measured once, kept in a file, read again.

    {"machine": {"cpu": ..., "onnxruntime": ..., "threads": ...}, "latencies_ms": {operator: ms}}

One file for each machine and session setup, named by their digest. Latencies are those of
kernels, so they serve all models. Left out: an age; another onnxruntime has another file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from edgec.passes.operator_latency import Operator, latencies_ms
from edgec.targets import Session
from edgec.targets.machine import cpu_name, this_machine

Measure = Callable[[Sequence[Operator], Session], Sequence[float | None]]

_DIGITS = 5  # of milliseconds


class LatencyTable:
    """Milliseconds by operator, for one setup of sessions on this machine."""

    def __init__(
        self, settings: Session, folder: pathlib.Path | None, measure: Measure = latencies_ms
    ) -> None:
        """folder: where tables are kept; None keeps nothing. measure: takes what is missing."""
        self._settings, self._measure = settings, measure
        self._machine = _machine(settings)
        digest = hashlib.sha256(json.dumps(self._machine, sort_keys=True).encode()).hexdigest()
        self._path = None if folder is None else folder / f"{digest[:16]}.json"
        self.findings: list[str] = []
        self.measured = 0
        self._known = self._read()

    def milliseconds(self, operators: Sequence[Operator]) -> list[float | None]:
        """The latency of each; None for one that cannot be run by itself."""
        keys = [operator.key() for operator in operators]
        missing = {k: o for k, o in zip(keys, operators, strict=True) if k not in self._known}
        if missing:
            taken = self._measure(list(missing.values()), self._settings)
            for key, latency in zip(missing, taken, strict=True):
                self._known[key] = None if latency is None else round(latency, _DIGITS)
            self.measured += len(missing)
        return [self._known[key] for key in keys]

    def save(self) -> None:
        """Keep what was measured: in one rename, so that no one reads half of it."""
        if self._path is None or not self.measured:
            return
        # what another build has measured meanwhile stays
        table = {"machine": self._machine, "latencies_ms": {**self._read(), **self._known}}
        fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(table, indent=0, sort_keys=True), encoding="utf-8")
            os.replace(fresh, self._path)
        except OSError as error:
            self.findings.append(
                f"the latencies could not be kept in {self._path} ({error.strerror}): the next "
                "build measures them again"
            )

    def _read(self) -> dict[str, float | None]:
        if self._path is None or not self._path.is_file():
            return {}
        try:
            table = json.loads(self._path.read_text(encoding="utf-8"))
            known = table["latencies_ms"]
            if table["machine"] != self._machine or not all(map(_is_latency, known.values())):
                raise ValueError("it is another machine's, or holds something else than latencies")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            damaged = (
                f"the latencies in {self._path} are damaged ({error!r}): they are measured anew"
            )
            if damaged not in self.findings:
                self.findings.append(damaged)
            return {}
        return dict(known)


def _is_latency(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (number and math.isfinite(value) and value >= 0)  # type: ignore[operator,arg-type]


def _machine(settings: Session) -> dict[str, Any]:
    """Everything that a latency depends on, besides the operator."""
    import onnxruntime

    machine = this_machine()
    return {
        "cpu": cpu_name(),
        "arch": machine.arch,
        "os": machine.os,
        "features": sorted(machine.features),
        "onnxruntime": onnxruntime.__version__,
        "threads": settings.threads,
        "providers": list(settings.providers),
        "prepacking": settings.prepacking,
        "disabled_optimizers": list(settings.disabled_optimizers),
        "config": dict(settings.config),
    }


__all__ = ["LatencyTable", "Measure"]
