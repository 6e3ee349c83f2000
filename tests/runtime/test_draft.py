"""Speculative decoding: with a draft, the tokens are the model's own, and fewer runs make them."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import pytest
from language_samples import CONTEXT, section, write_decoder

import edgec_runtime
from edgec_runtime.errors import InputError

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
DRAWS: dict[str, Any] = {"temperature": 0.8, "top_k": 20, "seed": 5}
KINDS = {
    "growing": ({"cache": "growing"}, "past"),
    "shared": ({"cache": "shared"}, "past"),
    "fixed": ({"cache": "shared"}, CONTEXT),
    "chunks": ({"cache": "growing", "prompt_chunk": 3}, "past"),
}


def load(path: pathlib.Path, kind: str, **options: Any) -> edgec_runtime.Model:
    changes, capacity = KINDS[kind]
    made = section(**{"eos": ()} | changes | options.pop("changes", {}))
    return edgec_runtime.load(write_decoder(path, made, capacity=capacity, **options))


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> edgec_runtime.Model:
    return load(tmp_path / "model", request.param)


@pytest.fixture(params=["growing", "fixed"])
def draft(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> edgec_runtime.Model:
    return load(tmp_path / "draft", request.param, noise=0.3)


def runs_of(model: edgec_runtime.Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the number of new tokens of each run of this model's session."""
    runs: list[int] = []
    run = edgec_runtime.Model.run_bound

    def counting(self: edgec_runtime.Model, binding: Any) -> None:
        run(self, binding)
        if self.session is model.session:
            runs.append(binding.get_outputs()[0].shape()[1])

    monkeypatch.setattr(edgec_runtime.Model, "run_bound", counting)
    return runs


@pytest.mark.parametrize("options", [{}, DRAWS, {"repetition_penalty": 1.5}])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_answer_is_the_models_own(
    model: edgec_runtime.Model,
    draft: edgec_runtime.Model,
    options: dict[str, Any],
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = model.generate(PROMPT, max_new_tokens=40, **options)
    assert alone.guessed_tokens == alone.accepted_tokens == 0
    runs = runs_of(model, monkeypatch)
    answer = model.generate(PROMPT, max_new_tokens=40, draft=draft, draft_tokens=count, **options)
    assert answer.tokens == alone.tokens
    assert len(set(answer.tokens)) > 5
    assert 0 < answer.accepted_tokens < answer.guessed_tokens  # right at times, wrong at times
    chunks = -(-len(PROMPT) // (model.manifest.generation.prompt_chunk or 1 << 30))  # type: ignore[union-attr]
    # each token but the first costs a run or was guessed
    assert len(runs) - chunks + answer.accepted_tokens == 39
    assert sum(runs[chunks:]) == len(runs) - chunks + answer.guessed_tokens


def test_a_draft_that_is_the_model_is_always_right(model: edgec_runtime.Model) -> None:
    answer = model.generate(PROMPT, max_new_tokens=31, draft=model, draft_tokens=4)
    assert answer.tokens == model.generate(PROMPT, max_new_tokens=31).tokens
    # 1 by the prompt, 6 times 1 + 4: nothing is guessed behind the last token
    assert (answer.guessed_tokens, answer.accepted_tokens) == (24, 24)


def test_a_whole_context_can_be_filled(
    model: edgec_runtime.Model, draft: edgec_runtime.Model
) -> None:
    answer = model.generate(PROMPT, draft=draft)
    assert len(answer.tokens) == CONTEXT - len(PROMPT)
    assert answer.tokens == model.generate(PROMPT).tokens


def test_an_end_among_guesses_ends_the_answer(tmp_path: pathlib.Path) -> None:
    free = load(tmp_path / "free", "shared").generate(PROMPT, max_new_tokens=30)
    end = free.tokens[12]
    model = load(tmp_path / "model", "shared", changes={"eos": (end,)})
    answer = model.generate(PROMPT, max_new_tokens=30, draft=model, draft_tokens=5)
    assert answer.tokens == free.tokens[: free.tokens.index(end)]
    assert answer.reason == "eos"


def test_a_conversation_reads_only_what_is_new_of_either_model(
    model: edgec_runtime.Model, draft: edgec_runtime.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = edgec_runtime.PromptCache()
    first = model.generate(PROMPT, max_new_tokens=10, cache=cache, draft=draft)
    # what wrong guesses left behind is not kept
    read = (*PROMPT, *first.tokens)
    assert cache.tokens == read[: len(cache.tokens)] and len(cache.tokens) >= len(read) - 1
    assert cache.draft.tokens[: len(PROMPT) + 1] == read[: len(PROMPT) + 1]
    follow = [*read, 7, 8]
    runs = runs_of(draft, monkeypatch)
    second = model.generate(follow, max_new_tokens=20, cache=cache, draft=draft)
    assert second.cached_tokens == len(read) - 1  # its last token was not read
    assert second.tokens == model.generate(follow, max_new_tokens=20).tokens
    assert runs[0] < len(PROMPT)  # the draft has not read its prompt again


def test_a_stream_that_is_dropped_leaves_what_it_has_read(
    model: edgec_runtime.Model, draft: edgec_runtime.Model
) -> None:
    cache = edgec_runtime.PromptCache()
    expected = model.generate(PROMPT, max_new_tokens=30)
    stream = model.generate(
        PROMPT, max_new_tokens=30, stream="tokens", cache=cache, draft=draft, draft_tokens=6
    )
    tokens = [next(stream) for _ in range(9)]
    del stream
    assert tokens == list(expected.tokens[:9])
    assert cache.tokens == (*PROMPT, *tokens)[: len(cache.tokens)]
    again = model.generate(PROMPT, max_new_tokens=30, cache=cache, draft=draft)
    assert (again.tokens, again.cached_tokens) == (expected.tokens, len(PROMPT) - 1)


def test_bad_drafts_are_refused(tmp_path: pathlib.Path) -> None:
    from bundle_samples import write_sample

    model = load(tmp_path / "model", "growing")
    small = load(tmp_path / "small", "growing")
    short = edgec_runtime.load(
        write_decoder(tmp_path / "short", section(cache="shared", eos=()), capacity=32)
    )
    plain = edgec_runtime.load(write_sample(tmp_path / "plain"))
    other = load(tmp_path / "other", "growing")
    value = dataclasses.replace(other.manifest.graphs["main"].outputs[0], shape=("batch", "new", 9))
    graph = other.manifest.graphs["main"]
    changed = dataclasses.replace(graph, outputs=(value, *graph.outputs[1:]))
    manifest = dataclasses.replace(other.manifest, graphs={"main": changed})
    other._bundle = dataclasses.replace(other._bundle, manifest=manifest)
    for options, message in (
        ({"draft": small, "draft_tokens": 0}, "draft_tokens is 0, expected a whole number from 1"),
        ({"draft_tokens": 3}, "draft_tokens is 3, and there is no draft"),
        ({"draft": plain}, "draft .*plain: it is no language model"),
        ({"draft": short}, "draft .*short: it has room for 32 tokens, prompt and answer may have"),
        ({"draft": other}, "its vocabulary has 9 tokens, that of the model 260: take a draft"),
    ):
        with pytest.raises(InputError, match=message):
            model.generate(PROMPT, **options)
    with pytest.raises(
        InputError, match="stream, cache, draft and sinks take one prompt, 2 were given"
    ):
        model.generate([PROMPT, PROMPT], draft=small)
    answer = model.generate(PROMPT, max_new_tokens=32 - len(PROMPT), draft=short)
    assert answer.tokens == model.generate(PROMPT, max_new_tokens=24).tokens
