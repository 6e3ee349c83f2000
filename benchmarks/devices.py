"""Every target on every device that is installed: does the bundle compute there what it should?

    edgec devices install all        # what can be had on this machine
    python benchmarks/devices.py [--only ocr ...] [--targets arm64 ...] [--devices haswell ...]
                                 [--samples 2] [--every] [--verify-seconds 60] [--rows FILE]
                               [--write docs/targets.md] [--json]

One model per kind (``kinds.py``) is built for every target with the target's own recipe, and
run on the target's own devices (``edgec verify --on``); a device that no target calls its own
runs one bundle of each kind, that of the target which asks most of the CPU. ``--every`` runs each
bundle on each device that it fits. Two tables:

    verified   kind x device: status, agreement and SQNR against float32 there and here
    targets    kind x target: the recipe that the build took, size, SQNR, and what one inference
               costs: executed instructions on the target's own device or the first that counts
               them, as a share of those of float32 there; on this machine's own kind, latency
               instead

An interrupted run goes on with ``--rows FILE``: finished rows are kept there as JSON lines and
taken from there if the same edgec made them, with the same devices and numbers of samples.

A device that is not installed, or that no target fits, is listed with the reason. The exit
code is 1 if a bundle failed or was refused on a device that it fits.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import kinds
from fixtures.locate import FixtureMissing

import edgec
import edgec_runtime
from edgec.devices.check import OnDevice, Samples, fits, verify_on
from edgec.devices.install import missing
from edgec.errors import EdgecError
from edgec.report import Report
from edgec.targets import Target, load_profile, load_target, profile_names, target_names
from edgec_runtime.bundle import read_bundle

LOSSLESS = "cleanup,fuse,lower"
SHOWN = ("quantize", "prune", "convert")  # beginnings of the passes that name a recipe


@dataclass(frozen=True)
class Row:
    """One kind of model built for one target. cost: in words. verdicts: JSON data."""

    kind: str
    target: str
    recipe: str
    size_mb: float
    sqnr_db: float
    cost: str
    verdicts: tuple[Mapping[str, object], ...]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(kinds.MODELS), choices=list(kinds.MODELS))
    parser.add_argument("--targets", nargs="*", default=target_names(), choices=target_names())
    parser.add_argument("--devices", nargs="*", default=profile_names(), choices=profile_names())
    parser.add_argument("--samples", type=int, default=2, help="per model and device")
    parser.add_argument("--calibration", type=int, default=32, help="samples")
    parser.add_argument("--every", action="store_true", help="each bundle on all that it fits")
    parser.add_argument(
        "--verify-seconds", type=float, default=60.0, help="per device, two samples at least"
    )
    parser.add_argument("--rows", type=pathlib.Path, help="keep finished rows, and go on from them")
    parser.add_argument("--write", type=pathlib.Path, help="docs/targets.md: renew its tables")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the tables")
    asked = parser.parse_args()
    lacking = {name: missing(load_profile(name)) for name in asked.devices}
    devices = [name for name, reason in lacking.items() if reason is None]
    setting = {
        "edgec": sources_sha256(),
        "devices": devices,
        "samples": asked.samples,
        "calibration": asked.calibration,
        "verify_seconds": asked.verify_seconds,
        "every": asked.every,
    }
    rows = kept_rows(asked.rows, setting)
    with tempfile.TemporaryDirectory() as folder:
        for kind in asked.only:
            try:
                given = kinds.MODELS[kind](asked.calibration, asked.samples)
            except FixtureMissing as absent:
                print(f"{kind} is left out: {absent}", file=sys.stderr)
                continue
            done = {row.target for row in rows if row.kind == kind}
            targets = [target for target in asked.targets if target not in done]
            run_on = functools.partial(verify_on, seconds=asked.verify_seconds)
            targets.sort(key=lambda name: -len(load_target(name).features))
            before = {str(v["device"]) for row in rows if row.kind == kind for v in row.verdicts}
            fitting = Devices(devices, before, every=asked.every)
            for row in built_and_run(kind, given, targets, fitting, pathlib.Path(folder), run_on):
                print(line(row), file=sys.stderr, flush=True)
                rows.append(row)
                if asked.rows is not None:
                    with asked.rows.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"asked": setting, "row": asdict(row)}) + "\n")
    rows = sorted(
        (row for row in rows if row.kind in asked.only and row.target in asked.targets),
        key=lambda row: (asked.only.index(row.kind), asked.targets.index(row.target)),
    )
    if asked.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        skipped = {name: reason for name, reason in lacking.items() if reason}
        text = "\n\n".join((verified_table(rows, skipped), targets_table(rows)))
        print(text)
        if asked.write is not None:
            renew(asked.write, text)
    statuses = [str(v["status"]) for row in rows for v in row.verdicts]
    return int("failed" in statuses or "refused" in statuses or not statuses)


def sources_sha256() -> str:
    """Of every source file of edgec, its passes and targets, the runtime, and the models here."""
    digest = hashlib.sha256(pathlib.Path(kinds.__file__).read_bytes())
    digest.update(pathlib.Path(__file__).read_bytes())
    for package in (edgec, edgec.passes, edgec.targets, edgec_runtime):
        [folder] = package.__path__
        for path in sorted(pathlib.Path(folder).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest.update(path.relative_to(folder).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def kept_rows(path: pathlib.Path | None, setting: Mapping[str, Any]) -> list[Row]:
    """The rows of an earlier run with the same edgec, devices and numbers of samples."""
    if path is None or not path.exists():
        return []
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    return [
        Row(**{**kept["row"], "verdicts": tuple(kept["row"]["verdicts"])})
        for kept in lines
        if kept["asked"] == setting
    ]


class Devices:
    """Which devices run the bundle of which target, one kind of model."""

    def __init__(self, installed: Sequence[str], before: Iterable[str], *, every: bool) -> None:
        """before: devices that have run a bundle of this kind. every: all that fit run it."""
        self._installed, self._ran, self._every = installed, set(before), every
        self._owned = {device for name in target_names() for device in load_target(name).devices}

    def of(self, target: str, bundle: pathlib.Path) -> list[str]:
        """Those that run this bundle; from now on they have run one."""
        read = read_bundle(bundle)
        own = load_target(target).devices
        spare = self._owned | self._ran
        chosen = [
            name
            for name in self._installed
            if fits(read, name) and (self._every or name in own or name not in spare)
        ]
        self._ran.update(chosen)
        return chosen


def built_and_run(
    kind: str,
    given: kinds.Given,
    targets: Sequence[str],
    devices: Devices,
    folder: pathlib.Path,
    run_on: Callable[..., Sequence[OnDevice]],
) -> Iterator[Row]:
    """The rows of one kind; its export is made once and serves all targets.

    run_on: ``verify_on``, all but bundle, devices and samples given.
    """
    source, calibration, samples = given
    exported = folder / f"{kind}.x.reference.onnx"
    first = folder / f"{kind}.x.edgec"
    if not targets:
        return
    edgec.build(source, target="x86-64", output=first, recipe="lower", verify=False)
    for target in targets:
        bundle = folder / f"{kind}.{target}.edgec"
        options, feeds = options_for(load_target(target), calibration, samples)
        try:
            report = edgec.build(exported, target=target, output=bundle, **options)
        except EdgecError as error:
            print(f"{kind} for {target} cannot be built: {error}", file=sys.stderr)
            continue
        verdicts = run_on(bundle, devices.of(target, bundle), feeds, against=exported)
        cost = speed_here(report)
        own = load_target(target).devices
        counts = [v.device for v in verdicts if v.outcome and v.outcome.counts]
        counting = min(counts, key=lambda name: name not in own, default=None)
        if counting is not None:
            plain = folder / f"{kind}.{target}.float.edgec"
            edgec.build(exported, target=target, output=plain, recipe=LOSSLESS, **options)
            cost = counted(verdicts, run_on(plain, [counting], against=exported)[0])
        yield Row(
            kind=kind,
            target=target,
            recipe=recipe_of(report),
            size_mb=report.size_bytes / 1e6,
            sqnr_db=round(float(report.sqnr_db or 0.0), 1),
            cost=cost,
            verdicts=tuple(verdict.facts() for verdict in verdicts),
        )


def options_for(
    target: Target, calibration: Callable[[], Iterator[kinds.Feeds]], samples: Any
) -> tuple[dict[str, Any], Samples]:
    """What a build takes, and samples to run: those of one shape where shapes are fixed."""

    def shapes(feeds: kinds.Feeds) -> list[tuple[int, ...]]:
        return [array.shape for array in feeds.values()]

    given = list(samples)
    known = list(calibration())
    if target.static_shapes:
        wanted = shapes(given[0])
        given = [feeds for feeds in given if shapes(feeds) == wanted]
        known = [feeds for feeds in known if shapes(feeds) == wanted]
    options = {
        "calibration": lambda: iter(known),
        "evaluation": lambda: iter(given),
        "verify": False,
        "keep_reference": False,
    }
    return options, Samples(tuple(given), len(given))


def recipe_of(report: Report) -> str:
    """The lossy passes that the build took, with the number of layers that they touched."""
    named = [s for s in report.steps if s.name.startswith(SHOWN) and s.changed]
    return ", ".join(f"{step.name} ({step.changed})" for step in named) or "float32"


def speed_here(report: Report) -> str:
    """Latency where this machine is of the target's kind."""
    if report.measured_on is None or not report.measured_on.is_target or not report.speedup:
        return "-"
    return f"{report.speedup:.2f}x fp32's speed, here"


