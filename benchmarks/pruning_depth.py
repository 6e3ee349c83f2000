"""What does a sentence encoder know without some of its residual blocks?

    python benchmarks/pruning.py --depth [--blocks 2] [--importance output] [--json]

MiniLM has 12 blocks: six layers of attention and feed-forward. Which go is chosen by
``prune-blocks`` on pieces of news; what the model is judged on is not among them. Score:
Spearman's correlation of the cosines of pairs of texts with human judgements. Speed is not judged
here, and nothing is trained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from fixtures import models, similarity

import edgec
from edgec.export import export
from edgec.passes import Cleanup, Context, Fuse, PruneBlocks
from edgec.passes.execution import open_session
from edgec.targets import load_target

_NAMES = ("input_ids", "attention_mask", "token_type_ids")
_JUDGED = ("lee", "wordsim353", "simlex999")
_LENGTH = 64  # tokens of a piece of news
_SKIPPED = 128  # pieces that are free for a later training to hold out


@dataclass(frozen=True)
class Row:
    """A model: the share of the numbers in weights that it keeps, and its scores."""

    model: str
    kept: float
    scores: dict[str, float]
    findings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pieces:
    """Feeds that can be read any number of times."""

    feeds: Sequence[dict[str, np.ndarray[Any, Any]]]

    def __iter__(self) -> Any:
        """The feeds in a fixed order."""
        return iter(self.feeds)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.feeds)


def depth(asked: argparse.Namespace) -> str:
    """The table of the dense model and of the one without the blocks; JSON if asked for."""
    tokenizer, module = models.minilm()
    dense = encoder(module)
    context = _context(dense, tokenizer)
    rows = [Row("dense", 1.0, scores(tokenizer, dense))]
    given = PruneBlocks(blocks=asked.blocks, importance=asked.importance)
    result = given.run(dense.clone(), context)
    plan = result.decisions["blocks"]
    gone = [f"{i} ({entry['name']})" for i, entry in enumerate(plan) if entry["removed"]]
    kept = _numbers(result.model) / _numbers(dense)
    name = f"without blocks {', '.join(gone)}, by {asked.importance}"
    rows.append(Row(name, kept, scores(tokenizer, result.model), result.findings))
    return json.dumps([asdict(row) for row in rows], indent=2) if asked.json else _table(rows)


def encoder(module: Any) -> ir.Model:
    """The graph of MiniLM from tokens to the last hidden state, any number and length of texts."""
    import torch

    class LastHidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = module

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return self.encoder(input_ids, attention_mask, token_type_ids).last_hidden_state

    ids = torch.randint(1000, 20000, (2, 24), generator=torch.Generator().manual_seed(0))
    example = dict(zip(_NAMES, (ids, torch.ones_like(ids), torch.zeros_like(ids)), strict=True))
    dynamic = {name: {0: "batch", 1: "length"} for name in _NAMES}
    source = edgec.Source(LastHidden().eval(), example, dynamic=dynamic, name="minilm")
    target = load_target("x86-64")
    model = export(source, target).model
    context = Context(target=target, reference=model)
    for step in (Cleanup(), Fuse()):
        model = step.run(model.clone(), context).model
    return model


def _context(dense: ir.Model, tokenizer: Any) -> Context:
    """Pieces of news of one length, so that none has to be filled up."""
    feeds = []
    for text in similarity.news():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids) - _LENGTH + 3, _LENGTH - 2):
            piece = ids[start : start + _LENGTH - 2]
            whole = np.array([[tokenizer.cls_token_id, *piece, tokenizer.sep_token_id]])
            given = (whole, np.ones_like(whole), np.zeros_like(whole))
            feeds.append(dict(zip(_NAMES, given, strict=True)))
    order = np.random.default_rng(0).permutation(len(feeds))
    mixed = [feeds[i] for i in order]
    return Context(
        target=load_target("x86-64"),
        reference=dense,
        calibration=Pieces(mixed[_SKIPPED:]),
    )


def scores(tokenizer: Any, model: ir.Model) -> dict[str, float]:
    """Spearman's correlation on each collection of pairs."""
    session = open_session(model)

    def encode(*tensors: Any) -> Any:
        return session.run(None, dict(zip(_NAMES, tensors, strict=True)))[0]

    return {
        name: similarity.score(tokenizer, encode, similarity.pairs(name))  # type: ignore[arg-type]
        for name in _JUDGED
    }


def _numbers(model: ir.Model) -> int:
    values = model.graph.initializers.values()
    return sum(int(v.const_value.size) for v in values if v.const_value is not None)


def _table(rows: Sequence[Row]) -> str:
    lines = [f"| MiniLM | weights kept | {' | '.join(_JUDGED)} |", "|---|---" + "|---" * 3 + "|"]
    for row in rows:
        judged = " | ".join(f"{row.scores[name]:.3f}" for name in _JUDGED)
        lines.append(f"| {row.model} | {row.kept:.0%} | {judged} |")
    return "\n".join([*lines, "", *(finding for row in rows for finding in row.findings)])
