"""Is a bundle's greedy answer that of transformers, token by token?

    python benchmarks/decoder.py [--directory DIR] [--bundle FILE] [--tokens 200] [--json]

Builds a float32 bundle of a Hugging Face directory (by default the fixture SmolLM2-135M) and
lets it and transformers answer ten prompts greedily, five of them as a chat. The table gives the
tokens of each answer and how many of them, from the first on, are the same. Exit code 1 if one
answer differs. With --bundle, a bundle that was built before from the same directory.

Left out on purpose: speed and other engines.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

import torch  # noqa: E402
from fixtures import language  # noqa: E402

import edgec  # noqa: E402
import edgec_runtime  # noqa: E402

CONTINUED = (
    "Once upon a time, in a village by the sea, there lived",
    "The history of the steam engine begins with",
    "def fibonacci(n):\n",
    "Dear Sir, I am writing to you because",
    "1, 1, 2, 3, 5, 8, 13,",
)
ASKED = (
    "Write a story about a robot that learns to paint.",
    "Explain how a refrigerator works, step by step.",
    "List the planets of the solar system and say something about each of them.",
    "What should I see in Rome in three days? Make a plan.",
    "Write a letter to a friend about your holidays in the mountains.",
)


@dataclass(frozen=True)
class Row:
    """One prompt: tokens of the answer in transformers, and those the same from the first on."""

    prompt: str
    tokens: int
    same: int
    equal: bool


def compare(bundle: pathlib.Path, directory: pathlib.Path, tokens: int, which: list[int]) -> Any:
    """A row for each prompt, one answer after the other."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    model = edgec_runtime.load(bundle, any_target=True)
    prompts = [*((text, tokenizer(text).input_ids) for text in CONTINUED)]
    for text in ASKED:
        chat = [{"role": "user", "content": text}]
        prompts.append((text, tokenizer.apply_chat_template(chat, add_generation_prompt=True)))
    for index in which:
        text, ids = prompts[index]
        expected = language.greedy(reference, ids, tokens)
        asked: Any = text if text in CONTINUED else [{"role": "user", "content": text}]
        answer = list(model.generate(asked, max_new_tokens=tokens, temperature=0).tokens)
        same = next(
            (i for i, (a, b) in enumerate(zip(expected, answer, strict=False)) if a != b),
            min(len(expected), len(answer)),
        )
        yield Row(text, len(expected), same, expected == answer)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--directory", type=pathlib.Path, help="of a causal language model")
    parser.add_argument("--bundle", type=pathlib.Path, help="built from it; else it is built")
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--only", type=int, nargs="+", default=list(range(10)), help="prompts, 0-9")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        directory = asked.directory or language.smollm2_directory(work / "smollm2")
        bundle = asked.bundle
        if bundle is None:
            report = edgec.build(
                directory,
                target="x86-64",
                output=work / "model.edgec",
                recipe="cleanup,lower",
                keep_reference=False,
                verify=False,
            )
            bundle = pathlib.Path(str(report.bundle_path))
        rows = []
        for row in compare(bundle, directory, asked.tokens, asked.only):
            rows.append(row)
            if asked.json:
                print(json.dumps(asdict(row)), flush=True)
            else:
                mark = "equal" if row.equal else "DIFFERS"
                print(f"{row.same:5d} of {row.tokens:5d}  {mark:8s} {row.prompt!r:.70}", flush=True)
    equal = sum(row.equal for row in rows)
    if not asked.json:
        total, same = sum(row.tokens for row in rows), sum(row.same for row in rows)
        print(f"{equal} of {len(rows)} answers are equal; {same} of {total} tokens")
    return 0 if equal == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
