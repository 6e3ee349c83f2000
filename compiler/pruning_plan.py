"""A pruning plan: which units of which group stay, so that another build can cut the same.

    {"groups": [{"name": "/layer1/conv1/Conv", "kind": "channel", "units": 64, "kept": [0, 2]}]}

The lock file and report.json of a build hold it under prune-structured; alone it is a plan file.
It belongs to an architecture: weights, data and the rest of the recipe may be others. A build
in rounds has a plan for each; together they are one cut.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgec.errors import PassError, PlanError
from edgec.lock import read_lock
from edgec.passes import Pass, PruneStructured
from edgec.passes.plan_entries import group_entries
from edgec.recipe import from_toml
from edgec.rounds import in_rounds

_NOTHING: Mapping[str, Any] = {"groups": []}
_EXPECTED = (
    "expected the lock file or report.json of an earlier build, or a plan as docs/pruning.md has it"
)


def read_plan(path: pathlib.Path) -> Mapping[str, Any]:
    """The plan in a lock file, in a report.json, or alone in a JSON file.

    Raises PlanError if there is none, LockError for a damaged lock file. Whether it fits a
    model is known when it is applied.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"pruning plan {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise PlanError(f"pruning plan {path}: not JSON: {error}") from error
    if not isinstance(table, dict):
        raise PlanError(f"pruning plan {path}: {_EXPECTED}")
    if "groups" in table:
        return _merged([table], path)
    steps: Iterable[tuple[Any, Any]]
    if "lock_version" in table:
        lock = read_lock(path)
        passes = in_rounds(from_toml(lock.recipe, f"lock file {path}"))
        steps = zip((p.name for p in passes), lock.steps, strict=False)
    elif isinstance(table.get("steps"), list):
        steps = ((s.get("name"), s.get("plan")) for s in table["steps"] if isinstance(s, dict))
    else:
        raise PlanError(f"pruning plan {path}: {_EXPECTED}")
    plans = [plan for name, plan in steps if name == PruneStructured.name and plan]
    if not plans:
        raise PlanError(
            f"pruning plan {path}: the build that wrote it did not prune by {PruneStructured.name};"
            " give the file of one that did"
        )
    return _merged(plans, path)


def as_decisions(plan: Mapping[str, Any], recipe: Sequence[Pass]) -> list[Mapping[str, Any]]:
    """What ``run_passes`` is to replay of a recipe: the plan, all of it in the first pruning."""
    waiting = [plan]
    return [
        (waiting.pop() if waiting else _NOTHING) if isinstance(p, PruneStructured) else {}
        for p in in_rounds(recipe)
    ]


def check_plan(recipe: Sequence[Pass], path: pathlib.Path, lock: object) -> None:
    """Raise PlanError if no pass of the recipe can apply a plan, or a lock file already does.

    recipe: empty for the target's own.
    """
    if lock is not None:
        raise PlanError(
            f"pruning plan {path}: lock file {lock} has the plan of its build, too; give --lock to "
            "repeat that build, or --plan to cut another model alike"
        )
    if not any(isinstance(p, PruneStructured) for p in recipe):
        given = ", ".join(p.name for p in recipe) or "the passes of the target"
        raise PlanError(
            f"pruning plan {path}: the recipe has no {PruneStructured.name} to apply it, but "
            f"{given}; name the passes with --recipe"
        )


def _merged(plans: Sequence[Mapping[str, Any]], path: pathlib.Path) -> Mapping[str, Any]:
    """One plan for several that were applied one after the other."""
    groups: dict[str, dict[str, Any]] = {}
    try:
        entries = [e for plan in plans for e in group_entries(plan, f"pruning plan {path}")]
    except PassError as error:
        raise PlanError(str(error)) from error
    for entry in entries:
        before = groups.get(entry["name"])
        if before is None:
            groups[entry["name"]] = dict(entry)
        elif entry["units"] == len(before["kept"]):
            before["kept"] = [before["kept"][unit] for unit in entry["kept"]]
        else:
            raise PlanError(
                f"pruning plan {path}: damaged: group '{entry['name']}' has {entry['units']} "
                f"units where {len(before['kept'])} were kept before; take the file of its build "
                "again"
            )
    if all(len(group["kept"]) == group["units"] for group in groups.values()):
        raise PlanError(
            f"pruning plan {path}: it cuts nothing, so the model would stay as it is; give the "
            f"file of a build that cut something, or leave --plan and {PruneStructured.name} out"
        )
    return {"groups": list(groups.values())}
