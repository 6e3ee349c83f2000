"""EfficientNet-Lite0 in int8 on photographs: how often it still answers as in float32.

    python benchmarks/efficientnet.py [--steps N] [--rate R] [--held-out] [--json]

Rows: ``edgec build`` with calibration photographs and nothing else; with ``reconstruct``, which
rounds weights by their layers' outputs; and with ``recover`` behind it, all on the same
photographs, without labels. Two of three unlabelled photographs calibrate and teach; the 201
labelled ones and the third are judged. agreement: share of the judged photographs with the
float32 model's class; speed: float32's CPU time in ONNX Runtime over the bundle's, medians of
calls that take turns, one thread. ``--held-out`` judges every fifth photograph of the first
part instead and leaves it out of calibration: for trying settings.

Left out on purpose: ImageNet accuracy (the photographs are not ImageNet's).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import torch  # noqa: E402
from fixtures import models, photographs  # noqa: E402

import edgec  # noqa: E402
import edgec_runtime  # noqa: E402
from edgec.bench import interleave  # noqa: E402

Images = list[np.ndarray[Any, Any]]  # each float32 [1, 3, 224, 224]

QUANTIZED = ["cleanup", "fuse", "quantize-static", "reconstruct"]


@dataclass(frozen=True)
class Row:
    """agreement: share of the judged photographs. speed: float32 = 1. 1 MB = 1e6 bytes."""

    model: str
    agreement: float
    standard_error: float
    sqnr_db: float
    size_mb: float
    speed: float
    build_cpu_s: float


@dataclass(frozen=True)
class Split:
    """learned: for calibration and recovery. judged: for the table alone."""

    learned: Images
    judged: Images


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of recover; 0: without its row")
    parser.add_argument("--rate", type=float, default=0.0, help="of recover's weights")
    parser.add_argument("--bias-rate", type=float, default=1e-4, help="of recover's biases")
    parser.add_argument("--held-out", action="store_true", help="judge on learned photographs")
    parser.add_argument("--seconds", type=float, default=20.0, help="for the timing")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data = split(held_out=asked.held_out)
    chosen = [
        f"recover.steps={asked.steps}",
        f"recover.rate={asked.rate}",
        f"recover.bias_rate={asked.bias_rate}",
    ]
    recipes: dict[str, tuple[list[str] | None, list[str]]] = {
        "edgec build": (None, []),
        "with reconstruct": ([*QUANTIZED, "lower"], []),
    }
    if asked.steps:
        recipes["with reconstruct and recover"] = ([*QUANTIZED, "recover", "lower"], chosen)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(pathlib.Path(folder), data, recipes, asked.seconds)
    if asked.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    print(f"{len(data.learned)} photographs learned from, {len(data.judged)} judged")
    print("| model | agreement % | s.e. | SQNR dB | MB | speed | build CPU s |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.model} | {100 * row.agreement:.1f} | {100 * row.standard_error:.1f} "
            f"| {row.sqnr_db:.1f} | {row.size_mb:.2f} | {row.speed:.2f} | {row.build_cpu_s:.0f} |"
        )


def split(*, held_out: bool) -> Split:
    """The photographs; held_out: the learned part alone, split once more."""
    others = [photographs.tensor(image) for image in photographs.unlabelled()]
    learned = [image for i, image in enumerate(others) if i % 3]
    if held_out:
        return Split([x for i, x in enumerate(learned) if i % 5], learned[::5])
    judged = [photographs.tensor(photograph.image) for photograph in photographs.labelled()]
    return Split(learned, judged + others[::3])


def compare(
    folder: pathlib.Path,
    data: Split,
    recipes: dict[str, tuple[list[str] | None, list[str]]],
    seconds: float,
) -> list[Row]:
    """One row per recipe. folder: for the bundles. recipes: passes and settings, by row."""
    bundles: dict[str, pathlib.Path] = {}
    found: dict[str, tuple[Any, float]] = {}
    for name, (recipe, chosen) in recipes.items():
        print(f"{name} ...", file=sys.stderr)
        bundles[name] = folder / f"{name.replace(' ', '-')}.edgec"
        before = time.process_time()
        report = edgec.build(
            source(data),
            target="x86-64",
            output=bundles[name],
            recipe=recipe,
            settings=chosen,
            verify=False,
        )
        found[name] = report, time.process_time() - before
    speeds = measured_speeds(bundles, data.judged[0], seconds)
    count = len(data.judged)
    return [
        Row(
            model=name,
            agreement=report.agreement,
            standard_error=(report.agreement * (1 - report.agreement) / count) ** 0.5,
            sqnr_db=report.sqnr_db,
            size_mb=bundles[name].stat().st_size / 1e6,
            speed=speeds[name],
            build_cpu_s=cpu_s,
        )
        for name, (report, cpu_s) in found.items()
    ]


def source(data: Split) -> edgec.Source:
    """EfficientNet-Lite0 with its weights, calibrated and judged on the split."""
    return edgec.Source(
        module=models.efficientnet_lite0(),
        example_inputs=(torch.zeros(1, 3, 224, 224),),
        input_names=("image",),
        output_names=("logits",),
        calibration=lambda: ({"image": image} for image in data.learned),
        evaluation=lambda: ({"image": image} for image in data.judged),
        image=photographs.efficientnet_spec(),
        name="efficientnet-lite0",
    )


def measured_speeds(
    bundles: dict[str, pathlib.Path], image: np.ndarray[Any, Any], seconds: float
) -> dict[str, float]:
    """CPU time of float32 over that of each bundle; the reference lies beside the first one."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    reference = next(iter(bundles.values())).with_suffix(".reference.onnx")
    plain = onnxruntime.InferenceSession(reference, options)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("float32", lambda: plain.run(None, {"image": image}))
    ]
    for name, path in bundles.items():
        bundle = edgec_runtime.load(path, threads=1, any_target=True)
        calls.append((name, lambda ours=bundle: ours.run({"image": image})))  # type: ignore[misc]
    timed = interleave(calls, seconds=seconds, max_runs=20_000, clock=time.thread_time)
    medians_ms = {timing.name: timing.median_ms for timing in timed}
    return {name: medians_ms["float32"] / medians_ms[name] for name in bundles}


if __name__ == "__main__":
    main()
