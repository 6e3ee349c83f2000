"""One training of a quantized graph towards its reference: what ``recover`` runs.

The reference answers in ONNX Runtime (teacher), the differentiable twin learns (student).
What is learned from is in `edgec.passes.curriculum`, what is lessened in
`edgec.passes.losses`, what changes in `edgec.passes.learner`. Samples are stacked along their
first axis where the twin gives the same for a stack. The state that is nearest on held-out
samples wins.

The same training gives the same bytes, also when it was killed and goes on from its
checkpoint; shared by several processes it gives the same but for the order of sums.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, PassError
from edgec.passes.contract import Progress as Announce
from edgec.passes.curriculum import judged, lessons
from edgec.passes.learner import Learner, peak_rates
from edgec.passes.losses import Losses
from edgec.passes.stacks import Teacher, in_stacks, keeps_apart, rows
from edgec.passes.training_settings import rate_share
from edgec.passes.training_state import Checkpoints, Progress
from edgec.passes.training_task import Task
from edgec.passes.workers import ALONE, Workers

if TYPE_CHECKING:
    from edgec.passes.recover import Recover
    from edgec.passes.torch_graph import TorchGraph

NOTHING = 1e-8  # distance of two float32 implementations of the same graph


@dataclass(frozen=True)
class Outcome:
    """The best state's step and held-out distance; before: the untrained one's.

    Both are infinite where there was nothing to train. steps: that were done. losses: of each.
    findings: for the report.
    """

    step: int
    before: float
    after: float
    steps: int = 0
    losses: tuple[float, ...] = ()
    findings: tuple[str, ...] = ()

    @property
    def improved(self) -> bool:
        """True if a trained state is nearer than the untrained one."""
        return self.after < self.before


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
    workers.hand_out(task)
    return lesson.train()


def join_trainings(workers: Workers) -> None:
    """Take part in every training that process 0 hands out, until there are no more."""
    from edgec.passes.torch_graph import to_torch

    while True:
        with workers.handed() as task:
            if task is None:
                return
            twin = to_torch(task.model, learn_scales=task.settings.scale_rate > 0)
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
        self._size = 1  # samples on top of each other: as asked for, but a stack for each worker
        if keeps_apart(twin, task.samples, self._losses.student_features):
            share = settings.batch // workers.size
            self._size = min(share, settings.micro_batch or share)
        self._losses.check_rows(self._size * rows(task.samples[0]))

    def train(self) -> Outcome:
        """Train the twin and leave it in its best state on held-out samples."""
        with _fixed_threads(self._settings.threads):
            return self._train()

    def _train(self) -> Outcome:
        from edgec.passes.torch_student import Student

        task, settings, workers = self._task, self._settings, self._workers
        student = Student(self._twin, self._losses, settings)
        learner = Learner(student, self._teacher, settings, workers)
        stacks = in_stacks(judged(task.held_out, settings, task.seed), self._size)
        judges = [(self._teacher.answered(s), counts) for s, counts in workers.share(stacks)]
        judge_count = sum(len(stack) for stack in stacks)

        saves = bool(workers.said("saves" if self._folder is not None else ""))
        digests = task.digests() if self._folder is not None else {}
        checkpoints = Checkpoints(self._folder, settings.name, digests)
        at = self._resumed(checkpoints, learner)
        if at is None:
            first = learner.distance(judges, judge_count)
            at = Progress(first=first, best=first, ended=first <= NOTHING)
        if not at.ended:
            drawn = lessons(
                task.samples, settings, np.random.default_rng(task.seed), self._doubts()
            )
            taught = itertools.islice(drawn, at.step, None)
            every = max(settings.steps // settings.judgements, 1)
            while at.step < settings.steps and not self._tired(at):
                share = rate_share(at.step, settings.steps, settings.warmup)
                at.losses.append(learner.step(in_stacks(next(taught), self._size), share))
                at.step += 1
                self._announce(settings.name, at.step, settings.steps)
                if at.step % every == 0 or at.step == settings.steps:
                    _judge(at, learner.distance(judges, judge_count), learner)
                if saves and at.step % settings.save_every == 0:
                    checkpoints.write(at, learner.state())
            at.ended = True
            if saves:
                checkpoints.write(at, learner.best())
        learner.finish()
        found, labels = tuple(checkpoints.findings), self._losses.labels
        if labels:
            weight = f"{self._settings.label_weight:g}"
            found += (f"class labels '{labels}' counted, too (label_weight {weight})",)
        return Outcome(at.best_step, at.first, at.best, at.step, tuple(at.losses), found)

    def _doubts(self) -> tuple[float, ...]:
        """How unsure the teacher is of each sample, where that orders them."""
        if self._settings.order != "easy-first":
            return ()
        answered = (self._teacher.answered([sample]) for sample in self._task.samples)
        return tuple(self._losses.doubt(stack.answers) for stack in answered)

    def _tired(self, at: Progress) -> bool:
        """True if the held-out distance has not fallen for too many judgements."""
        return 0 < self._settings.patience <= at.stale

    def _resumed(self, checkpoints: Checkpoints, learner: Learner) -> Progress | None:
        """Where process 0's checkpoint says that the training was; None to begin."""
        with checkpoints.opened() as found:
            said = None if found is None else [found[0].to_json(), list(found[1])]
            told = json.loads(self._workers.said(json.dumps(said)))
            if told is None:
                return None
            learner.restore(told[1], None if found is None else found[1])
        at = Progress.from_json(told[0])
        if not at.ended:
            checkpoints.findings.append(f"went on at step {at.step} of an interrupted training")
        return at


def _judge(at: Progress, distance: float, learner: Learner) -> None:
    """Note a held-out distance, and the state that it belongs to if it is the best so far."""
    if distance < at.best:
        at.best, at.best_step, at.stale = distance, at.step, 0
        learner.keep()
    else:
        at.stale += 1


@contextlib.contextmanager
def _fixed_threads(count: int) -> Iterator[None]:
    """Sums depend on the number of threads: a fixed one gives the same bytes everywhere."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
