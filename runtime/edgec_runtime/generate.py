"""Writes text with a language model: the loop around the graph of a decoder.

    model = edgec_runtime.load("smollm2.arm64.edgec")
    print(model.generate("The capital of France is", max_new_tokens=20).text)
    for piece in model.generate([{"role": "user", "content": "Hello"}], stream=True):
        print(piece, end="")

``generate`` is the method ``Model.generate``. It checks and encodes the prompts, reads them in
one or several runs, and then feeds one token per row and run. Greedy answers are those of
transformers, token by token; draws are made from the same probabilities (``sampling``).

Left out on purpose: beam search, constrained decoding, speculative decoding, and a smaller batch
once some of its rows have ended.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

import numpy as np

from edgec_runtime.cache import (
    Cache,
    Prefix,
    PromptCache,
    context_limit,
    new_cache,
    not_a_language_model,
)
from edgec_runtime.errors import InputError
from edgec_runtime.generation import Generation, Sampling
from edgec_runtime.sampling import choose, random_generator
from edgec_runtime.text import Message, Pieces, Text

if TYPE_CHECKING:
    from edgec_runtime.session import Model

Array = np.ndarray[Any, Any]
Reason = Literal["eos", "stop", "length"]
Prompt = str | Array | Sequence[int] | Sequence[Message]
Prompts = list[str] | Sequence[Sequence[int]] | Sequence[Sequence[Message]]


class Options(TypedDict, total=False):
    """The options of ``generate``, for type checkers."""

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    stop: str | Sequence[str]
    seed: int
    cache: PromptCache | None


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    tokens: without the one that ended it. text: without the stop string; None if the bundle has
    no tokenizer or ``tokenizers`` is not installed. reason: why it ended; "length": after
    max_new_tokens. prompt_tokens: of the prompt; cached_tokens: those of them that were in
    the cache.
    """

    text: str | None
    tokens: tuple[int, ...]
    reason: Reason
    prompt_tokens: int
    cached_tokens: int = 0


@overload
def generate(
    model: Model, prompt: Prompt, *, stream: Literal[False] = False, **options: Unpack[Options]
) -> Completion: ...


@overload
def generate(
    model: Model, prompt: Prompts, *, stream: Literal[False] = False, **options: Unpack[Options]
) -> list[Completion]: ...


@overload
def generate(
    model: Model, prompt: Prompt, *, stream: Literal[True], **options: Unpack[Options]
) -> Iterator[str]: ...


def generate(
    model: Model,
    prompt: Prompt | Prompts,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    stream: bool = False,
    cache: PromptCache | None = None,
) -> Completion | list[Completion] | Iterator[str]:
    """Continue a prompt: a text, a chat (dicts with role and content), token ids, or many of them.

    max_new_tokens: of the answer; by default as many as the context has room for.
    temperature: 0 takes the most likely token, always. top_k, top_p, min_p: which tokens a draw
    may take. repetition_penalty: above 1, tokens of prompt and answer become less likely. Those
    left out are what the model's maker recommends: greedy unless the bundle says otherwise.
    stop: texts that end the answer. seed: of the draws.
    stream: return the text piece by piece, as it comes.
    cache: what earlier calls have read of this conversation; one prompt at a time.
    Returns a Completion for one prompt, a list of them for several, pieces of text if streamed.
    Raises InputError for a wrong argument, for a prompt that is empty or too long, and if the
    bundle is no language model; EdgecError for an optional package that is not installed.
    """
    generation = model.manifest.generation
    if generation is None:
        raise not_a_language_model(f"model {model.path}")
    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    changes: dict[str, Any] = {name: item for name, item in given.items() if item is not None}
    settings = dataclasses.replace(generation.sampling, **changes)
    settings.check()
    if type(seed) is not int or seed < 0:
        raise InputError(f"seed is {seed!r}, expected a whole number from 0 up")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not isinstance(text, str) or not text for text in stops):
        raise InputError(f"stop is {stop!r}, expected texts that are not empty")
    prompts, single = _listed(prompt)
    if not single and (stream or cache is not None):
        raise InputError(f"stream and cache take one prompt, {len(prompts)} were given")
    needed = stream or bool(stops) or any([_is_text(one) for one in prompts])
    present = generation.tokenizer is not None and importlib.util.find_spec("tokenizers")
    text = model.text if needed or present else None
    rows = [_encode(one, text) for one in prompts]
    limit = _limit(model, generation, rows, max_new_tokens)
    answers = [
        _Answer(row, generation, text, stops, random_generator(seed, number))
        for number, row in enumerate(rows)
    ]
    steps = _steps(copy.copy(model), generation, answers, settings, limit, cache)
    if stream:
        return (piece for [piece] in steps if piece)
    for _ in steps:
        pass
    completions = [answer.completion() for answer in answers]
    return completions[0] if single else completions


class _Answer:
    """One row of a batch while it grows."""

    def __init__(
        self,
        prompt: Sequence[int],
        generation: Generation,
        text: Text | None,
        stop: Sequence[str],
        random: np.random.Generator,
    ) -> None:
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


