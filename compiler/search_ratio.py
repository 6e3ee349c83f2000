"""Finds how much to prune: the user states an outcome, not a share of units.

    size, speed    smallest share that keeps them, by bisection without training
                     ──▶ the whole recipe at that share, and at larger ones while it misses
    drop alone     largest share that keeps it, by bisection of whole recipes, from a quarter on

Training changes no shapes: what was not trained is as large and as fast. So a share costs a
training only where the outputs count. Shares are multiples of 1/32; those that lead to the same
widths are tried once. Where size or speed and a drop are promised, the drop is judged at the
smallest share that is fast enough; if no share is, the largest that keeps the drop comes closest.

Left out on purpose: going on from the weights of the share before. Each share starts from the
reference, so that its outcome does not depend on those that were tried before it; small steps
are the `rounds` of the pass.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edgec.errors import RecipeError
from edgec.hunt import Found, Hunt, Recipe, better
from edgec.passes import PruneStructured
from edgec.passes.prune_structured import NOTHING, OUTCOMES
from edgec.pipeline import Step
from edgec.promise import Limits
from edgec.report import Trial

_STEPS = 32  # a share is a multiple of 1/32
_FIRST = 8  # of them, tried first where the drop alone decides
_MARGIN = 1.03  # by which a limit has to be kept without training: the last look may differ
_CALL_MS = 0.015  # added by the runtime: graphs are tried alone, the bundle is timed in it
_MORE = 3  # larger shares that are tried where the whole recipe misses what it kept untrained


def is_open(recipe: Recipe) -> bool:
    """True if the promises have to say how much the recipe prunes."""
    return any(isinstance(p, PruneStructured) and not p.ratio for p in recipe)


def check_demand(recipe: Recipe, limits: Limits, *, held_out: bool) -> None:
    """Raise RecipeError unless promises can choose the share that a recipe leaves open.

    held_out: there is calibration data to hold some out.
    """
    if not is_open(recipe) or _of_size_or_speed(limits):
        return
    if limits.max_drop is None:
        raise RecipeError(
            "pass 'prune-structured' has no ratio: how much may go? Give a share of the units, as "
            f"in --set prune-structured.ratio=0.25, or a promise to choose it by: {OUTCOMES}"
        )
    if not held_out:
        raise RecipeError(
            "pass 'prune-structured' has no ratio, and no samples can be held out to find the one "
            "that keeps --max-drop; give (more) --calibration data, or a ratio as in "
            "--set prune-structured.ratio=0.25"
        )


def fitted(hunt: Hunt, recipe: Recipe) -> Found:
    """The recipe with the share that the promises ask for, run and judged.

    One share is run in full, whatever the time; if none keeps every promise, it is the best.
    Raises RecipeError if nothing that was promised can be judged here.
    """
    limits, shares = hunt.judge.limits, _Shares(hunt, recipe)
    if _of_size_or_speed(limits):
        shares.glance(_STEPS // 2)
        if limits.max_size_mb is not None or shares.timed:
            least = shares.least()
            if least is not None:
                return shares.from_least(least)
            if limits.max_drop is None:
                return shares.attempt(max(shares.cuts))
        elif limits.max_drop is None:
            raise RecipeError(
                "pass 'prune-structured' has no ratio, and this machine is not of the kind of "
                f"target '{hunt.context.target.name}', so that no promise of speed can choose it; "
                "build on the target, add --max-size-mb or --max-drop, or give a ratio as in "
                "--set prune-structured.ratio=0.25"
            )
    alone = Limits(max_drop=limits.max_drop)
    check_demand(recipe, alone, held_out=hunt.context.validation is not None)
    return shares.most()


def ratio_findings(
    trials: Sequence[Trial], chosen: Trial, steps: Sequence[Step]
) -> tuple[str, ...]:
    """How the share was chosen; nothing where it was given, or cuts nothing, which its step says.

    steps: of the chosen trial.
    """
    told = [finding for step in steps for finding in step.result.findings]
    if all(t.ratio == chosen.ratio for t in trials) or any(f.startswith(NOTHING) for f in told):
        return ()
    quick = sum(trial.untrained for trial in trials)
    tried = len({trial.ratio for trial in trials if not trial.untrained})
    return (
        f"prune-structured.ratio {chosen.ratio:g} was chosen for the promises: {quick} shares were "
        f"tried without training, for size and speed alone, and {tried} in full",
    )


def _of_size_or_speed(limits: Limits) -> bool:
    """True if there is a promise that is easier to keep the more is pruned."""
    outcomes = (limits.min_speedup, limits.max_latency_ms, limits.max_size_mb)
    return any(limit is not None for limit in outcomes)


def _is_loss(reason: str) -> bool:
    """True for a broken promise that more pruning makes worse."""
    return reason.startswith(("drop", "drowns"))


@dataclass
class _Shares:
    """The shares of one recipe, each by its number of steps.

    cuts: what is cut at a share. glances: trials without training, by what is cut.
    """

    hunt: Hunt
    recipe: Recipe
    cuts: dict[int, list[Mapping[str, Any]]] = field(default_factory=dict)
    glances: dict[str, Trial] = field(default_factory=dict)

    @property
    def timed(self) -> bool:
        """True if latencies of this machine are those of the target."""
        return any(trial.speedup is not None for trial in self.glances.values())

    def glance(self, step: int) -> Trial:
        """Size and speed at a share."""
        key = self._key(step)
        if key not in self.glances:
            self.glances[key] = self.hunt.glance(self._recipe(step), self.cuts[step])
        return self.glances[key]

    def attempt(self, step: int) -> Found:
        """The whole recipe at a share."""
        return self.hunt.attempt(self._recipe(step))

    def least(self) -> int | None:
        """The smallest share that keeps size and speed; None if none does."""
        misses, keeps, step = 0, _STEPS, _STEPS // 2
        while True:
            if self._keeps_clearly(self.glance(step)):
                keeps = step
            else:
                misses = step
            step = (misses + keeps) // 2
            if step == misses or self.hunt.over:
                return keeps if keeps < _STEPS else None

    def from_least(self, step: int) -> Found:
        """In full at a share that is fast enough, or larger where it turns out not to be."""
        best = found = self.attempt(step)
        for _ in range(_MORE):
            more = self._larger(step)
            reasons = found.trials[-1].reasons
            if self.hunt.over or more is None or all(map(_is_loss, reasons)):
                break
            step = more
            found = self.attempt(step)
            best = better(best, found)
        return best

    def most(self) -> Found:
        """The largest share that loses no more than promised; else the best one."""
        keeps, loses, step = 0, _STEPS, _FIRST
        losing: dict[str, bool] = {}
        best: Found | None = None
        largest: Found | None = None
        while keeps < step < loses:
            key = self._key(step)
            if key not in losing:
                if best is not None and self.hunt.over:
                    break
                found = self.attempt(step)
                best = better(best, found)
                losing[key] = any(map(_is_loss, found.trials[-1].reasons))
                largest = largest if losing[key] else found
            if losing[key]:
                loses = step
            else:
                keeps = step
            step = (keeps + loses) // 2
            if loses == _STEPS:
                step = min(step, 2 * keeps)
        return largest or better(best, None)

    def _recipe(self, step: int) -> Recipe:
        ratio = step / _STEPS
        return tuple(
            replace(p, ratio=ratio) if isinstance(p, PruneStructured) and not p.ratio else p
            for p in self.recipe
        )

    def _key(self, step: int) -> str:
        """What is cut at a share, as text."""
        if step not in self.cuts:
            self.hunt.announce(f"share {step}/{_STEPS}")
            self.cuts[step] = self.hunt.cuts(self._recipe(step))
        return json.dumps(self.cuts[step], sort_keys=True)

    def _larger(self, step: int) -> int | None:
        """The next share that cuts more."""
        here = self._key(step)
        return next((s for s in range(step + 1, _STEPS) if self._key(s) != here), None)

    def _keeps_clearly(self, trial: Trial) -> bool:
        """True if size and speed are kept with a margin."""
        limits = self.hunt.judge.limits
        kept = [not trial.reasons]
        if trial.speedup is not None and trial.latency_ms is not None:
            called_ms = trial.latency_ms + _CALL_MS
            speedup = trial.speedup * trial.latency_ms / called_ms
            kept.append(speedup >= (limits.min_speedup or 0.0) * _MARGIN)
            kept.append(called_ms * _MARGIN <= (limits.max_latency_ms or math.inf))
        if limits.max_size_mb is not None:
            kept.append(trial.size_bytes * _MARGIN <= limits.max_size_mb * 1e6)
        return all(kept)
