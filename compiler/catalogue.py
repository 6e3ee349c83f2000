"""Passes and targets as data, for the lists, their JSON and the generated documentation."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from typing import Any

from edgec.errors import RecipeError, suggestion
from edgec.passes import PASSES
from edgec.targets import Target


def describe_passes(name: str | None = None) -> list[dict[str, Any]]:
    """Name, stage, whether lossless, summary, description and parameters of each pass.

    name: only that pass; RecipeError if there is none.
    """
    known = [cls.name for cls in PASSES]
    if name is not None and name not in known:
        raise RecipeError(
            f"unknown pass '{name}'{suggestion(name, known)}; the passes are {', '.join(known)}"
        )
    return [_describe(cls) for cls in PASSES if name in (None, cls.name)]


def describe_target(target: Target) -> dict[str, Any]:
    """The capabilities of a target as JSON data, in the keys of its TOML file."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    table: dict[str, Any] = plain(target)
    return table


def _describe(cls: Any) -> dict[str, Any]:
    text = inspect.cleandoc(cls.__doc__ or "")
    hints = typing.get_type_hints(cls)
    return {
        "name": cls.name,
        "stage": cls.stage.name.lower(),
        "lossless": cls.lossless,
        "summary": text.splitlines()[0] if text else "",
        "description": text,
        "parameters": [
            {
                "name": field.name,
                "type": _type_name(hints[field.name]),
                "default": _plain(field.default),
            }
            for field in dataclasses.fields(cls)
        ],
    }


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(str(value) for value in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "list"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _plain(value: Any) -> Any:
    if value is dataclasses.MISSING:
        return None
    return list(value) if isinstance(value, tuple) else value
