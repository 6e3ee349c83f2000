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


def plan(output: pathlib.Path, name: str, target: str) -> Places:
    """The files that a build with this ``-o`` writes; checks that it can.

    Raises OutputError if the folder cannot be made or written to.
    """
    if output.suffix == ".edgec":
        folder, stem, report = output.parent, output.stem, f"{output.stem}.report"
    else:
        folder, stem, report = output, f"{name}.{target}", "report"
    if output.suffix == ".edgec" and output.is_dir():
        raise OutputError(f"{output}: is a directory; a bundle is a file")
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise OutputError(f"{nearest}: is a file; -o needs a folder there")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: no permission to write there; choose another -o")
    return Places(
        bundle=folder / f"{stem}.edgec",
        lock=folder / f"{stem}.lock.json",
        json=folder / f"{report}.json",
        html=folder / f"{report}.html",
        reference=folder / f"{stem}.reference.onnx",
    )


def file_digest(path: pathlib.Path) -> str:
    """sha256 of a file, as hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def staging(places: Places) -> Iterator[pathlib.Path]:
    """A folder whose files are moved to their places if the block succeeds."""
    folder = places.bundle.parent
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        hidden = tempfile.mkdtemp(prefix=".edgec-", dir=folder)
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror or error}; choose another -o") from error
    try:
        yield pathlib.Path(hidden)
        for file in sorted(pathlib.Path(hidden).iterdir()):
            os.replace(file, folder / file.name)
    except OSError as error:
        raise OutputError(f"{folder}: cannot write there: {error.strerror or error}") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # stays where it holds something
