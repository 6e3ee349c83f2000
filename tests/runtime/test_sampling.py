"""The filters of a draw against transformers' own, on random scores; and the draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as reference

from edgec_runtime import sampling
from edgec_runtime.errors import EdgecError, InputError
from edgec_runtime.generation import Sampling

Array = np.ndarray[Any, Any]


def scores_of(seed: int, size: int = 5000, spread: float = 3.0) -> Array:
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32) * np.float32(spread)


def theirs(processor: Any, scores: Array, seen: list[int] | None = None) -> Array:
    return processor(torch.tensor([seen or [0]]), torch.tensor(scores[None]))[0].numpy()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("ours", "processor"),
    [
        (lambda s: sampling.keep_top_k(s, 1), reference.TopKLogitsWarper(1)),
        (lambda s: sampling.keep_top_k(s, 50), reference.TopKLogitsWarper(50)),
        (lambda s: sampling.keep_top_k(s, 9999), reference.TopKLogitsWarper(9999)),
        (lambda s: sampling.keep_top_p(s, 0.001), reference.TopPLogitsWarper(0.001)),
        (lambda s: sampling.keep_top_p(s, 0.5), reference.TopPLogitsWarper(0.5)),
        (lambda s: sampling.keep_top_p(s, 0.95), reference.TopPLogitsWarper(0.95)),
        (lambda s: sampling.keep_min_p(s, 0.02), reference.MinPLogitsWarper(0.02)),
        (lambda s: sampling.keep_min_p(s, 1.0), reference.MinPLogitsWarper(1.0)),
    ],
)
def test_a_filter_keeps_what_that_of_transformers_keeps(
    seed: int, ours: Callable[[Array], Array], processor: Any
) -> None:
    scores = scores_of(seed)
    np.testing.assert_array_equal(ours(scores), theirs(processor, scores))


@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    seen, scores = [3, 8, 8, 4999], scores_of(0)
    expected = theirs(reference.RepetitionPenaltyLogitsProcessor(penalty), scores, seen)
    np.testing.assert_array_equal(sampling.penalise(scores, seen, penalty), expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "settings",
    [
        Sampling(1.0),
        Sampling(0.7, top_k=40, top_p=0.9, min_p=0.05),
        Sampling(1.5, top_p=0.8),
        Sampling(0.3, top_k=3, top_p=0.5),
        Sampling(2.0, min_p=0.3),
    ],
)
def test_the_chain_gives_the_probabilities_of_transformers(seed: int, settings: Sampling) -> None:
    scores = scores_of(seed)
    chain = reference.LogitsProcessorList([reference.TemperatureLogitsWarper(settings.temperature)])
    if settings.top_k:
        chain.append(reference.TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        chain.append(reference.TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        chain.append(reference.MinPLogitsWarper(settings.min_p))
    expected = torch.tensor(theirs(chain, scores)).softmax(-1).numpy()
    actual = sampling.probabilities(scores, settings)
    np.testing.assert_array_equal(actual > 0, expected > 0)
    # both sum in float32: 1e-6 is ten roundings of the largest probability
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_the_chain_is_in_the_order_of_transformers() -> None:
    from transformers import GenerationConfig, GenerationMixin

    config = GenerationConfig(
        do_sample=True, temperature=0.5, top_k=7, top_p=0.5, min_p=0.1, repetition_penalty=2.0
    )
    chain = GenerationMixin()._get_logits_processor(config)
    assert [type(step).__name__ for step in chain] == [
        "RepetitionPenaltyLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
    ]
    scores, seen = scores_of(1, size=40), [1, 2, 3]
    penalised = sampling.penalise(scores, seen, 2.0)
    settings = Sampling(0.5, 7, 0.5, 0.1, 2.0)
    expected = torch.tensor(theirs(chain, scores, seen)).softmax(-1).numpy()
    actual = sampling.probabilities(penalised, settings)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_temperature_zero_takes_the_highest_score_and_draws_nothing() -> None:
    random = sampling.random_generator(0)
    before = random.bit_generator.state
    scores = scores_of(2)
    assert sampling.choose(scores, [], Sampling(), random) == int(scores.argmax())
    assert random.bit_generator.state == before
    seen = [int(scores.argmax())]
    choice = sampling.choose(scores, seen, Sampling(repetition_penalty=50.0), random)
    assert choice != int(scores.argmax())


def test_draws_follow_the_probabilities() -> None:
    scores, settings = scores_of(3, size=6, spread=1.0), Sampling(1.0, top_k=4)
    random = sampling.random_generator(7)
    draws = [sampling.choose(scores, [], settings, random) for _ in range(20_000)]
    shares = np.bincount(draws, minlength=6) / len(draws)
    # 4 standard errors of a share are at most 4 * sqrt(0.25 / 20000) = 0.014
    np.testing.assert_allclose(shares, sampling.probabilities(scores, settings), atol=0.014)
    assert np.count_nonzero(shares) == 4


def test_a_seed_gives_the_same_draws_and_rows_differ() -> None:
    scores, settings = scores_of(4), Sampling(1.0)

    def draws(seed: int, row: int) -> list[int]:
        random = sampling.random_generator(seed, row)
        return [sampling.choose(scores, [], settings, random) for _ in range(20)]

    assert draws(1, 0) == draws(1, 0)
    assert draws(1, 0) != draws(2, 0)
    assert draws(1, 0) != draws(1, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_an_error(value: float) -> None:
    scores = scores_of(5)
    scores[3] = value
    with pytest.raises(EdgecError, match="scores that are not finite for the next token"):
        sampling.choose(scores, [], Sampling(), sampling.random_generator(0))


def test_half_precision_scores_are_widened_first() -> None:
    scores = np.array([60_000, 59_000, 0], np.float16)
    choice = sampling.choose(
        scores, [0], Sampling(repetition_penalty=0.5), sampling.random_generator(0)
    )
    assert choice == 0  # 120,000 is no float16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Sampling(-0.1), "temperature is -0.1, expected a number from 0 up"),
        (Sampling(float("nan")), "temperature is nan"),
        (Sampling(top_k=-1), "top_k is -1, expected a whole number from 0 up"),
        (Sampling(top_k=1.5), "top_k is 1.5, expected int"),  # type: ignore[arg-type]
        (Sampling(top_p=0), "top_p is 0, expected a number above 0, at most 1"),
        (Sampling(top_p="1"), "top_p is '1', expected float"),  # type: ignore[arg-type]
        (Sampling(min_p=1.1), "min_p is 1.1, expected a number from 0 to 1"),
        (Sampling(repetition_penalty=0), "repetition_penalty is 0, expected a number above 0"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: Sampling, message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings.check()
