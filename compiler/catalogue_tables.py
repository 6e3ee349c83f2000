"""Targets and passes as tables for the terminal, every capability with its meaning."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from edgec.report_terminal import fact, plain_text, table

if TYPE_CHECKING:
    from rich.table import Table

    from edgec.targets import Target


def targets_table(targets: Iterable[Target]) -> Table:
    """Name, instruction set, systems and description of each target."""
    rows = [
        (target.name, target.arch, ", ".join(target.os), target.description) for target in targets
    ]
    return table(("target", "isa", "runs on", "description"), rows, wrap=("runs on", "description"))


def target_table(target: Target) -> Table:
    """Every capability of one target: its TOML key, its value and what it means."""
    rows = list(capabilities(target))
    return table(("capability", "value", "meaning"), rows, wrap=("value", "meaning"))


def passes_table(passes: Iterable[Mapping[str, Any]]) -> Table:
    """Name, stage, losslessness and summary of each pass that the catalogue describes."""
    rows = [
        (p["name"], p["stage"], "lossless" if p["lossless"] else "lossy", p["summary"])
        for p in passes
    ]
    return table(("pass", "stage", "effect", "what it does"), rows, wrap=("what it does",))


def pass_table(described: Mapping[str, Any]) -> Table:
    """The parameters of one pass, under its description."""
    rows = [
        (p["name"], p["type"], json.dumps(p["default"], ensure_ascii=False))
        for p in described["parameters"]
    ]
    effect = "lossless" if described["lossless"] else "lossy"
    drawn = table(("parameter", "type", "default"), rows, wrap=("type", "default"))
    drawn.title = plain_text(
        f"{described['name']} ({described['stage']}, {effect})\n{described['description']}\n"
    )
    drawn.title_justify = "left"
    drawn.title_style = ""
    drawn.expand = True
    return drawn


def capabilities(settings: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(TOML key, value, comment in the schema) of every field, tables by dotted key."""
    comments = _field_comments(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from capabilities(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", fact(field.name, value), comments.get(field.name, "")


def _field_comments(cls: type) -> dict[str, str]:
    """The comment beside each field of a dataclass, or on the line above it."""
    import inspect
    import re

    comments: dict[str, str] = {}
    above = ""
    for line in inspect.getsource(cls).splitlines():
        field = re.match(r"    (\w+): [^#]*(?:#\s*(.*))?$", line)
        if field:
            comments[field[1]] = field[2] or above
        alone = re.match(r"    #\s*(.*)$", line)
        above = alone[1] if alone else ""
    return comments
