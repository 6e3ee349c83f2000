"""What an ARM bundle costs on CPUs with and without the dot product, in executed instructions.

    edgec devices install cortex-a72 cortex-a76    # an emulator, Debian's Python, the wheel
    python benchmarks/arm64.py [--only lstm ...] [--recipe PASSES ...] [--calibration 48] [--json]

Each model (``kinds.py``) is built for arm64 and for arm64-dotprod with the target's own
recipe, and each artifact runs on both CPUs, beside float32. The exit code is 1 unless each
costs no more than all others on its own CPU. --recipe adds an artifact of that recipe, built
for both targets: that is how the targets' recipes were chosen.

Counts repeat within 1 %, and the comparison allows for as much. They are a proxy of time:
what waits for memory is told too cheap.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import kinds
from fixtures.locate import FixtureMissing

import edgec
from edgec.devices.check import verify_on
from edgec.devices.install import missing
from edgec.errors import EdgecError
from edgec.targets import load_profile
from edgec_runtime.bundle import read_bundle

OWN_CPU = {"arm64": "cortex-a72", "arm64-dotprod": "cortex-a76"}  # target -> its CPU
MODELS = {
    **{name: kinds.MODELS[name] for name in ("efficientnet-lite0", "lstm", "ocr", "decoder-step")},
    "minilm": functools.partial(kinds.minilm, length=32),  # an emulator takes minutes for 128
}
FLOAT = "float32"
REPEATABLE = 1.01


@dataclass(frozen=True)
class Row:
    """One artifact of one model. instructions, sqnr_db: by CPU; instructions in millions.

    digest: of graph and weights, which both targets may agree on.
    """

    model: str
    artifact: str
    recipe: str
    size_mb: float
    instructions: Mapping[str, float]
    sqnr_db: Mapping[str, float]
    digest: str


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--recipe", nargs="*", default=[], help="names of passes, with commas")
    parser.add_argument("--calibration", type=int, default=48, help="samples")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    asked = parser.parse_args()
    for device in OWN_CPU.values():
        if reason := missing(load_profile(device)):
            sys.exit(f"{device}: {reason}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in asked.only:
            try:
                given = MODELS[model](asked.calibration, 1)
            except FixtureMissing as absent:
                print(f"{model} is left out: {absent}", file=sys.stderr)
                continue
            for row in measured(model, given, asked.recipe, pathlib.Path(folder)):
                print(line(row), file=sys.stderr, flush=True)
                rows.append(row)
    print(json.dumps([asdict(row) for row in rows], indent=2) if asked.json else table(rows))
    wrong = [reason for model in asked.only for reason in dearer(rows, model)]
    for reason in wrong:
        print(reason, file=sys.stderr)
    return int(bool(wrong) or not rows)


def measured(
    model: str, given: kinds.Given, recipes: Sequence[str], folder: pathlib.Path
) -> Iterator[Row]:
    """float32, the artifact of each target, and those of further recipes."""
    source, calibration, sample = given
    options = {"calibration": calibration, "evaluation": lambda: iter(sample), "verify": False}
    plain = folder / f"{model}.{FLOAT}.edgec"
    edgec.build(source, target="arm64", output=plain, recipe="lower", **options)
    exported = plain.with_name(f"{model}.{FLOAT}.reference.onnx")
    yield counted(model, FLOAT, "lower", plain, exported)
    wanted = [(target, None) for target in OWN_CPU]
    wanted += [(target, recipe) for recipe in recipes for target in OWN_CPU]
    options["keep_reference"] = False
    for number, (target, recipe) in enumerate(wanted):
        bundle = folder / f"{model}.{number}.edgec"
        artifact = target if recipe is None else f"{target}, {recipe}"
        try:
            report = edgec.build(exported, target=target, output=bundle, recipe=recipe, **options)
        except EdgecError as error:
            print(f"{model} for {artifact} cannot be built: {error}", file=sys.stderr)
            continue
        passes = ", ".join(s.name for s in report.steps if s.changed) or "none"
        yield counted(model, artifact, passes, bundle, exported)


def counted(
    model: str,
    artifact: str,
    recipe: str,
    bundle: pathlib.Path,
    reference: pathlib.Path,
) -> Row:
    """One artifact on both CPUs, whichever it was built for, judged on its golden sample."""
    cpus = list(OWN_CPU.values())
    instructions, noise = {}, {}
    for verdict in verify_on(bundle, cpus, against=reference, any_target=True):
        if verdict.outcome is None or verdict.outcome.counts is None or verdict.judgement is None:
            raise EdgecError(f"{model}, {artifact} on {verdict.device}: {verdict.reason}")
        instructions[verdict.device] = verdict.outcome.counts["total"] / 1e6
        noise[verdict.device] = verdict.judgement.sqnr_db
    entries = {entry.name: entry.sha256 for entry in read_bundle(bundle).manifest.entries}
    digest = entries["graph.onnx"] + entries["weights.bin"]
    size_mb = bundle.stat().st_size / 1e6
    return Row(model, artifact, recipe, size_mb, instructions, noise, digest)


def dearer(rows: Sequence[Row], model: str) -> Iterator[str]:
    """What contradicts: each target's artifact is the cheapest on its own CPU."""
    found = {row.artifact: row for row in rows if row.model == model}
    for target, row in ((name, found[name]) for name in OWN_CPU if name in found):
        cpu = OWN_CPU[target]
        for other in found.values():
            if row.instructions[cpu] > REPEATABLE * other.instructions[cpu]:
                yield (
                    f"{model} on {cpu}: {target} costs {row.instructions[cpu]:.1f} million "
                    f"instructions, {other.artifact} {other.instructions[cpu]:.1f}"
                )


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    cpus = list(OWN_CPU.values())
    lines = [
        "| model | artifact | graph | MB | "
        + " | ".join([f"M instructions, {cpu}" for cpu in cpus] + [f"SQNR dB, {c}" for c in cpus])
        + " | passes |",
        "|---" * (5 + 2 * len(cpus)) + "|",
    ]
    for row in rows:
        cells = [row.model, row.artifact, row.digest[:6], f"{row.size_mb:.2f}"]
        cells += [f"{row.instructions[cpu]:.1f}" for cpu in cpus]
        cells += [f"{row.sqnr_db[cpu]:.1f}" for cpu in cpus]
        lines.append(f"| {' | '.join([*cells, row.recipe])} |")
    return "\n".join(lines)


def line(row: Row) -> str:
    """What is going on, for people who wait."""
    costs = ", ".join(f"{number:.1f} M on {cpu}" for cpu, number in row.instructions.items())
    return f"{row.model}, {row.artifact}: {costs}"


if __name__ == "__main__":
    sys.exit(main())
