"""Takes whole residual blocks out of the graph: a shallower model, smaller and with less to run.

A block is a branch x + f(x), as ``residual_blocks`` finds them; without it x goes on. Depth is what
a device feels most: every node of the block goes, and widths stay what the kernels like. Attention
and feed-forward of a transformer's layer are two blocks, so a layer goes in one or two steps.
Which blocks matter least is measured on calibration data (``block_importance``).

Shares are counted against the reference, so that a second run has nothing left to do. The plan
is the pass's decisions: it can be read, and replayed on a retrained model of the same
architecture. The weights that stay are left as they are; ``recover`` trains them.

Left out: choosing again after each block that went, merging of layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import onnx_ir as ir

from edgec.passes.block_importance import Measure, block_importance
from edgec.passes.contract import Context, PassError, Result, Skip, Stage
from edgec.passes.matching import bypass_identities, is_op
from edgec.passes.plan_entries import block_entries
from edgec.passes.residual_blocks import Block, find_blocks, remove_blocks
from edgec.passes.weights import check_skip
from edgec_runtime.errors import suggestion


@dataclass(frozen=True)
class PruneBlocks:
    """Removes the residual blocks that matter least: a shallower model."""

    name: ClassVar[str] = "prune-blocks"
    stage: ClassVar[Stage] = Stage.PRUNE
    lossless: ClassVar[bool] = False
    version: ClassVar[int] = 1

    ratio: float = 0.25  # share of the reference's blocks that goes at most, above 0 and below 1
    blocks: int = 0  # how many of the reference's blocks go; 0: as the ratio says
    # output: error of the outputs without the block; similarity: of the stream before and after
    importance: Measure = "output"
    skip: tuple[str, ...] = ()  # names of nodes that stay, with the blocks that they are in

    def __post_init__(self) -> None:
        """Raise PassError for parameters out of range."""
        if not 0.0 < self.ratio < 1.0:
            raise PassError(
                f"prune-blocks: ratio is {self.ratio}, expected a share above 0 and below 1 (0.25 "
                "removes a quarter of the residual blocks)"
            )
        if self.blocks < 0:
            raise PassError(f"prune-blocks: blocks is {self.blocks}, expected 0 or more")
        if self.importance not in get_args(Measure):
            near = suggestion(self.importance, get_args(Measure))
            raise PassError(f"prune-blocks: importance has no '{self.importance}'{near}")

    def run(self, model: ir.Model, context: Context) -> Result:
        """Remove; ``changed`` counts the blocks that went."""
        check_skip(self.name, self.skip, list(model.graph.all_nodes()))
        present = find_blocks(model)
        skipped = list(present.skipped)
        findings: tuple[str, ...] = ()
        known = _results(context.reference)
        total = max(len(known), len(present.found))
        sums = {node.outputs[0].name for node in model.graph if is_op(node, "Add")}
        before = len(known - sums)  # blocks that went in an earlier run
        if context.lock:
            decisions = dict(context.lock)
            removed = replayed(decisions, present.found)
            self._check_plan(removed)
        else:
            limit = self._limit(total)
            budget = limit - before
            if budget < 1 and total:
                findings = (
                    f"no residual block goes: {limit} of {total} may, {before} went before",
                )
            scores = self._scores(present.found, model, context, skipped) if budget > 0 else {}
            removed = _chosen(present.found, scores, budget)
            decisions = plan(present.found, scores, removed)
        dense = _weights(model)
        touched = remove_blocks(model, removed)
        if removed:
            left = _weights(model)
            findings = (
                f"{before + len(removed)} of {total} residual blocks are gone: {dense} numbers in "
                f"weights became {left} ({left / max(dense, 1):.1%})",
            )
        return Result(model, len(removed), tuple(skipped), touched, decisions, findings)

    def _check_plan(self, removed: Sequence[Block]) -> None:
        """Raise PassError for a plan that removes a node of ``skip``."""
        for block in removed:
            named = self._named(block)
            if named is not None:
                raise PassError(
                    f"prune-blocks: the plan removes block '{block.name}', but '{named}' is named "
                    "in skip; take it out of skip, or keep the block in the plan"
                )

    def _named(self, block: Block) -> str | None:
        """The first node of a block that ``skip`` names."""
        return next((name for name in block.nodes if name in self.skip), None)

    def _limit(self, total: int) -> int:
        """How many of the reference's blocks go."""
        if self.blocks > total > 0:
            raise PassError(
                f"prune-blocks: blocks is {self.blocks}, but only {total} residual blocks of the "
                f"model can go: give {total} or less"
            )
        return self.blocks or math.floor(self.ratio * total + 1e-9)

    def _scores(
        self, found: Sequence[Block], model: ir.Model, context: Context, skipped: list[Skip]
    ) -> dict[str, float]:
        """The importance of the blocks that may go, by result."""
        allowed = []
        for block in found:
            named = self._named(block)
            if named is None:
                allowed.append(block)
            else:
                skipped.append(Skip(block.name, f"'{named}' is named in skip"))
        scores = {}
        measured = block_importance(allowed, model, context, self.importance) if allowed else {}
        for block in allowed:
            score = measured[block.result]
            if isinstance(score, str):
                skipped.append(Skip(block.name, score))
            else:
                scores[block.result] = float(f"{score:.6g}")
        return scores


def _chosen(found: Sequence[Block], scores: Mapping[str, float], budget: int) -> list[Block]:
    """The blocks that go, those within them too, in the order of the nodes.

    The least important one that the budget has room for is next; among equals the last, since
    early blocks feed all others. A block around others costs as many as go with it.
    """
    order = sorted(
        (block for block in reversed(found) if block.result in scores),
        key=lambda block: scores[block.result],
    )
    gone: set[str] = set()
    while True:
        for block in order:
            going = {b.result for b in found if b.result in block.values} - gone
            if going and len(gone | going) <= budget:
                gone |= going
                break
        else:
            return [block for block in found if block.result in gone]


def plan(
    found: Sequence[Block], scores: Mapping[str, float], removed: Sequence[Block]
) -> dict[str, Any]:
    """What goes as JSON data: of each block its name, its size, its importance and if it went."""
    gone = {block.result for block in removed}
    return {
        "blocks": [
            {
                "name": block.name,
                "result": block.result,
                "shortcut": block.shortcut,
                "nodes": len(block.nodes),
                "weights": block.weights,
                "importance": scores.get(block.result),
                "removed": block.result in gone,
            }
            for block in found
        ]
    }


def replayed(plan: Mapping[str, Any], found: Sequence[Block]) -> list[Block]:
    """The blocks that a plan removes from a model of the same architecture.

    Raises PassError if the plan was made for another one, or is damaged.
    """
    known = {block.result: block for block in found}
    removed = []
    for entry in block_entries(plan):
        block = known.get(entry["result"])
        size = (entry["shortcut"], entry["nodes"], entry["weights"])
        if block is None or (block.shortcut, len(block.nodes), block.weights) != size:
            raise PassError(
                f"the plan has a residual block '{entry['name']}' of {entry['nodes']} nodes "
                f"and {entry['weights']} weights, which this model does not have: it was made "
                "for another architecture; build without it"
            )
        if entry["removed"]:
            removed.append(block)
    return removed


def _results(reference: ir.Model) -> set[str]:
    """What the blocks of the reference make; exporters hide weights behind nodes that rename.

    They are not counted in the pruned model: where one block went, another may become free.
    """
    plain = reference.clone()
    bypass_identities(plain)
    return {block.result for block in find_blocks(plain).found}


def _weights(model: ir.Model) -> int:
    return sum(
        int(value.const_value.size)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )
