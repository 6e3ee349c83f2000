"""Promises: the user's limits, kept or broken, never ignored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgec.errors import EdgecError, suggestion
from edgec.report import Measurement, Metric, Promise


@dataclass(frozen=True)
class Limits:
    """What the user demands; None demands nothing.

    max_drop: of the user's metric (in its unit), or of the agreement with the reference
        (0..1) where there is no metric. max_size_mb: of the bundle, 1 MB = 1,000,000 bytes.
    min_speedup: latency of the float32 reference over the bundle's, in the same runtime.
    """

    max_drop: float | None = None
    max_size_mb: float | None = None
    min_speedup: float | None = None

    def __post_init__(self) -> None:
        """Refuse limits that no build could keep or break."""
        for name, value in dataclasses.asdict(self).items():
            if value is None:
                continue
            number = isinstance(value, (int, float)) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and name != "max_drop"):
                least = "a number from 0 up" if name == "max_drop" else "a number above 0"
                raise EdgecError(f"promise {name} is {value!r}, expected {least}")


def limits_from(table: Mapping[str, Any], where: str) -> Limits:
    """Limits from a TOML table; an unknown key or a wrong type is an EdgecError."""
    known = [f.name for f in dataclasses.fields(Limits)]
    for key, value in table.items():
        if key not in known:
            raise EdgecError(
                f"{where}: unknown promise '{key}'{suggestion(key, known)}; "
                f"the promises are {', '.join(known)}"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise EdgecError(f"{where}: promise {key} is {value!r}, expected a number")
    return Limits(**{k: float(v) for k, v in table.items()})


def judge(
    limits: Limits,
    *,
    size_bytes: int,
    metric: Metric | None,
    agreement: float | None,
    speedup: float | None,
    measured_on: Measurement | None,
    real_data: bool,
) -> tuple[Promise, ...]:
    """Every promise that was made, with its verdict. Not judged is not kept."""
    promises = []
    if limits.max_drop is not None:
        if metric is not None:
            promises.append(_at_most("max_drop", limits.max_drop, metric.drop, metric.name))
        elif agreement is not None and real_data:
            drop = round(1.0 - agreement, 6)
            promises.append(_at_most("max_drop", limits.max_drop, drop, "agreement"))
        else:
            reason = "not judged: no evaluation data; give --evaluation or --calibration"
            promises.append(Promise("max_drop", limits.max_drop, None, False, reason))
    if limits.max_size_mb is not None:
        promises.append(_at_most("max_size_mb", limits.max_size_mb, size_bytes / 1e6, "bundle"))
    if limits.min_speedup is not None:
        promises.append(_speedup(limits.min_speedup, speedup, measured_on))
    return tuple(promises)


def _at_most(name: str, limit: float, value: float, of: str) -> Promise:
    return Promise(name, limit, value, bool(value <= limit), of)


def _speedup(limit: float, value: float | None, measured_on: Measurement | None) -> Promise:
    if value is None or measured_on is None:
        return Promise("min_speedup", limit, None, False, "not judged: no latency was measured")
    if not measured_on.is_target:
        reason = (
            f"not judged: measured on {measured_on.arch} (x{value:.2f}), which is not the "
            "target; run the build or `edgec bench` on the device"
        )
        return Promise("min_speedup", limit, None, False, reason)
    return Promise("min_speedup", limit, value, value >= limit, f"{measured_on.threads} thread(s)")
