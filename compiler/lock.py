"""The lock file: every decision that was taken by measurement, to repeat a build exactly.

Calibration ranges, golden outputs and evaluation results differ in the last bits between
CPUs. They are therefore an input of the build: written to ``NAME.TARGET.lock.json`` the
first time, replayed by ``--lock`` to the same bytes anywhere.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from edgec.errors import LockError

LOCK_VERSION = 1


@dataclass(frozen=True)
class Lock:
    """Decisions by step, and what they belong to.

    reference: sha256 of the reference graph. recipe: the passes with parameters, as TOML.
    seed, version: as given to the build. steps: decisions of each pass, in order.
    golden, results: as in the bundle's manifest.
    """

    reference: str
    target: str
    recipe: str
    seed: int = 0
    version: int = 1
    steps: tuple[Mapping[str, Any], ...] = ()
    golden: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    lock_version: int = LOCK_VERSION

    def to_json(self) -> str:
        """Sorted, indented JSON with a digest of itself."""
        table = asdict(self)
        return json.dumps({**table, "sha256": _digest(table)}, indent=1, sort_keys=True) + "\n"


def read_lock(path: pathlib.Path) -> Lock:
    """The lock in ``path``. Raises LockError if it is missing or no lock file."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LockError(f"lock file {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise LockError(f"lock file {path}: not JSON: {error}") from error
    if not isinstance(table, dict) or table.get("lock_version") != LOCK_VERSION:
        raise LockError(f"lock file {path}: not an edgec lock file of version {LOCK_VERSION}")
    if table.pop("sha256", None) != _digest(table):
        raise LockError(
            f"lock file {path}: damaged, or changed by hand; take it from version control again, "
            "or build without --lock to make a new one"
        )
    try:
        return Lock(**{**table, "steps": tuple(table["steps"])})
    except (TypeError, KeyError) as error:
        raise LockError(f"lock file {path}: not a complete lock file: {error}") from error


def _digest(table: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def check_lock(
    lock: Lock,
    path: pathlib.Path,
    *,
    target: str | None = None,
    reference: str | None = None,
    recipe: str | None = None,
    steps: int | None = None,
) -> None:
    """Raise LockError unless the lock was made for this target, model and recipe.

    steps: number of passes that it has to have decisions for.
    """
    for what, locked, present in (
        ("target", lock.target, target),
        ("model", lock.reference, reference),
        ("recipe", lock.recipe, recipe),
    ):
        if present is not None and locked != present:
            detail = f" ('{locked}', now '{present}')" if what == "target" else ""
            pruned = any("groups" in step or "blocks" in step for step in lock.steps)
            instead = ", or with --plan to prune another model alike" * (what == "model" and pruned)
            raise LockError(
                f"lock file {path}: made for another {what}{detail}; build without --lock to make "
                f"a new one{instead}"
            )
    if steps is not None and len(lock.steps) != steps:
        count = len(lock.steps)
        raise LockError(
            f"lock file {path}: it holds {count} step{'s' * (count != 1)} for {steps} passes; "
            "build without --lock to make a new one"
        )
