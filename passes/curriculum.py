"""What is learned from, and in which order: the samples of every step of a training.

Samples may be put together from two, which gives the teacher more to say about than the few
samples of a calibration. Class labels come along where the data has them. Easy first: the
samples that the teacher is surest of come before the others (curriculum by transfer with a
linear pace; Hacohen and Weinshall 2019, arXiv:1904.03626, sections 2 and 3).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgec.passes.contract import Feeds, Samples

if TYPE_CHECKING:
    from edgec.passes.recover import Recover

Order = Literal["random", "easy-first"]

LABEL = "label"  # the key of class labels, where no output's name is
UNKNOWN = -1  # the class of a sample that was put together from two
_FIRST_SHARE = 0.25  # of the samples, the easiest, that the first lessons are drawn from
_ALL_AT = 0.5  # share of the steps after which every sample is in play
_JUDGED = 48  # samples of a judgement, at most
_SPLICEABLE_RANK = 3  # batch, channels or time, and more


@dataclass(frozen=True)
class Example:
    """Feeds of one run, and the class labels that came with them: integers, by name."""

    feeds: Feeds
    labels: Feeds = field(default_factory=dict)


def examples(samples: Samples, labels: Samples | None) -> list[Example]:
    """The samples with those of their labels that are integers, as classes are.

    labels: of the samples, in their order; None if there are none.
    """
    if labels is None:
        return [Example(feeds) for feeds in samples]
    return [
        Example(feeds, {name: array for name, array in given.items() if array.dtype.kind in "iu"})
        for feeds, given in zip(samples, labels, strict=True)
    ]


def lessons(
    samples: Sequence[Example],
    settings: Recover,
    random: np.random.Generator,
    doubts: Sequence[float] = (),
) -> Iterator[list[Example]]:
    """Without end: the samples of one step after the other, every sample as often as any.

    doubts: how unsure the teacher is of each sample. If given, the first lessons are drawn
    from the easiest quarter alone; until half of the steps the rest comes in, linearly.
    """
    ranked = [int(i) for i in np.argsort(np.asarray(doubts), kind="stable")]
    ranked = ranked or list(range(len(samples)))
    order: list[int] = []
    for step in itertools.count():
        pool = ranked[: _pool_size(len(samples), step / settings.steps)] if doubts else ranked
        chosen = []
        for _ in range(settings.batch):
            order = order or [pool[int(i)] for i in random.permutation(len(pool))]
            chosen.append(samples[order.pop()])
        if settings.splice:  # every other one
            for i in range(0, len(chosen), 2):
                other = samples[pool[int(random.integers(len(pool)))]]
                chosen[i] = joined(chosen[i], other, random.random()) or chosen[i]
        yield chosen


def _pool_size(count: int, progress: float) -> int:
    """How many of the easiest samples are in play at a share of the training, 1 to count."""
    share = _FIRST_SHARE + (1.0 - _FIRST_SHARE) * progress / _ALL_AT
    return max(1, min(count, round(share * count)))


def judged(samples: Sequence[Example], settings: Recover, seed: int) -> list[Example]:
    """Held-out samples, evenly spaced, at most 48; pieces put together where there are fewer.

    Evenly spaced, since data often comes sorted by class.
    """
    random = np.random.default_rng(seed)
    count = min(len(samples), _JUDGED)
    judged = [samples[i * len(samples) // count] for i in range(count)]
    while settings.splice and len(judged) < _JUDGED:
        first, second = (samples[int(random.integers(len(samples)))] for _ in range(2))
        piece = joined(first, second, random.random())
        if piece is None:
            break
        judged.append(piece)
    return judged


def joined(example: Example, other: Example, share: float) -> Example | None:
    """The start of one sample and the rest of another, cut at a share of the longest axis.

    A new sample with the contents of real ones, on which the teacher has its opinion (CutMix,
    Yun et al. 2019, arXiv:1905.04899, without its labels: the class is ``UNKNOWN``). None if
    the samples are no images or sequences of features, or of different shapes.
    """
    if not alike([example.feeds, other.feeds]):
        return None
    joined = {}
    for name, array in example.feeds.items():
        if array.ndim < _SPLICEABLE_RANK or array.dtype.kind != "f":
            return None
        axis = max(range(1, array.ndim), key=lambda i: array.shape[i])
        cut = round(share * array.shape[axis])
        before, after = (np.s_[:],) * axis + (np.s_[:cut],), (np.s_[:],) * axis + (np.s_[cut:],)
        joined[name] = np.concatenate([array[before], other.feeds[name][after]], axis)
    unknown = {name: np.full(v.shape, UNKNOWN, np.int64) for name, v in example.labels.items()}
    return Example(joined, unknown)


def alike(samples: Sequence[Feeds]) -> bool:
    """True if the samples have the same shapes, with a first axis to stack along."""
    shapes = [{name: array.shape for name, array in feeds.items()} for feeds in samples]
    return all(shape == shapes[0] for shape in shapes) and all(shapes[0].values())
