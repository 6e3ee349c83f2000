"""x86-64 without VNNI: does an int8 bundle still compute what it computes elsewhere?

    python benchmarks/avx2.py [--only ocr ...] [--samples 8] [--repeats 40] [--json]

AVX2 multiplies uint8 by int8 and adds pairs of products in 16 bits, which saturate; VNNI adds
in 32 bits. Three ways out are compared, beside float32:

    target x86-64   the session option session.x64quantprecision, set where VNNI is absent
    s8, 7 bits      the weights keep a bit free (``int8.reduce_range``)
    u8              weights are uint8: ONNX Runtime widens both sides to 16 bits first

The target x86-64-avx2 ships one of the last two; the table names the other one beside it.

SQNR is that of the outputs against float32, on this machine and on this CPU with everything
newer than AVX2 hidden from its programs. Times are CPU time per call on one thread, calls in
turns, as ratios to float32 on the same machine. Without a C compiler and CPUID faulting only this
machine is left. On an emulated Haswell: benchmarks/devices.py --devices haswell.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

import kinds  # noqa: E402
import numpy as np  # noqa: E402
from fixtures import haswell  # noqa: E402
from fixtures.locate import FixtureMissing  # noqa: E402
from kinds import Array, Feeds, Given  # noqa: E402

import edgec  # noqa: E402
from edgec.targets import Target, load_target  # noqa: E402
from edgec_runtime.golden import sqnr_db  # noqa: E402

_MODELS = [name for name in kinds.MODELS if name != "decoder-step"]

RUNNER = str(ROOT / "tests" / "fixtures" / "run_bundles.py")
FLOAT = "float32"


@dataclass(frozen=True)
class Row:
    """One model under one scheme. sqnr_db, speed: by machine; speed is fp32's time over ours."""

    model: str
    scheme: str
    size_mb: float
    sqnr_db: Mapping[str, float]
    speed: Mapping[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(_MODELS), choices=list(_MODELS))
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=64, help="samples")
    parser.add_argument("--repeats", type=int, default=40, help="timed calls")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    asked = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        machines = list(_machines(place))
        for name in asked.only:
            print(f"{name} ...", file=sys.stderr)
            try:
                given = kinds.MODELS[name](asked.calibration, asked.samples)
            except FixtureMissing as missing:
                print(f"{name} is left out: {missing}", file=sys.stderr)
                continue
            rows += measured(name, given, machines, place, asked.repeats)
            if not asked.json:
                print(table(rows[-len(schemes()) - 1 :], machines), file=sys.stderr)
    if asked.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(table(rows, machines))


def schemes() -> dict[str, Target]:
    """The targets as they are shipped, and the ways out that x86-64-avx2 did not take."""
    x64, avx2 = load_target("x86-64"), load_target("x86-64-avx2")
    seven = replace(avx2.int8, weight="int8", reduce_range=True)
    unsigned = replace(avx2.int8, weight="uint8", reduce_range=False)
    ways = {"s8, 7 bits": seven, "u8": unsigned}
    return {
        "target x86-64": x64,
        "target x86-64-avx2": avx2,
        **{name: replace(avx2, int8=way) for name, way in ways.items() if way != avx2.int8},
    }


def measured(
    model: str,
    given: Given,
    machines: Sequence[haswell.Machine],
    folder: pathlib.Path,
    repeats: int,
) -> list[Row]:
    """float32 and every scheme of one model on every machine."""
    source, calibration, samples = given
    bundles = {FLOAT: folder / f"{model}.float.edgec"}
    judged = {"evaluation": lambda: samples, "calibration": calibration}
    edgec.build(source, target="x86-64", output=bundles[FLOAT], recipe="lower", **judged)
    # the exported reference serves all: an export takes longer than its quantization
    exported = bundles[FLOAT].with_name(f"{model}.float.reference.onnx")
    for number, (scheme, target) in enumerate(schemes().items()):
        bundles[scheme] = folder / f"{model}.{number}.edgec"
        edgec.build(exported, target=target, output=bundles[scheme], keep_reference=False, **judged)
    found: dict[str, tuple[dict[str, float], Array]] = {}
    exact = run(haswell.native(), [bundles[FLOAT]], samples, folder, 0)[0][0]
    for machine in machines:
        outputs, seconds = run(machine, list(bundles.values()), samples, folder, repeats)
        noise = {
            scheme: worst_sqnr_db(exact, outputs[place]) for place, scheme in enumerate(bundles)
        }
        found[machine.name] = noise, np.median(seconds, axis=1) if repeats else np.array([])
    return [
        Row(
            model=model,
            scheme=scheme,
            size_mb=bundles[scheme].stat().st_size / 1e6,
            sqnr_db={name: noise[scheme] for name, (noise, _) in found.items()},
            speed={n: float(times[0] / times[i]) for n, (_, times) in found.items() if times.size},
        )
        for i, scheme in enumerate(bundles)
    ]


def run(
    machine: haswell.Machine,
    bundles: Sequence[pathlib.Path],
    samples: Sequence[Feeds],
    folder: pathlib.Path,
    repeats: int,
) -> tuple[list[list[dict[str, Array]]], Array]:
    """Outputs [bundle][sample] by name, and CPU seconds [bundle, repeat], on a machine."""
    feeds, outputs = folder / "feeds.npz", folder / "outputs.npz"
    np.savez(feeds, **{f"{i} {k}": a for i, given in enumerate(samples) for k, a in given.items()})
    arguments = [RUNNER, str(feeds), str(outputs), str(repeats), *map(str, bundles)]
    machine.run(arguments, timeout_s=7200)
    found: list[list[dict[str, Array]]] = [[{} for _ in samples] for _ in bundles]
    with np.load(outputs) as archive:
        seconds = archive["seconds"]
        for key in archive.files:
            if key != "seconds":
                place, number, name = key.split(" ", 2)
                found[int(place)][int(number)][name] = archive[key]
    return found, seconds


def worst_sqnr_db(
    expected: Sequence[Mapping[str, Array]], actual: Sequence[Mapping[str, Array]]
) -> float:
    """The lowest SQNR of any float output over all samples together, in dB."""
    worst = [
        sqnr_db(
            np.concatenate([sample[name].ravel() for sample in expected]),
            np.concatenate([sample[name].ravel() for sample in actual]),
        )
        for name, array in expected[0].items()
        if array.dtype.kind == "f"
    ]
    return min(worst)


def table(rows: Sequence[Row], machines: Sequence[haswell.Machine]) -> str:
    """The rows as Markdown."""
    names = [machine.name for machine in machines]
    columns = [f"SQNR dB, {name}" for name in names]
    columns += [f"speed, {name}" for name in names if any(name in row.speed for row in rows)]
    lines = [
        "| model | scheme | MB | " + " | ".join(columns) + " |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for row in rows:
        cells = [f"{row.sqnr_db[name]:.1f}" for name in names]
        cells += [f"{row.speed[name]:.2f}" for name in names if name in row.speed]
        lines.append(f"| {row.model} | {row.scheme} | {row.size_mb:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _machines(folder: pathlib.Path) -> Iterator[haswell.Machine]:
    """Each machine that can be had."""
    yield haswell.native()
    try:
        yield haswell.masked(folder)
    except FixtureMissing as missing:
        print(f"left out: {missing}", file=sys.stderr)


if __name__ == "__main__":
    main()
