"""Promises: the user's limits, kept or broken, never ignored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgec.errors import EdgecError, suggestion
from edgec.report import Measurement, Metric, Promise, Robustness, Slices


@dataclass(frozen=True)
class Limits:
    """What the user demands; None demands nothing.

    max_drop: of the user's metric (in its unit), or of the agreement with the reference
        (0..1) where there is no metric. max_size_mb: of the bundle, 1 MB = 1,000,000 bytes.
    min_speedup: latency of the float32 reference over the bundle's, in the same runtime.
    max_latency_ms: median latency of one inference of the bundle.
    max_slice_drop: the largest drop of a slice. max_robustness_drop: the largest drop under an
        attack or a corruption. Both in the unit of max_drop; `edgec.scrutiny` says of what.
    """

    max_drop: float | None = None
    max_size_mb: float | None = None
    min_speedup: float | None = None
    max_latency_ms: float | None = None
    max_slice_drop: float | None = None
    max_robustness_drop: float | None = None

    def __post_init__(self) -> None:
        """Refuse limits that no build could keep or break."""
        for name, value in dataclasses.asdict(self).items():
            if value is None:
                continue
            number = isinstance(value, (int, float)) and math.isfinite(value)
            may_be_zero = name.endswith("_drop")
            if not number or value < 0 or (value == 0 and not may_be_zero):
                least = "a number from 0 up" if may_be_zero else "a number above 0"
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
    latency_ms: float | None = None,
    slices: Slices | None = None,
    robustness: Robustness | None = None,
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
        limit, shown = limits.min_speedup, f"x{speedup or 0.0:.2f}"
        promises.append(_timed("min_speedup", limit, speedup, shown, measured_on))
    if limits.max_latency_ms is not None:
        limit, shown = limits.max_latency_ms, f"{latency_ms or 0.0:.3g} ms"
        promises.append(_timed("max_latency_ms", limit, latency_ms, shown, measured_on))
    if limits.max_slice_drop is not None:
        promises.append(_slice_drop(limits.max_slice_drop, slices))
    if limits.max_robustness_drop is not None:
        promises.append(_robustness_drop(limits.max_robustness_drop, robustness))
    return tuple(promises)


def _slice_drop(limit: float, slices: Slices | None) -> Promise:
    worst = slices.worst if slices is not None else None
    if slices is None or worst is None:
        reason = "not judged: no slice has enough samples"
        return Promise("max_slice_drop", limit, None, False, reason)
    reason = f"{slices.metric} of {slices.title(worst)}, {worst.samples} samples"
    return _at_most("max_slice_drop", limit, worst.drop, reason + _give_or_take(worst.error))


def _robustness_drop(limit: float, found: Robustness | None) -> Promise:
    """Broken by the worst disturbance; not judged where even a dead bundle would keep it."""
    name = "max_robustness_drop"
    if found is None:
        return Promise(name, limit, None, False, "not judged: nothing was disturbed")
    worst = found.worst
    reason = f"{found.metric} under {worst.kind}, {found.samples} samples"
    verdict = _at_most(name, limit, worst.drop, reason + _give_or_take(worst.error))
    if not verdict.kept or found.floor is None:
        return verdict
    for row in found.rows:
        if row.kind != "none" and row.reference - found.floor <= limit:
            advice = "; take a smaller --robustness-epsilon" if row.by_attack else ""
            reason = (
                f"not judged: the reference itself has {found.metric} {row.reference:.3g} under "
                f"{row.kind}, so any bundle would keep this{advice}"
            )
            return Promise(name, limit, None, False, reason)
    return verdict


def _give_or_take(error: float | None) -> str:
    return "" if error is None else f", +- {error:.2g}"


def _at_most(name: str, limit: float, value: float, of: str) -> Promise:
    kept = value <= limit or math.isclose(value, limit, rel_tol=1e-9)  # 0.9 - 0.85 is > 0.05
    return Promise(name, limit, value, bool(kept), of)


def _timed(
    name: str, limit: float, value: float | None, shown: str, measured_on: Measurement | None
) -> Promise:
    """A promise of speed or latency: judged on a machine of the target's kind alone."""
    if value is None or measured_on is None:
        return Promise(name, limit, None, False, "not judged: no latency was measured")
    if not measured_on.is_target:
        reason = (
            f"not judged: measured on {measured_on.arch} ({shown}), which is not the "
            "target; run the build or `edgec bench` on the device"
        )
        return Promise(name, limit, None, False, reason)
    kept = value <= limit if name.startswith("max_") else value >= limit
    return Promise(name, limit, value, kept, f"{measured_on.threads} thread(s)")
