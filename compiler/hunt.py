"""One search: what it works on, its trials so far, and how a recipe is tried.

Every trial is noted in the journal, so that a search that was killed goes on from there.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from edgec.journal import Journal
from edgec.passes import Context, Feeds, Pass, PruneStructured
from edgec.passes.contract import Samples
from edgec.pipeline import Step, run_passes
from edgec.pruning_plan import as_decisions
from edgec.recipe import to_toml
from edgec.report import Trial
from edgec.rounds import without_training
from edgec.trial import Judge

Recipe = tuple[Pass, ...]

_GLANCED = "# without training, for size and speed alone\n"  # in front of a recipe in the journal
_FEW = 64  # samples that show the shapes; as many as an importance that is measured looks at


@dataclass(frozen=True)
class Found:
    """The outcome: the chosen recipe, its steps, and every trial in order.

    No trials where there was nothing to choose.
    """

    recipe: Recipe
    steps: tuple[Step, ...]
    trials: tuple[Trial, ...]
    findings: tuple[str, ...] = ()


def better(best: Found | None, other: Found | None) -> Found:
    """The one with fewer broken promises; on a tie the smaller drop, then the faster.

    Without a broken promise the drop is small enough, and speed alone decides.
    """
    if best is None or other is None:
        return cast(Found, best or other)
    one, two = best.trials[-1], other.trials[-1]
    ranks = [
        (len(t.reasons), (t.drop or 0.0) if t.reasons else 0.0, -(t.speedup or 0.0))
        for t in (one, two)
    ]
    return other if ranks[1] < ranks[0] else best


@dataclass
class Hunt:
    """One search: what it works on, and the trials so far.

    plan: what the pruning passes are to cut, as their decisions; None where they choose.
    """

    context: Context
    checks: Sequence[Feeds]
    judge: Judge
    journal: Journal
    deadline: float
    announce: Callable[[str], None]
    plan: Mapping[str, Any] | None = None
    trials: list[Trial] = dataclasses.field(default_factory=list)

    @property
    def over(self) -> bool:
        """True after the time limit."""
        return time.monotonic() > self.deadline

    def run(self, recipe: Recipe, locked: Sequence[Mapping[str, Any]] = ()) -> tuple[Step, ...]:
        """Run a recipe without judging it. locked: decisions to replay."""
        if self.plan is not None and not locked:
            locked = as_decisions(self.plan, recipe)
        return run_passes(recipe, self.context, self.checks, locked, self.announce)

    def attempt(
        self, recipe: Recipe, locked: Sequence[Mapping[str, Any]] = (), kept_float: int = 0
    ) -> Found:
        """Run and judge one recipe. locked: decisions to replay."""
        text = to_toml(recipe)
        known = self.journal.find(text)
        if known is not None:
            locked = known[0]
        steps = self.run(recipe, locked)
        if known is not None:
            trial = known[1]
        else:
            self.announce("compare with float32")
            trial = self.judge([p.name for p in recipe], kept_float, steps)
            trial = replace(trial, ratio=None if self.plan is not None else _ratio(recipe))
            self.journal.add(text, [step.result.decisions for step in steps], trial)
        self.trials.append(trial)
        return Found(recipe, steps, (trial,))

    def cuts(self, recipe: Recipe) -> list[Mapping[str, Any]]:
        """Decisions of the steps up to the last prune-structured, training left out."""
        passes = without_training(recipe)
        known = self.journal.find(_GLANCED + to_toml(passes))
        last = max(i for i, p in enumerate(passes) if isinstance(p, PruneStructured))
        if known is not None:
            return known[0][: last + 1]
        steps = self._quick().run(passes[: last + 1])
        return [step.result.decisions for step in steps]

    def glance(self, recipe: Recipe, cuts: Sequence[Mapping[str, Any]]) -> Trial:
        """Size and speed of a recipe: training changes no shapes, so it is left out.

        cuts: what ``cuts`` gave for it.
        """
        passes = without_training(recipe)
        text = _GLANCED + to_toml(passes)
        known = self.journal.find(text)
        if known is not None:
            trial = known[1]
        else:
            locked = [*cuts, *({} for _ in passes[len(cuts) :])]
            steps = self._quick().run(passes, locked)
            self.announce("time beside float32")
            trial = self.judge.size_and_speed([p.name for p in passes], steps)
            trial = replace(trial, ratio=_ratio(recipe), untrained=True)
            self.journal.add(text, [step.result.decisions for step in steps], trial)
        self.trials.append(trial)
        return trial

    def _quick(self) -> Hunt:
        """The same with few samples."""
        samples = self.context.calibration
        if samples is None:
            return self
        return replace(self, context=replace(self.context, calibration=_First(samples, _FEW)))


@dataclass(frozen=True)
class _First:
    """The first of some samples."""

    samples: Samples
    count: int

    def __iter__(self) -> Iterator[Feeds]:
        return itertools.islice(iter(self.samples), self.count)

    def __len__(self) -> int:
        return min(len(self.samples), self.count)


def _ratio(recipe: Recipe) -> float | None:
    """The largest share that a recipe prunes; None if it prunes no units."""
    return max((p.ratio for p in recipe if isinstance(p, PruneStructured)), default=None)
