"""Lets a small model guess what a larger one will write, so that one run reads several tokens.

    model.generate(prompt, draft=small)

The small model writes a few tokens, the large one reads them all in one run, and a guess that is
the token it takes itself needs no run of its own. Its own scores decide which token it takes,
greedily or by its own draw, so that the answer is the one it gives alone; only the last bits of
scores may differ, since a run over several tokens adds in another order.

Source: Leviathan et al. 2023 (arXiv:2211.17192), section 2.1. There a guess stands by chance, and
answers keep their probabilities; here it stands if it is the token of the draw, and a seed gives
the same tokens with a draft and without. Behind the draft's own context nothing is guessed.

Left out on purpose: batches, models with an encoder, trees of guesses, and a number of guesses
that follows how many were right.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgec_runtime.cache import (
    Cache,
    Prefix,
    PromptCache,
    common_length,
    context_limit,
    new_cache,
    not_a_language_model,
    vocabulary_size,
)
from edgec_runtime.errors import EdgecError, InputError
from edgec_runtime.generation import Generation, Sampling
from edgec_runtime.reader import Reader
from edgec_runtime.sampling import choose, random_generator

if TYPE_CHECKING:
    from edgec_runtime.manifest import Manifest
    from edgec_runtime.session import Model

Array = np.ndarray[Any, Any]


_COUNT = 2  # guesses at once


def open_draft(
    draft: Model,
    count: int | None,
    model: Model,
    room: int,
    settings: Sampling,
    kept: PromptCache | None,
) -> Draft:
    """What guesses for an answer of ``model``.

    count: guesses at once. room: tokens of prompt and answer. settings: of the answer. kept: what
    earlier answers have read. Raises InputError if the draft cannot guess for this model.
    """
    from edgec_runtime.session import Model

    if not isinstance(draft, Model):
        raise InputError(f"draft is {draft!r}, expected a model: edgec_runtime.load(...)")
    count = _COUNT if count is None else count
    if type(count) is not int or count < 1:
        raise InputError(f"draft_tokens is {count!r}, expected a whole number from 1 up")
    where, generation = f"draft {draft.path}", draft.manifest.generation
    if generation is None:
        raise not_a_language_model(where)
    if generation.encoder is not None:
        raise InputError(f"{where}: it has an encoder, expected a model without one")
    target = model.manifest.generation
    assert target is not None
    theirs = vocabulary_size(model.manifest, target)
    own = vocabulary_size(draft.manifest, generation)
    tokenizer = _tokenizer(draft.manifest, generation)
    alike = tokenizer is not None and tokenizer == _tokenizer(model.manifest, target)
    if (own is None or own != theirs) and not alike:  # else one is padded
        told, expected = own or "an unknown number of", theirs or "an unknown number"
        raise InputError(
            f"{where}: its vocabulary has {told} tokens, that of the model {expected}: take one "
            "with the model's own tokenizer"
        )
    count = min(count, target.prompt_chunk - 1)  # so many scores at once are meant to fit
    if count == 0:
        raise InputError(f"model {model.path} reads one token a run: leave draft out")
    if _positions(model.manifest, target) == 1:
        raise InputError(f"model {model.path} gives scores of its last token only: leave draft out")
    room = min(room, context_limit(draft.manifest, generation))
    greedy = dataclasses.replace(settings, temperature=0.0)
    known = min(own or 1 << 31, theirs or 1 << 31)
    return Draft(copy.copy(draft), generation, count, room, known, greedy, kept and kept.draft)


def _positions(manifest: Manifest, generation: Generation) -> int | str | None:
    """How many tokens the graph gives scores of, if that is fixed."""
    outputs = {value.name: value for value in manifest.graphs["main"].outputs}
    return outputs[generation.logits].shape[1]


def _tokenizer(manifest: Manifest, generation: Generation) -> str | None:
    """The digest of a bundle's tokenizer, if it has one."""
    digests = {entry.name: entry.sha256 for entry in manifest.entries}
    return digests.get(generation.tokenizer or "")


