"""One training of a graph towards its reference: what ``recover`` runs.

The reference answers in ONNX Runtime (teacher), the differentiable twin learns (student).
What is learned from is in `edgec.passes.curriculum`, what is lessened in
`edgec.passes.losses`, the loop in `edgec.passes.training_loop`. Samples are stacked along
their first axis where the twin gives the same for a stack.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, PassError, Samples
from edgec.passes.contract import Progress as Announce
from edgec.passes.curriculum import LABEL, Example, judged, lessons
from edgec.passes.learner import Learner
from edgec.passes.losses import Losses
from edgec.passes.stacks import Teacher, in_stacks, keeps_apart, rows
from edgec.passes.training_loop import NONE_HELD_OUT, Outcome, fixed_threads, run_training
from edgec.passes.training_state import Checkpoints
from edgec.passes.training_task import Task
from edgec.passes.twin_check import how_apart
from edgec.passes.workers import ALONE, Workers

if TYPE_CHECKING:
    from edgec.passes.recover import Recover
    from edgec.passes.torch_graph import TorchGraph


def train(twin: TorchGraph, model: ir.Model, context: Context, settings: Recover) -> Outcome:
    """Train the twin of the model, leave it in its best state on held-out samples.

    The context has calibration data; its workers, if it has any, take their share.
    """
    if not peak_rates(twin, settings):
        finding = "nothing was trained: of what the rates are for, this model has nothing"
        return Outcome(0, math.inf, math.inf, findings=(finding,))
    task = Task.of(model, context, settings)
    workers = context.workers or ALONE
    lesson = Lesson(twin, task, workers, context.work, context.progress)
    if apart := how_apart(twin, model, task.samples):
        finding = f"nothing was trained: this graph in torch {apart}"
        return Outcome(0, math.inf, math.inf, findings=(finding,))
    workers.hand_out(task)
    found = lesson.train()
    told = lesson.told_of_labels(context.calibration_labels)
    if not context.validation:
        told.append(NONE_HELD_OUT)
    return replace(found, findings=(*found.findings, *told))


def join_trainings(workers: Workers) -> None:
    """Take part in every training that process 0 hands out, until there are no more."""
    while True:
        with workers.handed() as task:
            if task is None:
                return
            twin = task.settings.twin(task.model)
            Lesson(twin, task, workers).train()


class Lesson:
    """One training: a task, a twin of its model, its teacher, and where it is on disk."""

    def __init__(
        self,
        twin: TorchGraph,
        task: Task,
        workers: Workers = ALONE,
        folder: pathlib.Path | None = None,
        announce: Announce = lambda what, done, total: None,
    ) -> None:
        """folder: for the checkpoint; None for none. announce: progress for people.

        Raises PassError for settings that do not fit the model, the data or the workers.
        """
        settings = task.settings
        if settings.batch < workers.size:
            raise PassError(
                f"{settings.name}: a batch of {settings.batch} samples cannot be shared by "
                f"{workers.size} processes; raise {settings.name}.batch or start fewer"
            )
        self._twin, self._task, self._settings = twin, task, settings
        self._workers, self._announce = workers, announce
        self._folder = folder if workers.rank == 0 else None
        self._losses = Losses(task.model, task.reference, settings, task.seed, task.samples[0])
        asked = [*twin.outputs, *self._losses.features]
        self._teacher = Teacher(task.reference, asked, settings.threads)
        # samples on top of each other: as asked for, but a stack for each worker
        self._share = settings.batch // workers.size
        self._size = min(self._share, settings.micro_batch or self._share)
        if not keeps_apart(twin, task.samples, self._losses.student_features):
            self._share = self._size = 1
        self._losses.check_rows(self._size * rows(task.samples[0]))

    def train(self) -> Outcome:
        """Train the twin and leave it in its best state on held-out samples."""
        with fixed_threads(self._settings.threads):
            return self._train()

    def _train(self) -> Outcome:
        from edgec.passes.torch_student import Student

        task, settings, workers = self._task, self._settings, self._workers
        student = Student(self._twin, self._losses, settings)
        rates = peak_rates(self._twin, settings)
        learner = Learner(student, self._teacher.answered, rates, workers, sharded=settings.sharded)
        stacks = in_stacks(judged(task.held_out, settings, task.seed), self._size)
        count = sum(len(stack) for stack in stacks)
        judges = [
            (self._teacher.answered(stack), len(stack) / count if counts else 0.0)
            for stack, counts in workers.share(stacks)
        ]
        digests = task.digests() if self._folder is not None else {}
        outcome = run_training(
            learner,
            self._drawn,
            judges,
            settings,
            size=self._size,
            wider=settings.wider,
            checkpoints=Checkpoints(self._folder, settings.name, digests),
            workers=workers,
            announce=self._announce,
        )
        return replace(outcome, findings=(*outcome.findings, *self._idle(rates)))

    def told_of_labels(self, given: Samples | None) -> list[str]:
        """Which labels counted, and which did not, and why. given: all that the data has."""
        losses, weight = self._losses, self._settings.label_weight
        if not weight or given is None:
            return []
        first = next(iter(given), {})
        told = [f"class labels '{losses.labels}' counted, too (label_weight {weight:g})"]
        reasons = [
            losses.unused(name, first[name].dtype)
            for name in (LABEL, *self._twin.outputs)
            if name in first
        ]
        unused = [f"labels were not used: {reason}" for reason in reasons if reason]
        return [*(told if losses.labels else []), *unused]

    def _idle(self, rates: Mapping[str, float]) -> list[str]:
        """Which settings that are not at their defaults had nothing to work on here."""
        twin, losses, settings = self._twin, self._losses, self._settings
        scales = set(twin.scales())
        weights = [n for n in rates if n not in scales and twin.initializer(n).dim() > 1]
        matched = "no inner value has a name that the teacher has, too"
        cases = {  # setting -> had it an effect, why not
            "rate": (bool(weights), "no weight of this graph is trained"),
            "scale_rate": (bool(scales), "this graph has no scales to learn"),
            "temperature": (losses.of_classes, "no output is of classes"),
            "features": (losses.matched > 0, matched),
            "feature_weight": (losses.matched > 0, matched),
            "label_weight": (
                bool(losses.labels),
                "the data has no labels for an output of classes",
            ),
            "micro_batch": (
                settings.micro_batch <= self._share,
                f"at most {self._share} samples are on top of each other",
            ),
            "sharded": (self._workers.size > 1, "one process trains"),
        }
        values = ((name, getattr(settings, name), *case) for name, case in cases.items())
        return [
            f"{name} = {value} had no effect: {reason}"
            for name, value, used, reason in values
            if value not in (0, getattr(type(settings), name)) and not used
        ]

    def _drawn(self) -> Iterator[list[Example]]:
        """The samples of each step."""
        random = np.random.default_rng(self._task.seed)
        return lessons(self._task.samples, self._settings, random, self._doubts())

    def _doubts(self) -> tuple[float, ...]:
        """How unsure the teacher is of each sample, where that orders them."""
        if self._settings.order != "easy-first":
            return ()
        answered = (self._teacher.answered([sample]) for sample in self._task.samples)
        return tuple(self._losses.doubt(stack.answers) for stack in answered)


def peak_rates(twin: TorchGraph, settings: Recover) -> dict[str, float]:
    """Name of each parameter that is trained -> its rate in units of what one step of it means."""
    rates = {}
    scales = set(twin.scales())
    for name in twin.trained():
        parameter = twin.initializer(name)
        size = float(parameter.detach().square().mean().sqrt())
        step = twin.quantization_step(name)
        if name in scales:
            rate = settings.scale_rate * size
        elif parameter.dim() > 1 and step:
            rate = settings.rate * step
        elif parameter.dim() > 1:
            rate = settings.rate * size / 64  # a float weight moves as an int8 one would
        else:
            rate = settings.bias_rate * size
        if rate > 0:
            rates[name] = rate
    return rates
