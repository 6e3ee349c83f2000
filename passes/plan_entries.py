"""The entries of a pruning plan, held against what they have to be: a plan may be written by hand.

    {"groups": [{"name": "/layer1/conv1/Conv", "kind": "channel", "units": 64, "kept": [0, 2]}],
     "blocks": [{"name": "/layer.0/Add", "result": "add_3", "shortcut": "layer_norm",
                 "nodes": 22, "weights": 591360, "removed": true}]}

Whether a plan fits a model is for the pass to say that applies it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from edgec.passes.contract import PassError
from edgec.passes.dimension_groups import Kind

Entry = Mapping[str, Any]
Fields = Mapping[str, tuple[str, Callable[[Any], bool]]]

_DO = "correct the plan, or take it from the files of its build again"
_SHOWN = 40  # characters of a wrong value

# what a field has to be, in words and as a test
_TEXT = ("a text", lambda value: isinstance(value, str))
_GROUP: Fields = {
    "name": _TEXT,
    "kind": (" or ".join(get_args(Kind)), lambda value: value in get_args(Kind)),
    "units": ("a whole number above 0", lambda value: _is_whole(value) and value > 0),
    "kept": ("a list of unit numbers", lambda value: isinstance(value, list)),
}
_COUNT = ("a whole number, 0 or more", lambda value: _is_whole(value) and value >= 0)
_BLOCK: Fields = {
    "name": _TEXT,
    "result": _TEXT,
    "shortcut": _TEXT,
    "nodes": _COUNT,
    "weights": _COUNT,
    "removed": ("true or false", lambda value: isinstance(value, bool)),
}


def group_entries(plan: Entry, name: str = "the pruning plan") -> list[Entry]:
    """The groups of a plan, ``kept`` of each sorted. name: of the plan in errors.

    Raises PassError for one that is damaged.
    """
    found: list[Entry] = []
    for where, entry in _entries(plan, "groups", _GROUP, "name", name):
        units, kept = entry["units"], entry["kept"]
        seen: set[int] = set()
        for position, unit in enumerate(kept):
            if not _is_whole(unit) or not 0 <= unit < units:
                expected = f"a whole number from 0 to {units - 1}"
                raise _damaged(f"{where}: kept[{position}] is {_shown(unit)}", expected)
            if unit in seen:
                raise _damaged(f"{where}: kept has {unit} more than once", "each unit once")
            seen.add(unit)
        if not kept:
            raise _damaged(f"{where}: kept is empty", f"at least one of {units} units: some stay")
        found.append({**entry, "kept": sorted(seen)})
    return found


def block_entries(plan: Entry, name: str = "the pruning plan") -> list[Entry]:
    """The residual blocks of a plan. name: of the plan in errors.

    Raises PassError for one that is damaged.
    """
    return [entry for _, entry in _entries(plan, "blocks", _BLOCK, "result", name)]


def _entries(
    plan: Entry,
    key: str,
    fields: Fields,
    unique: str,
    name: str,
) -> list[tuple[str, Entry]]:
    """The entries of a list of a plan, each behind the words for where it stands.

    unique: the field that no two of them have in common.
    """
    entries = plan.get(key)
    if not isinstance(entries, list):
        raise _damaged(f"{name}: {key} is {_shown(entries)}", "a list")
    found: list[tuple[str, Entry]] = []
    for number, entry in enumerate(entries):
        where = f"{name}: {key}[{number}]"
        if not isinstance(entry, dict):
            raise _damaged(f"{where} is {_shown(entry)}", f"{', '.join(fields)} of one")
        if isinstance(entry.get("name"), str):
            where += f" ('{entry['name']}')"
        for field, (expected, is_right) in fields.items():
            if field not in entry:
                raise _damaged(f"{where} has no {field}", expected)
            if not is_right(entry[field]):
                raise _damaged(f"{where}: {field} is {_shown(entry[field])}", expected)
        if any(entry[unique] == other[unique] for _, other in found):
            raise _damaged(f"{where}: it stands there twice", f"another {unique} for each")
        found.append((where, entry))
    return found


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def _damaged(what: str, expected: str) -> PassError:
    return PassError(f"{what}, expected {expected}; {_DO}")
