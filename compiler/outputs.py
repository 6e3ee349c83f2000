"""Where the results of a build go: all of them or none.

Files are made in a hidden folder beside their place and moved there at the end, each with
one atomic rename; a build that fails leaves what was there before.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from edgec.errors import OutputError


@dataclass(frozen=True)
class Places:
    """The files of one build, all in one folder.

    For an output directory the reports are report.json and report.html; for a bundle path
    they carry the bundle's name, so that bundles can share a folder.
    """

    bundle: pathlib.Path
    lock: pathlib.Path
    json: pathlib.Path
    html: pathlib.Path
    reference: pathlib.Path

    def __iter__(self) -> Iterator[pathlib.Path]:
        """All files that a build may write; the last holds weights that .onnx cannot."""
        yield from (self.bundle, self.lock, self.json, self.html, self.reference)
        yield self.reference.with_name(f"{self.reference.name}.data")


def plan(output: pathlib.Path, name: str, target: str) -> Places:
    """The files that a build with this ``-o`` writes; checks that it can.

    Raises OutputError if the folder cannot be made or written to.
    """
    if output.suffix == ".edgec":
        folder, stem, report = output.parent, output.stem, f"{output.stem}.report"
    else:
        folder, stem, report = output, f"{name}.{target}", "report"
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise OutputError(f"{nearest}: is a file, expected a folder; choose another -o")
    try:  # permissions, read-only file systems and quotas are told by trying
        tempfile.TemporaryDirectory(prefix=".edgec-", dir=nearest).cleanup()
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot write there: {error.strerror or error}; choose another -o"
        ) from error
    places = Places(
        bundle=folder / f"{stem}.edgec",
        lock=folder / f"{stem}.lock.json",
        json=folder / f"{report}.json",
        html=folder / f"{report}.html",
        reference=folder / f"{stem}.reference.onnx",
    )
    for place in places:
        if place.is_dir():
            raise OutputError(
                f"{place}: is a directory, expected a file or nothing; choose another -o"
            )
    return places


def file_digest(path: pathlib.Path) -> str:
    """sha256 of a file, as hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def staging(places: Places) -> Iterator[pathlib.Path]:
    """A folder whose files are moved to their places if the block succeeds.

    A file of an earlier build that this one does not make anew is removed: it would be
    taken for this one's.
    """
    folder = places.bundle.parent
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    hidden = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        hidden = tempfile.mkdtemp(prefix=".edgec-", dir=folder)
        yield pathlib.Path(hidden)
        for place in places:
            file = pathlib.Path(hidden) / place.name
            if file.exists():
                os.replace(file, place)
            else:
                place.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot write there: {error.strerror or error}; choose another -o"
        ) from error
    finally:
        if hidden:
            shutil.rmtree(hidden, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # stays where it holds something
