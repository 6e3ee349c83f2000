"""The file of a device's measured latencies: what `edgec bench --record` writes.

JSON, written as a whole or not at all, sorted, so that it can be kept under version control:

    {"version": 1, "device": "ssh://pi@board", "counted_on": "cortex-a76", "models": [
        {"name": "ocr.arm64.edgec", "sha256": "…", "milliseconds": 41.2,
         "instructions": {"total": 61935412, "load_store": 15204233, …}}]}

A model is known by the digest of its bundle: measuring it again replaces its figures, and
counting it later completes them. One thread.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgec.devices.cost_model import CLASSES, Measured
from edgec.errors import DataError

_VERSION = 1


@dataclass(frozen=True)
class Record:
    """One model. milliseconds: median latency; instructions: by class; None: not yet known."""

    name: str
    sha256: str  # of the bundle
    milliseconds: float | None = None
    instructions: Mapping[str, int] | None = None


@dataclass(frozen=True)
class DeviceRecords:
    """What is known of one device.

    device: where the latencies were measured; counted_on: the profile that counted. Empty
    until there are any.
    """

    device: str = ""
    counted_on: str = ""
    models: tuple[Record, ...] = ()

    def measured(self) -> tuple[Measured, ...]:
        """The models with a latency and counts."""
        return tuple(
            Measured(model.instructions, model.milliseconds)
            for model in self.models
            if model.instructions is not None and model.milliseconds is not None
        )

    def extended(self, other: DeviceRecords) -> DeviceRecords:
        """With the figures of others; a model that is known keeps those it is not given anew.

        Raises DataError if the others are of another device or profile.
        """
        for kind, old, new in (
            ("measured", self.device, other.device),
            ("counted", self.counted_on, other.counted_on),
        ):
            if old and new and old != new:
                raise DataError(
                    f"its models were {kind} on {old}, these on {new}; record in another file"
                )
        known = {model.sha256: model for model in self.models}
        for model in other.models:
            before = known.get(model.sha256, model)
            known[model.sha256] = replace(
                model,
                milliseconds=(
                    before.milliseconds if model.milliseconds is None else model.milliseconds
                ),
                instructions=(
                    before.instructions if model.instructions is None else model.instructions
                ),
            )
        ordered = sorted(known.values(), key=lambda model: (model.name, model.sha256))
        return DeviceRecords(
            self.device or other.device, self.counted_on or other.counted_on, tuple(ordered)
        )


def add_records(path: pathlib.Path, records: DeviceRecords) -> None:
    """Extend the file by records, or make it. Raises DataError, and then the file is as before."""
    known = read_records(path) if path.exists() else DeviceRecords()
    try:
        together = known.extended(records)
    except DataError as error:
        raise DataError(f"records {path}: {error}") from error
    write_records(path, together)


def read_records(path: pathlib.Path) -> DeviceRecords:
    """The records in a file. Raises DataError if it cannot be read or is damaged."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise DataError(f"records {path}: {reason or error}; see edgec bench --record") from error
    try:
        return _parsed(table)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"records {path}: damaged ({error}); record the models again in another file"
        ) from error


def write_records(path: pathlib.Path, records: DeviceRecords) -> None:
    """Write the file in one step. Raises DataError if it cannot be written."""
    table = {
        "version": _VERSION,
        "device": records.device,
        "counted_on": records.counted_on,
        "models": [
            {
                "name": model.name,
                "sha256": model.sha256,
                "milliseconds": model.milliseconds,
                "instructions": None if model.instructions is None else dict(model.instructions),
            }
            for model in records.models
        ],
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"records {path}: cannot be written: {error.strerror or error}") from error


def _parsed(table: Mapping[str, Any]) -> DeviceRecords:
    if table["version"] != _VERSION:
        raise ValueError(f"version {table['version']}, expected {_VERSION}")
    return DeviceRecords(
        str(table["device"]), str(table["counted_on"]), tuple(map(_record, table["models"]))
    )


def _record(table: Mapping[str, Any]) -> Record:
    milliseconds, counts = table["milliseconds"], table["instructions"]
    if milliseconds is not None and not float(milliseconds) > 0:
        raise ValueError(f"a latency of {milliseconds} ms")
    return Record(
        name=str(table["name"]),
        sha256=str(table["sha256"]),
        milliseconds=None if milliseconds is None else float(milliseconds),
        instructions=None if counts is None else {name: int(counts[name]) for name in CLASSES},
    )
