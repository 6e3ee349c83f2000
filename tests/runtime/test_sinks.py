"""Answers longer than the context: what stays, what is forgotten, and what the cache holds."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
from language_samples import CONTEXT, HEAD_SIZE, HEADS, section, write_decoder

import edgec_runtime
from edgec_runtime.errors import InputError

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
KINDS: dict[str, tuple[dict[str, Any], int | str]] = {
    "growing": ({"cache": "growing", "context_length": 24}, "past"),
    "shared": ({"cache": "shared", "context_length": 24}, "past"),
    "fixed": ({"cache": "shared", "context_length": CONTEXT}, 24),
    "chunks": ({"cache": "shared", "context_length": 24, "prompt_chunk": 3}, "past"),
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> edgec_runtime.Model:
    changes, capacity = KINDS[request.param]
    path = write_decoder(tmp_path / "a", section(eos=(), **changes), capacity=capacity)
    return edgec_runtime.load(path)


def by_rule(model: edgec_runtime.Model, sinks: int, count: int) -> tuple[list[int], list[int]]:
    """Greedy answer that reads what is left anew for each token; and what is left at its end."""
    seen, answer = list(PROMPT), []
    [past, *_] = [v.shape[2] for v in model.inputs if v.name == "past.key"]
    empty = np.zeros((1, HEADS, past if isinstance(past, int) else 0, HEAD_SIZE), np.float32)
    for _ in range(count):
        if len(seen) > 24:
            seen = seen[:sinks] + seen[sinks + (24 - sinks) // 2 :]
        feeds = {"past.key": empty, "past.value": empty, "mask": np.ones((1, len(seen)), "i8")}
        token = int(model(**feeds, ids=np.array([seen]))["logits"][0, -1].argmax())
        answer.append(token)
        seen.append(token)
    return answer, seen


@pytest.mark.parametrize("sinks", [0, 4, 12])
def test_the_beginning_stays_and_the_older_half_goes(
    model: edgec_runtime.Model, sinks: int
) -> None:
    cache = edgec_runtime.PromptCache()
    expected, seen = by_rule(model, sinks, 80)
    answer = model.generate(PROMPT, max_new_tokens=80, sinks=sinks, cache=cache)
    assert list(answer.tokens) == expected
    assert (answer.reason, len(answer.tokens)) == ("length", 80)
    assert list(cache.tokens) == seen[:-1]  # the last one was not read
    # the cache is good for a prompt that begins alike
    follow = [*seen[:10], 7]
    again = model.generate(follow, max_new_tokens=9, cache=cache)
    assert again.cached_tokens == 10
    assert again.tokens == model.generate(follow, max_new_tokens=9).tokens


def test_an_answer_that_fits_is_the_usual_one(model: edgec_runtime.Model) -> None:
    usual = model.generate(PROMPT, max_new_tokens=16)
    assert model.generate(PROMPT, max_new_tokens=16, sinks=4) == usual
    tokens = list(model.generate(PROMPT, max_new_tokens=30, sinks=4, stream="tokens"))
    assert tuple(tokens[:16]) == usual.tokens and len(tokens) == 30


def test_what_does_not_fit_together_is_refused(model: edgec_runtime.Model) -> None:
    for options, message in (
        ({"sinks": -1, "max_new_tokens": 50}, "sinks is -1, expected a whole number from 0 to 12"),
        ({"sinks": 13, "max_new_tokens": 50}, "from 0 to 12, half of the context"),
        ({"sinks": 4}, "sinks is given without max_new_tokens"),
        ({"sinks": 4, "max_new_tokens": 50, "draft": model}, "draft and sinks exclude each other"),
    ):
        with pytest.raises(InputError, match=message):
            model.generate(PROMPT, **options)
    for count in (24, 25):
        message = f"the prompt has {count} tokens; the model has room for 24 with the answer"
        with pytest.raises(InputError, match=message):
            model.generate([1] * count, max_new_tokens=5, sinks=4)
    assert len(model.generate([1] * 23, max_new_tokens=5, sinks=4).tokens) == 5
    with pytest.raises(InputError, match="draft and sinks take one prompt, a list of 2 was given"):
        model.generate([PROMPT, PROMPT], max_new_tokens=5, sinks=4)


def test_a_run_that_fails_leaves_the_cache_true(
    model: edgec_runtime.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = edgec_runtime.Model.run_bound
    for last in range(2, 26):  # before the context is full, when it is read again, and behind that
        left = [last]

        def failing(self: edgec_runtime.Model, binding: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise InputError("no more")
            run(self, binding)

        cache = edgec_runtime.PromptCache()
        with monkeypatch.context() as patched:
            patched.setattr(edgec_runtime.Model, "run_bound", failing)
            with pytest.raises(InputError, match="no more"):
                model.generate(PROMPT, max_new_tokens=80, sinks=4, cache=cache)
        follow = [*cache.tokens[:20], 7]
        answer = model.generate(follow, max_new_tokens=3, cache=cache)
        assert answer.cached_tokens == len(follow) - 1
        assert answer.tokens == model.generate(follow, max_new_tokens=3).tokens


def test_the_smallest_context_is_enough(tmp_path: pathlib.Path) -> None:
    path = write_decoder(tmp_path / "a", section(eos=(), cache="shared"), capacity=2)
    answer = edgec_runtime.load(path).generate([3], max_new_tokens=9, sinks=1)
    assert len(answer.tokens) == 9
