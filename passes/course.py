"""One training on labels, which may have to keep what was learned before: what ``adapt`` runs.

Lessened is the cross-entropy of the labels, of new samples and of remembered ones in the
same step (replay). On top come, if asked for: the distance to the answers of the model as it
was, at the classes that it knew (learning without forgetting, Li & Hoiem 2016,
arXiv:1606.09282, section 3); and the distance of every weight to where it was, as much as it
mattered (Kirkpatrick et al. 2017, arXiv:1612.00796, equation 3). Held-out samples are judged
by cross-entropy. The loop is in `edgec.passes.training_loop`.

Left out: augmentation, which is the user's data's business, and the warm-up of new rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, PassError
from edgec.passes.curriculum import LABEL, Example
from edgec.passes.learner import Learner
from edgec.passes.responses import log_probabilities
from edgec.passes.stacks import Teacher, Values, in_stacks, keeps_apart, unanswered
from edgec.passes.training_loop import NONE_HELD_OUT, Outcome, run_training
from edgec.passes.training_state import Checkpoints
from edgec.passes.training_task import task_digests
from edgec.passes.twin_check import how_apart

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from edgec.passes.adapt import Adapt
    from edgec.passes.head import Head
    from edgec.passes.learner import Judge
    from edgec.passes.torch_graph import TorchGraph


@dataclass(frozen=True)
class Lore:
    """What a training learns from. held_out, held_memory: for judgements only."""

    samples: Sequence[Example]
    memory: Sequence[Example] = ()
    held_out: Sequence[Example] = ()
    held_memory: Sequence[Example] = ()

    def all(self) -> tuple[Example, ...]:
        """Every sample there is."""
        return (*self.samples, *self.memory, *self.held_out, *self.held_memory)


@dataclass(frozen=True)
class Ties:
    """What holds a model to what it was.

    keeps: True for learning without forgetting, at the classes that it knew: ``classes``.
    importance: of each weight, by initializer name; empty without consolidation.
    """

    keeps: bool = False
    classes: tuple[int, ...] = ()
    importance: Mapping[str, Tensor] = field(default_factory=dict)


def train(
    twin: TorchGraph,
    model: ir.Model,
    head: Head,
    lore: Lore,
    ties: Ties,
    rates: Mapping[str, float],
    settings: Adapt,
    context: Context,
) -> Outcome:
    """Train the twin of the model and leave it in its best state on held-out samples.

    rates: Adam's, at the peak of the schedule, by the name of the initializer. Every sample has
    one array of labels, checked. A killed training goes on from ``context.work``. Raises
    PassError, before it begins, where the twin answers otherwise than ONNX Runtime.
    """
    from edgec.passes.torch_student import Student

    if apart := how_apart(twin, model, lore.samples):
        raise PassError(
            f"adapt: this graph in torch {apart}, so nothing was trained; adapt the model where "
            "it comes from"
        )
    size = settings.micro_batch or settings.batch
    idle: tuple[str, ...] = ()
    if not keeps_apart(twin, lore.samples, ()):
        if settings.micro_batch > 1:
            idle = (f"micro_batch = {size} had no effect: this graph takes one sample at a time",)
        size = 1
    answered = unanswered
    if ties.keeps:
        answered = Teacher(context.reference, [head.output], settings.threads).answered
    student = Student(twin, Labels(twin, head, ties, settings), settings)
    digests = {}
    if context.work is not None:
        digests = task_digests(model, context.reference, lore.all(), settings, context.seed)
    outcome = run_training(
        Learner(student, answered, rates),
        lambda: _drawn(lore, settings, context.seed),
        _judges(lore, size),
        settings,
        size=size,
        checkpoints=Checkpoints(context.work, settings.name, digests),
        announce=context.progress,
    )
    if not lore.held_out:
        idle = (*idle, NONE_HELD_OUT)
    return replace(outcome, findings=(*outcome.findings, *idle))


class Labels:
    """What an adaptation lessens, and judges held-out samples by."""

    student_features: tuple[str, ...] = ()

    def __init__(self, twin: TorchGraph, head: Head, ties: Ties, settings: Adapt) -> None:
        """The twin is as it was; a copy of its consolidated weights is kept."""
        self._head, self._ties, self._settings = head, ties, settings
        self._moving = {name: twin.initializer(name) for name in ties.importance}
        self._start = {name: tensor.detach().clone() for name, tensor in self._moving.items()}

    def parameters(self) -> list[Parameter]:
        """Nothing is learned beside the model."""
        return []

    def loss(self, values: Values, answers: Values, labels: Values) -> Tensor:
        """Cross-entropy, and what holds the model to what it was, of one stack."""
        loss = self.distance(values, answers, labels)
        if self._ties.keeps:
            loss = loss + self._settings.keep_weight * self._kept(values, answers)
        if self._moving:
            loss = loss + self._settings.ewc_weight / 2 * self._pull()
        return loss

    def distance(self, values: Values, answers: Values, labels: Values) -> Tensor:
        """Cross-entropy. Raises PassError if there are more or fewer labels than rows."""
        import torch.nn.functional as functional

        answer, classes = scores(self._head, values), labels[LABEL]
        if len(classes) != len(answer):
            raise PassError(
                f"adapt: {len(classes)} labels for {len(answer)} rows of class scores; give one "
                "label for each row of the output"
            )
        return functional.cross_entropy(answer, classes)

    def _kept(self, values: Values, answers: Values) -> Tensor:
        """Distance to the answers from before, softened."""
        import torch.nn.functional as functional

        columns, warmth = list(self._ties.classes), self._settings.temperature
        ours, theirs = (
            log_probabilities("logits", scores(self._head, v)[:, columns], warmth)
            for v in (values, answers)
        )
        apart = functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
        return warmth**2 * apart

    def _pull(self) -> Tensor:
        """How far the weights are from where they were, where it matters."""
        import torch

        parts = [
            (matters * (self._moving[name] - self._start[name]).square()).sum()
            for name, matters in self._ties.importance.items()
        ]
        return torch.stack(parts).sum()


def scores(head: Head, values: Values) -> Tensor:
    """Logits, or logarithms of probabilities, from the values of a twin: [rows, classes]."""
    answer = values[head.output]
    answer = answer.movedim(head.class_axis(answer.ndim), -1)
    if head.kind == "probabilities":
        answer = log_probabilities("probabilities", answer, 1.0)
    return answer.reshape(-1, answer.shape[-1])


def _drawn(lore: Lore, settings: Adapt, seed: int) -> Iterator[list[Example]]:
    """The samples of each step: of either side each as often as any other."""
    random = np.random.default_rng(seed)
    recalled = round(settings.replay * settings.batch) if lore.memory else 0
    new, old = _shuffled(lore.samples, random), _shuffled(lore.memory, random)
    while True:
        drawn = list(itertools.islice(new, settings.batch - recalled))
        yield [*drawn, *itertools.islice(old, recalled)]


def _shuffled(samples: Sequence[Example], random: np.random.Generator) -> Iterator[Example]:
    while True:
        yield from (samples[int(i)] for i in random.permutation(len(samples)))


def _judges(lore: Lore, size: int) -> list[Judge]:
    """Held-out samples in stacks; new and remembered ones count alike."""
    sides = [side for side in (lore.held_out or lore.samples, lore.held_memory) if side]
    return [
        (unanswered(stack), len(stack) / len(side) / len(sides))
        for side in sides
        for stack in in_stacks(side, size)
    ]
