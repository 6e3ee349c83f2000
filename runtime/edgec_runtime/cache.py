"""Key-value caches of a decoder, and the memory that they take.

A growing cache is what the last run gave, handed back to the next run as it is; a shared cache
is one buffer per tensor that the graph writes into. Neither is copied from step to step: ONNX
Runtime is bound to the tensors by io_binding.

    cache = PromptCache()                                 # one per conversation
    model.generate(messages, cache=cache)                 # reads the whole prompt
    model.generate(messages + [...], cache=cache)         # reads what is new in it
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgec_runtime.bundle import WEIGHTS, read_bundle
from edgec_runtime.errors import InputError
from edgec_runtime.generation import CachePair, Generation

if TYPE_CHECKING:
    import onnxruntime

    from edgec_runtime.adapters import Adapter
    from edgec_runtime.manifest import Manifest

Array = np.ndarray[Any, Any]

# numpy asks Linux for huge pages (2 MiB) from 4 MiB up: the first token of every head would take
# one, 250 MB of a decoder with 180 key and value heads and a context of 8,192
_MAPPED_BYTES = 1 << 20


@dataclass(frozen=True)
class CacheTensor:
    """One tensor of a cache. capacity: its fixed length, None if any length will do."""

    pair: CachePair
    heads: int
    head_size: int
    dtype: np.dtype[Any]
    capacity: int | None

    @property
    def token_bytes(self) -> int:
        """Bytes that one token of one row takes in it."""
        return self.heads * self.head_size * self.dtype.itemsize

    def empty(self, batch: int, length: int) -> Array:
        """Zeros for that many rows and tokens; no memory is taken before it is written."""
        shape = (batch, self.heads, length, self.head_size)
        size = math.prod(shape) * self.dtype.itemsize
        if size < _MAPPED_BYTES:
            return np.zeros(shape, self.dtype)
        memory = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_NOHUGEPAGE)
        return np.frombuffer(memory, self.dtype).reshape(shape)


class GrowingCache:
    """Past tensors that each run replaces by longer ones."""

    def __init__(self, tensors: Sequence[CacheTensor], batch: int) -> None:
        """An empty cache for that many rows."""
        self._pairs = [tensor.pair for tensor in tensors]
        self._values = [ort_value(tensor.empty(batch, 0)) for tensor in tensors]
        self.length = 0

    def reserve(self, length: int) -> None:
        """Nothing to do: every run makes its own room."""

    def bind(self, binding: onnxruntime.IOBinding) -> None:
        """Hand the tensors to the next run, and ask it for the longer ones."""
        for pair, value in zip(self._pairs, self._values, strict=True):
            binding.bind_ortvalue_input(pair.past, value)
            binding.bind_output(pair.present)

    def advance(self, binding: onnxruntime.IOBinding, tokens: int) -> None:
        """Take over what a run of that many tokens gave: the outputs that were bound last."""
        self._values = binding.get_outputs()[-len(self._values) :]
        self.length += tokens

    def cut(self, length: int) -> None:
        """Forget all tokens but the first ones."""
        if length < self.length:
            kept = (value.numpy()[:, :, :length] for value in self._values)
            self._values = [ort_value(np.ascontiguousarray(array)) for array in kept]
            self.length = length


class SharedCache:
    """Buffers that the graph reads and writes in place."""

    def __init__(self, tensors: Sequence[CacheTensor], batch: int) -> None:
        """An empty cache for that many rows; ``reserve`` makes its buffers."""
        self._tensors = tensors
        self._arrays = [tensor.empty(batch, tensor.capacity or 0) for tensor in tensors]
        self._values = [ort_value(array) for array in self._arrays]
        self._binding: onnxruntime.IOBinding | None = None
        self.length = 0

    def reserve(self, length: int) -> None:
        """Make room for that many tokens; longer buffers take over what is in the old ones."""
        if length <= min(array.shape[2] for array in self._arrays):
            return
        old = self._arrays
        arrays = [t.empty(len(old[0]), length) for t in self._tensors]
        for array, before in zip(arrays, old, strict=True):
            array[:, :, : self.length] = before[:, :, : self.length]
        values = [ort_value(array) for array in arrays]
        self._arrays, self._values, self._binding = arrays, values, None

    def bind(self, binding: onnxruntime.IOBinding) -> None:
        """Bind each buffer as input and as output, once for many runs."""
        if binding is self._binding:
            return
        for tensor, value in zip(self._tensors, self._values, strict=True):
            binding.bind_ortvalue_input(tensor.pair.past, value)
            binding.bind_ortvalue_output(tensor.pair.present, value)
        self._binding = binding

    def advance(self, binding: onnxruntime.IOBinding, tokens: int) -> None:
        """Count the tokens that a run has written."""
        self.length += tokens

    def cut(self, length: int) -> None:
        """Forget all tokens but the first ones; the next run overwrites the others."""
        self.length = min(length, self.length)


Cache = GrowingCache | SharedCache


@dataclass(frozen=True)
class Prefix:
    """What a cache holds: these tokens, as this session with this adapter has read them."""

    session: onnxruntime.InferenceSession
    adapter: Adapter | None
    tokens: tuple[int, ...]
    cache: Cache


class PromptCache:
    """What a model has read of one conversation, kept by the caller between two calls.

    A call takes it out and puts it back when it ends; a second call at the same time finds it
    empty and reads its whole prompt. Its memory is free once the caller drops it.
    """

    def __init__(self) -> None:
        """An empty cache, for any model."""
        self._lock = threading.Lock()
        self._prefix: Prefix | None = None
        self._draft: PromptCache | None = None

    @property
    def draft(self) -> PromptCache:
        """What the latest draft has read; its memory is free when this cache is."""
        with self._lock:
            self._draft = self._draft or PromptCache()
            return self._draft

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that need not be read again."""
        prefix = self._prefix
        return () if prefix is None else prefix.tokens

    def take(
        self,
        session: onnxruntime.InferenceSession,
        adapter: Adapter | None,
        tokens: Sequence[int],
    ) -> Cache | None:
        """The cache of the longest known beginning of ``tokens``, one token less at least.

        None if nothing of it was read by this session with this adapter.
        """
        with self._lock:
            prefix, self._prefix = self._prefix, None
        if prefix is None or prefix.session is not session or prefix.adapter is not adapter:
            return None
        limit = min(len(prefix.tokens), len(tokens) - 1)
        common = common_length(prefix.tokens[:limit], tokens)
        prefix.cache.cut(common)
        return prefix.cache if common else None

    def put(self, prefix: Prefix) -> None:
        """Keep what a call has read."""
        with self._lock:
            self._prefix = prefix


