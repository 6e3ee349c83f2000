"""A long conversation with a language model: what memory it takes, and whether a step is slow.

    python benchmarks/long_context.py [--bundle FILE] [--context 4096] [--prompt 512] [--json]
    python benchmarks/long_context.py --cpu-time        # while other programs run

write: a prompt of --prompt tokens, then one token after another until the context is full.
resident: MB (1e6 bytes) above the loaded model, which has answered once. cache: MB that keys and
values of so many tokens take, by the shapes of the bundle. Steps are wall time of the whole loop,
choice and text of the token included; a step grows with the tokens before it, so that the 99th
percentile stands beside the median of the same 256 steps and beside that of all. --cpu-time
takes the CPU time of the process instead, in which a step that waits does not show.
read: a prompt that fills the context, and one token: the largest resident size meanwhile, by the
number of tokens that one call reads.

The text is Wikipedia's, the answer goes on after the token that would end it, and room is made for
the model's whole context. Each measurement is a process of its own. By default the bundle is
SmolLM2-135M-Instruct in int4, as benchmarks/language_models.py builds its row int4-rtn, which is
taken from there if it was built. Linux only: resident sizes come from /proc.

Left out on purpose: batches, other engines.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import numpy as np  # noqa: E402

import edgec_runtime  # noqa: E402
from edgec_runtime.bundle import Bundle  # noqa: E402

WINDOW = 256  # steps
CHUNKS = (128, 512)  # tokens of a prompt that one call reads; 128 is the default
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Window:
    """Some steps in a row. tokens: before the last of them."""

    tokens: int
    resident_mb: float
    cache_mb: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Written:
    """An answer that fills the context. every: percentiles of all steps."""

    loaded_mb: float
    prompt_resident_mb: float
    windows: Sequence[Window]
    every: tuple[float, float]


@dataclass(frozen=True)
class Read:
    """A prompt that fills the context."""

    chunk: int
    peak_mb: float
    cache_mb: float
    tokens_per_s: float


def main() -> None:
    asked = _arguments()
    if asked.measure:
        given = json.loads(asked.measure)
        found = write(**given) if "new" in given else read(**given)
        print(json.dumps(asdict(found)))
        return
    bundle = asked.bundle or built(asked.work)
    prompt = text_tokens(bundle, asked.context)
    path = {"path": str(bundle), "threads": asked.threads, "cpu_time": asked.cpu_time}
    new = asked.context - asked.prompt
    raw = _apart({**path, "prompt": prompt[: asked.prompt], "new": new})
    written = Written(**{**raw, "windows": [Window(**one) for one in raw["windows"]]})
    reads = [Read(**_apart({**path, "prompt": prompt[:-1], "chunk": chunk})) for chunk in CHUNKS]
    if asked.json:
        print(json.dumps({"write": asdict(written), "read": [asdict(one) for one in reads]}))
    else:
        print(report(bundle, asked, written, reads))


def built(work: pathlib.Path) -> pathlib.Path:
    """SmolLM2-135M-Instruct in int4, from the folder if it was made before."""
    import language_models
    from fixtures import language
    from peers.processes import Peers

    work.mkdir(parents=True, exist_ok=True)
    directory = language.smollm2_directory(work / "smollm2")
    unused = work / "unused"  # a row of rtn reads no text
    text = language_models.Text([], unused, unused)
    return language_models.made("int4-rtn", directory, text, work, Peers(work, "0"))


def text_tokens(bundle: pathlib.Path, count: int) -> list[int]:
    """The first tokens of running text."""
    from fixtures import language

    text = edgec_runtime.load(bundle, mapped=True).text
    return text.encode(language.wikipedia(12 * count))[:count]


def write(path: str, threads: int, cpu_time: bool, prompt: list[int], new: int) -> Written:
    """Answer a prompt with ``new`` tokens, in this process."""
    clock = time.process_time if cpu_time else time.perf_counter
    model, token_mb = opened(path, threads), token_megabytes(path)
    loaded = resident_mb()
    starts, sizes = [], []
    run = model.run_bound

    def watched(binding: Any) -> None:
        starts.append(clock())
        run(binding)
        sizes.append(resident_mb() - loaded)

    watching = copy.copy(model)
    watching.run_bound = watched  # type: ignore[method-assign]
    stream, reading = watching.generate(prompt, stream=True, temperature=0), 0
    while len(starts) - reading < new + 1:
        next(stream)
        reading = reading or len(starts)  # runs that read the prompt; then one a token
    steps = 1e3 * np.diff(starts)[reading:]
    windows = []
    for first in range(0, len(steps), WINDOW):
        taken = steps[first : first + WINDOW]
        tokens = len(prompt) + first + len(taken)
        p50, p99 = np.percentile(taken, [50, 99]).tolist()
        size = sizes[reading + first + len(taken) - 1]
        windows.append(Window(tokens, size, tokens * token_mb, p50, p99))
    p50, p99 = np.percentile(steps, [50, 99]).tolist()
    return Written(loaded, sizes[reading - 1], windows, (p50, p99))


def read(path: str, threads: int, cpu_time: bool, prompt: list[int], chunk: int) -> Read:
    """Read a prompt in this process, ``chunk`` tokens a call."""
    clock = time.process_time if cpu_time else time.perf_counter
    model = opened(path, threads, chunk)
    loaded = resident_mb()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the largest size so far
    started = clock()
    model.generate(prompt, max_new_tokens=1, temperature=0)
    speed = len(prompt) / (clock() - started)
    return Read(chunk, peak_mb() - loaded, (len(prompt) + 1) * token_megabytes(path), speed)


def opened(path: str, threads: int, chunk: int | None = None) -> edgec_runtime.Model:
    """A model whose answers no token ends; it has answered once."""
    model = edgec_runtime.load(path, threads=threads)
    known = model.manifest.generation
    if known is None:
        raise SystemExit(f"{path}: it is no language model; give one with --bundle")
    generation = replace(known, eos=(), prompt_chunk=chunk or known.prompt_chunk)
    manifest = replace(model.manifest, generation=generation)
    size = model.path.stat().st_size
    changed = edgec_runtime.Model(Bundle(model.path, size, manifest), model.session, threads)
    changed.generate([1, 2, 3, 4], max_new_tokens=4)
    return changed


def token_megabytes(path: str) -> float:
    """What keys and values of one token take."""
    several = edgec_runtime.memory_needed(path, tokens=1000).cache
    return several / 1000 / 1e6


def resident_mb() -> float:
    """Memory of this process."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * _PAGE / 1e6


