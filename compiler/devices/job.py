"""What is run on a device, and what came back: a job and its outcome, as files in a folder."""

from __future__ import annotations

import json
import math
import pathlib
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np

import edgec_runtime
from edgec.devices import guest
from edgec.errors import DataError, DeviceError
from edgec.targets import Profile

Array = np.ndarray[Any, Any]

BUNDLE = "model.edgec"
RUNTIME = "runtime.zip"  # edgec_runtime, for a Python that has none
GUEST = "guest.py"


@dataclass(frozen=True)
class Job:
    """One bundle and the feeds to run it on, by input name.

    repeats: timed calls with the first feeds. count: mark one warm call with the first feeds
    for a counter of executed instructions. threads: 0 lets ONNX Runtime choose.
    seconds: two feeds are run in any case; each further one only while the time of all runs is
    likely to stay below it, so that there may be fewer outputs than feeds.
    """

    bundle: pathlib.Path
    feeds: Sequence[Mapping[str, Array]]
    threads: int = 1
    repeats: int = 0
    count: bool = False
    seconds: float = math.inf


@dataclass(frozen=True)
class Outcome:
    """What a device gave: outputs by name for each of the job's feeds, or for the first of them.

    arch, os, features: as the device itself tells. latency_ms: of the repeats.
    counts: executed instructions of one warm call by class, None where they are not counted;
    uncounted: why not, where the job asked for them.
    nodes: how many nodes of the graph each execution provider took, where there are several.
    checked: what was found out about a device on which nothing runs; there are no outputs then.
    """

    outputs: tuple[Mapping[str, Array], ...]
    onnxruntime: str
    arch: str
    os: str
    features: tuple[str, ...]
    providers: tuple[str, ...]
    load_ms: float
    latency_ms: tuple[float, ...]
    counts: Mapping[str, int] | None = None
    uncounted: str = ""
    nodes: Mapping[str, int] = field(default_factory=dict)
    checked: str = ""


class Device(ABC):
    """A device that is ready to run jobs; leaving it as a context gives back what it holds."""

    profile: Profile  # what the device is

    @abstractmethod
    def run(self, job: Job) -> Outcome:
        """Run a job. Raises DeviceError if the device fails, EdgecError if the model does."""

    def close(self) -> None:  # noqa: B027 - most devices hold nothing between jobs
        """Close connections, end processes and remove temporary files."""

    def __enter__(self) -> Self:
        """The device."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give back what the device holds."""
        self.close()


def write_job(job: Job, folder: pathlib.Path) -> None:
    """Lay the job out in a folder: bundle, feeds and job.json.

    Raises DataError for feeds that no file of arrays can hold (strings).
    """
    shutil.copyfile(job.bundle, folder / BUNDLE)
    arrays = guest.numbered(job.feeds)
    try:
        guest.write_tensors(folder / guest.FEEDS, arrays)
    except KeyError as error:
        raise DataError(
            f"bundle {job.bundle}: it has inputs of dtype {error}, which cannot be sent to a "
            "device; verify it on this machine"
        ) from error
    table = {
        "bundle": BUNDLE,
        "samples": len(job.feeds),
        "threads": job.threads,
        "repeats": job.repeats,
        "count": job.count,
        "limit_ms": None if math.isinf(job.seconds) else round(job.seconds * 1e3),
    }
    (folder / guest.JOB).write_text(json.dumps(table), encoding="utf-8")


def write_guest(folder: pathlib.Path, program: ModuleType = guest) -> None:
    """Put the guest program and the runtime that it imports beside the job."""
    shutil.copyfile(str(program.__file__), folder / GUEST)
    package = pathlib.Path(edgec_runtime.__file__).parent
    with zipfile.ZipFile(folder / RUNTIME, "w") as archive:
        for file in sorted(package.glob("*.py")):
            archive.write(file, f"{package.name}/{file.name}")


def read_outcome(job: Job, folder: pathlib.Path, profile: Profile, log: str = "") -> Outcome:
    """The outcome that a device left in the folder.

    log: what the device printed, for the error. Raises DeviceError if there is none, or if
    the device could not run the bundle.
    """
    where = f"device {profile.name}"
    try:
        table = json.loads((folder / guest.OUTCOME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = f"the run ended without an outcome: {last_line(log)}"
        raise DeviceError(f"{where}: {reason}") from error
    if "error" in table:
        raise DeviceError(f"{where}: {table['error']}")
    arrays = guest.read_tensors(folder / guest.OUTPUTS)
    all_ran = math.isinf(job.seconds)
    ran = len(job.feeds) if all_ran else len({key.partition(" ")[0] for key in arrays})
    return Outcome(
        outputs=guest.by_sample(arrays, ran),
        onnxruntime=table["onnxruntime"],
        arch=table["arch"],
        os=table["os"],
        features=tuple(table["features"]),
        providers=tuple(table["providers"]),
        load_ms=float(table["load_ms"]),
        latency_ms=tuple(float(value) for value in table["latency_ms"]),
        nodes=table.get("nodes", {}),
    )


def last_line(text: str) -> str:
    """The last line of what a program printed, which mostly tells why it ended."""
    return (text.strip().splitlines() or ["it printed nothing"])[-1]
