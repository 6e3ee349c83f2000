"""Goes on writing where the context is full: the beginning stays, older tokens are forgotten.

    for piece in model.generate(prompt, max_new_tokens=20_000, sinks=4, stream=True):
        print(piece, end="")

A model attends much to its very first tokens, whatever they say, and loses itself without them.
When the context is full, the first ``sinks`` tokens stay in the cache, the older half of those
behind them is forgotten, and the newer half is read again at its new positions. That is a pause as
long as a prompt of that length takes; in between a step costs what it always does. A repetition
penalty still knows the tokens that are forgotten.

Source: Xiao et al. 2023 (arXiv:2309.17453), sections 3.1 and 3.2. There the cache of the newer
tokens is kept and forgets one token a step, here they are read again, so that nothing in the cache
comes from forgotten tokens, and any model with a cache will do.

Left out on purpose: batches, models with an encoder, and a draft beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgec_runtime.errors import InputError
from edgec_runtime.reader import Reader

Array = np.ndarray[Any, Any]


def check_sinks(sinks: int, context: int, asked: int | None) -> None:
    """Raise InputError unless that many tokens can stay at the beginning of this context.

    asked: tokens of the answer, which may be more than the context has room for.
    """
    most = context // 2
    if type(sinks) is not int or not 0 <= sinks <= most:
        raise InputError(
            f"sinks is {sinks!r}, expected a whole number from 0 to {most}, half of the context"
        )
    if asked is None:
        raise InputError(
            "sinks is given without max_new_tokens: the context ends no such answer, say how many "
            "tokens it may have"
        )


class SinkReader:
    """A Reader of one prompt that never runs out of context."""

    def __init__(self, reader: Reader, sinks: int, room: int) -> None:
        """sinks: tokens that always stay. room: tokens that the cache may hold."""
        self._reader, self._sinks, self._room = reader, sinks, room
        self._seen: list[int] = []

    @property
    def tokens(self) -> Sequence[int]:
        """Those in the cache."""
        return self._seen[: self._reader.length]

    def read(self, prompts: Sequence[Sequence[int]]) -> Array:
        """Scores [1, vocabulary] behind the one prompt."""
        self._seen = list(prompts[0])
        return self._reader.read(prompts)

    def feed(self, tokens: Array) -> Array:
        """Scores [1, vocabulary] behind this token, int [1, 1]."""
        full = self._reader.length == self._room
        self._seen.append(int(tokens[0, 0]))
        if not full:
            return self._reader.feed(tokens)
        self._reader.cut(self._sinks)
        half = max(1, (self._room - self._sinks) // 2)
        del self._seen[self._sinks : self._sinks + half]
        return self._reader.read([self._seen])
