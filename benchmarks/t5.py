"""A T5 that spells out how words sound: is a bundle's answer that of transformers, and how good?

    python benchmarks/t5.py [--words 400] [--epochs 3] [--directory DIR] [--json]

There are no weights of a T5 in any package, so a small one is trained here: a word's letters in,
its phonemes out, on the dictionary of the fixture cmudict (1.2 million parameters, three layers
each side, gated feed-forward layers and relative positions as T5 1.1 has them). ``HELD_OUT`` words,
drawn with a fixed seed, are never learned from: no pronunciation of theirs is among the examples.
The trained model is saved as transformers does; ``--directory`` keeps it for the next time.

Two bundles for x86-64 are built of that directory: float32 with the target's kernels, and the
target's own recipe (int8), calibrated on learned words. transformers and both bundles pronounce
the first ``--words`` held-out words, in turns, one word at a time: phoneme error rate and word
accuracy against the nearest of a word's pronunciations, and the share of answers that are
transformers' token by token. Exit code 1 if one answer of float32 is not.

Times are CPU time of whole answers on one thread, the ratio that of float32's sum to a row's own;
under load the ratios hold, the times do not. Left out on purpose: other engines, batches.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from fixtures.pronunciation import Word, words  # noqa: E402
from whisper import build  # noqa: E402

import edgec_runtime  # noqa: E402

HELD_OUT = 2000  # words of 110,000 that nothing is learned from
CALIBRATION = 64  # of the learned words
BATCH, RATE = 256, 3e-3  # examples of a step, peak of the learning rate
TOKENS = 32  # of an answer at most; the longest pronunciation has 20
PAD, END = 0, 1
IGNORED = -100  # no label, as in torch's cross entropy
Answer = Callable[[str], list[int]]


@dataclass(frozen=True)
class Row:
    """One way to answer. same: share of the answers that are those of transformers, in %."""

    model: str
    megabytes: float
    phoneme_error_rate: float
    word_accuracy: float
    same: float
    cpu_ms: float
    speedup: float


@dataclass
class Tally:
    """What one has answered so far."""

    errors: int = 0
    phonemes: int = 0
    right: int = 0
    same: int = 0
    seconds: float = 0.0


def split(known: Sequence[Word]) -> tuple[list[Word], list[Word]]:
    """Words to learn from, and the held-out ones in the order of their draw."""
    drawn = np.random.default_rng(0).permutation(len(known)).tolist()
    return [known[i] for i in drawn[HELD_OUT:]], [known[i] for i in drawn[:HELD_OUT]]


def make_tokenizer(known: Sequence[Word]) -> Any:
    """Letters and phonemes as tokens; a text falls into its letters, and an end follows."""
    import tokenizers
    import transformers

    letters = sorted({letter for word in known for letter in word.letters})
    phonemes = sorted({p for word in known for said in word.pronunciations for p in said})
    names = ["<pad>", "</s>", "<unk>", *letters, *phonemes]
    vocabulary = {name: number for number, name in enumerate(names)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.normalizer = tokenizers.normalizers.Lowercase()
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", END)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def trained(directory: pathlib.Path, learned: Sequence[Word], epochs: int) -> pathlib.Path:
    """A directory with the trained T5, filled on the first call and taken as it is afterwards."""
    if (directory / "config.json").is_file():
        return directory
    import transformers

    tokenizer = make_tokenizer(learned)
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            decoder_start_token_id=PAD,
            pad_token_id=PAD,
            eos_token_id=END,
        )
    )
    codes = tokenizer.get_vocab()
    examples = [
        ([*(codes[letter] for letter in word.letters), END], [*(codes[p] for p in said), END])
        for word in learned
        for said in word.pronunciations
    ]
    learn(model, examples, epochs)
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def learn(model: Any, examples: Sequence[tuple[list[int], list[int]]], epochs: int) -> None:
    """Train with AdamW, the rate rising and falling once (Smith 2018, arXiv:1803.09820)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    steps = epochs * -(-len(examples) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    random = np.random.default_rng(0)
    began, total = time.process_time(), 0.0
    model.train()
    for step, batch in enumerate(batches(examples, epochs, random)):
        letters = padded([word for word, _ in batch], PAD)
        labels = padded([said for _, said in batch], IGNORED)
        loss = model(input_ids=letters, attention_mask=(letters != PAD).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % 100 == 99:
            spent = time.process_time() - began
            print(
                f"step {step + 1} of {steps}: loss {total / 100:.3f}, {spent:.0f} CPU s",
                file=sys.stderr,
                flush=True,
            )
            total = 0.0


def batches(
    examples: Sequence[Any], epochs: int, random: np.random.Generator
) -> Iterator[list[Any]]:
    """Batches of words about as long, in another order each epoch: little padding."""
    for _ in range(epochs):
        order = random.permutation(len(examples))
        order = order[np.argsort([len(examples[i][0]) for i in order], kind="stable")]
        starts = random.permutation(range(0, len(order), BATCH))
        for start in starts:
            yield [examples[i] for i in order[start : start + BATCH]]


def padded(rows: Sequence[Sequence[int]], filler: int) -> Any:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])


