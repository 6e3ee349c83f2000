"""What a bundle says about a language model: the manifest's optional section ``generation``.

It names the inputs and outputs of the graph ``main`` that a decoder's loop feeds and reads,
the pairs of its key-value cache, the special tokens, and the entries of the bundle that hold
tokenizer and chat template. Field names are JSON keys; every key is stated, but for ``encoder``.

The contract of the graph, with ``new`` tokens in this call and ``past`` tokens in the cache:

    ids        int64 or int32 [batch, new]
    mask       the same, [batch, past + new], 1 for a token and 0 for left padding
    positions  the same, [batch, new]: tokens before this one in its row; 1 for padding
    logits     [batch, new or 1, vocabulary]: the last row is read, so a graph that gives only
               that one saves memory
    pairs      past -> present, [batch, heads, length, head size], heads and size fixed numbers
      growing: past has the length ``past``, which may be 0; present has past + new
      shared:  past and present are one buffer of fixed or any length, the capacity; the graph
               writes the new tokens at ``past``, the length of the mask less ``new``

Several new tokens come with an empty cache, or with a batch of 1. Batches are padded left.

A model that reads its prompt with an encoder has a second graph, ``encoder``, and says how it is
fed. It runs once a prompt; every output of it is an input of ``main`` of the same name and dtype,
the same in all steps: keys and values of the cross-attention, masks. The rows of a batch of answers
are as long as each other, so that ``mask`` is null.

A graph may take int64 [1] ``logits_from``, an input with the default 0: logits are of that
position of this call and those behind it, counted from the end if below 0.

Left out on purpose: beam search, caches in other layouts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from edgec_runtime.errors import BundleError, InputError

if TYPE_CHECKING:
    from edgec_runtime.manifest import Graph, Value

MAIN, ENCODER = "main", "encoder"  # roles of graphs
LOGITS_FROM = "logits_from"  # name of the input that says which positions get logits

_INDEX = ("int64", "int32")


@dataclass(frozen=True)
class CachePair:
    """A tensor of the cache: the input that takes it and the output that gives it back."""

    past: str
    present: str


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; every setting means what it means in transformers."""

    temperature: float = 0.0  # 0: greedy, the token of the highest score; nothing is drawn
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off; applies to greedy choice as well

    def check(self) -> None:
        """Raise InputError for a setting of the wrong type or out of range."""
        for name, value in vars(self).items():
            kinds: tuple[type, ...] = (int,) if name == "top_k" else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise InputError(f"{name} is {value!r}, expected {kinds[-1].__name__}")
        ranges = (
            ("temperature", 0 <= self.temperature < math.inf, "a number from 0 up"),
            ("top_k", self.top_k >= 0, "a whole number from 0 up"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a number above 0"),
        )
        for name, right, expected in ranges:
            if not right:
                raise InputError(f"{name} is {getattr(self, name)}, expected {expected}")


@dataclass(frozen=True)
class Encoder:
    """How the graph ``encoder`` is fed, and how the answers to what it read begin."""

    input: str  # token ids int [batch, length], or features, float [batch, ...]
    mask: str | None  # of token ids, [batch, length], 1 for a token and 0 for padding behind it
    start: tuple[int, ...]  # ids that stand in front of every answer
    suppress: tuple[int, ...] = ()  # ids that are never chosen
    begin_suppress: tuple[int, ...] = ()  # ids that are not chosen as the first one


@dataclass(frozen=True)
class Generation:
    """The section ``generation`` of the manifest."""

    ids: str  # input: token ids
    mask: str | None  # input: attention mask; None of a model with an encoder
    positions: str | None  # input: position ids
    logits: str  # output
    pairs: tuple[CachePair, ...]
    cache: Literal["growing", "shared"]
    eos: tuple[int, ...]  # ids that end an answer
    pad: int  # id that fills rows of a batch; any known id will do
    bos: int | None
    context_length: int  # tokens of prompt and answer together
    # tokens of a long prompt that one call takes, which bounds the memory of scores and attention;
    # SmolLM2 reads faster in 128 than in 512 and takes a tenth (benchmarks/long_context.py)
    prompt_chunk: int = 128
    # what generation_config states; temperature 0 unless it says do_sample
    sampling: Sampling = field(default_factory=Sampling)
    tokenizer: str | None = None  # entry: JSON of the library tokenizers
    chat_template: str | None = None  # entry: jinja text, UTF-8
    # names that a chat template may use: bos_token, eos_token, ... -> their text
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    encoder: Encoder | None = field(default=None, metadata={"optional": True})
    # input with the default [0]: the position, counted from the end if below 0, from which on there
    # are logits
    logits_from: str | None = field(default=None, metadata={"optional": True})

    @property
    def files(self) -> tuple[str, ...]:
        """The entries of the bundle that it names."""
        return tuple(name for name in (self.tokenizer, self.chat_template) if name is not None)


def check_generation(generation: Generation | None, graphs: Mapping[str, Graph]) -> None:
    """Raise BundleError unless the section fits the signatures of the graphs.

    generation: None if the manifest has no such section; an encoder needs one.
    """
    if MAIN not in graphs:
        raise _wrong("there is no graph 'main'")
    stated = None if generation is None else generation.encoder
    if (stated is None) != (ENCODER not in graphs):
        raise _wrong("a graph 'encoder' and a section 'encoder' belong together; expected both")
    if generation is None:
        return
    try:
        generation.sampling.check()
    except InputError as error:
        raise _wrong(f"sampling.{error}") from error
    if not generation.pairs:
        raise _wrong("pairs is empty; expected the inputs and outputs of the key-value cache")
    for name in ("context_length", "prompt_chunk"):
        if getattr(generation, name) < 1:
            raise _wrong(f"{name} is {getattr(generation, name)}, expected 1 or more")
    if generation.chat_template is not None and generation.tokenizer is None:
        raise _wrong("it has a chat_template and no tokenizer; expected both")
    if generation.mask is None and stated is None:
        raise _wrong("it has no mask, which a model without an encoder needs")
    graph = graphs[MAIN]
    inputs = {value.name: value for value in graph.inputs}
    outputs = {value.name: value for value in graph.outputs}
    plain = (generation.ids, generation.mask, generation.positions)
    fed = [name for name in plain if name is not None] + [pair.past for pair in generation.pairs]
    given = [generation.logits, *(pair.present for pair in generation.pairs)]
    if stated is not None:
        _check_encoder(stated, graphs[ENCODER], inputs)
        fed += [value.name for value in graphs[ENCODER].outputs]
    for side, named, known in (("input", fed, inputs), ("output", given, outputs)):
        for name in named:
            if name not in known:
                raise _wrong(f"it names the {side} '{name}', which the graph main lacks")
        if len(set(named)) != len(named):
            raise _wrong(f"it names an {side} twice")
    unfed = next((name for name in inputs if name not in fed), None)
    if unfed is not None:
        raise _wrong(f"the input '{unfed}' of the graph main has no part in it")
    for name in filter(None, plain):
        _check_index(inputs[name])
    for pair in generation.pairs:
        _check_pair(inputs[pair.past], outputs[pair.present])
    _check_tokens(generation, outputs[generation.logits])


def _check_encoder(encoder: Encoder, graph: Graph, taken: Mapping[str, Value]) -> None:
    """taken: the inputs of main."""
    inputs = {value.name: value for value in graph.inputs}
    fed = [name for name in (encoder.input, encoder.mask) if name is not None]
    if sorted(fed) != sorted(inputs):
        raise _wrong(f"encoder feeds {', '.join(fed)}; the graph has {', '.join(inputs)}")
    if set(inputs) & set(taken):
        raise _wrong(f"the graphs encoder and main both have the input '{encoder.input}'")
    read = inputs[encoder.input]
    if encoder.mask is not None:
        _check_index(read)
        _check_index(inputs[encoder.mask])
    elif len(read.shape) < 2:
        raise _wrong(f"the input '{read.name}' is {list(read.shape)}, expected [batch, ...]")
    for value in graph.outputs:
        known = taken.get(value.name)
        if known is None or known.dtype != value.dtype:
            raise _wrong(
                f"the encoder gives '{value.name}' ({value.dtype}), and the graph main has no such "
                "input"
            )
    if not encoder.start:
        raise _wrong("encoder.start is empty; expected the tokens that an answer begins with")


def _check_index(value: Value) -> None:
    if value.dtype not in _INDEX or len(value.shape) != 2:
        raise _wrong(
            f"the input '{value.name}' is {value.dtype} {list(value.shape)}, expected "
            "int64 or int32 [batch, tokens]"
        )


def _check_pair(past: Value, present: Value) -> None:
    for value in (past, present):
        if len(value.shape) != 4:
            raise _wrong(
                f"'{value.name}' of the cache has the shape {list(value.shape)}, expected "
                "[batch, heads, length, head size]"
            )
    if not all(isinstance(past.shape[axis], int) for axis in (1, 3)):
        raise _wrong(
            f"the input '{past.name}' has the shape {list(past.shape)}, expected fixed numbers "
            "of heads and head size"
        )
    if past.dtype != present.dtype:
        raise _wrong(
            f"the input '{past.name}' is {past.dtype}, the output '{present.name}' "
            f"{present.dtype}; expected the same"
        )


def _check_tokens(generation: Generation, logits: Value) -> None:
    if len(logits.shape) != 3:
        raise _wrong(
            f"the output '{logits.name}' has the shape {list(logits.shape)}, expected "
            "[batch, tokens, vocabulary]"
        )
    size = logits.shape[2]
    limit = size if isinstance(size, int) else 1 << 31
    ids = {"eos": generation.eos, "pad": (generation.pad,)}
    if generation.bos is not None:
        ids["bos"] = (generation.bos,)
    if generation.encoder is not None:
        for name in ("start", "suppress", "begin_suppress"):
            ids[f"encoder.{name}"] = getattr(generation.encoder, name)
    for name, tokens in ids.items():
        for token in tokens:
            if not 0 <= token < limit:
                raise _wrong(f"{name} has the token {token}, expected 0 to {limit - 1}")


def _wrong(what: str) -> BundleError:
    return BundleError(f"manifest.json: generation: {what}")
