"""EfficientNet-Lite0 in int8: ONNX Runtime's own tools against edgec, side by side.

    python benchmarks/compare_today.py [--seconds 60] [--json]

Every tool starts from the same fp32 .onnx file and the same 102 calibration images; every
result is judged on the same labelled photographs: 201, or the demo's 40 without the Debian
packages of ``tests/fixtures/install.py --debian``. Calls take turns, one thread each, and
CPU time per call is taken, so that other programs on the machine disturb all alike.

top-1 is no estimate of ImageNet accuracy (standard error 2.8 points on 201); agreement with
fp32, image by image, is the figure that compares. Build is the CPU time of the tool; that
of edgec includes its checks, its judgement and its report.

Left out on purpose: tools of other runtimes (OpenVINO, LiteRT, ExecuTorch).
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402

import edgec  # noqa: E402
import edgec_runtime  # noqa: E402

Call = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]  # image -> logits


@dataclass(frozen=True)
class Row:
    """One tool. size_mb: 1 MB = 1e6 bytes. ratio: CPU time of fp32 over this one's."""

    tool: str
    size_mb: float
    top1: float
    agreement: float
    sqnr_db: float
    cpu_ms: float
    ratio: float
    build_cpu_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="time for all latencies")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, images = compare(pathlib.Path(folder), asked.seconds)
    if asked.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print_table(rows, images)


def compare(folder: pathlib.Path, seconds: float) -> tuple[list[Row], int]:
    """One row per tool, fp32 first, and the number of photographs judged on."""
    from fixtures import photographs

    fp32 = folder / "fp32.onnx"
    calls: dict[str, Call] = {}
    files: dict[str, pathlib.Path] = {}
    build_s: dict[str, float] = {}
    for tool, make in TOOLS.items():
        print(f"{tool} ...", file=sys.stderr)
        before = time.process_time()
        files[tool] = make(fp32, folder)
        build_s[tool] = time.process_time() - before
        calls[tool] = opened(files[tool])

    labelled = list(photographs.labelled())
    tensors = [photographs.tensor(item.image) for item in labelled]
    logits = {t: np.concatenate([call(x) for x in tensors]) for t, call in calls.items()}
    cpu_ms = interleaved_cpu_ms(calls, tensors[0], seconds)

    reference = logits["fp32"]
    rows = []
    for tool, values in logits.items():
        noise = float(((values - reference) ** 2).sum())
        guesses = values.argmax(1)
        rows.append(
            Row(
                tool=tool,
                size_mb=files[tool].stat().st_size / 1e6,
                top1=statistics.fmean(
                    int(guess) in item.classes
                    for guess, item in zip(guesses, labelled, strict=True)
                ),
                agreement=float((guesses == reference.argmax(1)).mean()),
                sqnr_db=10 * float(np.log10((reference**2).sum() / noise)) if noise else np.inf,
                cpu_ms=cpu_ms[tool],
                ratio=cpu_ms["fp32"] / cpu_ms[tool],
                build_cpu_s=build_s[tool],
            )
        )
    return rows, len(labelled)


def export_fp32(fp32: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The model as torch exports it."""
    import efficientnet_lite0
    import torch

    source = efficientnet_lite0.build()
    torch.onnx.export(
        source.module,
        source.example_inputs,
        fp32,
        dynamo=True,
        external_data=False,
        input_names=["image"],
        output_names=["logits"],
        verbose=False,
    )
    return fp32


def ort_static_default(fp32: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """quantize_static as it stands in the documentation: nothing but the required arguments."""
    from onnxruntime.quantization import quantize_static

    made = folder / "static-default.onnx"
    quantize_static(prepared(fp32, folder), made, reader())
    return made


def ort_static_best(fp32: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The settings that suit this model and x86-64: per channel, u8 activations, s8 weights."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    made = folder / "static-best.onnx"
    quantize_static(
        prepared(fp32, folder),
        made,
        reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return made


def ort_dynamic(fp32: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """quantize_dynamic as it stands in the documentation."""
    from onnxruntime.quantization import quantize_dynamic

    made = folder / "dynamic.onnx"
    quantize_dynamic(prepared(fp32, folder), made)
    return made


def edgec_x86_64(fp32: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """edgec build fp32.onnx --target x86-64, everything else at its default."""
    made = folder / "model.x86-64.edgec"
    edgec.build(fp32, target="x86-64", output=made, calibration=calibration)
    return made


TOOLS: Mapping[str, Callable[[pathlib.Path, pathlib.Path], pathlib.Path]] = {
    "fp32": export_fp32,
    "ORT quantize_dynamic": ort_dynamic,
    "ORT quantize_static, defaults": ort_static_default,
    "ORT quantize_static, per-channel U8S8 QDQ": ort_static_best,
    "edgec, target x86-64": edgec_x86_64,
}


def calibration() -> Iterator[dict[str, Any]]:
    import efficientnet_lite0

    return efficientnet_lite0.calibration()


def reader() -> Any:
    """The calibration images as quantize_static wants them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        feeds = calibration()

        def get_next(self) -> Any:
            return next(self.feeds, None)

    return Reader()


def prepared(fp32: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The file after quant_pre_process, which ONNX Runtime asks for before quantizing."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    made = folder / "prepared.onnx"
    quant_pre_process(fp32, made)
    return made


def opened(file: pathlib.Path) -> Call:
    """The file in ONNX Runtime, or the bundle in edgec's runtime, on one thread."""
    if file.suffix == ".edgec":
        model = edgec_runtime.load(file, threads=1)
        return lambda image: model(image=image)["logits"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda image: np.asarray(session.run(None, {"image": image})[0])


def interleaved_cpu_ms(
    calls: Mapping[str, Call], image: np.ndarray[Any, Any], seconds: float
) -> dict[str, float]:
    """Median CPU milliseconds of a call, the calls taking turns for ``seconds``."""
    taken: dict[str, list[float]] = {tool: [] for tool in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken["fp32"]) < 20:
        for tool, call in calls.items():
            before = time.thread_time()
            call(image)
            taken[tool].append((time.thread_time() - before) * 1e3)
    return {tool: statistics.median(times) for tool, times in taken.items()}


def print_table(rows: list[Row], images: int) -> None:
    from edgec.machine import cpu_name

    print("| | size | top-1 | agrees with fp32 | SQNR | speed, fp32 = 1 | build, CPU |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        sqnr = f"{row.sqnr_db:.1f} dB" if np.isfinite(row.sqnr_db) else "-"
        print(
            f"| {row.tool} | {row.size_mb:.2f} MB | {row.top1:.3f} | {row.agreement:.1%} "
            f"| {sqnr} | {row.ratio:.2f} | {row.build_cpu_s:.0f} s |"
        )
    fp32 = next(row for row in rows if row.tool == "fp32")
    versions = f"onnxruntime {onnxruntime.__version__}, edgec {edgec.__version__}"
    print(f"\n{images} photographs; {cpu_name()}, 1 thread, fp32 takes {fp32.cpu_ms:.1f} ms of")
    print(f"CPU time; median of interleaved calls; {versions}.")


if __name__ == "__main__":
    main()
