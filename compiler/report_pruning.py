"""The part of the report's page that says what was pruned: units of groups, and residual blocks.

Left out: which units stay. That is the plan, in report.json under the step, to be applied again
by ``edgec build --plan``.
"""

from __future__ import annotations

from edgec import report_format as words
from edgec import report_markup as html
from edgec.report import Report
from edgec.report_plans import DepthPlan, PruningPlan

_SHOWN = 12  # rows of a table that is not folded up
_GROUPS = (
    "Groups: units that can only be cut together, by the node that makes them first. Which ones "
    "stay is in report.json."
)
_BLOCKS = (
    "Blocks: branches that are added to a stream, by the node that adds them, and how much the "
    "model misses each by itself."
)
_AGAIN = "<code>edgec build --plan report.json</code> cuts another model alike."


def pruning_section(report: Report) -> str:
    """A table for each step that cut units or blocks; empty if none did."""
    plans = [(i, s.plan) for i, s in enumerate(report.steps, start=1) if _has_cut(s.plan)]
    if not plans:
        return ""
    kinds = {type(plan) for _, plan in plans}
    notes = [note for kind, note in ((PruningPlan, _GROUPS), (DepthPlan, _BLOCKS)) if kind in kinds]
    content = "".join(_part(step, plan, alone=len(plans) == 1) for step, plan in plans)
    return html.section("What was pruned", " ".join((*notes, _AGAIN)), content)


def _has_cut(plan: PruningPlan | DepthPlan | None) -> bool:
    if isinstance(plan, DepthPlan):
        return any(block.removed for block in plan.blocks)
    return plan is not None and bool(plan.groups)


def _part(step: int, plan: PruningPlan | DepthPlan | None, *, alone: bool) -> str:
    """The table of a step, folded up if it is long."""
    if isinstance(plan, DepthPlan):
        amount, noun, table = len(plan.blocks), "block", _blocks(plan)
    else:
        assert plan is not None  # it has cut something
        amount, noun, table = len(plan.groups), "group", _groups(plan)
    heading = "" if alone else f"<h3>Step {step}</h3>"
    if amount > _SHOWN:
        table = html.details(words.count(amount, noun), table)
    return heading + table


def _groups(plan: PruningPlan) -> str:
    rows = [
        [
            html.Cell(html.code(group.name), "lead"),
            html.Cell(html.text(group.kind)),
            html.Cell(f"{group.units:,}", "right"),
            html.Cell(f"{len(group.kept):,}", "right"),
            html.Cell(_share(len(group.kept) / group.units), "wide"),
        ]
        for group in plan.groups
    ]
    return html.table(("Group", "Kind", "Units", "Kept", ""), rows, kind="dense")


def _blocks(plan: DepthPlan) -> str:
    rows = [
        [
            html.Cell(html.code(block.name), "lead"),
            html.Cell(f"{block.nodes:,}", "right"),
            html.Cell(f"{block.weights:,}", "right"),
            html.Cell("" if block.importance is None else f"{block.importance:.3g}", "right"),
            html.Cell("gone" if block.removed else "kept"),
        ]
        for block in plan.blocks
    ]
    return html.table(("Block", "Nodes", "Weights", "Importance", ""), rows, kind="dense")


def _share(kept: float) -> str:
    return f'<div class="track" aria-hidden="true">{html.bar(kept)}</div>'
