"""Which token comes next: the filters of a draw, and the draw.

Scores go through the filters in transformers' order: repetition penalty, temperature, top-k,
top-p, min-p. Each keeps the tokens that transformers' class of the same name keeps, in the
same float32 arithmetic, and gives the others -inf; where several tokens tie at the limit of
top-p, all of them stay.

A draw takes one uniform number u from a numpy Generator and gives the first token, by id, at
which the sum of the probabilities exceeds u. So an answer depends on scores, settings and seed
alone; torch draws other numbers from the same probabilities.

Sources: top-k: Fan et al. 2018 (arXiv:1805.04833), section 5.4; top-p: Holtzman et al. 2019
(arXiv:1904.09751), section 3.1; min-p: Nguyen et al. 2024 (arXiv:2407.01082), section 3;
repetition penalty: Keskar et al. 2019 (arXiv:1909.05858), section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgec_runtime.errors import EdgecError
from edgec_runtime.generation import Sampling

Array = np.ndarray[Any, Any]


def random_generator(seed: int, row: int = 0) -> np.random.Generator:
    """The numbers of one row of a batch; they do not depend on the other rows."""
    return np.random.Generator(np.random.PCG64([seed, row]))


def choose(
    scores: Array,
    seen: Sequence[int],
    settings: Sampling,
    random: np.random.Generator,
    barred: Sequence[int] = (),
) -> int:
    """The next token.

    scores: float [vocabulary], logits. seen: the tokens so far, for the repetition penalty.
    barred: tokens that are no choice.
    Raises EdgecError if the highest score is not finite.
    """
    best = int(scores.argmax())  # a NaN, if there is one
    if not np.isfinite(scores[best]):
        raise EdgecError(
            "the model gives scores that are not finite for the next token; "
            "build it in a wider number format, or report the prompt to its maker"
        )
    if settings.temperature == 0 and settings.repetition_penalty == 1 and not barred:
        return best
    scores = scores.astype(np.float32)
    if settings.repetition_penalty != 1:
        scores = penalise(scores, seen, settings.repetition_penalty)
    scores[list(barred)] = -np.inf
    if settings.temperature == 0:
        return int(scores.argmax())
    shares = probabilities(scores, settings)
    kept = np.flatnonzero(shares)
    sums = np.cumsum(shares[kept], dtype=np.float64)
    place = np.searchsorted(sums, random.random() * sums[-1], side="right")
    return int(kept[min(int(place), len(kept) - 1)])


def probabilities(scores: Array, settings: Sampling) -> Array:
    """What a token is drawn from: float32 [vocabulary], 0 for tokens that a filter removed.

    scores: float32 [vocabulary], with the repetition penalty. temperature must be above 0.
    """
    scores = scores / settings.temperature
    if settings.top_k:
        scores = keep_top_k(scores, settings.top_k)
    if settings.top_p < 1:
        scores = keep_top_p(scores, settings.top_p)
    if settings.min_p:
        scores = keep_min_p(scores, settings.min_p)
    return _softmax(scores)


def penalise(scores: Array, seen: Sequence[int], penalty: float) -> Array:
    """Scores of the tokens seen divided by ``penalty`` if positive, multiplied if negative."""
    tokens = np.asarray(seen, dtype=np.int64)
    result, old = scores.copy(), scores[tokens]
    result[tokens] = np.where(old < 0, old * penalty, old / penalty)
    return result


def keep_top_k(scores: Array, k: int) -> Array:
    """The ``k`` highest scores, and what ties with the last of them; -inf for the others."""
    if k >= scores.size:
        return scores
    return _only(scores, scores >= np.partition(scores, scores.size - k)[scores.size - k])


def keep_top_p(scores: Array, p: float) -> Array:
    """The fewest highest scores whose probabilities exceed ``p`` together; at least one."""
    ordered = np.sort(scores)
    sums = np.cumsum(_softmax(ordered), dtype=np.float64).astype(np.float32)
    first = min(int(np.count_nonzero(sums <= 1 - p)), scores.size - 1)
    return _only(scores, scores >= ordered[first])


def keep_min_p(scores: Array, p: float) -> Array:
    """The scores whose probability is at least ``p`` times the highest one."""
    shares = _softmax(scores)
    return _only(scores, shares >= p * shares.max(keepdims=True))


def _only(scores: Array, kept: Array) -> Array:
    return np.where(kept, scores, np.float32(-np.inf))


def _softmax(scores: Array) -> Array:
    powers: Array = np.exp(scores - scores.max())
    powers /= powers.sum()
    return powers
