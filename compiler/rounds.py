"""Prune, recover, prune further: a recipe as the steps that it is carried out in.

    prune-magnitude (sparsity 0.9, rounds 2), recover
        ->  prune-magnitude (0.7875), recover, prune-magnitude (0.9), recover

A pruning with ``rounds`` and the training behind it are repeated, the share rising by the cubic
schedule of Zhu and Gupta 2017 (arXiv:1710.01878, section 3). Each round is a step of its own:
in the lock, in the journal of a search and in the report. The recipe stays as it was asked
for, so a search may still change its share.

Left out: pruning in the middle of a training, which would keep the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgec.errors import RecipeError
from edgec.passes import Pass, PruneMagnitude, PruneStructured, Stage
from edgec.passes.progressive import share_of_round


def in_rounds(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """The steps of a recipe, none of which has more than one round; steps stay what they are.

    Raises RecipeError where no training stands behind a pruning in several rounds.
    """
    steps: list[Pass] = []
    left = list(passes)
    while left:
        pass_ = left.pop(0)
        if not isinstance(pass_, (PruneMagnitude, PruneStructured)) or pass_.rounds == 1:
            steps.append(pass_)
            continue
        if not left or left[0].stage is not Stage.TRAIN:
            behind = f"'{left[0].name}' does" if left else "nothing does"
            raise RecipeError(
                f"recipe: '{pass_.name}' has rounds = {pass_.rounds}, so a training has to stand "
                f"right behind it, and {behind}; put recover behind it, or leave out rounds"
            )
        training = left.pop(0)
        for number in range(1, pass_.rounds + 1):
            steps += [_of_round(pass_, number), training]
    return tuple(steps)


def without_training(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """What a recipe does to the shapes: its trainings left out, each pruning in one round."""
    return tuple(_shaping(p) for p in passes if p.stage is not Stage.TRAIN)


def _shaping(pass_: Pass) -> Pass:
    if isinstance(pass_, PruneStructured):
        return replace(pass_, rounds=1, refit=False)
    return replace(pass_, rounds=1) if isinstance(pass_, PruneMagnitude) else pass_


def _of_round(pass_: PruneMagnitude | PruneStructured, number: int) -> Pass:
    """What a pruning does in one of its rounds. number: 1 for the first."""
    if isinstance(pass_, PruneMagnitude):
        sparsity = share_of_round(pass_.sparsity, number, pass_.rounds)
        return replace(pass_, sparsity=sparsity, rounds=1)
    return replace(pass_, ratio=share_of_round(pass_.ratio, number, pass_.rounds), rounds=1)