@dataclass(frozen=True)
class Memory:
    """Bytes that a language model takes, beside ONNX Runtime itself and its activations.

    What an encoder hands to the decoder counts as activations.
    """

    weights: int
    cache: int  # a growing one exists twice while a run replaces it

    @property
    def total(self) -> int:
        """Of both."""
        return self.weights + self.cache


def memory_needed(
    path: str | os.PathLike[str], tokens: int | None = None, batch: int = 1
) -> Memory:
    """What a language model takes for prompt and answer of that many tokens, without loading it.

    tokens: by default as many as it can read. batch: number of prompts at once.
    Raises BundleError for the file, InputError if it is no language model.
    """
    bundle = read_bundle(path)
    manifest = bundle.manifest
    generation = manifest.generation
    if generation is None:
        raise not_a_language_model(f"bundle {bundle.path}")
    limit = context_limit(manifest, generation)
    if tokens is not None and not 1 <= tokens <= limit:
        raise InputError(f"bundle {bundle.path}: {tokens} tokens asked, it can read 1 to {limit}")
    tensors = cache_tensors(manifest, generation)
    length = tokens or limit
    held = sum(t.token_bytes * (t.capacity or length) for t in tensors) * batch
    weights = next(entry.size for entry in manifest.entries if entry.name == WEIGHTS)
    return Memory(weights, held * (2 if generation.cache == "growing" else 1))


def new_cache(manifest: Manifest, generation: Generation, batch: int) -> Cache:
    """An empty cache of the kind that the bundle states."""
    tensors = cache_tensors(manifest, generation)
    return (GrowingCache if generation.cache == "growing" else SharedCache)(tensors, batch)


def cache_tensors(manifest: Manifest, generation: Generation) -> tuple[CacheTensor, ...]:
    """The tensors of the cache, from the signature of the graph."""
    inputs = {value.name: value for value in manifest.graphs["main"].inputs}
    tensors = []
    for pair in generation.pairs:
        _, heads, length, head_size = inputs[pair.past].shape
        capacity = length if isinstance(length, int) else None
        dtype = np.dtype(inputs[pair.past].dtype)
        assert isinstance(heads, int) and isinstance(head_size, int)  # read_bundle checked it
        tensors.append(CacheTensor(pair, heads, head_size, dtype, capacity))
    return tuple(tensors)


def common_length(read: Sequence[int], tokens: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(read, tokens, strict=False))
    differing = (place for place, (one, other) in pairs if one != other)
    return next(differing, min(len(read), len(tokens)))


def context_limit(manifest: Manifest, generation: Generation) -> int:
    """Tokens of prompt and answer together that model and cache allow."""
    tensors = cache_tensors(manifest, generation)
    capacity = min((t.capacity for t in tensors if t.capacity is not None), default=math.inf)
    return int(min(generation.context_length, capacity))


def vocabulary_size(manifest: Manifest, generation: Generation) -> int | None:
    """Tokens that the logits are of; None if the graph does not say."""
    outputs = {value.name: value for value in manifest.graphs["main"].outputs}
    size = outputs[generation.logits].shape[2]
    return size if isinstance(size, int) else None


def not_a_language_model(where: str) -> InputError:
    """The error for a bundle without the section ``generation``."""
    return InputError(
        f"{where}: it is no language model: its manifest has no section 'generation'; call it "
        "with arrays"
    )


def ort_value(array: Array) -> onnxruntime.OrtValue:
    """The array as a tensor of ONNX Runtime's, on the same memory."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
