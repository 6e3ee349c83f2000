"""Runs the graph of a decoder: prompts in one or several runs, then a token per row and run.

It binds tokens, mask and positions as the bundle names them, and the cache, which grows with every
run. Which token follows is not decided here (``generate``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgec_runtime.cache import Cache, ort_value
from edgec_runtime.errors import InputError
from edgec_runtime.generation import Generation

if TYPE_CHECKING:
    from edgec_runtime.session import Model

Array = np.ndarray[Any, Any]


class Reader:
    """Runs the graph of a decoder on new tokens, and keeps its cache in step."""

    def __init__(
        self,
        model: Model,
        generation: Generation,
        cache: Cache,
        lengths: Sequence[int],
        encoded: Mapping[str, Array],
    ) -> None:
        """lengths: of the prompts, padded to the longest one.

        encoded: feeds of the encoder, if there is one; it runs here, once.
        """
        self._model, self._generation, self._cache = model, generation, cache
        self._padding = max(lengths) - np.array(lengths)[:, None]
        self._binding = model.session.io_binding()
        self._from = np.array([-1])  # the first position that gets logits
        for name, array in (model.encode(encoded) if encoded else {}).items():
            self._binding.bind_cpu_input(name, array)  # the same in every step
        if generation.logits_from is not None:  # nobody reads the others
            # as a tensor of ONNX Runtime's, or it finds no inputs that have defaults
            self._first = ort_value(self._from)
            self._binding.bind_ortvalue_input(generation.logits_from, self._first)
        inputs = {value.name: value.dtype for value in model.inputs}
        plain = (generation.ids, generation.mask, generation.positions)
        self._dtypes = {name: inputs[name] for name in plain if name is not None}
        self._shown = np.zeros((len(lengths), 0), bool)  # of the mask, longer than needed

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._cache.length

    def read(self, prompts: Sequence[Sequence[int]]) -> Array:
        """Scores behind the prompts; one prompt is read in chunks, from where the cache ends."""
        width = max(map(len, prompts))
        rows = [[self._generation.pad] * (width - len(row)) + list(row) for row in prompts]
        tokens = np.array(rows)
        chunk = self._generation.prompt_chunk if len(rows) == 1 else width
        while width - self._cache.length > chunk:
            self._run(tokens[:, self._cache.length : self._cache.length + chunk])
        return self.feed(tokens[:, self._cache.length :])

    def feed(self, tokens: Array) -> Array:
        """Float scores [batch, vocabulary] behind these tokens, int [batch, new]."""
        self._run(tokens)
        return self._logits()[:, -1]

    def feed_all(self, tokens: Array) -> Array:
        """Float scores [batch, new, vocabulary] behind each of these tokens, int [batch, new].

        Raises InputError if the graph gives those of the last token only.
        """
        self._from[:] = 0
        try:
            self._run(tokens)
        finally:
            self._from[:] = -1
        logits = self._logits()
        if logits.shape[1] != tokens.shape[1]:
            raise InputError(
                f"model {self._model.path} gives scores of its last token only, expected those "
                "of every token that it reads: leave draft out"
            )
        return logits

    def cut(self, length: int) -> None:
        """Forget all tokens of the cache but the first ones."""
        self._cache.cut(length)

    def _logits(self) -> Array:
        logits: Array = self._binding.get_outputs_as_ortvaluevector()[0].numpy()
        return logits

    def _run(self, tokens: Array) -> None:
        generation, cache, new = self._generation, self._cache, tokens.shape[1]
        self._bind(generation.ids, tokens)
        if generation.mask is not None:
            self._bind(generation.mask, self._mask(generation.mask, cache.length + new))
        if generation.positions is not None:
            places = np.arange(cache.length, cache.length + new) - self._padding
            self._bind(generation.positions, np.where(places < 0, 1, places))
        self._binding.bind_output(generation.logits)
        cache.bind(self._binding)
        self._model.run_bound(self._binding)
        cache.advance(self._binding, new)

    def _bind(self, name: str, array: Array) -> None:
        self._binding.bind_cpu_input(name, np.ascontiguousarray(array, self._dtypes[name]))

    def _mask(self, name: str, length: int) -> Array:
        """Whether each position is no padding, [batch, length]; more is kept for later."""
        if length > self._shown.shape[1]:
            places = np.arange(2 * length) - self._padding
            self._shown = (places >= 0).astype(self._dtypes[name])
        return self._shown[:, :length]
