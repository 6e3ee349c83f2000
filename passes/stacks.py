"""Samples on top of each other, with what the teacher says of them: what a step works on.

A stack is as fast as a few samples and gives the same gradient, but only some graphs keep
the samples of a stack apart; ``keeps_apart`` tries it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Feeds, PassError
from edgec.passes.curriculum import Example, alike
from edgec.passes.execution import open_session, run_feeds
from edgec.passes.responses import squared_error
from edgec.passes.weights import Array

if TYPE_CHECKING:
    from torch import Tensor

    from edgec.passes.torch_graph import TorchGraph

Values = Mapping[str, "Tensor"]  # by name: outputs, inner values, answers or labels

_SAME_ANSWER = 0.05  # relative squared error that single flipped steps may cause in a deep graph


@dataclass(frozen=True)
class Stack:
    """Samples that the twin sees at once, on top of each other, and the teacher's answers."""

    feeds: Values
    answers: Values
    labels: Values
    count: int


class Teacher:
    """The reference in ONNX Runtime."""

    def __init__(self, reference: ir.Model, names: Sequence[str], threads: int) -> None:
        """names: of the values that it is asked for."""
        self._names = tuple(names)
        self._session = open_session(reference, outputs=self._names, threads=threads)

    def answered(self, samples: Sequence[Example]) -> Stack:
        """The samples as one stack."""
        import torch

        answers = [run_feeds(self._session, sample.feeds) for sample in samples]
        tensors = {
            name: torch.from_numpy(np.concatenate(arrays) if len(samples) > 1 else arrays[0])
            for name, arrays in zip(self._names, zip(*answers, strict=True), strict=True)
        }
        return replace(unanswered(samples), answers=tensors)


def unanswered(samples: Sequence[Example]) -> Stack:
    """The samples as one stack, with their labels alone."""
    feeds = stacked([sample.feeds for sample in samples])
    return Stack(feeds, {}, stacked(_labels(samples)), len(samples))


def stacked(samples: Sequence[Feeds]) -> dict[str, Tensor]:
    """The arrays of samples on top of each other, as tensors; one sample may have no axes."""
    import torch

    def joined(name: str) -> Array:
        arrays = [feeds[name] for feeds in samples]
        return np.concatenate(arrays) if len(arrays) > 1 else np.array(arrays[0])

    return {name: torch.from_numpy(joined(name)) for name in samples[0]}


def in_stacks(samples: Iterable[Example], size: int) -> list[list[Example]]:
    """The samples in order, in stacks of up to ``size`` that are alike."""
    stacks: list[list[Example]] = []
    for sample in samples:
        fits = bool(stacks) and len(stacks[-1]) < size
        if fits and alike([stacks[-1][0].feeds, sample.feeds]):
            stacks[-1].append(sample)
        else:
            stacks.append([sample])
    return stacks


def keeps_apart(twin: TorchGraph, samples: Sequence[Example], kept: Sequence[str]) -> bool:
    """True if the twin gives for two samples on top of each other what it gives for each.

    A graph may count on its batch: in the constant of a Reshape, or across samples. And
    its values may have the batch along another axis, or none. kept: values that count
    besides the outputs.
    """
    import torch

    pair = [sample.feeds for sample in samples[:2]]
    if len(pair) < 2 or not alike(pair):
        return False
    with torch.no_grad():
        singles = [twin(stacked([feeds]), keep=kept) for feeds in pair]
        try:
            together = twin(stacked(pair), keep=kept)
        except PassError:
            return False
    for name in (*twin.outputs, *kept):
        parts = [values[name] for values in singles]
        if not parts[0].ndim:
            return False
        apart = torch.cat(parts)
        if together[name].shape != apart.shape:
            return False
        error = squared_error(together[name].float(), apart.float())
        if name in twin.outputs and float(error) > _SAME_ANSWER:
            return False
    return True


def rows(sample: Example) -> int:
    """Length of the first axis of a sample's first input."""
    shape = next(iter(sample.feeds.values())).shape
    return shape[0] if shape else 1


def _labels(part: Sequence[Example]) -> list[Feeds]:
    """The labels that all samples of a part have, int64 [rows] each."""
    names = [n for n in part[0].labels if all(n in sample.labels for sample in part)]
    return [{n: sample.labels[n].reshape(-1).astype(np.int64) for n in names} for sample in part]
