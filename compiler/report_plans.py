"""What pruning cut, as a report tells it: units by their groups, and residual blocks.

The JSON data of a plan is what ``edgec build --plan`` applies again.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PrunedGroup:
    """Units that can only be cut together, and the numbers of those that were kept.

    name: of the node that makes the units first. kind: channel, head or hidden.
    """

    name: str
    kind: str
    units: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class PruningPlan:
    """What a step cut; its JSON data is what ``edgec build --plan`` applies again."""

    groups: tuple[PrunedGroup, ...]


@dataclass(frozen=True)
class ResidualBlock:
    """A branch of a sum, and whether it went.

    name: of the sum. result, shortcut: the values that it makes, and that goes on without it.
    nodes, weights: how many went or would go. importance: lowest matters least; None where it was
    not measured.
    """

    name: str
    result: str
    shortcut: str
    nodes: int
    weights: int
    importance: float | None
    removed: bool


@dataclass(frozen=True)
class DepthPlan:
    """The residual blocks that a step found; its JSON data is as that of ``PruningPlan``."""

    blocks: tuple[ResidualBlock, ...]
