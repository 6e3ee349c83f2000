"""Does a language model write elsewhere what it writes here, token by token?

    edgec devices install cortex-a76 chromium-wasm             # once; Chromium is yours to install
    python benchmarks/decoder_devices.py [--on cortex-a72 cortex-a76 page] [--work DIR] [--json]

The fixture SmolLM2-135M-Instruct, built for arm64 in float32 and as the target does it by default,
answers on emulated CPUs; built for web by default and in 4 bits, it answers in the page of
examples/web, in Chromium. Greedy answers to two questions, as a chat, are compared with those of
edgec_runtime in this process, on the same bundle and one thread. first: seconds to the first token,
on an emulated CPU from the start of its Python, in the page from the question. step: milliseconds
from one token to the next, mean; an emulator's say nothing about the CPU that it stands for.
Exit code 1 if one answer differs.

Left out on purpose: sampling, and what these devices lose against float32.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/devices")]

import web_page  # noqa: E402
from fixtures import language  # noqa: E402

import edgec  # noqa: E402
import edgec_runtime  # noqa: E402
from edgec.devices.answer import answer_tokens  # noqa: E402

PAGE = "page"
PROMPTS = ("Why is the sky blue?", "Explain how a refrigerator works, step by step.")
RECIPES = {
    "float32": "cleanup,fuse,lower",
    "default": None,
    "int4": "cleanup,fuse,quantize-weights,lower",
}
_GRID = ("bits=4", "scheme=asymmetric", "block_size=32", "embedding_bits=4", "method=rtn")


@dataclass(frozen=True)
class Row:
    """One answer. same: tokens equal to those of this process, from the first on. MB: 1e6 bytes."""

    bundle: str
    mb: float
    device: str
    prompt_tokens: int
    tokens: int
    same: int
    first_s: float
    step_ms: float


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--on", nargs="+", default=["cortex-a72", "cortex-a76", PAGE])
    parser.add_argument("--tokens", type=int, default=40, help="of each answer")
    parser.add_argument("--work", type=pathlib.Path, help="folder that keeps the bundles")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    asked = parser.parse_args()
    rows = []
    if not asked.json:
        print("| bundle | MB | device | prompt | tokens as here | first s | step ms |")
        print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        work = asked.work or pathlib.Path(folder)
        for device in asked.on:
            target, kinds = (
                ("web", ("default", "int4"))
                if device == PAGE
                else ("arm64", ("float32", "default"))
            )
            for kind in kinds:
                bundle = built(kind, target, work)
                for row in answers(bundle, f"{target}, {kind}", device, asked.tokens):
                    rows.append(row)
                    print(json.dumps(asdict(row)) if asked.json else _line(row), flush=True)
    return 0 if all(row.same == row.tokens for row in rows) else 1


def built(kind: str, target: str, work: pathlib.Path) -> pathlib.Path:
    """The bundle, from the folder if it was made before."""
    file = work / f"smollm2-{kind}.{target}.edgec"
    if not file.is_file():
        edgec.build(
            language.smollm2_directory(work / "smollm2"),
            target=target,
            output=file,
            recipe=RECIPES[kind],
            settings=[f"quantize-weights.{one}" for one in _GRID] if kind == "int4" else [],
            keep_reference=False,
            verify=False,
        )
    return file


def answers(bundle: pathlib.Path, title: str, device: str, tokens: int) -> Any:
    """A row for each prompt."""
    model = edgec_runtime.load(bundle, threads=1, any_target=True)
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        expected = model.generate(chat, max_new_tokens=tokens, temperature=0)
        if device == PAGE:
            found, first_s, step_ms = in_page(bundle, prompt, tokens)
        else:
            found, first_s, step_ms = emulated(bundle, device, model.text.encode_chat(chat), tokens)
        pairs = list(zip(expected.tokens, found, strict=False))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        size_mb = bundle.stat().st_size / 1e6
        counts = (expected.prompt_tokens, max(len(expected.tokens), len(found)), same)
        yield Row(title, size_mb, device, *counts, first_s, step_ms)


def emulated(
    bundle: pathlib.Path, device: str, prompt: Sequence[int], tokens: int
) -> tuple[list[int], float, float]:
    """Tokens, seconds to the first, milliseconds a step."""
    options: Any = {"max_new_tokens": tokens, "temperature": 0}
    started, found, times = time.perf_counter(), [], []
    for token in answer_tokens(device, bundle, prompt, options=options, threads=1):
        found.append(token)
        times.append(time.perf_counter() - started)
    return found, times[0], 1e3 * (times[-1] - times[0]) / max(len(times) - 1, 1)


def in_page(bundle: pathlib.Path, prompt: str, tokens: int) -> tuple[list[int], float, float]:
    """Tokens, seconds to the first, milliseconds a step."""
    told = web_page.chatted(bundle, [prompt], longest=tokens)
    if told["state"] != "ready" or told["problems"]:
        sys.exit(f"the page failed: {told['status']} {told['problems']}")
    [answer] = told["answers"]
    found, first_s = answer["tokens"], answer["first"]
    return found, first_s, 1e3 * (answer["seconds"] - first_s) / max(len(found) - 1, 1)


def _line(row: Row) -> str:
    cells = (
        row.bundle,
        f"{row.mb:.1f}",
        row.device,
        f"{row.prompt_tokens} tokens",
        f"{row.same} of {row.tokens}",
        f"{row.first_s:.1f}",
        f"{row.step_ms:.0f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
