"""Cuts whole channels, heads and hidden units out of the graph: smaller weights, fewer products.

What can be cut together is found by ``dimension_groups``, what is cut is chosen by the
importance of the units, and ``removal`` makes the tensors smaller; nothing is masked. Widths
stay multiples of what the target's kernels fill their vectors with. The plan (which units of
which group stay) is the pass's decisions: it can be read, and replayed on a retrained model of
the same architecture.

Shares are counted against the reference, so that a second run has nothing left to do, and a
later one with a larger ratio goes on. The weights that stay are as they were, unless ``refit`` fits
them; ``recover`` trains them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import onnx_ir as ir

from edgec.passes.contract import Context, PassError, Result, Skip, Stage
from edgec.passes.differences import apply_differences, differences
from edgec.passes.dimension_groups import Group, Kind, coupled_groups
from edgec.passes.importance import FromWeights, Scores, unit_importance
from edgec.passes.importance_measured import Measured, measured_importance
from edgec.passes.plan_entries import group_entries
from edgec.passes.progressive import check_rounds
from edgec.passes.pruned_latency import Costs, Prediction, held_to_account, predict
from edgec.passes.refit import refit
from edgec.passes.removal import Cut, remove
from edgec.passes.unit_ranking import Ranked, across, structure
from edgec.passes.weights import Refused, check_skip, label
from edgec_runtime.errors import suggestion

Ranking = Literal["local", "global", "isomorphic", "latency"]
Importance = Literal[FromWeights, Measured]

NOTHING = "nothing can be cut"  # a finding where no share of units would cut anything
_REASONS = 3  # of that, told in it

OUTCOMES = "--min-speedup, --max-latency-ms, --max-size-mb or --max-drop"


@dataclass(frozen=True)
class PruneStructured:
    """Removes the channels, heads and hidden units that matter least."""

    name: ClassVar[str] = "prune-structured"
    stage: ClassVar[Stage] = Stage.PRUNE
    lossless: ClassVar[bool] = False
    version: ClassVar[int] = 1

    # share of the reference's units that goes, of its latency where that ranks; 0: as the
    # promises demand
    ratio: float = 0.0
    # who competes. local: units of one group; global: of one kind; isomorphic: of groups of the
    # same structure; latency: all, by importance lost for each millisecond saved
    ranking: Ranking = "local"
    # from weights: l1, l2, geometric-median, bn-scale (without fuse); from data: taylor, wanda
    importance: Importance = "l1"
    kinds: tuple[str, ...] = ("channel", "head", "hidden")  # units that may go
    round_to: int = 0  # widths stay multiples of it, and no less; 0: as the target says
    max_ratio: float = 0.8  # of one group, where the ranking is not local
    # form in which ranking = latency times layers: float32, int8 (what quantize-static makes of
    # them); auto: int8 for convolutions where there is calibration data and the target quantizes
    costs: Costs = "auto"
    mixed: bool = False  # also cut what a norm takes its mean over: the units left change, too
    skip: tuple[str, ...] = ()  # names of nodes whose outputs stay
    refit: bool = False  # fit the layers behind a cut to what they gave before it
    rounds: int = 1  # of this pass and the training behind it, the ratio rising

    def __post_init__(self) -> None:
        """Raise PassError for parameters out of range."""
        if not 0.0 <= self.ratio < 1.0:
            raise PassError(
                f"prune-structured: ratio is {self.ratio}, expected a share below 1 (0.25 removes "
                "a quarter of the units), or 0 for as many as the promises demand"
            )
        if not 0.0 < self.max_ratio < 1.0:
            raise PassError(
                f"prune-structured: max_ratio is {self.max_ratio}, expected a share above 0 and "
                "below 1"
            )
        if self.max_ratio != PruneStructured.max_ratio and self.ranking == "local":
            raise PassError(
                f"prune-structured: max_ratio is {self.max_ratio}, but ranking is local, the same "
                "share of every group, so it would have no effect; leave prune-structured.max_ratio"
                " out, or set prune-structured.ranking"
            )
        if self.round_to < 0:
            raise PassError(f"prune-structured: round_to is {self.round_to}, expected 0 or more")
        check_rounds(self.name, self.rounds)
        choices = (
            ("ranking", (self.ranking,), Ranking),
            ("importance", (self.importance,), Importance),
            ("kinds", self.kinds, Kind),
            ("costs", (self.costs,), Costs),
        )
        for field, given, known in choices:
            for word in given:
                if word not in get_args(known):
                    near = suggestion(word, get_args(known))
                    raise PassError(f"prune-structured: {field} has no '{word}'{near}")
        if self.costs != PruneStructured.costs and self.ranking != "latency":
            raise PassError(
                f"prune-structured: costs is {self.costs}, but ranking is {self.ranking}, which "
                "times nothing, so it would have no effect; leave prune-structured.costs out, or "
                "set prune-structured.ranking=latency"
            )

    def run(self, model: ir.Model, context: Context) -> Result:
        """Cut; ``changed`` counts the tensors that became smaller, or were fitted."""
        if not (self.ratio or context.lock):
            raise PassError(
                "prune-structured: how much may go? Give a share of the units, as in "
                f"--set prune-structured.ratio=0.25, or a promise to choose it by: {OUTCOMES}"
            )
        if self.refit and "refit" not in context.lock and not context.calibration:
            raise PassError(
                "prune-structured: refit needs calibration data: give some hundred typical inputs, "
                "or leave refit out"
            )
        check_skip(self.name, self.skip, list(model.graph.all_nodes()))
        groups = coupled_groups(model)
        skipped = list(groups.skipped)
        prediction = None
        findings: list[str] = []
        if context.lock:
            cuts = replayed(context.lock, groups.found)
            self._check_plan(model, cuts)
        else:
            ranked = list(self._ranked(model, groups.found, context, skipped))
            if self.ranking == "latency":
                prediction = self._predicted(ranked, groups.found, model, context)
            kept = self._kept(ranked, model) if prediction is None else prediction.chosen.kept
            cuts = [item.cut(kept[item]) for item in ranked if kept[item] < item.group.units]
            idle = frozenset[Ranked]() if prediction is None else prediction.chosen.idle
            skipped += [self._left(item, idle) for item in ranked if kept[item] == item.dense]
            if all(item.group.units == item.dense <= item.step for item in ranked):
                findings += _nothing(skipped[len(groups.skipped) :] + list(groups.skipped))
        dense = model.clone()
        units = sum(group.units for group in groups.found)
        decisions = plan(cuts)
        changed = remove(model, cuts)
        if changed:
            findings.append(_finding(_weights(dense), _weights(model), cuts, units))
        fitted: Mapping[str, str] = {}
        if self.refit and changed:
            fitted, kept_old = self._refit(model, dense, cuts, context)
            skipped += kept_old
            findings.append(
                f"{len(fitted)} tensors of layers behind a cut were fitted to the outputs before"
            )
        if self.refit:
            decisions["refit"] = dict(fitted)  # also if nothing was cut: a replay has no data
        if prediction is not None:
            findings += prediction.findings
            if changed:
                findings.append(held_to_account(prediction, dense, model, context))
        changed += len(set(fitted) - _sliced(cuts))
        touched = _touched(model, _sliced(cuts) | set(fitted))
        return Result(model, changed, tuple(skipped), touched, decisions, tuple(findings))

    def _ranked(
        self, model: ir.Model, groups: Sequence[Group], context: Context, skipped: list[Skip]
    ) -> Iterator[Ranked]:
        """The groups that may be cut, with the importance of their units."""
        weights = _initializers(model)
        dense = _sizes(context.reference)
        allowed, stays = [], self._stays(model)
        for group in groups:
            try:
                self._check(group, stays)
                allowed.append(group)
            except Refused as refused:
                skipped.append(Skip(group.name, str(refused)))
        for group, scores in self._scores(allowed, model, context):
            if isinstance(scores, str):
                skipped.append(Skip(group.name, scores))
                continue
            step = self._step(group, context.target.channel_multiple)
            yield Ranked(group, scores, step, _dense_units(group, weights, dense))

    def _kept(self, ranked: Sequence[Ranked], model: ir.Model) -> Mapping[Ranked, int]:
        """How many units each group keeps."""
        if self.ranking == "local":
            return {item: item.kept(self.ratio) for item in ranked}
        rivals: dict[object, list[Ranked]] = {}
        for item in ranked:
            isomorphic = self.ranking == "isomorphic"
            alike = structure(item.group, model) if isomorphic else item.group.kind
            rivals.setdefault(alike, []).append(item)
        kept: dict[Ranked, int] = {}
        for items in rivals.values():
            kept |= across(items, self.ratio, self.max_ratio)
        return kept

    def _refit(
        self, model: ir.Model, dense: ir.Model, cuts: Sequence[Cut], context: Context
    ) -> tuple[Mapping[str, str], tuple[Skip, ...]]:
        """What fitting the layers behind the cuts changed, or did in a lock; and what stayed."""
        if "refit" in context.lock:
            known: Mapping[str, str] = context.lock["refit"]
            apply_differences(model, known)
            return known, ()
        assert context.calibration is not None  # run() has seen to it
        cut = model.clone()
        progress = partial(context.progress, "refit")
        stayed = refit(model, dense, cuts, context.calibration, progress=progress)
        return differences(cut, model), stayed

    def _predicted(
        self, ranked: Sequence[Ranked], groups: Sequence[Group], model: ir.Model, context: Context
    ) -> Prediction:
        return predict(
            ranked,
            groups,
            model,
            context,
            self.costs,
            ratio=self.ratio,
            max_ratio=self.max_ratio,
        )

    def _left(self, item: Ranked, idle: Collection[Ranked]) -> Skip:
        """Why a group has all the units that it ever had."""
        reason = f"its {item.dense} units stay: "
        if self.ranking != "latency":
            reason += f"they go {item.step} at a time"
        elif item in idle:
            reason += "without some of them the model takes as long"
        else:
            reason += "others save more time for what they matter, or they are too few"
        return Skip(item.group.name, reason)

    def _scores(
        self, groups: Sequence[Group], model: ir.Model, context: Context
    ) -> Iterator[tuple[Group, Scores | str]]:
        """The groups with the importance of their units, or why they have none."""
        weights = _initializers(model)
        if self.importance == "taylor" or self.importance == "wanda":
            measured = measured_importance(groups, model, context, self.importance)
            for group in groups:
                yield group, measured.get(group.name, "no layer that can be measured reads it")
            return
        for group in groups:
            try:
                yield group, unit_importance(group, weights, self.importance)
            except Refused as refused:
                yield group, str(refused)

    def _check_plan(self, model: ir.Model, cuts: Sequence[Cut]) -> None:
        """Raise PassError for a plan that cuts what the settings say is not to be cut."""
        stays = self._stays(model)
        for cut in cuts:
            try:
                if cut.units:
                    self._check(cut.group, stays)
            except Refused as refused:
                raise PassError(
                    f"prune-structured: the plan cuts group '{cut.group.name}', but {refused}; "
                    "change that setting, or take the group out of the plan"
                ) from refused

    def _stays(self, model: ir.Model) -> Mapping[str, str]:
        """The nodes of ``skip``, by the names of their outputs."""
        named = [node for node in model.graph.all_nodes() if label(node) in self.skip]
        return {str(value.name): label(node) for node in named for value in node.outputs}

    def _check(self, group: Group, stays: Mapping[str, str]) -> None:
        """Raise Refused for a group that is not to be cut. stays: as ``_stays`` gives it."""
        if group.kind not in self.kinds:
            raise Refused(f"its units are of kind '{group.kind}', which kinds leaves out")
        if group.mixed and not self.mixed:
            raise Refused(f"{group.mixed}; mixed=true cuts it all the same")
        for part in group.shapes:
            if part.name in stays:
                raise Refused(f"'{stays[part.name]}' is named in skip")

    def _step(self, group: Group, multiple: int) -> int:
        """Units that go at a time, so that widths stay multiples and the least is left."""
        widths = [part.indices.shape[1] for part in group.slices]
        # a layer is as wide as its heads together; elsewhere a unit may be part of a block
        width = max(widths) if group.kind == "head" else min(widths)
        multiple = self.round_to or multiple
        return max(multiple // math.gcd(multiple, width), group.least)


def plan(cuts: Sequence[Cut]) -> dict[str, Any]:
    """What is cut as JSON data: of each group its name, kind, number of units, and those kept."""
    return {
        "groups": [
            {
                "name": cut.group.name,
                "kind": cut.group.kind,
                "units": cut.group.units,
                "kept": sorted(set(range(cut.group.units)) - set(cut.units)),
            }
            for cut in cuts
        ]
    }


def replayed(plan: Mapping[str, Any], groups: Sequence[Group]) -> list[Cut]:
    """The cuts of a plan on groups of the same architecture.

    Raises PassError if the plan was made for another one, or is damaged.
    """
    known = {group.name: group for group in groups}
    cuts = []
    for entry in group_entries(plan):
        group = known.get(entry["name"])
        if group is None or group.units != entry["units"] or group.kind != entry["kind"]:
            raise PassError(
                f"the plan cuts group '{entry['name']}' of {entry['units']} units of kind "
                f"'{entry['kind']}', which this model does not have: it was made for another "
                "architecture; build without it"
            )
        if len(entry["kept"]) < group.least:
            raise PassError(
                f"the plan keeps {len(entry['kept'])} of {group.units} units of group "
                f"'{group.name}', which needs {group.least}: a Squeeze without axes would drop an "
                "axis of one; keep more, or write the axes into the model"
            )
        gone = set(range(group.units)) - set(entry["kept"])
        cuts.append(Cut(group, tuple(sorted(gone))))
    return cuts


def _initializers(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    return {
        name: value.const_value
        for graph in model.graphs()
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }


def _sizes(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Shapes of all constants by name; exporters store some as nodes."""
    sizes = {name: tuple(t.shape.numpy()) for name, t in _initializers(model).items()}
    for node in model.graph.all_nodes():
        if node.op_type == "Constant" and "value" in node.attributes:
            shape = node.attributes["value"].as_tensor().shape
            sizes[str(node.outputs[0].name)] = tuple(shape.numpy())
    return sizes


