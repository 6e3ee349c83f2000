"""The answer to a prompt: while it grows, and when it is whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgec_runtime.generation import Generation
from edgec_runtime.text import Pieces, Text

Reason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    tokens: without the one that ended it. text: without the stop string; None for token ids
    without stop strings, which need no tokenizer (``model.text.decode(tokens)``), and for features
    where the bundle has none or ``tokenizers`` is not installed. reason: why it ended; "length":
    after max_new_tokens. prompt_tokens: of the prompt, with an encoder those that the answer
    starts with; cached_tokens: those of them that were in the cache. guessed_tokens: by the
    draft; accepted_tokens: those of them that cost the model no run of its own.
    """

    text: str | None
    tokens: tuple[int, ...]
    reason: Reason
    prompt_tokens: int
    cached_tokens: int = 0
    guessed_tokens: int = 0
    accepted_tokens: int = 0


class Answer:
    """One row of a batch while it grows."""

    def __init__(
        self,
        prompt: Sequence[int],
        generation: Generation,
        text: Text | None,
        stop: Sequence[str],
        random: np.random.Generator,
    ) -> None:
        """text: None leaves the answer in tokens. stop: texts that end it. random: of its draws."""
        self.tokens = list(prompt)  # of prompt and answer
        self.reason: Reason | None = None
        self.random = random
        self.cached = 0
        self._prompt_tokens = len(prompt)
        self._ends: dict[int, Reason] = {token: "eos" for token in generation.eos}
        self._pieces: Pieces | None = None
        self._text: list[str] = []
        if text is not None:
            specials = {text.special_token(one) for one in stop} - {None}
            self._ends |= {token: "stop" for token in specials if token is not None}
            self._pieces = Pieces(text.decode, stop)

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain with it."""
        self.reason = self._ends.get(token)
        if self.reason is not None:
            return self.end(self.reason)
        self.tokens.append(token)
        if self._pieces is None:
            return ""
        piece = self._pieces.push(token)
        self._text.append(piece)
        if self._pieces.stopped:
            self.reason = "stop"
        return piece

    def end(self, reason: Reason) -> str:
        """There are no more tokens; returns the rest of the text."""
        self.reason = reason
        if self._pieces is None:
            return ""
        piece = self._pieces.end()
        self._text.append(piece)
        if self._pieces.stopped:
            self.reason = "stop"
        return piece

    def completion(self) -> Completion:
        """The whole answer."""
        assert self.reason is not None
        return Completion(
            text=None if self._pieces is None else "".join(self._text),
            tokens=tuple(self.tokens[self._prompt_tokens :]),
            reason=self.reason,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self.cached,
        )
