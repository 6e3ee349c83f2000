"""Finds the recipe that keeps the promise: candidates in order, then layers kept in float.

    recipe 1 ── slower than float32 ──▶ recipe 2 ── … ──▶ lossless
        └── loses too much ──▶ the noisiest 1, 2, 4, … layers in float ──▶ the fewest that do

The first candidate that keeps every promise is taken. Ranges and roundings are measured
once for each recipe: keeping another layer in float replays them. Every trial is judged on
held-out calibration data (`edgec.trial`); the best so far survives the time limit, and a
journal lets a search that was killed go on where it stopped.

Left out on purpose: searching all subsets of layers. Ranking them by their own noise takes
one pass over the data and needs a logarithmic number of trials.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import onnx_ir as ir

from edgec.journal import Journal
from edgec.passes import Context, Feeds, Pass
from edgec.passes.weights import label
from edgec.pipeline import Step, run_passes
from edgec.recipe import to_toml
from edgec.report import Trial
from edgec.trial import Judge

Recipe = tuple[Pass, ...]


@dataclass(frozen=True)
class Found:
    """The outcome: the chosen recipe, its steps, and every trial in order.

    No trials where there was nothing to choose.
    """

    recipe: Recipe
    steps: tuple[Step, ...]
    trials: tuple[Trial, ...]
    findings: tuple[str, ...] = ()


def search(
    candidates: Sequence[Recipe],
    context: Context,
    checks: Sequence[Feeds],
    judge: Judge,
    *,
    journal: Journal,
    seconds: float,
    announce: Callable[[str], None] = lambda name: None,
) -> Found:
    """Try the candidates in order of preference until one keeps every promise.

    seconds: no further trial is begun after this time; the first is always made.
    """
    context = replace(context, work=journal.work)
    if len(candidates) == 1 and judge.limits.max_drop is None:
        steps = run_passes(candidates[0], context, checks, announce=announce)
        return Found(candidates[0], steps, ())
    hunt = _Hunt(context, checks, judge, journal, time.monotonic() + seconds, announce)
    best: Found | None = None
    for recipe in candidates:
        if best is not None and hunt.over:
            break
        best = _better(best, hunt.attempt(recipe))
        if best.trials[-1].kept:
            break
        if _only_loses(best.trials[-1]) and best.recipe == recipe:
            best = _better(best, hunt.promote(best))
            if best.trials[-1].kept:
                break
    assert best is not None  # there is at least one candidate
    trials = tuple(replace(trial, chosen=trial == best.trials[-1]) for trial in hunt.trials)
    return replace(best, trials=trials, findings=_findings(trials, hunt.over))


def _only_loses(trial: Trial) -> bool:
    """True if nothing but accuracy is missing: float layers can win that back."""
    return bool(trial.reasons) and all(r.startswith(("drop", "drowns")) for r in trial.reasons)


def _better(best: Found | None, other: Found | None) -> Found:
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
class _Hunt:
    """One search: what it works on, and the trials so far."""

    context: Context
    checks: Sequence[Feeds]
    judge: Judge
    journal: Journal
    deadline: float
    announce: Callable[[str], None]
    trials: list[Trial] = dataclasses.field(default_factory=list)

    @property
    def over(self) -> bool:
        """True after the time limit."""
        return time.monotonic() > self.deadline

    def attempt(
        self, recipe: Recipe, locked: Sequence[Mapping[str, Any]] = (), kept_float: int = 0
    ) -> Found:
        """Run and judge one recipe. locked: decisions to replay."""
        text = to_toml(recipe)
        known = self.journal.find(text)
        if known is not None:
            locked = known[0]
        steps = run_passes(recipe, self.context, self.checks, locked, self.announce)
        if known is not None:
            trial = known[1]
        else:
            self.announce("compare with float32")
            trial = self.judge([p.name for p in recipe], kept_float, steps)
            self.journal.add(text, [step.result.decisions for step in steps], trial)
        self.trials.append(trial)
        return Found(recipe, steps, (trial,))

    def promote(self, found: Found) -> Found | None:
        """The fewest of the noisiest layers in float that keep the promise; else the best try.

        None if no step of the recipe ranks its layers.
        """
        index = next((i for i, s in enumerate(found.steps) if s.result.sensitivity), None)
        if index is None:
            return None
        noise = found.steps[index].result.sensitivity
        ranked = sorted(noise, key=lambda name: (noise[name], name))
        before = found.steps[index - 1].model if index else self.context.reference
        sources = _integer_sources(before, noise, self.context.target.int8.integer_ops)
        # what was measured up to the ranked pass is replayed; later passes look anew
        locked = [s.result.decisions if i <= index else {} for i, s in enumerate(found.steps)]

        choices: list[set[str]] = [set()]
        for name in ranked:
            wider = choices[-1] | {name, *sources[name]}
            choices += [wider] if wider > choices[-1] else []

        def with_float(choice: int) -> Found:
            passes = [step.pass_ for step in found.steps]  # more than in the recipe, with rounds
            pass_: Any = passes[index]
            pass_ = replace(pass_, skip=(*pass_.skip, *sorted(choices[choice])))
            recipe = (*passes[:index], pass_, *passes[index + 1 :])
            return self.attempt(recipe, locked, len(choices[choice]))

        best: Found | None = None
        fails, choice = 0, 1
        while not self.over and choice < len(choices):
            tried = with_float(choice)
            best = _better(best, tried)
            if tried.trials[-1].kept or not _only_loses(tried.trials[-1]):
                break
            fails, choice = choice, 2 * choice
        if best is None or not best.trials[-1].kept:
            return best
        while not self.over and choice - fails > 1:
            middle = (fails + choice) // 2
            tried = with_float(middle)
            if tried.trials[-1].kept:
                best, choice = tried, middle
            else:
                fails = middle
        return best


def _integer_sources(
    model: ir.Model, quantized: Collection[str], integer_ops: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """The convolutions whose integer outputs each quantized node reads.

    An integer convolution has no float output: what reads it in float still reads 8 bits.
    So it has to stay in float together with its noisy reader.
    """
    sources: dict[str, tuple[str, ...]] = {}
    for node in model.graph:
        if label(node) not in quantized:
            continue
        found, seen = [], set()
        waiting = [node.inputs[0]]
        while waiting:
            value = waiting.pop()
            producer = None if value is None else value.producer()
            if producer is None or producer in seen:
                continue
            seen.add(producer)
            if label(producer) in quantized:
                found += [label(producer)] if producer.op_type == "Conv" else []
            elif producer.op_type in integer_ops:
                waiting += producer.inputs
        sources[label(node)] = tuple(sorted(found))
    return sources


def _findings(trials: Sequence[Trial], over: bool) -> tuple[str, ...]:
    chosen = next(trial for trial in trials if trial.chosen)
    findings = []
    first = trials[0]
    if chosen.recipe != first.recipe:
        because = ", ".join(first.reasons)
        findings.append(
            f"the recipe {', '.join(first.recipe)} was given up ({because}); the bundle was made "
            f"by {', '.join(chosen.recipe)}"
        )
    elif chosen.kept_float:
        findings.append(
            f"the noisiest {chosen.kept_float} layers stay in float: with all of them in "
            f"integers the held-out drop was {first.drop}, with these it is {chosen.drop}"
        )
    if chosen.reasons and len(trials) > 1:
        ended = "the time limit ended the search" if over else "every candidate was tried"
        findings.append(
            f"no candidate keeps every promise on held-out data ({', '.join(chosen.reasons)}): "
            f"this is the best of {len(trials)}; {ended}"
        )
    return tuple(findings)