def counted(verdicts: Sequence[OnDevice], plain: OnDevice) -> str:
    """Million instructions of the bundle on a device, and their share of float32's there."""
    mine = next(v for v in verdicts if v.device == plain.device)
    if mine.outcome is None or plain.outcome is None:
        return "-"
    ours, theirs = mine.outcome.counts, plain.outcome.counts
    if not ours or not theirs:
        return "-"
    total = ours["total"] / 1e6
    share = ours["total"] / theirs["total"]
    return f"{total:.1f} M instructions, {share:.2f} of fp32's, {plain.device}"


def line(row: Row) -> str:
    """What is going on, for people who wait."""
    states = ", ".join(f"{v['device']} {v['status']}" for v in row.verdicts) or "no device"
    return f"{row.kind} for {row.target}: {row.recipe}, {row.sqnr_db} dB: {states}"


def verified_table(rows: Sequence[Row], skipped: Mapping[str, str]) -> str:
    """Kind x device, and which devices were not there."""
    lines = [
        "| model | target | device | status | samples | agreement | SQNR dB | here dB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for v in row.verdicts:
            cells = [row.kind, row.target, str(v["device"]), str(v["status"])]
            if "sqnr_db" in v:
                cells += [f"{v['samples']}", f"{v['agreement']:.3f}"]
                cells += [f"{v['sqnr_db']:.1f}", f"{v['sqnr_here_db']:.1f}"]
            else:
                cells += ["-", "-", "-", str(v.get("reason", ""))]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\nnot run: {name}: {reason}" for name, reason in skipped.items()]
    return "\n".join(lines)


def targets_table(rows: Sequence[Row]) -> str:
    """Kind x target, each with the command that gives it."""
    lines = [
        "| model | target | recipe | MB | SQNR dB | cost of one inference | command |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        command = f"`benchmarks/devices.py --only {row.kind} --targets {row.target}`"
        cells = [row.kind, row.target, row.recipe, f"{row.size_mb:.2f}", f"{row.sqnr_db:.1f}"]
        lines.append(f"| {' | '.join([*cells, row.cost, command])} |")
    return "\n".join(lines)


def renew(page: pathlib.Path, text: str) -> None:
    """Put the tables between the page's marks."""
    before, mark, rest = page.read_text(encoding="utf-8").partition("<!-- tables -->\n")
    _, end, after = rest.partition("<!-- end of tables -->")
    if not mark or not end:
        sys.exit(f"{page}: it has no marks <!-- tables --> and <!-- end of tables -->")
    page.write_text(f"{before}{mark}\n{text}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
