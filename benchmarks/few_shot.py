"""What a language model learns from its prompt, by the kind of its weights.

    python benchmarks/few_shot.py [--rows float32 int8 int4-gptq ...] [--shots 5] [--json]
    python benchmarks/few_shot.py --rows float32 --shots 0     # what it knows without examples

The prompt shows pairs of words of one relation, "Athens -> Greece", and ends in a word that the
model has to find the partner of among four. Relations are capitals, currencies, opposites, past
tenses and ten others, 573 pairs, each asked once; the wrong choices are partners of other words of
the same relation. The model's answer is the likeliest choice: the sum of the log likelihoods of
its tokens. Examples and choices are drawn once, by seed: they are equal for every row.

right: share of right answers and its standard error. nats: mean of -log of the right choice's
share of the choices' likelihood; it moves before answers do. same: share of the answers that
are float32's. gained, lost: answers right here and wrong in float32, and the other way about; z is
(gained - lost) / sqrt(gained + lost), and between -2 and 2 the difference may be chance.

The rows and their files are those of language_models.py. Left out on purpose: chat templates and
answers written out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import language_models  # noqa: E402
from fixtures import language  # noqa: E402
from language_models import KINDS  # noqa: E402
from peers.processes import Peers, Unavailable  # noqa: E402

from edgec.machine import cpu_name  # noqa: E402

CHOICES = 4
BASELINE = "float32"


@dataclass(frozen=True)
class Question:
    """A prompt and the texts that may follow it, one of them right."""

    prompt: str
    choices: Sequence[str]
    right: int


@dataclass(frozen=True)
class Answer:
    """What a model makes of a question. nats: -log of the right choice's share of likelihood."""

    right: bool
    chosen: int
    nats: float


@dataclass(frozen=True)
class Row:
    """One file. same, gained, lost, z: beside the baseline."""

    name: str
    title: str
    reason: str = ""
    right: float | None = None
    error: float | None = None
    nats: float | None = None
    same: float | None = None
    gained: int | None = None
    lost: int | None = None
    z: float | None = None


def main() -> None:
    from transformers import AutoTokenizer

    asked = _arguments()
    work: pathlib.Path = asked.work
    work.mkdir(parents=True, exist_ok=True)
    directory = asked.directory or language.smollm2_directory(work / "smollm2")
    text = language_models.running_text(directory, work, 1)
    questions = drawn(asked.shots, asked.seed)[:: asked.every]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    peers = Peers(asked.peers.resolve(), asked.core)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    answers: dict[str, list[Answer]] = {}
    rows = []
    for name in asked.rows:
        print(f"{KINDS[name].title} ...", file=sys.stderr, flush=True)
        row = Row(name, KINDS[name].title)
        try:
            file = language_models.made(name, directory, text, work, peers)
            answers[name] = answered(name, file, questions, encode, peers)
            rows.append(judged(row, answers[name], answers.get(BASELINE)))
        except Unavailable as error:
            rows.append(replace(row, reason=str(error)))
    if asked.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    print(
        f"{cpu_name()}; {len(questions)} questions, {asked.shots} examples before each; chance: "
        f"{100 / CHOICES:.0f} %, {math.log(CHOICES):.3f} nats"
    )
    print(table(rows))


def drawn(shots: int, seed: int) -> list[Question]:
    """A question for every pair of words."""
    draw = random.Random(seed)
    found = []
    for pairs in language.word_pairs().values():
        for word, right in pairs:
            others = [pair for pair in pairs if pair[0] != word]
            examples = draw.sample(others, shots)
            wrong = sorted({second for _, second in others} - {right})
            choices = [right, *draw.sample(wrong, CHOICES - 1)]
            draw.shuffle(choices)
            shown = "".join(f"{first} -> {second}\n" for first, second in examples)
            texts = [f" {choice}" for choice in choices]
            found.append(Question(f"{shown}{word} ->", texts, choices.index(right)))
    return found


def answered(
    name: str,
    file: pathlib.Path,
    questions: Sequence[Question],
    encode: Callable[[str], list[int]],
    peers: Peers,
) -> list[Answer]:
    """The likeliest choices. Raises Unavailable."""
    process = language_models.opened(name, file, peers)
    found = []
    try:
        for question in questions:
            # apart, so that all choices stand behind the same ids
            prompt, choices = encode(question.prompt), [encode(one) for one in question.choices]
            nats = process.ask(do="choose", prompt=prompt, choices=choices)["nll"]
            chosen = nats.index(min(nats))
            share = 1 / sum(math.exp(nats[question.right] - one) for one in nats)
            found.append(Answer(chosen == question.right, chosen, -math.log(share)))
    finally:
        process.close()
    return found


def judged(row: Row, answers: Sequence[Answer], baseline: Sequence[Answer] | None) -> Row:
    """The row with its figures; beside the baseline, if it is another."""
    count = len(answers)
    right = sum(one.right for one in answers) / count
    row = replace(
        row,
        right=right,
        error=math.sqrt(right * (1 - right) / count),
        nats=sum(one.nats for one in answers) / count,
    )
    if baseline is None or baseline is answers:
        return row
    both = list(zip(answers, baseline, strict=True))
    gained = sum(mine.right and not base.right for mine, base in both)
    lost = sum(base.right and not mine.right for mine, base in both)
    return replace(
        row,
        same=sum(mine.chosen == base.chosen for mine, base in both) / count,
        gained=gained,
        lost=lost,
        z=(gained - lost) / math.sqrt(max(gained + lost, 1)),
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    heads = ["model", "right, %", "nats", "same, %", "gained", "lost", "z"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *map(_line, rows)])


def _line(row: Row) -> str:
    cells = [row.title]
    if row.right is None or row.error is None:
        cells += ["-"] * 6
    else:
        cells += [f"{100 * row.right:.1f} ± {100 * row.error:.1f}", f"{row.nats:.3f}"]
        if row.same is None:
            cells += ["-"] * 4
        else:
            cells += [f"{100 * row.same:.1f}", str(row.gained), str(row.lost), f"{row.z:.1f}"]
    return f"| {' | '.join(cells)} |{' ' + row.reason if row.reason else ''}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--directory", type=pathlib.Path, help="Hugging Face; default: SmolLM2")
    parser.add_argument("--shots", type=int, default=5, help="pairs of words in a prompt")
    parser.add_argument("--every", type=int, default=1, help="of so many questions one is asked")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--core", default="0", help="core that the engines are bound to")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "build" / "language")
    parser.add_argument("--peers", type=pathlib.Path, default=ROOT / ".peers")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    asked = parser.parse_args()
    if asked.directory and any(KINDS[name].engine == "llama.cpp" for name in asked.rows):
        parser.error("llama.cpp's files are made of the fixture: leave its --rows out")
    return asked


if __name__ == "__main__":
    main()
