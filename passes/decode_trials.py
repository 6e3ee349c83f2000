"""Prompts and decode steps on which rewrites of a decoder are proven.

A causal language model is one graph for prompt and steps: it reads ids [batch, new], an
attention mask [batch, past + new], positions [batch, new] and the cache, and gives logits and
the grown cache, ``present.*`` for ``past_key_values.*`` (names as optimum's exporter gives
them). Two rewritings that agree on one prompt can still part in a cache or behind padding, so a
trial is a whole conversation:

    one row:    a prompt, a second piece of it behind the first, 20 single tokens
    four rows:  padded left (one place and several), whole, and padded right; 20 single tokens

The rewriting stands beside what it replaces in one model, and both read the same operands: an
error is of that place alone, and int8 rounding between layers cannot blow it up. The caches
of the model as it was are fed back.

Ids come from the calibration data where it has some, else they are random numbers of a
fixed seed. Left out: models with other inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context
from edgec.passes.equivalence import difference
from edgec.passes.execution import open_session, run_feeds
from edgec.passes.weights import Array

STEPS = 20
IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
_PAST, _PRESENT = "past_key_values.", "present."
_PROMPT, _SECOND_PIECE = 9, 4  # tokens
_LONGEST = 24  # tokens of a prompt taken from the calibration data
_PADDED = 1  # position of a padded token, as transformers' generate() gives it
_SAFE_IDS = 100  # exclusive bound of random ids where the size of the vocabulary is not known


@dataclass(frozen=True)
class Decoder:
    """The inputs of a decoder. caches: [batch, heads, past, size] inputs, by name.

    vocabulary: exclusive bound of the ids. outputs: names, in order.
    """

    has_positions: bool
    caches: dict[str, tuple[int, int]]  # heads, size
    vocabulary: int


@dataclass(frozen=True)
class Trial:
    """ids, shown: integers [batch, tokens]; pieces: how many tokens each run takes."""

    ids: Array
    shown: Array
    pieces: tuple[int, ...]


@dataclass(frozen=True)
class Twin:
    """Two values that must be the same: names in one model.

    at_queries: only where the mask shows the positions of this run, [batch, new, ...]: a row
    that attends to nothing is 0 or a mean, and nobody reads it.
    """

    old: str
    new: str
    at_queries: bool = False


def decoder_of(model: ir.Model) -> Decoder | str:
    """The decoder that a model is, or why it is none that trials know."""
    caches: dict[str, tuple[int, int]] = {}
    outputs = {value.name for value in model.graph.outputs}
    others = set()
    for value in model.graph.inputs:
        name = str(value.name)
        if not name.startswith(_PAST):
            others.add(name)
            continue
        shape = value.shape
        if shape is None or len(shape) != 4 or value.dtype != ir.DataType.FLOAT:
            return f"its cache '{name}' is not float32 with four axes"
        heads, size = shape[1], shape[3]
        if not isinstance(heads, int) or not isinstance(size, int):
            return f"number or size of the heads of '{name}' is not known"
        if _present(name) not in outputs:
            return f"it has no output '{_present(name)}' for the input '{name}'"
        caches[name] = (heads, size)
    if not caches or not {IDS, MASK} <= others <= {IDS, MASK, POSITIONS}:
        return f"its inputs are not {IDS}, {MASK}, {POSITIONS} and {_PAST}*"
    last = model.graph.outputs[0].shape
    words = last[2] if last is not None and len(last) == 3 else None
    return Decoder(POSITIONS in others, caches, words if isinstance(words, int) else _SAFE_IDS)


def trials_for(decoder: Decoder, context: Context) -> tuple[Trial, ...]:
    """The trials of a decoder; the same for the same data and seed."""
    random = np.random.default_rng(context.seed)
    prompts = [random.integers(0, decoder.vocabulary, _PROMPT) for _ in range(4)]
    texts = _texts(context)
    prompts[: len(texts)] = texts
    tail = random.integers(0, decoder.vocabulary, (4, _SECOND_PIECE + STEPS))
    single = np.concatenate([prompts[0], tail[0]])[None]
    length = min(len(prompt) for prompt in prompts)
    third = length // 3
    ids = np.stack([prompt[:length] for prompt in prompts])
    shown = np.ones((4, length + STEPS), np.int64)
    # the first row is padded: kernels may take the whole batch's beginning from it
    shown[0, :1] = shown[2, :third] = shown[3, length - third : length] = 0
    return (
        Trial(single, np.ones_like(single), (len(prompts[0]), _SECOND_PIECE, *[1] * STEPS)),
        Trial(np.concatenate([ids, tail[:, :STEPS]], axis=1), shown, (length, *[1] * STEPS)),
    )


def run_trial(
    model: ir.Model, decoder: Decoder, trial: Trial, names: Sequence[str]
) -> Iterator[tuple[Array, dict[str, Array]]]:
    """Which positions each run shows, bool [batch, new], and the values by name.

    The model's own caches are fed back. Raises PassError if ONNX Runtime refuses.
    """
    presents = [_present(name) for name in decoder.caches]
    wanted = list(dict.fromkeys([*names, *presents]))
    session = open_session(model, outputs=wanted, optimized=False)
    batch, start = len(trial.ids), 0
    positions = np.where(trial.shown == 1, trial.shown.cumsum(axis=1) - 1, _PADDED)
    caches = {
        name: np.zeros((batch, heads, 0, size), np.float32)
        for name, (heads, size) in decoder.caches.items()
    }
    for piece in trial.pieces:
        end = start + piece
        feeds = {IDS: trial.ids[:, start:end], MASK: trial.shown[:, :end], **caches}
        if decoder.has_positions:
            feeds[POSITIONS] = positions[:, start:end]
        values = dict(zip(wanted, run_feeds(session, feeds), strict=True))
        yield trial.shown[:, start:end] == 1, {name: values[name] for name in names}
        caches = {name: values[_present(name)] for name in decoder.caches}
        start = end


def largest_errors(
    model: ir.Model, decoder: Decoder, trials: Sequence[Trial], twins: Sequence[Twin]
) -> list[float]:
    """Largest difference of each pair, relative to the old value's largest number of a run.

    Infinite where shapes or NaN differ. Raises PassError if ONNX Runtime refuses the model.
    """
    names = list(dict.fromkeys(name for twin in twins for name in (twin.old, twin.new)))
    errors = [0.0] * len(twins)
    for trial in trials:
        for shown, values in run_trial(model, decoder, trial, names):
            for index, twin in enumerate(twins):
                old, new = values[twin.old], values[twin.new]
                if old.ndim == 4 and new.ndim == 3 and old.size == new.size:
                    new = new.reshape(old.shape)  # heads are merged in one of them
                if twin.at_queries and old.shape == new.shape:
                    old, new = old[shown], new[shown]
                if not np.isfinite(old).all():
                    errors[index] = float("inf")
                errors[index] = max(errors[index], difference(old, new))
    return errors


def _present(past: str) -> str:
    return _PRESENT + past.removeprefix(_PAST)


def _texts(context: Context) -> list[Array]:
    """At most four prompts of real ids; nothing where the calibration data has none."""
    found: list[Array] = []
    if context.calibration is None:
        return found
    for feeds in context.calibration:
        ids = feeds.get(IDS)
        if ids is not None and ids.ndim == 2 and ids.shape[1] > _PROMPT:
            found.append(ids[0, :_LONGEST].astype(np.int64))
        if len(found) == 4:
            break
    return found
