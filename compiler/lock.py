"""The lock file: every decision that was taken by measurement, to repeat a build exactly.

Calibration ranges, golden outputs and evaluation results differ in the last bits between
CPUs. They are therefore an input of the build: written to ``NAME.TARGET.lock.json`` the
first time, replayed by ``--lock`` to the same bytes anywhere.
"""

from __future__ import annotations

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
    steps: decisions of each pass, in order. golden, results: as in the bundle's manifest.
    """

    reference: str
    target: str
    recipe: str
    steps: tuple[Mapping[str, Any], ...] = ()
    golden: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    lock_version: int = LOCK_VERSION

    def to_json(self) -> str:
        """Sorted, indented JSON."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


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
    try:
        return Lock(**{**table, "steps": tuple(table["steps"])})
    except (TypeError, KeyError) as error:
        raise LockError(f"lock file {path}: damaged: {error}") from error


def check_lock(lock: Lock, path: pathlib.Path, *, reference: str, target: str, recipe: str) -> None:
    """Raise LockError unless the lock was made for this model, target and recipe."""
    for what, locked, present in (
        ("target", lock.target, target),
        ("model", lock.reference, reference),
        ("recipe", lock.recipe, recipe),
    ):
        if locked != present:
            detail = f" ('{locked}', now '{present}')" if what == "target" else ""
            raise LockError(
                f"lock file {path}: made for another {what}{detail}; build without --lock to make "
                "a new one"
            )
