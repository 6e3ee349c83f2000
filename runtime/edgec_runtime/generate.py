"""Writes text with a language model: the loop around the graph of a decoder.

    model = edgec_runtime.load("smollm2.arm64.edgec")
    print(model.generate("The capital of France is", max_new_tokens=20).text)
    for piece in model.generate([{"role": "user", "content": "Hello"}], stream=True):
        print(piece, end="")

    print(whisper.generate(features).text)                  # a model with an encoder

``generate`` is the method ``Model.generate``. It checks and encodes the prompts, reads them in
one or several runs, and then feeds one token per row and run. Greedy answers are those of
transformers, token by token; draws are made from the same probabilities (``sampling``).

Left out on purpose: beam search, constrained decoding, and a smaller batch once some of its rows
have ended.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

import numpy as np

from edgec_runtime.answer import Answer, Completion
from edgec_runtime.cache import (
    Prefix,
    PromptCache,
    context_limit,
    new_cache,
    not_a_language_model,
    vocabulary_size,
)
from edgec_runtime.draft import Draft, DraftedReader, open_draft
from edgec_runtime.errors import InputError
from edgec_runtime.generation import Generation, Sampling
from edgec_runtime.prompts import (
    Prompt,
    Prompts,
    encode,
    encoder_feeds,
    is_text,
    listed,
    start_tokens,
)
from edgec_runtime.reader import Reader
from edgec_runtime.sampling import choose, random_generator
from edgec_runtime.sinks import SinkReader, check_sinks

if TYPE_CHECKING:
    from edgec_runtime.session import Model

Array = np.ndarray[Any, Any]


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
    start: Sequence[int] | None
    draft: Model | None
    draft_tokens: int | None
    sinks: int | None


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


@overload
def generate(
    model: Model, prompt: Prompt, *, stream: Literal["tokens"], **options: Unpack[Options]
) -> Iterator[int]: ...


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
    stream: bool | Literal["tokens"] = False,
    cache: PromptCache | None = None,
    start: Sequence[int] | None = None,
    draft: Model | None = None,
    draft_tokens: int | None = None,
    sinks: int | None = None,
) -> Completion | list[Completion] | Iterator[str] | Iterator[int]:
    """Continue a prompt: a text, a chat (dicts with role and content), token ids, or many of them.

    With an encoder, answer it instead: the encoder reads the prompt, which may be features (float
    arrays as the encoder takes them, without the batch).

    max_new_tokens: of the answer; by default as many as the context has room for.
    temperature: 0 takes the most likely token, always. top_k, top_p, min_p: which tokens a draw
    may take. repetition_penalty: above 1, tokens of prompt and answer become less likely. Those
    left out are what the model's maker recommends: greedy unless the bundle says otherwise.
    stop: texts that end the answer. seed: of the draws.
    stream: return the text piece by piece, as it comes; "tokens": the tokens one by one, for
    which no tokenizer is needed.
    cache: what earlier calls have read of this conversation; one prompt at a time.
    start: tokens that the answers begin with, in place of those that the bundle states for a
    model with an encoder (language and task of a transcription); they are no part of the answers.
    draft: a smaller model of the same vocabulary that guesses what comes, draft_tokens (2) at
    once, at most prompt_chunk - 1, up to the end of its own context; the answer stays that of the
    model itself. One prompt at a time.
    sinks: go on where the context is full, with so many tokens of the beginning and the newer half
    of the others; needs max_new_tokens. One prompt at a time.
    Returns a Completion for one prompt, a list of them for several, pieces or tokens if streamed.
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
    encoder = generation.encoder
    if encoder is not None and cache is not None:
        raise InputError("cache is for models without an encoder, which reads every prompt anew")
    prompts, single = listed(prompt, model.manifest, encoder)
    if not single and (stream or (cache, draft, sinks) != (None, None, None)):
        raise InputError(
            f"stream, cache, draft and sinks take one prompt, a list of {len(prompts)} was given"
        )
    needed = stream is True or bool(stops) or any([is_text(one) for one in prompts])
    if isinstance(prompts[0], np.ndarray) and generation.tokenizer is not None:  # features
        needed = needed or importlib.util.find_spec("tokenizers") is not None
    text = model.text if needed else None
    encoded: dict[str, Array] = {}
    if encoder is not None or start is not None:
        rows = [start_tokens(start, encoder) for _ in prompts]
        encoded = encoder_feeds(model.manifest, generation, prompts, text)
    else:
        rows = [encode(one, text) for one in prompts]
    if encoder is not None and (draft, sinks) != (None, None):
        raise InputError("draft and sinks are for models without an encoder")
    context = context_limit(model.manifest, generation)
    if sinks is not None:
        if draft is not None:
            raise InputError("draft and sinks exclude each other")
        check_sinks(sinks, context, max_new_tokens)
    limit = _limit(model, generation, rows, max_new_tokens, endless=sinks is not None)
    room = min(max(map(len, rows)) + limit, context)
    guessing = None
    if draft is not None:
        guessing = open_draft(draft, draft_tokens, model, room, settings, cache)
    elif draft_tokens is not None:
        raise InputError(f"draft_tokens is {draft_tokens!r}, and there is no draft")
    answers = [
        Answer(row, generation, text, stops, random_generator(seed, number))
        for number, row in enumerate(rows)
    ]
    way = _Way(settings, limit, room, cache, encoded, guessing, sinks)
    steps = _steps(copy.copy(model), generation, answers, way)
    if stream == "tokens":
        return _new_tokens(steps, answers[0])
    if stream:
        return (piece for [piece] in steps if piece)
    for _ in steps:
        pass
    completions = [answer.completion() for answer in answers]
    if guessing is not None:
        completions[0] = dataclasses.replace(
            completions[0],
            guessed_tokens=guessing.guessed,
            accepted_tokens=guessing.accepted,
        )
    return completions[0] if single else completions