def _steps(
    model: Model,
    generation: Generation,
    answers: Sequence[_Answer],
    settings: Sampling,
    limit: int,
    kept: PromptCache | None,
) -> Iterator[list[str]]:
    """Let every answer grow by one token per item, and give the new pieces of text.

    model: one whose adapter nobody changes.
    """
    cache = None
    if kept is not None:
        cache = kept.take(model.session, model.adapter, answers[0].tokens)
    if cache is None:
        cache = new_cache(model.manifest, generation, len(answers))
    reader = _Reader(model, generation, cache, [len(answer.tokens) for answer in answers])
    cache.reserve(reader.width + limit)
    for answer in answers:
        answer.cached = cache.length
    try:
        scores = reader.read([answer.tokens for answer in answers])
        for count in range(1, limit + 1):
            pieces, tokens = [], []
            for answer, row in zip(answers, scores, strict=True):
                piece, token = "", generation.pad
                if answer.reason is None:
                    token = choose(row, answer.tokens, settings, answer.random)
                    piece = answer.push(token)
                    if count == limit and answer.reason is None:
                        piece += answer.end("length")
                pieces.append(piece)
                tokens.append(token)
            yield pieces
            if all(answer.reason is not None for answer in answers):
                return
            scores = reader.feed(np.array(tokens)[:, None])
    finally:
        if kept is not None:
            read = tuple(answers[0].tokens[: cache.length])
            kept.put(Prefix(model.session, model.adapter, read, cache))


class _Reader:
    """Runs the graph on new tokens."""

    def __init__(
        self, model: Model, generation: Generation, cache: Cache, lengths: Sequence[int]
    ) -> None:
        """lengths: of the prompts, which are padded to the longest one."""
        self.width = max(lengths)
        self._model, self._generation, self._cache = model, generation, cache
        self._padding = self.width - np.array(lengths)[:, None]
        self._binding = model.session.io_binding()
        inputs = {value.name: value.dtype for value in model.inputs}
        plain = (generation.ids, generation.mask, generation.positions)
        self._dtypes = {name: inputs[name] for name in plain if name is not None}

    def read(self, prompts: Sequence[Sequence[int]]) -> Array:
        """Scores behind the prompts; one prompt is read in chunks, from where the cache ends."""
        rows = [[self._generation.pad] * (self.width - len(row)) + list(row) for row in prompts]
        tokens = np.array(rows)
        chunk = self._generation.prompt_chunk if len(rows) == 1 else self.width
        while self.width - self._cache.length > chunk:
            self._run(tokens[:, self._cache.length : self._cache.length + chunk])
        return self.feed(tokens[:, self._cache.length :])

    def feed(self, tokens: Array) -> Array:
        """Float scores [batch, vocabulary] behind these tokens, int [batch, new]."""
        self._run(tokens)
        logits: Array = self._binding.get_outputs_as_ortvaluevector()[0].numpy()
        return logits[:, -1]

    def _run(self, tokens: Array) -> None:
        generation, cache, new = self._generation, self._cache, tokens.shape[1]
        places = np.arange(cache.length + new) - self._padding  # [batch, past + new]
        feeds = {generation.ids: tokens, generation.mask: places >= 0}
        if generation.positions is not None:
            feeds[generation.positions] = np.where(places < 0, 1, places)[:, cache.length :]
        for name, array in feeds.items():
            self._binding.bind_cpu_input(name, np.ascontiguousarray(array, self._dtypes[name]))
        self._binding.bind_output(generation.logits)
        cache.bind(self._binding)
        self._model.run_bound(self._binding)
        cache.advance(self._binding, new)


def _listed(prompt: Any) -> tuple[list[Any], bool]:
    """The prompts, and whether it was one alone. Raises InputError for something else."""
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if isinstance(prompt, str):
        return [prompt], True
    if isinstance(prompt, Sequence) and len(prompt):
        if isinstance(prompt[0], (Mapping, numbers.Integral)):
            return [prompt], True
        return [one.tolist() if isinstance(one, np.ndarray) else one for one in prompt], False
    if isinstance(prompt, Sequence):
        raise _empty()
    raise _no_prompt(prompt)


def _is_text(prompt: Any) -> bool:
    """Whether a prompt needs the tokenizer. Raises InputError unless it is a prompt."""
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, Sequence):
        raise _no_prompt(prompt)
    if not prompt:
        raise _empty()
    if not isinstance(prompt[0], Mapping) and not all(
        isinstance(token, numbers.Integral) for token in prompt
    ):
        raise _no_prompt(prompt)
    return isinstance(prompt[0], Mapping)


def _encode(prompt: Any, text: Text | None) -> list[int]:
    """The tokens of one prompt. Raises InputError if there are none."""
    if text is None or not _is_text(prompt):
        return [int(token) for token in prompt]
    tokens = text.encode(prompt) if isinstance(prompt, str) else text.encode_chat(prompt)
    if not tokens:
        raise _empty()
    return tokens


def _limit(
    model: Model, generation: Generation, rows: Sequence[Sequence[int]], asked: int | None
) -> int:
    """How many tokens the answers may have. Raises InputError if they do not fit."""
    if asked is not None and (type(asked) is not int or asked < 1):
        raise InputError(f"max_new_tokens is {asked!r}, expected a whole number from 1 up")
    [logits] = [value for value in model.outputs if value.name == generation.logits]
    size = logits.shape[2]
    count = size if isinstance(size, int) else 1 << 31
    wrong = next((token for row in rows for token in row if not 0 <= token < count), None)
    if wrong is not None:
        raise InputError(f"the prompt has the token {wrong}, expected 0 to {count - 1}")
    width, limit = max(map(len, rows)), context_limit(model.manifest, generation)
    if width + (asked or 1) > limit:
        answer = f", max_new_tokens is {asked}" if asked else ""
        raise InputError(
            f"the prompt has {width} tokens{answer}; the model has room for {limit} together: "
            "shorten the prompt"
        )
    return asked or limit - width


def _empty() -> InputError:
    return InputError("the prompt is empty; give at least one token")


def _no_prompt(prompt: Any) -> InputError:
    return InputError(
        f"the prompt is {prompt!r:.60}, expected a text, messages, token ids, or a list of them"
    )