def _dense_units(
    group: Group,
    weights: Mapping[str, ir.TensorProtocol],
    dense: Mapping[str, tuple[int, ...]],
) -> int:
    """How many units the group has in the reference, where a weight's name tells."""
    for part in group.slices:
        here, there = weights[part.name].shape.numpy(), dense.get(part.name, ())
        if len(here) == len(there) and part.indices.size == here[part.axis]:
            positions: int = part.indices.shape[1]
            return max(group.units, there[part.axis] // positions)
    return group.units


def _weights(model: ir.Model) -> int:
    return sum(int(tensor.size) for tensor in _initializers(model).values())


def _sliced(cuts: Sequence[Cut]) -> set[str]:
    """Names of the weights that the cuts made smaller."""
    return {part.name for cut in cuts for part in cut.group.slices}


def _touched(model: ir.Model, altered: set[str]) -> tuple[str, ...]:
    """Outputs of the nodes that read an altered weight."""
    return tuple(
        str(node.outputs[0].name)
        for node in model.graph
        if any(value is not None and value.name in altered for value in node.inputs)
    )


def _nothing(skipped: Sequence[Skip]) -> list[str]:
    """Why nothing can be cut, if there was anything to cut; by reason, in this order."""
    reasons: dict[str, list[str]] = {}
    for skip in skipped:
        reasons.setdefault(skip.reason, []).append(f"'{skip.node}'")
    told = [f"{why} ({', '.join(nodes)})" for why, nodes in list(reasons.items())[:_REASONS]]
    if len(reasons) > len(told):
        told.append(f"{len(reasons) - len(told)} reasons more are in the report")
    return [f"{NOTHING}: {'; '.join(told)}"] if told else []


def _finding(before: int, after: int, cuts: Sequence[Cut], units: int) -> str:
    gone = sum(len(cut.units) for cut in cuts)
    return (
        f"{gone} of {units} units in {len(cuts)} groups are cut: {before} numbers in weights "
        f"became {after} ({after / max(before, 1):.1%})"
    )