def calibration(model: edgec_runtime.Model, learned: Sequence[Word]) -> Iterator[Any]:
    """Letters of learned words, and the phonemes that the dictionary gives them."""
    codes = tokens_of(model)
    for word in learned[:CALIBRATION]:
        ids = [PAD, *(codes[phoneme] for phoneme in word.pronunciations[0])]
        letters = model.text.encode(word.letters)
        yield {"input_ids": np.array([letters]), "decoder_input_ids": np.array([ids])}


def tokens_of(model: edgec_runtime.Model) -> dict[str, int]:
    """The tokens by their names."""
    shape = next(v.shape for v in model.outputs if v.name == "logits")
    assert isinstance(shape[-1], int)
    return {model.text.decode([token]): token for token in range(shape[-1])}


def reference(directory: pathlib.Path) -> Answer:
    """The greedy answers of transformers, without start and end."""
    import transformers

    model = transformers.T5ForConditionalGeneration.from_pretrained(directory).eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)

    def answer(letters: str) -> list[int]:
        ids = torch.tensor([tokenizer.encode(letters)])
        with torch.no_grad():
            [whole] = model.generate(ids, max_new_tokens=TOKENS, do_sample=False).tolist()
        return [token for token in whole[1:] if token != END]

    return answer


def pronounce(
    answers: dict[str, Answer], megabytes: dict[str, float], judged: Sequence[Word], names: Any
) -> list[Row]:
    """Every model on every word, in turns; the first is what the others are held against."""
    tallies, order = {name: Tally() for name in answers}, list(answers)
    for number, word in enumerate(judged):
        given: dict[str, list[int]] = {}
        for name in order[number % len(order) :] + order[: number % len(order)]:
            began = time.process_time()
            given[name] = answers[name](word.letters)
            tallies[name].seconds += time.process_time() - began
        for name, tokens in given.items():
            errors, length = word.errors(tuple(names[token] for token in tokens))
            tally = tallies[name]
            tally.errors += errors
            tally.phonemes += length
            tally.right += errors == 0
            tally.same += tokens == given[order[0]]
    base = tallies["float32"].seconds
    return [
        Row(
            model=name,
            megabytes=megabytes[name],
            phoneme_error_rate=round(100 * tally.errors / tally.phonemes, 2),
            word_accuracy=round(100 * tally.right / len(judged), 2),
            same=round(100 * tally.same / len(judged), 2),
            cpu_ms=round(1e3 * tally.seconds / len(judged), 2),
            speedup=round(base / tally.seconds, 2),
        )
        for name, tally in tallies.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--words", type=int, default=400, help=f"to judge on, at most {HELD_OUT}")
    parser.add_argument("--epochs", type=int, default=3, help="of training")
    parser.add_argument("--directory", type=pathlib.Path, help="of the model, kept for next time")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    learned, held_out = split(words())
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        directory = trained(asked.directory or work / "t5", learned, asked.epochs)
        plain = build(directory, work / "float32.edgec", "cleanup,fuse,lower", None)
        data = functools.partial(calibration, plain, learned)
        models = {"float32": plain, "int8": build(directory, work / "int8.edgec", None, data)}
        answers: dict[str, Answer] = {"transformers": reference(directory)}
        megabytes = {"transformers": (directory / "model.safetensors").stat().st_size / 1e6}
        for name, model in models.items():
            answers[name] = functools.partial(spoken, model)
            megabytes[name] = model.path.stat().st_size / 1e6
        names = {token: name for name, token in tokens_of(plain).items()}
        judged = held_out[: asked.words]
        rows = pronounce(answers, megabytes, judged, names)
    for row in rows:
        if asked.json:
            print(json.dumps(asdict(row)), flush=True)
        else:
            print(
                f"{row.model:14s} {row.megabytes:5.1f} MB"
                f"  phoneme errors {row.phoneme_error_rate:5.2f} %"
                f"  words right {row.word_accuracy:5.1f} %  same {row.same:5.1f} %"
                f"  {row.cpu_ms:6.2f} CPU ms  {row.speedup:5.2f}x"
            )
    return int(next(row for row in rows if row.model == "float32").same < 100)


def spoken(model: edgec_runtime.Model, letters: str) -> list[int]:
    """The greedy answer of a bundle."""
    return list(model.generate(letters, max_new_tokens=TOKENS).tokens)


if __name__ == "__main__":
    sys.exit(main())
