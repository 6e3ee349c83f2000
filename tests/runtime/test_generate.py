"""Generation against transformers' own, on exports of small Llama- and GPT-2-like models."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from language_samples import VOCABULARY, tiny_transformers_model, write_export

import edgec_runtime
from edgec_runtime import bundle, sampling
from edgec_runtime.generation import Sampling

pytestmark = pytest.mark.slow  # torch, transformers, optimum and two exports

NEW = 40
PROMPTS = [[5, 9, 200, 31, 7], [88, 3], [140, 141, 142, 143, 144, 145, 146, 147, 148]]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[edgec_runtime.Model, Any]:
    torch.set_num_threads(1)
    reference = tiny_transformers_model(request.param)
    path = tmp_path_factory.mktemp(request.param) / "model.edgec"
    return edgec_runtime.load(write_export(path, reference)), reference


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    return ids, mask


def greedy(reference: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    ids, mask = padded(prompts)
    result = reference.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options
    )
    return result[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_those_of_transformers(
    pair: tuple[edgec_runtime.Model, Any], prompt: list[int]
) -> None:
    model, reference = pair
    answer = model.generate(prompt, max_new_tokens=NEW)
    assert list(answer.tokens) == greedy(reference, [prompt])[0]
    assert len(set(answer.tokens)) > 10  # no loop that any model would fall into
    assert (answer.reason, answer.prompt_tokens) == ("length", len(prompt))


def test_a_left_padded_batch_is_that_of_transformers(
    pair: tuple[edgec_runtime.Model, Any],
) -> None:
    model, reference = pair
    answers = model.generate(PROMPTS, max_new_tokens=NEW)
    assert [list(answer.tokens) for answer in answers] == greedy(reference, PROMPTS)
    alone = [model.generate(prompt, max_new_tokens=NEW) for prompt in PROMPTS]
    assert [a.tokens for a in answers] == [a.tokens for a in alone]


def test_a_greedy_answer_with_repetition_penalty_is_that_of_transformers(
    pair: tuple[edgec_runtime.Model, Any],
) -> None:
    model, reference = pair
    answer = model.generate(PROMPTS[0], max_new_tokens=NEW, repetition_penalty=1.5)
    expected = greedy(reference, [PROMPTS[0]], repetition_penalty=1.5)[0]
    assert list(answer.tokens) == expected != greedy(reference, [PROMPTS[0]])[0]


def test_draws_take_the_probabilities_of_transformers(
    pair: tuple[edgec_runtime.Model, Any],
) -> None:
    model, reference = pair
    options = {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.01}
    settings, random = Sampling(**options), sampling.random_generator(11)
    tokens = list(PROMPTS[0])
    for _ in range(NEW):
        with torch.no_grad():
            scores = reference(torch.tensor([tokens])).logits[0, -1].numpy()
        tokens.append(sampling.choose(scores, tokens, settings, random))
    answer = model.generate(PROMPTS[0], max_new_tokens=NEW, seed=11, **options)
    assert list(answer.tokens) == tokens[len(PROMPTS[0]) :]


def test_rows_end_at_their_own_eos(
    pair: tuple[edgec_runtime.Model, Any], tmp_path: pathlib.Path
) -> None:
    model, reference = pair
    free = greedy(reference, PROMPTS)
    end = free[0][9]
    expected = greedy(reference, PROMPTS, eos_token_id=end)
    answers = ending_at(model, end).generate(PROMPTS, max_new_tokens=NEW)
    for answer, row in zip(answers, expected, strict=True):
        cut = row.index(end) if end in row else len(row)
        assert list(answer.tokens) == row[:cut]
        assert answer.reason == ("eos" if end in row else "length")
    assert len(answers[0].tokens) <= 9


def ending_at(model: edgec_runtime.Model, token: int) -> edgec_runtime.Model:
    """The same session under a manifest with another eos."""
    generation = dataclasses.replace(model.manifest.generation, eos=(token,))
    manifest = dataclasses.replace(model.manifest, generation=generation)
    changed = bundle.Bundle(model.path, model.path.stat().st_size, manifest)
    return edgec_runtime.Model(changed, model.session, 1)


def test_a_prompt_read_in_chunks_gives_the_same_answer(
    pair: tuple[edgec_runtime.Model, Any],
) -> None:
    model, reference = pair
    prompt = [int(t) for t in np.random.default_rng(5).integers(0, VOCABULARY, 50)]
    generation = dataclasses.replace(model.manifest.generation, prompt_chunk=7)
    manifest = dataclasses.replace(model.manifest, generation=generation)
    chunked = edgec_runtime.Model(
        bundle.Bundle(model.path, model.path.stat().st_size, manifest), model.session, 1
    )
    answer = chunked.generate(prompt, max_new_tokens=NEW)
    assert list(answer.tokens) == greedy(reference, [prompt])[0]


def test_a_cache_saves_reading_and_changes_nothing(
    pair: tuple[edgec_runtime.Model, Any],
) -> None:
    model, reference = pair
    cache = edgec_runtime.PromptCache()
    first = model.generate(PROMPTS[2], max_new_tokens=8, cache=cache)
    follow = PROMPTS[2] + list(first.tokens) + [17, 90]
    second = model.generate(follow, max_new_tokens=NEW, cache=cache)
    assert second.cached_tokens == len(PROMPTS[2]) + 7  # the last token was never fed
    assert list(second.tokens) == greedy(reference, [follow])[0]
    other = PROMPTS[2][:4] + [1, 2, 3]
    third = model.generate(other, max_new_tokens=NEW, cache=cache)
    assert third.cached_tokens == 4
    assert list(third.tokens) == greedy(reference, [other])[0]
