"""How much faster does a language model write if a smaller one guesses for it?

    python benchmarks/draft.py model.edgec draft.edgec [--guesses 2 4 6] [--tokens 128]
                               [--threads 1] [--draft-threads 1] [--rounds 3]
                               [--temperature 0] [--json]

Five questions as a chat, answered by the model alone, by the draft alone, and by the model with
so many guesses at once. They take turns on every question; a time is the whole answer's, prompt
included, the median of the rounds. as alone: answers that are those of the model alone, token by
token, in tokens. accepted: guesses that cost no run. speed: over the
model alone. Exit code 1 if an answer differs.

Left out on purpose: other engines.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from decoder import ASKED

import edgec_runtime

_ALONE, _DRAFT = "model alone", "draft alone"


@dataclass(frozen=True)
class Row:
    """One way to write all answers. tokens_per_second: of them, over the sum of their times."""

    name: str
    tokens: int
    as_alone: int | None
    accepted: float | None
    tokens_per_second: float
    speed: float


def main() -> int:
    asked = _arguments()
    rows = measured(asked)
    if asked.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        draft = asked.draft.name
        print(
            f"{asked.model.name} on {asked.threads} thread(s), draft {draft} on "
            f"{asked.draft_threads}, wall time\n"
        )
        print("| | tokens as alone | accepted | t/s | speed |")
        print("|---|---|---|---|---|")
        for row in rows:
            same = "" if row.as_alone is None else f"{row.as_alone:,} of {row.tokens:,}"
            accepted = "" if row.accepted is None else f"{row.accepted:.0%}"
            print(
                f"| {row.name} | {same} | {accepted} | {row.tokens_per_second:.1f} "
                f"| {row.speed:.2f} |"
            )
    return 1 if any(row.as_alone not in (None, row.tokens) for row in rows) else 0


def measured(asked: argparse.Namespace) -> list[Row]:
    """A row for the model, for the draft, and for each number of guesses."""
    model = edgec_runtime.load(asked.model, threads=asked.threads, any_target=True)
    draft = edgec_runtime.load(asked.draft, threads=asked.draft_threads, any_target=True)
    ways: dict[str, tuple[edgec_runtime.Model, dict[str, Any]]] = {
        _ALONE: (model, {}),
        _DRAFT: (draft, {}),
    }
    for count in asked.guesses:
        ways[f"{count} guesses at once"] = (model, {"draft": draft, "draft_tokens": count})
    options = {"max_new_tokens": asked.tokens, "temperature": asked.temperature}
    times: dict[str, float] = dict.fromkeys(ways, 0.0)
    answers: dict[str, list[Any]] = {name: [] for name in ways}
    for question in ASKED:
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(asked.rounds):
            names = list(ways)[:: -1 if turn % 2 else 1]
            for name in names:
                one, extra = ways[name]
                chat = [{"role": "user", "content": question}]
                start = time.perf_counter()
                answer = one.generate(chat, **options, **extra)
                taken[name].append(time.perf_counter() - start)
                if turn == 0:
                    answers[name].append(answer)
        for name in ways:
            times[name] += statistics.median(taken[name])
    return [_row(name, answers, times) for name in ways]


def _row(name: str, answers: dict[str, list[Any]], times: dict[str, float]) -> Row:
    given, alone = answers[name], answers[_ALONE]
    tokens = sum(len(one.tokens) for one in given)
    guessed = sum(one.guessed_tokens for one in given)
    same, share = None, None
    if name not in (_ALONE, _DRAFT):
        pairs = zip(given, alone, strict=True)
        same = sum(len(one.tokens) for one, other in pairs if one.tokens == other.tokens)
        share = sum(one.accepted_tokens for one in given) / max(guessed, 1)
    rate = tokens / times[name]
    base = sum(len(one.tokens) for one in alone) / times[_ALONE]
    return Row(name, tokens, same, share, rate, rate / base)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=pathlib.Path, help="a bundle")
    parser.add_argument("draft", type=pathlib.Path, help="a smaller one of the same vocabulary")
    parser.add_argument("--guesses", type=int, nargs="+", default=[2, 4, 6], help="at once")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draft-threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