def peak_mb() -> float:
    """The largest resident size since ``clear_refs`` was written."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def _apart(given: dict[str, Any]) -> dict[str, Any]:
    """The result of a measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", json.dumps(given)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def report(
    bundle: pathlib.Path, asked: argparse.Namespace, written: Written, reads: Sequence[Read]
) -> str:
    """The measurements as Markdown."""
    from edgec.machine import cpu_name

    lines = [
        f"{cpu_name()}; {bundle.name}, {asked.threads} thread(s), "
        f"{'CPU' if asked.cpu_time else 'wall'} time; "
        f"loaded: {written.loaded_mb:.0f} MB; {asked.prompt} tokens read: "
        f"{written.prompt_resident_mb:.0f} MB above it",
        "",
        "| tokens | resident MB | cache MB | p50 ms | p99 ms | p99 / p50 |",
        "|---|---|---|---|---|---|",
    ]
    for one in written.windows:
        lines.append(
            f"| {one.tokens} | {one.resident_mb:.0f} | {one.cache_mb:.0f} | {one.p50_ms:.2f} "
            f"| {one.p99_ms:.2f} | {one.p99_ms / one.p50_ms:.2f} |"
        )
    p50, p99 = written.every
    worst = max(one.p99_ms / one.p50_ms for one in written.windows)
    middle = statistics.median(one.p99_ms / one.p50_ms for one in written.windows)
    first, last = written.windows[0], written.windows[-1]
    grown = last.resident_mb - first.resident_mb
    lines += [
        "",
        f"all steps: p50 {p50:.2f} ms, p99 {p99:.2f} ms, ratio {p99 / p50:.2f}; "
        f"windows of {WINDOW}: ratio {middle:.2f} in the middle, {worst:.2f} at worst",
        f"from {first.tokens} to {last.tokens} tokens: {grown:.1f} MB more resident, the cache "
        f"{last.cache_mb - first.cache_mb:.1f} MB",
        "",
        "| tokens a call | peak MB above loaded | cache MB | tokens a second |",
        "|---|---|---|---|",
    ]
    for read_ in reads:
        lines.append(
            f"| {read_.chunk} | {read_.peak_mb:.0f} | {read_.cache_mb:.0f} "
            f"| {read_.tokens_per_s:.0f} |"
        )
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=pathlib.Path, help="default: SmolLM2 in int4")
    parser.add_argument("--context", type=int, default=4096, help="tokens of prompt and answer")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="in place of wall time")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "build" / "language")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
