"""Reads target files and device profiles: TOML -> dataclasses, refusing unknown keys."""

from __future__ import annotations

import dataclasses
import pathlib
import tomllib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from edgec.targets.profile import Environment, Profile
from edgec.targets.schema import Target
from edgec_runtime.errors import EdgecError, suggestion
from edgec_runtime.machine import this_machine

T = TypeVar("T")

HOST_CPU = "host"  # cpu of a profile that this machine's own executes

_FOLDER = pathlib.Path(__file__).parent
_KINDS = {str: "text", int: "a whole number", bool: "true or false"}


class TargetError(EdgecError):
    """A target is unknown, or its file has a mistake."""


def target_names() -> list[str]:
    """Names of the shipped targets, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_target(name_or_path: str | pathlib.Path) -> Target:
    """The target of that name, or the one that a TOML file describes.

    Raises TargetError if there is no such target or the file has a mistake.
    """
    text = str(name_or_path)
    if text in target_names():
        return _read(Target, _FOLDER / f"{text}.toml")
    if text.endswith(".toml"):
        return _read(Target, pathlib.Path(text))
    raise TargetError(
        f"unknown target '{text}'{suggestion(text, target_names())}; "
        f"the targets are {', '.join(target_names())}, or a path to a .toml file"
    )


def profile_names() -> list[str]:
    """Names of the shipped device profiles, sorted."""
    return sorted(path.stem for path in (_FOLDER / "profiles").glob("*.toml"))


def load_profile(name_or_path: str | pathlib.Path) -> Profile:
    """The device profile of that name, or the one that a TOML file describes.

    Where this machine's own CPU is the device's, so are its features. Raises TargetError if
    there is no such profile or the file has a mistake.
    """
    text = str(name_or_path)
    if text in profile_names():
        return _read_profile(_FOLDER / "profiles" / f"{text}.toml")
    if text.endswith(".toml"):
        return _read_profile(pathlib.Path(text))
    raise TargetError(
        f"unknown device '{text}'{suggestion(text, profile_names())}; `edgec devices` lists "
        "them; native, a path to a .toml file, ssh://user@host and adb: are understood, too"
    )


def load_environment(name: str) -> Environment:
    """What has to be fetched for the profiles that name this environment."""
    path = _FOLDER / "environments" / f"{name}.toml"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.toml"))
        raise TargetError(f"unknown environment '{name}'{suggestion(name, known)}")
    return _read(Environment, path, "environment")


def _read_profile(path: pathlib.Path) -> Profile:
    profile = _read(Profile, path, "profile")
    if profile.cpu != HOST_CPU:
        return profile
    if profile.features:
        raise TargetError(
            f"profile file {path}: cpu is '{HOST_CPU}', so the features are this machine's; leave "
            "features empty ([])"
        )
    machine = this_machine()
    own = machine.features if machine.arch == profile.arch else ()
    return dataclasses.replace(profile, features=tuple(sorted(own)))


def _read(cls: type[T], path: pathlib.Path, what: str = "target") -> T:
    where = f"{what} file {path}"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TargetError(f"{where}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"{where}: not valid TOML: {error}") from error
    made = _build(cls, table, where)
    assert isinstance(made, cls)
    name = table["name"]
    if not name or any(c in name for c in "/\\ "):
        raise TargetError(
            f"{where}: name '{name}' becomes part of a file name; use letters, digits and '-'"
        )
    return made


def _build(cls: type, table: Mapping[str, Any], where: str) -> object:
    """An instance of the dataclass ``cls`` from a TOML table, checked key by key."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in table:
        if key not in fields:
            raise TargetError(
                f"{where}: unknown key '{key}'{suggestion(key, fields)}; "
                f"the keys are {', '.join(fields)}"
            )
    values = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _convert(hints[name], table[name], where, name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise TargetError(f"{where}: missing key '{name}'")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise TargetError(f"{where}: '{key}' must be a table")
        return _build(hint, value, f"{where} [{key}]")
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if dataclasses.is_dataclass(item):
            if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
                raise TargetError(f"{where}: '{key}' must be a list of tables ([[{key}]])")
            assert isinstance(item, type)
            return tuple(_build(item, v, f"{where} [[{key}]]") for v in value)
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise TargetError(f"{where}: '{key}' must be a list of strings")
        return tuple(value)
    if origin is not None and issubclass(_as_class(origin), Mapping):
        inner = typing.get_args(hint)[1]
        if not isinstance(value, dict):
            raise TargetError(f"{where}: '{key}' must be a table")
        return types.MappingProxyType(
            {k: _convert(inner, v, where, f"{key}.{k}") for k, v in sorted(value.items())}
        )
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            known = ", ".join(map(repr, typing.get_args(hint)))
            raise TargetError(f"{where}: '{key}' is {value!r}, expected one of {known}")
        return value
    if type(value) is not hint:
        raise TargetError(f"{where}: '{key}' is {value!r}, expected {_KINDS[hint]}")
    return value


def _as_class(origin: Any) -> type:
    return origin if isinstance(origin, type) else object
