"""The models of pruning_curve.py, each with its data, its judgement and its settings.

No setting was chosen on the data that is judged.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import efficientnet
import fashion
import numpy as np
import onnx_ir as ir
import torch
from distillation import Networks
from fixtures import models, similarity
from fixtures.locate import python_package

import edgec
from edgec.export import export
from edgec.passes import (
    Context,
    Feeds,
    Pass,
    PruneStructured,
    QuantizeDynamic,
    QuantizeStatic,
    Recover,
    SmoothActivations,
)
from edgec.passes.execution import open_session
from edgec.targets import load_target

TARGET = load_target("x86-64")
_IMAGES = 64  # of Fashion-MNIST in a step
_TOKENS = 32  # of a piece of news


@dataclass(frozen=True, eq=False)
class Task:
    """One model. judge: the score of a model, in the unit that ``measure`` names.

    digits: behind the point of a score that is printed. prune: its ratio is set for each point.
    qat: None where int8 is dynamic. timed: one inference.
    """

    name: str
    measure: str
    ratios: tuple[float, ...]
    context: Context
    judge: Callable[[ir.Model], float]
    timed: Feeds
    prune: PruneStructured
    recover: Recover
    quantize: Sequence[Pass]
    qat: Recover | None
    digits: int = 2


def residual(work: pathlib.Path, held_out: bool) -> Task:
    """Residual CNN of width 64 on Fashion-MNIST, trained here for four epochs."""
    data = fashion.fashion()
    nets = Networks(work, data, epochs=4)
    path = nets.trained("residual64", lambda: models.small_cnn(64), epochs=4)
    judged = data.held_out if held_out else data.test
    return Task(
        name="residual",
        measure=f"accuracy on {len(judged.classes):,} images, %",
        ratios=(0.3, 0.4, 0.5, 0.55, 0.6),
        context=Context(
            target=TARGET,
            reference=ir.load(path),
            calibration=data.learned.feeds(_IMAGES),
            calibration_labels=data.learned.labels(_IMAGES),
            validation=data.held_out.first(2_048).feeds(_IMAGES),
            validation_labels=data.held_out.first(2_048).labels(_IMAGES),
            cache=work,
        ),
        judge=lambda model: 100.0 * float(fashion.correct(model, judged).mean()),
        timed=data.held_out.first(1).feeds()[0],
        prune=PruneStructured(ranking="latency", refit=True),
        recover=_learning(steps=1600, rate=0.5, bias_rate=0.01),
        quantize=(QuantizeStatic(),),
        qat=_learning(steps=200, rate=0.05, bias_rate=2e-3),
    )


def _learning(steps: int, rate: float, bias_rate: float) -> Recover:
    """From the dense model's answers and from labels, batches of ``_IMAGES``."""
    return Recover(
        steps=steps,
        batch=1,
        splice=False,
        features=0,
        feature_weight=0.0,
        rate=rate,
        bias_rate=bias_rate,
        temperature=4.0,
        label_weight=1.0,
    )


def efficientnet_lite0(work: pathlib.Path, held_out: bool) -> Task:
    """ImageNet classifier; learns from unlabelled photographs what the dense one answers."""
    data = efficientnet.split(held_out=held_out)
    reference = export(efficientnet.source(data), TARGET).model
    learned = [{"image": image} for image in data.learned]
    validation = learned[::8]
    judged = [{"image": image} for image in data.judged]
    expected = _classes(reference, judged)
    return Task(
        name="efficientnet-lite0-held-out" if held_out else "efficientnet-lite0",  # other models
        measure=f"agreement with float32 on {len(judged)} photographs, %",
        ratios=(0.3, 0.4, 0.5),
        context=Context(
            target=TARGET,
            reference=reference,
            calibration=[feeds for i, feeds in enumerate(learned) if i % 8],
            validation=validation,
            cache=work,
        ),
        judge=lambda model: 100.0 * float((_classes(model, judged) == expected).mean()),
        timed=judged[0],
        prune=PruneStructured(importance="wanda", ranking="latency", refit=True),
        recover=Recover(steps=100, batch=8, rate=0.03, bias_rate=1e-3),
        quantize=(QuantizeStatic(),),
        qat=None,
    )


def _classes(model: ir.Model, samples: Sequence[Feeds]) -> Any:
    session = open_session(model)
    return np.array([int(session.run(None, dict(feeds))[0].argmax()) for feeds in samples])


def minilm(work: pathlib.Path, held_out: bool) -> Task:
    """Sentence encoder; learns from news and single words, without any judgement of pairs."""
    tokenizer, module = models.minilm("sdpa")
    names = ("input_ids", "attention_mask", "token_type_ids")
    example = {name: torch.ones(2, _TOKENS, dtype=torch.int64) for name in names}

    class LastHidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = module

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return self.encoder(input_ids, attention_mask, token_type_ids).last_hidden_state

    axes = {name: {0: "batch", 1: "sequence"} for name in names}
    source = edgec.Source(
        LastHidden().eval(), example, output_names=("last_hidden_state",), dynamic=axes
    )
    pairs = similarity.pairs("simlex999" if held_out else "wordsim353")
    sentences, words = news(without={*pairs.first, *pairs.second})
    texts = [*sentences, *words]
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]

    def tokens(length: int, *given: str) -> Feeds:
        made = tokenizer(
            list(given),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="np",
        )
        return {name: made[name].astype(np.int64) for name in names}

    def judge(model: ir.Model) -> float:
        session = open_session(model)

        def encode(*arrays: Any) -> Any:
            return session.run(None, dict(zip(names, arrays, strict=True)))[0]

        return similarity.score(tokenizer, encode, pairs)

    count = 16
    batches = [tokens(_TOKENS, *texts[i : i + count]) for i in range(0, 4096, count)]
    return Task(
        name="minilm",
        measure=f"Spearman on {'SimLex-999' if held_out else 'WordSim-353'}",
        ratios=(0.25, 0.375, 0.5),
        context=Context(
            target=TARGET,
            reference=export(source, TARGET).model,
            calibration=batches[16:],
            validation=batches[:16],
        ),
        judge=judge,
        timed=tokens(128, next(text for text in sentences if len(text) > 600)),
        prune=PruneStructured(kinds=("head", "hidden"), importance="taylor"),
        recover=Recover(steps=200, batch=1, splice=False, rate=0.3, bias_rate=3e-3),
        quantize=(SmoothActivations(), QuantizeDynamic()),
        qat=None,
        digits=3,
    )


def news(without: set[str]) -> tuple[list[str], list[str]]:
    """Sentences of 300 news texts that ship with gensim, and their words but for some."""
    text = (python_package("gensim", "test", "test_data") / "lee_background.cor").read_text(
        "latin1"
    )
    lines = [" ".join(line.split()) for line in text.split("\n") if line.strip()]
    parts = [part.strip() for line in lines for part in line.split(". ") if part.strip()]
    words = sorted({word.lower() for line in lines for word in re.findall(r"[A-Za-z]{3,}", line)})
    left_out = {word.lower() for word in without}
    return sorted({*parts, *lines}), [word for word in words if word not in left_out]


TASKS: Mapping[str, Callable[[pathlib.Path, bool], Task]] = {
    "residual": residual,
    "efficientnet-lite0": efficientnet_lite0,
    "minilm": minilm,
}
