"""The part of the report's page that says what was pruned: of each group, how much is left.

Left out: which units stay. That is the plan, in report.json under the step, to be applied again
by ``edgec build --plan``.
"""

from __future__ import annotations

from edgec import report_format as words
from edgec import report_markup as html
from edgec.report import PruningPlan, Report

_SHOWN = 12  # rows of a table that is not folded up


def pruning_section(report: Report) -> str:
    """A table for each step that cut units; empty if none did."""
    plans = [(i, s.plan) for i, s in enumerate(report.steps, start=1) if s.plan and s.plan.groups]
    if not plans:
        return ""
    note = (
        "Units that can only be cut together, by the node that makes them first. Which ones stay "
        "is in report.json; <code>edgec build --plan report.json</code> cuts another model alike."
    )
    content = "".join(_table(step, plan, alone=len(plans) == 1) for step, plan in plans)
    return html.section("What was pruned", note, content)


def _table(step: int, plan: PruningPlan, *, alone: bool) -> str:
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
    table = html.table(("Group", "Kind", "Units", "Kept", ""), rows, kind="dense")
    heading = "" if alone else f"<h3>Step {step}</h3>"
    if len(rows) > _SHOWN:
        table = html.details(words.count(len(rows), "group"), table)
    return heading + table


def _share(kept: float) -> str:
    return f'<div class="track" aria-hidden="true">{html.bar(kept)}</div>'
