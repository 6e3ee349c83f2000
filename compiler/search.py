"""Finds the recipe that keeps the promise: candidates in order, then layers kept in float.

    recipe 1 ── slower than float32 ──▶ recipe 2 ── … ──▶ lossless
        └── loses too much ──▶ the noisiest 1, 2, 4, … layers in float ──▶ the fewest that do

The first candidate that keeps every promise is taken. How much a recipe prunes is found by
`edgec.search_ratio`. Ranges and roundings are measured once for each recipe: keeping another
layer in float replays them. Every trial is judged on held-out calibration data (`edgec.trial`);
the best so far survives the time limit, and a journal lets a search that was killed go on where
it stopped.

Left out on purpose: searching all subsets of layers. Ranking them by their own noise takes
one pass over the data and needs a logarithmic number of trials.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from edgec.hunt import Found, Hunt, Recipe, better
from edgec.journal import Journal
from edgec.passes import Context, Feeds
from edgec.passes.weights import label
from edgec.report import Trial
from edgec.search_ratio import fitted, is_open, ratio_findings
from edgec.trial import Judge


def search(
    candidates: Sequence[Recipe],
    context: Context,
    checks: Sequence[Feeds],
    judge: Judge,
    *,
    journal: Journal,
    seconds: float,
    announce: Callable[[str], None] = lambda name: None,
    plan: Mapping[str, Any] | None = None,
) -> Found:
    """Try the candidates in order of preference until one keeps every promise.

    seconds: no further trial is begun after this time; the first is always made. plan: what the
    pruning passes are to cut; without one, a share that was not given is searched, too.
    """
    context = replace(context, work=journal.work)
    deadline = time.monotonic() + seconds
    hunt = Hunt(context, checks, judge, journal, deadline, announce, plan)
    unsettled = plan is None and any(map(is_open, candidates))
    if len(candidates) == 1 and judge.limits.max_drop is None and not unsettled:
        return Found(candidates[0], hunt.run(candidates[0]), ())
    best: Found | None = None
    for recipe in candidates:
        if best is not None and hunt.over:
            break
        tried = fitted(hunt, recipe) if unsettled and is_open(recipe) else hunt.attempt(recipe)
        best = better(best, tried)
        if best.trials[-1].kept:
            break
        may_lose = unsettled and judge.limits.max_drop is None  # nothing says how much is too much
        if _only_loses(best.trials[-1]) and best is tried and not may_lose:
            best = better(best, _promote(hunt, best))
            if best.trials[-1].kept:
                break
    assert best is not None  # there is at least one candidate
    trials = tuple(replace(trial, chosen=trial == best.trials[-1]) for trial in hunt.trials)
    return replace(best, trials=trials, findings=_findings(best, trials, hunt.over))


def _only_loses(trial: Trial) -> bool:
    """True if nothing but accuracy is missing: float layers can win that back."""
    return bool(trial.reasons) and all(r.startswith(("drop", "drowns")) for r in trial.reasons)


def _promote(hunt: Hunt, found: Found) -> Found | None:
    """The fewest of the noisiest layers in float that keep the promise; else the best try.

    None if no step of the recipe ranks its layers.
    """
    index = next((i for i, s in enumerate(found.steps) if s.result.sensitivity), None)
    if index is None:
        return None
    noise = found.steps[index].result.sensitivity
    ranked = sorted(noise, key=lambda name: (noise[name], name))
    before = found.steps[index - 1].model if index else hunt.context.reference
    sources = _integer_sources(before, noise, hunt.context.target.int8.integer_ops)
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
        return hunt.attempt(recipe, locked, len(choices[choice]))

    best: Found | None = None
    fails, choice = 0, 1
    while not hunt.over and choice < len(choices):
        tried = with_float(choice)
        best = better(best, tried)
        if tried.trials[-1].kept or not _only_loses(tried.trials[-1]):
            break
        fails, choice = choice, 2 * choice
    if best is None or not best.trials[-1].kept:
        return best
    while not hunt.over and choice - fails > 1:
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


def _findings(best: Found, trials: Sequence[Trial], over: bool) -> tuple[str, ...]:
    chosen = next(trial for trial in trials if trial.chosen)
    findings = list(ratio_findings(trials, chosen, best.steps))
    whole = [trial for trial in trials if not trial.untrained]
    first = next((trial for trial in whole if trial.ratio == chosen.ratio), whole[0])
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
