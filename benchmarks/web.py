"""WebAssembly: which quantization pays in a browser, by size, SQNR and CPU time?

    edgec devices install node-wasm
    python benchmarks/web.py [--only minilm ...] [--samples 4] [--repeats 40] [--json]

Each model is built for the target web in float32 and in every scheme below, and all of them
run in one process of Node.js with onnxruntime-web, on one thread, calls in turns. Times are
medians of CPU time as ratios to float32 there: over 1 is faster. SQNR is that of the outputs
in Node.js against float32 in Node.js, as `edgec build` judges them. The recipes of
targets/web.toml follow from this table.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import kinds
import numpy as np
from fixtures.locate import FixtureMissing
from kinds import Array, Feeds, Given

import edgec
from edgec.agreement import AgreementRule
from edgec.data import Sample
from edgec.devices.guest import by_sample, numbered, read_tensors, write_tensors
from edgec.devices.install import installed_folder, missing
from edgec.devices.web import MODULES
from edgec.evaluate import judge_outputs
from edgec.targets import Target, load_profile, load_target

RUNNER = pathlib.Path(__file__).with_name("web.mjs")
FLOAT = "float32"


@dataclass(frozen=True)
class Scheme:
    """A way to quantize. target: what it needs, beside what targets/web.toml says."""

    passes: str
    target: Target
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One model under one scheme. speed: float32's CPU time over its own."""

    model: str
    scheme: str
    size_mb: float
    sqnr_db: float
    speed: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(kinds.MODELS), choices=kinds.MODELS)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--calibration", type=int, default=64, help="samples")
    parser.add_argument("--repeats", type=int, default=40, help="timed calls")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    asked = parser.parse_args()
    profile = load_profile("node-wasm")
    if reason := missing(profile):
        sys.exit(f"{profile.name}: {reason}")
    modules = installed_folder(profile) / MODULES
    rows: list[Row] = []
    for name in asked.only:
        print(f"{name} ...", file=sys.stderr)
        try:
            given = kinds.MODELS[name](asked.calibration, asked.samples)
        except FixtureMissing as absent:
            print(f"{name} is left out: {absent}", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows += measured(name, given, modules, pathlib.Path(folder), asked.repeats)
    print(json.dumps([asdict(row) for row in rows], indent=2) if asked.json else table(rows))


def schemes() -> dict[str, Scheme]:
    """float32 first; the target is extended by the operators that web.toml leaves out."""
    web = load_target("web")
    every = ("Conv", "Gemm", "MatMul")
    static = {
        bits: replace(web, int8=replace(web.int8, static_ops=every, reduce_range=bits == 7))
        for bits in (7, 8)
    }
    recurrent = replace(
        web,
        kernels=(*web.kernels, "DynamicQuantizeLSTM"),
        int8=replace(web.int8, dynamic_ops=("MatMul", "Gemm", "LSTM")),
    )
    return {
        FLOAT: Scheme("", web),
        "int8 weights": Scheme("quantize-weights", web),
        "int4 weights": Scheme("quantize-weights", web, ("quantize-weights.bits=4",)),
        "static int8": Scheme("quantize-static", static[8]),
        "static int8, 7-bit weights": Scheme("quantize-static", static[7]),
        "dynamic int8": Scheme("quantize-dynamic", recurrent),
        "dynamic int8, smoothed": Scheme("smooth-activations,quantize-dynamic", recurrent),
    }


def measured(
    model: str, given: Given, modules: pathlib.Path, folder: pathlib.Path, repeats: int
) -> list[Row]:
    """float32 and every scheme of one model."""
    source, calibration, samples = given
    bundles: dict[str, pathlib.Path] = {}
    exported = folder / "float.reference.onnx"  # an export takes longer than its quantization
    for scheme, way in schemes().items():
        bundles[scheme] = folder / ("float.edgec" if scheme == FLOAT else f"{len(bundles)}.edgec")
        edgec.build(
            source if scheme == FLOAT else exported,
            target=way.target,
            output=bundles[scheme],
            recipe=",".join(filter(None, ("cleanup", "fuse", way.passes, "lower"))),
            settings=way.settings,
            calibration=calibration,
            evaluation=lambda: samples,
            verify=False,
            keep_reference=scheme == FLOAT,
        )
    outputs, seconds = run(list(bundles.values()), samples, modules, folder, repeats)
    times = np.median(seconds, axis=1)
    return [
        Row(
            model=model,
            scheme=scheme,
            size_mb=bundles[scheme].stat().st_size / 1e6,
            sqnr_db=judged_db(samples, outputs[0], outputs[place]),
            speed=float(times[0] / times[place]),
        )
        for place, scheme in enumerate(bundles)
    ]


def run(
    bundles: Sequence[pathlib.Path],
    samples: Sequence[Feeds],
    modules: pathlib.Path,
    folder: pathlib.Path,
    repeats: int,
) -> tuple[list[Sequence[Feeds]], Array]:
    """Outputs [bundle][sample] by name, and CPU seconds [bundle, repeat]."""
    feeds, outputs = folder / "feeds.tensors", folder / "outputs.tensors"
    write_tensors(feeds, numbered(samples))
    command = ["node", RUNNER, modules, feeds, outputs, repeats, *bundles]
    subprocess.run(list(map(str, command)), check=True)
    found = read_tensors(outputs)
    seconds = found.pop("seconds")
    by_bundle = by_sample(found, len(bundles))
    return [by_sample(arrays, len(samples)) for arrays in by_bundle], seconds


def judged_db(
    samples: Sequence[Feeds], expected: Sequence[Feeds], actual: Sequence[Feeds]
) -> float:
    """SQNR over all samples, without the positions that an attention mask hides."""
    wanted, found = iter(expected), iter(actual)
    judged = judge_outputs(
        lambda feeds: next(wanted),
        lambda feeds: next(found),
        [Sample(given, {}) for given in samples],
        rule=AgreementRule(),
    )
    return judged.sqnr_db


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| model | scheme | MB | SQNR dB | speed |", "|---|---|---:|---:|---:|"]
    for row in rows:
        noise = "-" if row.scheme == FLOAT else f"{row.sqnr_db:.1f}"
        lines.append(
            f"| {row.model} | {row.scheme} | {row.size_mb:.2f} | {noise} | {row.speed:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
