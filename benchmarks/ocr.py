"""The text recogniser PP-OCRv4 in int8: lines read exactly, CPU time, size, cost of the build.

    python benchmarks/ocr.py [--lines 1000] [--seed 7001] [--calibration-seed 11] [--json]

Rows: the float32 file in stock ONNX Runtime; ``edgec build`` with 64 calibration lines and
nothing else; the same with ``recover`` on the same 64 lines. Lines are drawn afresh from the
seeds (tests/fixtures/text_lines.py); a line counts if every character is right. The standard
error beside a figure is of that figure alone: the rows read the same lines, so their
differences are surer than that. Calls take turns, one thread each, and the median of their CPU
time is taken, so that other programs on the machine disturb all alike.

Left out on purpose: other tools (benchmarks/quantization.py), other line widths.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
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
from fixtures import models, text_lines  # noqa: E402

import edgec  # noqa: E402
import edgec_runtime  # noqa: E402

Call = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]  # lines -> probabilities

CALIBRATION_LINES = 64
RECIPES: dict[str, list[str] | None] = {
    "edgec build": None,
    "edgec build with recover": ["cleanup", "fuse", "quantize-static", "recover", "lower"],
}


@dataclass(frozen=True)
class Row:
    """One model. exact: % of the lines. ratio: its CPU time over float32's. 1 MB = 1e6 bytes."""

    model: str
    exact: float
    standard_error: float
    cpu_ms: float
    ratio: float
    size_mb: float
    build_cpu_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lines", type=int, default=1000, help="lines to read")
    parser.add_argument("--seed", type=int, default=7001, help="of the lines to read")
    parser.add_argument("--calibration-seed", type=int, default=11, help="of the 64 lines")
    parser.add_argument("--rounds", type=int, default=200, help="timed calls of each model")
    parser.add_argument("--target", default="x86-64")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(
            pathlib.Path(folder),
            lines=text_lines.render(asked.lines, asked.seed),
            calibration=text_lines.render(CALIBRATION_LINES, asked.calibration_seed),
            target=asked.target,
            rounds=asked.rounds,
        )
    if asked.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print_table(rows, asked.lines)


def compare(
    folder: pathlib.Path,
    *,
    lines: text_lines.Lines,
    calibration: text_lines.Lines,
    target: str = "x86-64",
    rounds: int = 200,
) -> list[Row]:
    """The rows, float32 first. folder: for the bundles."""
    source = models.ocr_recogniser_path()
    data = folder / "lines.npz"
    np.savez(data, x=calibration.images)
    calls: dict[str, Call] = {"float32": _stock(source)}
    sizes_mb = {"float32": source.stat().st_size / 1e6}
    build_cpu_s = {"float32": 0.0}
    for name, recipe in RECIPES.items():
        print(f"{name} ...", file=sys.stderr)
        bundle = folder / f"{name.replace(' ', '-')}.edgec"
        before = time.process_time()
        edgec.build(source, target=target, output=bundle, calibration=data, recipe=recipe)
        build_cpu_s[name] = time.process_time() - before
        sizes_mb[name] = bundle.stat().st_size / 1e6
        calls[name] = _bundle(bundle)
    shares = {name: exact_share(call, lines) for name, call in calls.items()}
    cpu_ms = _medians_cpu_ms(calls, lines.images[:1], rounds)
    count = len(lines.texts)
    return [
        Row(
            model=name,
            exact=100 * shares[name],
            standard_error=100 * (shares[name] * (1 - shares[name]) / count) ** 0.5,
            cpu_ms=cpu_ms[name],
            ratio=cpu_ms[name] / cpu_ms["float32"],
            size_mb=sizes_mb[name],
            build_cpu_s=build_cpu_s[name],
        )
        for name in calls
    ]


def exact_share(call: Call, lines: text_lines.Lines) -> float:
    """Share of the lines of which every character is read as it was drawn."""
    known = text_lines.characters(models.ocr_recogniser_path())
    read = [text_lines.decode(call(image[None]), known)[0] for image in lines.images]
    return statistics.fmean(a == b for a, b in zip(read, lines.texts, strict=True))


def print_table(rows: list[Row], lines: int) -> None:
    print(f"{'':26}{'exact %':>14}{'CPU ms':>9}{'ratio':>8}{'MB':>8}{'build CPU s':>13}")
    for row in rows:
        exact = f"{row.exact:.1f} ± {row.standard_error:.1f}"
        build = f"{row.build_cpu_s:.0f}" if row.build_cpu_s else "-"
        print(
            f"{row.model:26}{exact:>14}{row.cpu_ms:>9.2f}{row.ratio:>8.2f}"
            f"{row.size_mb:>8.2f}{build:>13}"
        )
    print(f"{lines} lines, {CALIBRATION_LINES} calibration lines, 1 thread")


def _stock(path: pathlib.Path) -> Call:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: np.asarray(session.run(None, {name: images})[0])


def _bundle(path: pathlib.Path) -> Call:
    model = edgec_runtime.load(path, any_target=True, threads=1)
    return lambda images: np.asarray(next(iter(model(x=images).values())))


def _medians_cpu_ms(
    calls: dict[str, Call], images: np.ndarray[Any, Any], rounds: int
) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 2):
        names = list(calls) if round_ % 2 else list(reversed(calls))
        for name in names:
            before = time.process_time()
            calls[name](images)
            if round_ >= 2:  # the first calls allocate
                taken[name].append((time.process_time() - before) * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


if __name__ == "__main__":
    main()
