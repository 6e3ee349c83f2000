"""One model per kind, each with data to calibrate with and samples to judge it on.

Real weights where a fixture package has them: EfficientNet-Lite0, the PP-OCR recogniser and
MiniLM. The LSTM has random weights. The decoder is a small language model of characters that
is trained here on news, in some ten seconds; its step takes one token and the cache.
"""

from __future__ import annotations

import functools
import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

import numpy as np  # noqa: E402

import edgec  # noqa: E402

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]
# what edgec.build takes, calibration feeds, samples
Given = tuple[Any, Callable[[], Iterator[Feeds]], list[Feeds]]


def efficientnet(calibration: int, samples: int) -> Given:
    """ImageNet classifier, convolutions."""
    import efficientnet_lite0

    source = replace(efficientnet_lite0.build(), metric=None, evaluation=None)
    judged = itertools.islice(efficientnet_lite0.evaluation(), samples)
    feeds: list[Feeds] = [{"image": feed["image"]} for feed in judged]
    return source, lambda: itertools.islice(efficientnet_lite0.calibration(), calibration), feeds


def ocr(calibration: int, samples: int) -> Given:
    """Text recogniser, convolutions and attention."""
    from fixtures import models, text_lines

    images = text_lines.render(calibration + samples, seed=1).images
    feeds: list[Feeds] = [{"x": image[None]} for image in images]
    return models.ocr_recogniser_path(), lambda: iter(feeds[:calibration]), feeds[calibration:]


def minilm(calibration: int, samples: int, length: int = 128) -> Given:
    """Sentence encoder, judged on the first texts. length: tokens of a sequence."""
    import torch
    from fixtures import models, similarity

    tokenizer, module = models.minilm()
    names = ("input_ids", "attention_mask", "token_type_ids")
    texts = sorted(set(similarity.pairs("lee").first))[: samples + calibration]
    tokens = [
        tokenizer(
            [t], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        for t in texts
    ]

    class LastHidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = module

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return self.encoder(input_ids, attention_mask, token_type_ids).last_hidden_state

    example = {name: tokens[0][name] for name in names}
    source = edgec.Source(LastHidden().eval(), example_inputs=example, name="minilm")
    feeds: list[Feeds] = [{name: t[name].numpy() for name in names} for t in tokens]
    return source, lambda: iter(feeds[samples:]), feeds[:samples]


def lstm(calibration: int, samples: int) -> Given:
    """Two LSTM layers of 512 over 100 steps; random weights."""
    import torch

    class Recurrent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.LSTM(128, 512, 2)
            self.head = torch.nn.Linear(512, 64)

        def forward(self, x: Any) -> Any:
            return self.head(self.layers(x)[0])

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    feeds: list[Feeds] = [
        {"x": rng.standard_normal((100, 1, 128), np.float32)} for _ in range(samples + calibration)
    ]
    example = (torch.from_numpy(feeds[0]["x"]),)
    source = edgec.Source(Recurrent().eval(), example, input_names=("x",), name="lstm")
    return source, lambda: iter(feeds[samples:]), feeds[:samples]


def decoder_step(calibration: int, samples: int) -> Given:
    """One step of a language model of characters: a token and the cache to logits and cache."""
    import torch

    model, tokens = _trained_decoder()
    example = (torch.zeros(1, 1, dtype=torch.int64), torch.zeros(_LAYERS, 2, _HEADS, 8, _HEAD))
    feeds: list[Feeds] = []
    with torch.no_grad():
        for number in range(calibration + samples):
            length = 16 + 7 * (number % 8)
            start = 97 * number % (len(tokens) - 128)
            text = tokens[start : start + length + 1]
            cache = model(text[None, :-1], torch.zeros(_LAYERS, 2, _HEADS, 0, _HEAD))[1]
            feeds.append({"token": text[None, -1:].numpy(), "past": cache.numpy()})
    source = edgec.Source(
        model,
        example,
        input_names=("token", "past"),
        output_names=("logits", "present"),
        dynamic={"past": {3: "time"}},
        name="decoder-step",
    )
    return source, lambda: iter(feeds[:calibration]), feeds[calibration:]


_LAYERS, _HEADS, _HEAD = 4, 4, 32


@functools.cache
def _trained_decoder() -> tuple[Any, Any]:
    """A transformer of 0.8 million weights, and the text that it was not trained on."""
    import torch
    from fixtures import similarity
    from torch import nn
    from torch.nn import functional

    width = _HEADS * _HEAD

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Any, past: Any) -> tuple[Any, Any]:
            batch, new, _ = x.shape
            qkv = self.qkv(self.norms[0](x)).view(batch, new, 3, _HEADS, _HEAD)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            k = torch.cat([past[0].expand(batch, -1, -1, -1), k], 2)
            v = torch.cat([past[1].expand(batch, -1, -1, -1), v], 2)
            scores = q @ k.transpose(2, 3) / _HEAD**0.5
            if new > 1:
                hidden = torch.ones(new, k.shape[2]).triu(1 + k.shape[2] - new).bool()
                scores = scores.masked_fill(hidden, -60.0)
            mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, new, width)
            x = x + self.out(mixed)
            x = x + self.down(functional.gelu(self.up(self.norms[1](x))))
            return x, torch.stack([k, v])

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(128, width), nn.Linear(width, 128)
            self.blocks = nn.ModuleList([Block() for _ in range(_LAYERS)])
            self.norm = nn.LayerNorm(width)

        def forward(self, token: Any, past: Any) -> tuple[Any, Any]:
            x, presents = self.embed(token), []
            for block, cached in zip(self.blocks, past, strict=True):
                x, present = block(x, cached[:, None])
                presents.append(present[:, 0])
            return self.head(self.norm(x[:, -1:] if not self.training else x)), torch.stack(
                presents
            )

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            text = "\n".join(sorted(set(similarity.pairs("lee").first)))
            codes = torch.tensor([min(ord(c), 127) for c in text])
            held_out = len(codes) // 5
            model, learned = Decoder().train(), codes[held_out:]
            optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
            nothing = torch.zeros(_LAYERS, 2, _HEADS, 0, _HEAD)
            for _ in range(150):
                starts = torch.randint(0, len(learned) - 65, (16,))
                batch = torch.stack([learned[s : s + 65] for s in starts])
                logits, _ = model(batch[:, :-1], nothing)
                loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    finally:
        torch.set_num_threads(threads)
    return model.eval(), codes[:held_out]


MODELS: Mapping[str, Callable[[int, int], Given]] = {
    "efficientnet-lite0": efficientnet,
    "ocr": ocr,
    "minilm": minilm,
    "lstm": lstm,
    "decoder-step": decoder_step,
}
