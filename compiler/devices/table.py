"""Tables of devices and of what bundles gave on them, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgec.devices.install import missing
from edgec.report_terminal import plain_text, table
from edgec.targets import load_profile, profile_names

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from edgec.devices.check import OnDevice
    from edgec.devices.cost import DeviceCost, ModelCost

_COLOURS = {
    "passed": "green",
    "failed": "red",
    "refused": "red",
    "skipped": "yellow",
    "checked": "cyan",
}
_COLUMNS = ("device", "status", "samples", "agrees", "SQNR dB", "here dB")
_COUNTS = ("instr. M", "of them int8")  # where any device counts


_CLASSES = {  # class of instructions -> its row
    "total": "all instructions",
    "load_store": "  loads, stores",
    "simd": "  SIMD",
    "fma_fp32": "    fp32 multiply-add",
    "fma_fp16": "    fp16 multiply-add",
    "widening": "    widening multiply",
    "dot": "    int8 dot product",
    "i8mm": "    int8 matrix product",
    "bf16": "    bf16 products",
    "sve": "  SVE",
    "sme": "  SME",
}


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
    counted = any(v.outcome is not None and v.outcome.counts for v in verdicts)
    columns = (*_COLUMNS, *_COUNTS) if counted else _COLUMNS
    rows = [tuple(_cells(verdict))[: len(columns)] for verdict in verdicts]
    return table(columns, rows, right=columns[2:], styles=_COLOURS)


def print_costs(costs: Sequence[DeviceCost], console: Console) -> None:
    """A table per device: its models, million instructions by class, milliseconds; the notes."""
    for cost in costs:
        console.print(costs_table(cost))
        if cost.ratio is not None:
            console.print(plain_text(f"{cost.ratio:.2f} of the float32 reference"))
        for note in cost.notes:
            console.print(plain_text(note))
        console.print()


def costs_table(cost: DeviceCost) -> Table:
    """What each model costs, in a column of its own.

    Instructions in millions, classes that none of the models executes left out.
    """
    rows: list[tuple[str, ...]] = [
        (words, *(_number(_millions(model, name)) for model in cost.models))
        for name, words in _CLASSES.items()
        if any(_millions(model, name) for model in cost.models)
    ]
    if cost.is_real:
        rows.append(("milliseconds", *(_number(model.latency_ms) for model in cost.models)))
    if any(model.estimate_ms is not None for model in cost.models):
        rows.append(("milliseconds, estimated", *(_number(m.estimate_ms) for m in cost.models)))
    rows.append(("megabytes", *(_number(model.size_bytes / 1e6) for model in cost.models)))
    names = tuple(model.name for model in cost.models)
    unit = "" if cost.is_real else ", million"
    return table((f"on {cost.device}{unit}", *names), rows, right=names, wrap=names)


def _millions(model: ModelCost, name: str) -> float | None:
    return None if model.counts is None else model.counts[name] / 1e6


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _cells(verdict: OnDevice) -> Iterator[str]:
    yield verdict.device
    yield verdict.status
    if verdict.judgement is None or verdict.here is None or verdict.outcome is None:
        yield from ["-"] * (len(_COLUMNS) + len(_COUNTS) - 2)
        return
    yield f"{verdict.judgement.samples} of {verdict.of_samples}"
    yield f"{verdict.judgement.agreement:.1%}"
    yield f"{verdict.judgement.sqnr_db:.1f}"
    yield f"{verdict.here.sqnr_db:.1f}"
    counts = verdict.outcome.counts
    yield "-" if counts is None else f"{counts['total'] / 1e6:.2f}"
    yield "-" if counts is None else f"{(counts['dot'] + counts['i8mm']) / 1e6:.2f}"
