"""Train a small Llama on Wikipedia and Jane Austen: a decoder whose weights never were quantized.

    python tests/fixtures/install.py --debian                  # once: Jane Austen's novels
    python benchmarks/small_gpt.py gpt/ [--steps 3000] [--seed 0]
    python benchmarks/language_models.py --directory gpt/ --work gpt-files/ --rounds 0 --rows \\
        float32 int8 int4-rtn int4-clip int4-hqq int4-awq int4-gptq int4-128-rtn int4-128-gptq

Writes a Hugging Face directory: six layers of width 256, four heads that share two of keys and
values, embedding and output layer tied, a byte-level BPE vocabulary of its own. AdamW, a
cosine rate behind a warm-up, weight decay of matrices, gradients clipped; windows of 256
tokens, drawn anew in every pass over the text. Products in bfloat16, weights in float32.

The first 600,000 characters of Wikipedia are left out: language_models.py judges by their
beginning and calibrates with their second half. The held-out loss is of a stretch between the two.
The same seed gives the same file on one machine, in one thread.

Left out on purpose: a model that writes well. It reads a million words twice; what it loses when
its weights are rounded is what it is for.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

os.environ.update(ORT_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from fixtures import language  # noqa: E402

LEFT_OUT = 600_000  # characters that language_models.py reads
HELD_OUT = slice(200_000, 300_000)  # of them: neither judged by nor calibrated with
WINDOW = 256  # tokens
VOCABULARY = 4096
END = "<|endoftext|>"
_PEAK_RATE, _WARM_UP, _DECAY = 1.5e-3, 0.05, 0.1
_LOGGED = 100  # steps


@dataclass(frozen=True)
class Course:
    """How long and from what: batches of windows."""

    steps: int
    batch: int
    seed: int


def main() -> None:
    asked = _arguments()
    torch.set_num_threads(1)
    torch.manual_seed(asked.seed)
    articles = language.wikipedia(sys.maxsize)
    text = f"{articles[LEFT_OUT:]}\n\n{language.austen()}"
    tokenizer = make_tokenizer(text)
    learned, held_out = (token_ids(tokenizer, part) for part in (text, articles[HELD_OUT]))
    model = make_model(tokenizer)
    started = time.process_time()
    train_loss = train(model, learned, Course(asked.steps, asked.batch, asked.seed))
    seconds = time.process_time() - started
    tokenizer.save_pretrained(asked.directory)
    model.save_pretrained(asked.directory)
    loss = mean_loss(model, held_out)
    print(
        f"{model.num_parameters():,} parameters, {asked.steps} steps of {asked.batch} windows, "
        f"{asked.steps * asked.batch * WINDOW:,} tokens of {len(learned):,}; loss in nats a token: "
        f"train {train_loss:.3f}, held out {loss:.3f} (perplexity {math.exp(loss):.1f}, "
        f"{len(held_out) // WINDOW * (WINDOW - 1):,} tokens); {seconds:.0f} s of CPU"
    )


def make_tokenizer(text: str) -> Any:
    """Byte-level BPE, learned from the text."""
    import tokenizers
    import transformers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text.split("\n"), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END
    )


def token_ids(tokenizer: Any, text: str) -> torch.Tensor:
    """int64 [tokens], without special tokens: so the text is judged, too."""
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


def make_model(tokenizer: Any) -> Any:
    """A Llama with random weights, all float32."""
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=WINDOW,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(model: Any, ids: torch.Tensor, course: Course) -> float:
    """Trains in place; the mean loss of the last tenth of the steps, in nats a token."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": _DECAY}, {"params": gains, "weight_decay": 0.0}],
        lr=_PEAK_RATE,
        betas=(0.9, 0.95),
    )
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, course.steps))
    batches = _batches(ids, course)
    losses = []
    model.train()
    for step in range(course.steps):
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        losses.append(float(loss.detach()))
        if step % _LOGGED == _LOGGED - 1:
            recent = sum(losses[-_LOGGED:]) / _LOGGED
            print(f"step {step + 1} of {course.steps}: {recent:.3f}", file=sys.stderr, flush=True)
    model.eval()
    last = losses[-max(course.steps // 10, 1) :]
    return sum(last) / len(last)


def mean_loss(model: Any, ids: torch.Tensor) -> float:
    """Nats a token, of windows that do not overlap; the first token of each is not scored."""
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    with torch.no_grad():
        each = [float(model(input_ids=w[None], labels=w[None]).loss) for w in windows]
    return sum(each) / len(each)


def _share(step: int, steps: int) -> float:
    """Of the peak rate: up in a line, down to a tenth along a cosine."""
    warm = max(round(_WARM_UP * steps), 1)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def _batches(ids: torch.Tensor, course: Course) -> Iterator[torch.Tensor]:
    """int64 [batch, WINDOW]: every pass cuts the text elsewhere and takes it in another order."""
    generator = torch.Generator().manual_seed(course.seed)
    while True:
        start = int(torch.randint(WINDOW, (1,), generator=generator))
        windows = ids[start : start + (len(ids) - start) // WINDOW * WINDOW].view(-1, WINDOW)
        order = torch.randperm(len(windows), generator=generator)
        for first in range(0, len(order) - course.batch + 1, course.batch):
            yield windows[order[first : first + course.batch]]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=pathlib.Path, help="where the model is written to")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=4, help=f"windows of {WINDOW} tokens a step")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