class Draft:
    """The small model beside one answer, and how often it was right."""

    def __init__(
        self,
        model: Model,
        generation: Generation,
        count: int,
        room: int,
        vocabulary: int,
        settings: Sampling,
        kept: PromptCache | None,
    ) -> None:
        """As ``open_draft``, which checks them. model: one whose adapter nobody changes.

        vocabulary: tokens that both models know.
        """
        self.count, self.room, self._vocabulary = count, room, vocabulary
        self.guessed = self.accepted = 0
        self._model, self._generation, self._kept = model, generation, kept
        self._settings = settings
        self._random = random_generator(0)  # the likeliest token needs none
        self._cache: Cache | None = None
        self._reader: Reader | None = None
        self._read: list[int] = []  # at least the tokens that the cache holds
        self._sure = 0  # so many of them are no guesses

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """The likeliest tokens behind ``tokens``; none behind one that the draft does not know."""
        if max(tokens[self._sure :]) >= self._vocabulary:
            return []
        scores = self._scores(tokens)
        guesses: list[int] = []
        while True:
            guesses.append(self._likeliest(scores[0]))
            if len(guesses) == count:
                self.guessed += count
                return guesses
            scores = self._feed(guesses[-1:])

    def close(self) -> None:
        """Keep what was read for the next answer."""
        if self._kept is not None and self._cache is not None:
            read = tuple(self._read[: self._cache.length])
            model = self._model
            self._kept.put(Prefix(model.session, model.adapter, read, self._cache))

    def _likeliest(self, scores: Array) -> int:
        try:
            return choose(scores[: self._vocabulary], self._read, self._settings, self._random)
        except EdgecError as error:
            raise EdgecError(f"draft {self._model.path}: {error}") from error

    def _feed(self, tokens: Sequence[int]) -> Array:
        assert self._reader is not None
        self._read += tokens
        return self._reader.feed(np.array([tokens]))

    def _scores(self, tokens: Sequence[int]) -> Array:
        """Scores [1, vocabulary] behind the tokens, of which known ones are not read again."""
        model, generation = self._model, self._generation
        if self._cache is not None:
            sure = self._sure
            known = sure + common_length(self._read[sure:], tokens[sure:])
            self._cache.cut(known)
            del self._read[known:]
            self._sure = len(tokens)
            return self._feed(tokens[known:])
        cache = None
        if self._kept is not None:
            cache = self._kept.take(model.session, model.adapter, tokens)
        cache = cache or new_cache(model.manifest, generation, 1)
        cache.reserve(self.room)
        self._read, self._sure, self._cache = list(tokens), len(tokens), cache
        self._reader = Reader(model, generation, self._cache, [len(tokens)], {})
        return self._reader.read([tokens])


class DraftedReader:
    """A Reader whose runs read a draft's guesses along with the token that is fed."""

    def __init__(self, reader: Reader, draft: Draft) -> None:
        """reader: of one prompt."""
        self._reader, self._draft = reader, draft
        self._tokens: list[int] = []
        self._guesses: list[int] = []
        self._scores: Array = np.zeros((0, 0))  # behind the last token, then behind each guess

    @property
    def tokens(self) -> Sequence[int]:
        """Those in the cache; wrong guesses may stand behind them."""
        return self._tokens[: self._reader.length]

    def read(self, prompts: Sequence[Sequence[int]]) -> Array:
        """Scores [1, vocabulary] behind the one prompt."""
        self._tokens = list(prompts[0])
        return self._reader.read(prompts)

    def feed(self, tokens: Array) -> Array:
        """Scores [1, vocabulary] behind this token, int [1, 1]; without a run if it was guessed."""
        token, draft = int(tokens[0, 0]), self._draft
        if self._guesses[:1] == [token]:
            draft.accepted += 1
            self._tokens.append(token)
            self._guesses, self._scores = self._guesses[1:], self._scores[1:]
            return self._scores[:1]
        self._reader.cut(len(self._tokens))
        self._tokens.append(token)
        count = min(draft.count, draft.room - len(self._tokens) - 1)  # behind the last: no use
        self._guesses = draft.guess(self._tokens, count) if count > 0 else []
        self._scores = self._reader.feed_all(np.array([[token, *self._guesses]]))[0]
        return self._scores[:1]
