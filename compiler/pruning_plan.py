"""A pruning plan: which units and which blocks go, so that another build can cut the same.

    {"groups": [{"name": "/layer1/conv1/Conv", "kind": "channel", "units": 64, "kept": [0, 2]}],
     "blocks": [{"name": "/layer.0/Add", "result": "add_3", "shortcut": "layer_norm",
                 "nodes": 22, "weights": 591360, "removed": true}]}

Groups are for prune-structured, blocks for prune-blocks; there may be one of both. The lock file
and report.json of a build hold them under these passes; alone they are a plan file. A plan belongs
to an architecture: weights, data and the rest of the recipe may be others. A build in rounds has a
plan for each; together they are one cut.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgec.errors import PassError, PlanError
from edgec.lock import read_lock
from edgec.passes import Pass, PruneBlocks, PruneStructured
from edgec.passes.plan_entries import block_entries, group_entries
from edgec.recipe import from_toml
from edgec.rounds import in_rounds

Plan = Mapping[str, Any]

_APPLIED_BY: Mapping[str, type[Pass]] = {"groups": PruneStructured, "blocks": PruneBlocks}
_PRUNING = " or ".join(pass_.name for pass_ in _APPLIED_BY.values())
_EXPECTED = (
    "expected the lock file or report.json of an earlier build, or a plan as docs/pruning.md has it"
)


def read_plan(path: pathlib.Path) -> Plan:
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
    if any(part in table for part in _APPLIED_BY):
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
    names = {pass_.name for pass_ in _APPLIED_BY.values()}
    plans = [plan for name, plan in steps if name in names and plan]
    if not plans:
        raise PlanError(
            f"pruning plan {path}: the build that wrote it did not prune by {_PRUNING}; give the "
            "file of one that did"
        )
    return _merged(plans, path)


def as_decisions(plan: Plan, recipe: Sequence[Pass]) -> list[Plan]:
    """What ``run_passes`` is to replay of a recipe: all of a pass's part where it first stands."""
    left = dict(plan)
    decisions: list[Plan] = []
    for pass_ in in_rounds(recipe):
        part = next((part for part, by in _APPLIED_BY.items() if isinstance(pass_, by)), None)
        if part is None or part not in plan:
            decisions.append({})
        else:
            decisions.append({part: left.pop(part, [])})
    return decisions


def check_plan(plan: Plan, recipe: Sequence[Pass], path: pathlib.Path, lock: object) -> None:
    """Raise PlanError if a recipe cannot apply all of a plan, or a lock file already does.

    recipe: empty for the target's own.
    """
    if lock is not None:
        raise PlanError(
            f"pruning plan {path}: lock file {lock} has the plan of its build, too; give --lock to "
            "repeat that build, or --plan to cut another model alike"
        )
    for part, by in _APPLIED_BY.items():
        if plan.get(part) and not any(isinstance(p, by) for p in recipe):
            given = ", ".join(p.name for p in recipe) or "the passes of the target"
            raise PlanError(
                f"pruning plan {path}: the recipe has no {by.name} to apply its {part}, but "
                f"{given}; name the passes with --recipe"
            )
    if "groups" not in plan and any(isinstance(p, PruneStructured) and not p.ratio for p in recipe):
        raise PlanError(
            f"pruning plan {path}: it has no groups for {PruneStructured.name}, which has no ratio "
            f"either; set {PruneStructured.name}.ratio, or give a plan that has groups"
        )


def _merged(plans: Sequence[Plan], path: pathlib.Path) -> Plan:
    """One plan for several that were applied one after the other."""
    name = f"pruning plan {path}"
    merged: dict[str, list[dict[str, Any]]] = {}
    try:
        for plan in plans:
            if "groups" in plan:
                _add_groups(merged.setdefault("groups", []), group_entries(plan, name), name)
            if "blocks" in plan:
                _add_blocks(merged.setdefault("blocks", []), block_entries(plan, name), name)
    except PassError as error:
        raise PlanError(str(error)) from error
    cut = any(len(group["kept"]) < group["units"] for group in merged.get("groups", ()))
    if not cut and not any(block["removed"] for block in merged.get("blocks", ())):
        raise PlanError(
            f"{name}: it cuts nothing, so the model would stay as it is; give the file of a build "
            "that cut something, or leave --plan and the pruning out"
        )
    return merged


def _add_groups(groups: list[dict[str, Any]], entries: Sequence[Plan], name: str) -> None:
    """Cut further: the units of entries are those that the groups before them kept."""
    known = {group["name"]: group for group in groups}
    for entry in entries:
        before = known.get(entry["name"])
        if before is None:
            groups.append(dict(entry))
        elif entry["units"] == len(before["kept"]):
            before["kept"] = [before["kept"][unit] for unit in entry["kept"]]
        else:
            raise PlanError(
                f"{name}: damaged: group '{entry['name']}' has {entry['units']} units where "
                f"{len(before['kept'])} were kept before; take the file of its build again"
            )


def _add_blocks(blocks: list[dict[str, Any]], entries: Sequence[Plan], name: str) -> None:
    """Remove more of the blocks that the model had before the first of them went."""
    known = {block["result"]: block for block in blocks}
    for entry in entries:
        before = known.get(entry["result"])
        if before is not None:
            before["removed"] = entry["removed"]
        elif not known:
            blocks.append(dict(entry))
        elif entry["removed"]:
            raise PlanError(
                f"{name}: block '{entry['name']}' became one only when others had gone, and a plan "
                "goes all at once; give the file of a build that has prune-blocks once"
            )
