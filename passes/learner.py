"""What changes in a training: the student's parameters, Adam's moments, the best state so far.

All that a checkpoint has to hold is here, by name. Parameters are replicated or sharded over
the processes that train together; every call is made by all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from edgec.passes.curriculum import Example
from edgec.passes.losses import PROJECTION_RATE
from edgec.passes.workers import ALONE, Workers

if TYPE_CHECKING:
    from torch import Tensor

    from edgec.passes.stacks import Stack
    from edgec.passes.torch_student import Student

    Judge = tuple[Stack, float]  # held-out samples, and how much their mean distance weighs


class Learner:
    """A student and the optimizer that moves it."""

    def __init__(
        self,
        student: Student,
        answered: Callable[[Sequence[Example]], Stack],
        rates: Mapping[str, float],
        workers: Workers = ALONE,
        *,
        sharded: bool = False,
    ) -> None:
        """The student's twin is trained in place; it may be sharded until ``finish``.

        answered: samples -> a stack with the teacher's answers. rates: Adam's, at the peak, by
        the name of the initializer; the others stay.
        """
        import torch

        self._student, self._answered = student, answered
        self._workers, self._sharded = workers, sharded and workers.size > 1
        for name in student.twin.trained():
            student.twin.initializer(name).requires_grad_(name in rates)
        own = list(student.projections)
        self._net = workers.wrapped(student, own=own, sharded=sharded)
        self._learned = {name: student.twin.initializer(name) for name in rates}
        self._learned |= {f"projection {i}": p for i, p in enumerate(own)}
        self._peaks = [rates.get(name, PROJECTION_RATE) for name in self._learned]
        self._optimizer = torch.optim.Adam(
            [
                {"params": [parameter], "lr": peak}
                for parameter, peak in zip(self._learned.values(), self._peaks, strict=True)
            ]
        )
        self._best: dict[str, Tensor] = {}
        self.keep()

    def step(
        self, stacks: Sequence[Sequence[Example]], rate_share: float, wider: float = 0.0
    ) -> float:
        """One optimizer step on stacks of samples; the loss before it.

        rate_share: of the peak rate. wider: share of the bits that weights have to spare. The
        result is the same for any number of processes, but for the order of sums.
        """
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * rate_share
        self._optimizer.zero_grad()
        count = sum(len(stack) for stack in stacks)
        mine = self._workers.share(stacks)
        total = 0.0
        for i, (stack, counts) in enumerate(mine):
            share = len(stack) / count if counts else 0.0
            answered = self._answered(stack)
            with self._workers.accumulating(self._net, last=i == len(mine) - 1):
                loss = self._net(answered, "loss", wider)
                # the gradients of the processes are averaged, and we want their sum
                (loss * (share * self._workers.size)).backward()
            total += share * float(loss.detach())
        if self._sharded:
            self._workers.average_gradients(self._student.projections)
        self._optimizer.step()
        return self._workers.total(total)

    def distance(self, judges: Sequence[Judge]) -> float:
        """Weighted sum of held-out distances. judges: this process's share, weight 0 for fillers.

        The weights of all processes add up to 1.
        """
        import torch

        total = 0.0
        with torch.no_grad():
            for stack, weight in judges:
                distance = float(self._net(stack, "distance"))
                total += weight * distance if weight else 0.0
        return self._workers.total(total)

    def keep(self) -> None:
        """Take the present state for the best."""
        self._best = {name: p.detach().clone() for name, p in self._learned.items()}

    def finish(self) -> None:
        """Put the best state into the twin, whole on every process."""
        import torch

        with torch.no_grad():
            for name, parameter in self._learned.items():
                parameter.copy_(self._best[name])
        if self._sharded:
            for module in self._student.twin.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    full = torch.nn.Parameter(self._workers.whole(parameter))
                    setattr(module, name, full)

    def best(self) -> dict[str, Tensor]:
        """The best state, whole."""
        return {f"best/{name}": self._workers.whole(t) for name, t in self._best.items()}

    def state(self) -> dict[str, Tensor]:
        """Everything that a training needs to go on, whole."""
        state = self.best()
        for name, parameter in self._learned.items():
            state[f"now/{name}"] = self._workers.whole(parameter)
            for key, moment in self._optimizer.state[parameter].items():
                state[f"adam/{key}/{name}"] = self._workers.whole(moment)
        return state

    def restore(self, names: Sequence[str], source: Mapping[str, Tensor] | None) -> None:
        """Take over what ``state`` or ``best`` gave. source: only process 0 needs it."""
        for name in names:
            given = None if source is None else source[name]
            self._workers.fill(self._target(name), given)

    def _target(self, name: str) -> Tensor:
        import torch

        kind, _, rest = name.partition("/")
        if kind == "best":
            return self._best[rest]
        if kind == "now":
            return self._learned[rest]
        key, _, rest = rest.partition("/")
        parameter = self._learned[rest]
        # as Adam makes them at its first step
        empty = torch.tensor(0.0) if key == "step" else torch.zeros_like(parameter)
        moment: Tensor = self._optimizer.state[parameter].setdefault(key, empty.detach())
        return moment
