"""Tables of devices and of what bundles gave on them, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgec.devices.install import missing
from edgec.report_terminal import table
from edgec.targets import load_profile, profile_names

if TYPE_CHECKING:
    from rich.table import Table

    from edgec.devices.check import OnDevice

_COLOURS = {
    "passed": "green",
    "failed": "red",
    "refused": "red",
    "skipped": "yellow",
    "checked": "cyan",
}
_COLUMNS = (
    *("device", "status", "onnxruntime", "samples", "agreement", "SQNR dB", "here dB"),
    *("M instructions", "M dot+i8mm"),
)


def describe_devices() -> list[dict[str, Any]]:
    """JSON data of every device profile, with what it lacks on this machine."""
    described = []
    for profile in map(load_profile, profile_names()):
        described.append(
            {
                "name": profile.name,
                "arch": profile.arch,
                "os": list(profile.os),
                "runner": profile.runner,
                "features": list(profile.features),
                "description": profile.description,
                "note": profile.note,
                "missing": missing(profile),
            }
        )
    return described


def devices_table(described: Sequence[Mapping[str, Any]]) -> Table:
    """Name, instruction set, runner and state of each device."""
    rows = [
        (d["name"], d["arch"], d["runner"], d["missing"] or "installed", d["description"])
        for d in described
    ]
    return table(
        ("device", "isa", "runs by", "state", "description"), rows, wrap=("state", "description")
    )


def verdicts_table(verdicts: Sequence[OnDevice]) -> Table:
    """One row per device: status, samples, agreement and SQNR there, SQNR here, instructions.

    Instructions in millions: all, and those that multiply 8-bit integers four or eight at once.
    """
    rows = [tuple(_cells(verdict)) for verdict in verdicts]
    return table(_COLUMNS, rows, right=_COLUMNS[2:], styles=_COLOURS)


def _cells(verdict: OnDevice) -> Iterator[str]:
    yield verdict.device
    yield verdict.status
    if verdict.judgement is None or verdict.here is None or verdict.outcome is None:
        yield from ["-"] * (len(_COLUMNS) - 2)
        return
    yield verdict.outcome.onnxruntime
    yield f"{verdict.judgement.samples} of {verdict.of_samples}"
    yield f"{verdict.judgement.agreement:.1%}"
    yield f"{verdict.judgement.sqnr_db:.1f}"
    yield f"{verdict.here.sqnr_db:.1f}"
    counts = verdict.outcome.counts
    yield "-" if counts is None else f"{counts['total'] / 1e6:.2f}"
    yield "-" if counts is None else f"{(counts['dot'] + counts['i8mm']) / 1e6:.2f}"