@dataclass(frozen=True)
class _Way:
    """How answers are written.

    limit: tokens of an answer. room: tokens that the cache may hold. encoded: the encoder's feeds.
    """

    settings: Sampling
    limit: int
    room: int
    kept: PromptCache | None
    encoded: Mapping[str, Array]
    draft: Draft | None
    sinks: int | None


def _steps(
    model: Model,
    generation: Generation,
    answers: Sequence[Answer],
    way: _Way,
) -> Iterator[list[str]]:
    """Let every answer grow by one token per item, and give the new pieces of text.

    model: one whose adapter nobody changes.
    """
    cache, kept, draft = None, way.kept, way.draft
    if kept is not None:
        cache = kept.take(model.session, model.adapter, answers[0].tokens)
    if cache is None:
        cache = new_cache(model.manifest, generation, len(answers))
    lengths = [len(answer.tokens) for answer in answers]
    alone = Reader(model, generation, cache, lengths, way.encoded)
    reader: Reader | DraftedReader | SinkReader = alone
    if draft is not None:
        reader = DraftedReader(alone, draft)
    elif way.sinks is not None:
        reader = SinkReader(alone, way.sinks, way.room)
    barred = _barred(generation)
    cache.reserve(way.room)
    for answer in answers:
        answer.cached = cache.length
    try:
        scores = reader.read([answer.tokens for answer in answers])
        for count in range(1, way.limit + 1):
            pieces, tokens = [], []
            for answer, row in zip(answers, scores, strict=True):
                piece, token = "", generation.pad
                if answer.reason is None:
                    never = barred[0] if count == 1 else barred[1]
                    token = choose(row, answer.tokens, way.settings, answer.random, never)
                    piece = answer.push(token)
                    if count == way.limit and answer.reason is None:
                        piece += answer.end("length")
                pieces.append(piece)
                tokens.append(token)
            yield pieces
            if all(answer.reason is not None for answer in answers):
                return
            scores = reader.feed(np.array(tokens)[:, None])
    finally:
        if draft is not None:
            draft.close()
        if kept is not None:
            held = answers[0].tokens if isinstance(reader, Reader) else reader.tokens
            cache.cut(len(held))
            read = tuple(held[: cache.length])
            kept.put(Prefix(model.session, model.adapter, read, cache))


def _new_tokens(steps: Iterator[list[str]], answer: Answer) -> Iterator[int]:
    """The tokens of the answer, each when its step is done."""
    known = len(answer.tokens)
    for _ in steps:
        yield from answer.tokens[known:]
        known = len(answer.tokens)


def _barred(generation: Generation) -> tuple[Sequence[int], Sequence[int]]:
    """The tokens that are no choice: for the first of an answer, and for the others."""
    encoder = generation.encoder
    if encoder is None:
        return (), ()
    return (*encoder.suppress, *encoder.begin_suppress), encoder.suppress


def _limit(
    model: Model,
    generation: Generation,
    rows: Sequence[Sequence[int]],
    asked: int | None,
    *,
    endless: bool,
) -> int:
    """How many tokens the answers may have. Raises InputError if they do not fit.

    endless: the context need not have room for them.
    """
    if asked is not None and (type(asked) is not int or asked < 1):
        raise InputError(f"max_new_tokens is {asked!r}, expected a whole number from 1 up")
    count = vocabulary_size(model.manifest, generation) or 1 << 31
    wrong = next((token for row in rows for token in row if not 0 <= token < count), None)
    if wrong is not None:
        raise InputError(f"the prompt has the token {wrong}, expected 0 to {count - 1}")
    width, limit = max(map(len, rows)), context_limit(model.manifest, generation)
    if width >= limit:
        raise InputError(
            f"the prompt has {width} tokens; the model has room for {limit} with the answer: "
            "shorten the prompt"
        )
    if not endless and width + (asked or 0) > limit:
        raise InputError(
            f"the prompt has {width} tokens, max_new_tokens is {asked}; the model has room for "
            f"{limit} together: shorten the prompt, lower max_new_tokens, or give sinks"
        )
    return asked or limit - width
