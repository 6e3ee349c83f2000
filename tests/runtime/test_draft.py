"""Speculative decoding: with a draft, the tokens are the model's own, and fewer runs make them."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest
from bundle_samples import write_sample
from language_samples import (
    CONTEXT,
    VOCABULARY,
    decoder_graph,
    section,
    write_decoder,
    write_onnx,
)
from onnx import helper, numpy_helper

import edgec_runtime
from edgec_runtime.bundle import read_bundle
from edgec_runtime.errors import EdgecError, InputError

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
DRAWS: dict[str, Any] = {"temperature": 0.8, "top_k": 20, "seed": 5}
KINDS = {
    "growing": ({"cache": "growing"}, "past"),
    "shared": ({"cache": "shared"}, "past"),
    "fixed": ({"cache": "shared"}, CONTEXT),
    "chunks": ({"cache": "growing", "prompt_chunk": 5}, "past"),
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


def test_nothing_is_guessed_behind_the_context_of_the_draft(
    model: edgec_runtime.Model, tmp_path: pathlib.Path
) -> None:
    made = section(cache="shared", eos=())
    short = edgec_runtime.load(write_decoder(tmp_path / "short", made, capacity=32))
    answer = model.generate(PROMPT, max_new_tokens=60, draft=short, draft_tokens=2)
    assert answer.tokens == model.generate(PROMPT, max_new_tokens=60).tokens
    assert 32 - len(PROMPT) - 10 < answer.guessed_tokens < 32 - len(PROMPT)


@pytest.mark.parametrize("broken", ["model", "draft"])
def test_a_run_that_fails_leaves_both_caches_true(
    model: edgec_runtime.Model,
    draft: edgec_runtime.Model,
    broken: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing = {"model": model, "draft": draft}[broken]
    run = edgec_runtime.Model.run_bound
    for last in range(1, 16):
        runs = [0]

        def counting(self: edgec_runtime.Model, binding: Any, runs: Any = runs) -> None:
            runs[0] += self.session is failing.session
            if self.session is failing.session and runs[0] == last:  # noqa: B023
                raise InputError("no more")
            run(self, binding)

        cache = edgec_runtime.PromptCache()
        with monkeypatch.context() as patched:
            patched.setattr(edgec_runtime.Model, "run_bound", counting)
            with pytest.raises(InputError, match="no more"):
                model.generate(PROMPT, max_new_tokens=40, draft=draft, cache=cache, draft_tokens=3)
        for one, kept in ((model, cache), (draft, cache.draft)):
            follow = [*(kept.tokens or PROMPT), 7]
            answer = one.generate(follow, max_new_tokens=5, cache=kept)
            assert answer.cached_tokens == len(follow) - 1 or not answer.cached_tokens
            assert answer.tokens == one.generate(follow, max_new_tokens=5).tokens


def test_a_draft_that_is_interrupted_makes_no_claim(
    draft: edgec_runtime.Model, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = load(tmp_path / "other", "shared"), edgec_runtime.PromptCache()
    model.generate(PROMPT, max_new_tokens=6, cache=cache, draft=draft)
    follow = [*PROMPT, *[11] * 30]

    def interrupted(array: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("edgec_runtime.cache.ort_value", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.generate(follow, max_new_tokens=30, draft=draft, cache=cache)
    answer = draft.generate(follow, max_new_tokens=6, cache=cache.draft)
    assert answer.tokens == draft.generate(follow, max_new_tokens=6).tokens


def test_a_run_that_onnxruntime_refuses_names_the_draft(
    model: edgec_runtime.Model, draft: edgec_runtime.Model
) -> None:
    # tokens that its table has not, in spite of its manifest
    with pytest.raises(InputError, match=r"draft.*: cannot run these inputs: .*Gather"):
        with_vocabulary(draft, 400).generate([300, 301])


def test_scores_of_the_last_token_alone_are_no_use(tmp_path: pathlib.Path) -> None:
    graph = decoder_graph()
    head = next(node for node in graph.graph.node if node.output[0] == "logits")
    index = numpy_helper.from_array(np.array([-1]), "behind")
    graph.graph.initializer.append(index)
    last = helper.make_node("Gather", [head.input[0], "behind"], ["final"], axis=1)
    head.input[0] = "final"
    place = list(graph.graph.node).index(head)
    nodes = [*graph.graph.node[:place], last, *graph.graph.node[place:]]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    model = edgec_runtime.load(write_onnx(tmp_path / "last", graph, section(eos=())))
    draft = load(tmp_path / "all", "growing")
    alone = model.generate(PROMPT, max_new_tokens=20)
    assert alone.tokens == draft.generate(PROMPT, max_new_tokens=20).tokens
    with pytest.raises(InputError, match=r"last gives scores of its last token only, expected"):
        model.generate(PROMPT, max_new_tokens=20, draft=draft)
    assert draft.generate(PROMPT, max_new_tokens=20, draft=model).tokens == alone.tokens


def test_a_draft_without_finite_scores_is_named(
    model: edgec_runtime.Model, tmp_path: pathlib.Path
) -> None:
    broken = load(tmp_path / "broken", "growing", scale=float("nan"))
    with pytest.raises(EdgecError, match=r"draft .*broken: the model gives scores that are not"):
        model.generate(PROMPT, max_new_tokens=9, draft=broken)


def test_tokens_that_the_draft_does_not_know_end_its_guesses(
    model: edgec_runtime.Model, tmp_path: pathlib.Path
) -> None:
    graph, known = decoder_graph(), 200
    for tensor in graph.graph.initializer:
        if tensor.name in ("table", "head"):
            rows = numpy_helper.to_array(tensor)
            cut = rows[:known] if tensor.name == "table" else rows[:, :known]
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(cut), tensor.name))
    graph.graph.output[0].type.tensor_type.shape.dim[2].dim_value = known
    draft = edgec_runtime.load(write_onnx(tmp_path / "few", graph, section(eos=(), bos=None)))
    alone = model.generate(PROMPT, max_new_tokens=40, **DRAWS)
    first = next(place for place, token in enumerate(alone.tokens) if token >= known)
    answer = model.generate(PROMPT, max_new_tokens=40, draft=draft, **DRAWS)
    assert answer.tokens == alone.tokens
    assert answer.guessed_tokens <= 2 * first
    assert model.generate([250, 3], max_new_tokens=9, draft=draft).guessed_tokens == 0


@pytest.mark.parametrize("size", [VOCABULARY + 60, "vocabulary"])
def test_another_vocabulary_will_do_where_the_tokenizer_is_the_models(
    model: edgec_runtime.Model, draft: edgec_runtime.Model, size: int | str
) -> None:
    other = with_vocabulary(draft, size)
    answer = model.generate(PROMPT, max_new_tokens=20, draft=other)
    assert answer.tokens == model.generate(PROMPT, max_new_tokens=20).tokens
    assert answer.guessed_tokens
    entries = tuple(entry for entry in other.manifest.entries if entry.name != "tokenizer.json")
    manifest = dataclasses.replace(other.manifest, entries=entries)
    other._bundle = dataclasses.replace(other._bundle, manifest=manifest)
    told = size if isinstance(size, int) else "an unknown number of"
    with pytest.raises(
        InputError, match=f"its vocabulary has {told} tokens, that of the model 260"
    ):
        model.generate(PROMPT, draft=other)


def with_vocabulary(model: edgec_runtime.Model, size: int | str) -> edgec_runtime.Model:
    """The same under a manifest that states another number of scores."""
    graph = model.manifest.graphs["main"]
    value = dataclasses.replace(graph.outputs[0], shape=("batch", "new", size))
    changed = dataclasses.replace(graph, outputs=(value, *graph.outputs[1:]))
    manifest = dataclasses.replace(model.manifest, graphs={"main": changed})
    model._bundle = dataclasses.replace(model._bundle, manifest=manifest)
    return model


def test_bad_drafts_are_refused(tmp_path: pathlib.Path) -> None:
    model = load(tmp_path / "model", "growing")
    small = load(tmp_path / "small", "growing")
    plain = edgec_runtime.load(write_sample(tmp_path / "plain"))
    for options, message in (
        ({"draft": small, "draft_tokens": 0}, "draft_tokens is 0, expected a whole number from 1"),
        ({"draft_tokens": 3}, "draft_tokens is 3, and there is no draft"),
        ({"draft": plain}, "draft .*plain: it is no language model"),
        ({"draft": "small.edgec"}, "draft is 'small.edgec', expected a model"),
        ({"draft": read_bundle(small.path)}, "expected a model: edgec_runtime.load"),
    ):
        with pytest.raises(InputError, match=message):
            model.generate(PROMPT, **options)
    slow = load(tmp_path / "slow", "growing", changes={"prompt_chunk": 1})
    with pytest.raises(InputError, match="slow reads one token a run: leave draft out"):
        slow.generate(PROMPT, draft=small)
    with pytest.raises(InputError, match="draft and sinks take one prompt, a list of 2 was given"):
        model.generate([PROMPT, PROMPT], draft=small)
