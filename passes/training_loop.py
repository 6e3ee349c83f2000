"""The loop of every training: steps, judgements, an early end, checkpoints, the best state.

`recover` (`edgec.passes.lesson`) and `adapt` (`edgec.passes.course`) say what is drawn for a
step, what is lessened and what is judged; when and how often is said here. The state with the
smallest held-out distance wins, the untrained one included.

The same training gives the same bytes, also when it was killed and goes on from its
checkpoint; shared by several processes it gives the same but for the order of sums.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgec.passes.contract import Progress as Announce
from edgec.passes.curriculum import Example
from edgec.passes.stacks import in_stacks
from edgec.passes.training_settings import TrainingSettings, rate_share
from edgec.passes.training_state import Checkpoints, Progress
from edgec.passes.workers import ALONE, Workers

if TYPE_CHECKING:
    from edgec.passes.learner import Judge, Learner

NONE_HELD_OUT = (
    "too few samples to hold some out: what is called held-out here was learned from, too"
)
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


def run_training(
    learner: Learner,
    drawn: Callable[[], Iterable[Sequence[Example]]],
    judges: Sequence[Judge],
    settings: TrainingSettings,
    *,
    size: int,
    wider: Callable[[int], float] = lambda step: 0.0,
    checkpoints: Checkpoints,
    workers: Workers = ALONE,
    announce: Announce = lambda what, done, total: None,
) -> Outcome:
    """Train and leave the learner's network in its best state on held-out samples.

    drawn: gives, without end, the samples of one step after the other, the same every time.
    judges: held-out stacks of this process. size: of a stack of a step, in samples. wider: share
    of the bits that weights have to spare at a step; judged are weights of their own width.
    """
    saves = bool(workers.said("saves" if checkpoints.kept else ""))
    at = _resumed(checkpoints, learner, workers)
    if at is None:
        first = learner.distance(judges)
        at = Progress(first=first, best=first, ended=first <= NOTHING)
    if not at.ended:
        taught = itertools.islice(drawn(), at.step, None)
        while at.step < settings.steps and not _tired(at, settings):
            share = rate_share(at.step, settings.steps, settings.warmup)
            wide = wider(at.step)
            at.losses.append(learner.step(in_stacks(next(taught), size), share, wide))
            at.step += 1
            announce(settings.name, at.step, settings.steps)
            if not math.isfinite(at.losses[-1]):
                break  # the weights are no numbers any more
            if at.step % settings.judged_every == 0 or at.step == settings.steps:
                _judge(at, learner.distance(judges), learner)
                if wide:  # what is judged has not been trained yet
                    at.stale = 0
            if saves and at.step % settings.save_every == 0:
                checkpoints.write(at, learner.state())
        at.ended = True
        if saves:
            checkpoints.write(at, learner.best())
    learner.finish()
    findings = (*checkpoints.findings, *_broken(at))
    return Outcome(at.best_step, at.first, at.best, at.step, tuple(at.losses), findings)


def _broken(at: Progress) -> list[str]:
    """That a loss or the first held-out distance is no number, for people."""
    if not math.isfinite(at.first):
        return [f"the held-out distance is {at.first} before any step: no state can be better"]
    if at.losses and not math.isfinite(at.losses[-1]):
        return [f"training ended with step {at.step}, whose loss is {at.losses[-1]}: lower rates"]
    return []


def _tired(at: Progress, settings: TrainingSettings) -> bool:
    """True if the held-out distance has not fallen for too many judgements."""
    return 0 < settings.patience <= at.stale


def _resumed(checkpoints: Checkpoints, learner: Learner, workers: Workers) -> Progress | None:
    """Where process 0's checkpoint says that the training was; None to begin."""
    with checkpoints.opened() as found:
        said = None if found is None else [found[0].to_json(), list(found[1])]
        told = json.loads(workers.said(json.dumps(said)))
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
def fixed_threads(count: int) -> Iterator[None]:
    """Sums depend on the number of threads: a fixed one gives the same bytes everywhere."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
