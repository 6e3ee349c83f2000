"""What a search has found so far, in a hidden file beside the bundle.

Written anew, in one rename, after every trial once there is more than one; a search that
was killed finds its measured decisions and outcomes there and goes on. The file carries a
key of everything that the outcomes depend on; another build ignores and overwrites it.

Beside it is a hidden folder for what the passes keep in order to go on, as long as the search
lasts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgec.report import Trial

Decisions = list[Mapping[str, Any]]


def journal_key(*parts: object) -> str:
    """sha256 of the text of all parts, in order."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


@dataclass
class Journal:
    """Decisions and trial of every recipe (as TOML text) that was tried.

    path: None keeps nothing on disk.
    """

    path: pathlib.Path | None
    key: str
    _known: dict[str, tuple[Decisions, Trial]] = field(default_factory=dict)
    _made_folder: bool = False

    def __post_init__(self) -> None:
        """Take over what an earlier search with the same key left."""
        if self.path is None or not self.path.is_file():
            return
        # a journal that cannot be read, or is another build's, is worth nothing
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            table = json.loads(self.path.read_text(encoding="utf-8"))
            if table["key"] == self.key:
                for entry in table["entries"]:
                    outcome = entry["trial"]
                    tuples = {name: tuple(outcome[name]) for name in ("recipe", "reasons")}
                    trial = Trial(**{**outcome, **tuples})
                    self._known[entry["recipe"]] = (entry["decisions"], trial)

    @property
    def work(self) -> pathlib.Path | None:
        """The folder for the passes, which makes it when it has something to keep."""
        return None if self.path is None else self.path.with_suffix(".work")

    def find(self, recipe: str) -> tuple[Decisions, Trial] | None:
        """Decisions of each step and the trial of a recipe; None if it was not tried."""
        return self._known.get(recipe)

    def add(self, recipe: str, decisions: Sequence[Mapping[str, Any]], trial: Trial) -> None:
        """Note a trial; written to disk unless it kept every promise at once."""
        self._known[recipe] = (list(decisions), trial)
        if self.path is None or (len(self._known) == 1 and trial.kept):
            return
        entries = [
            {"recipe": text, "decisions": known, "trial": dataclasses.asdict(outcome)}
            for text, (known, outcome) in self._known.items()
        ]
        # a search without a journal is still a search
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self.path.with_name(f"{self.path.name}.new")
            fresh.write_text(json.dumps({"key": self.key, "entries": entries}), encoding="utf-8")
            os.replace(fresh, self.path)

    def __enter__(self) -> Journal:
        """Look what is there; the file is written when there is something to lose."""
        self._made_folder = self.path is not None and not self.path.parent.is_dir()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove file and folder after success or an error; an interrupted search keeps them."""
        interrupted = kind is not None and not issubclass(kind, Exception)
        if self.path is None or self.work is None or interrupted:
            return
        shutil.rmtree(self.work, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
            if self._made_folder:
                self.path.parent.rmdir()
