"""One training on labels, which may have to keep what was learned before.

Lessened is the cross-entropy of the labels, of new samples and of remembered ones in the
same step (replay). On top come, if asked for: the distance to the answers of the model as it
was, at the classes that it knew (learning without forgetting, Li & Hoiem 2016,
arXiv:1606.09282, section 3); and the distance of every weight to where it was, as much as it
mattered (Kirkpatrick et al. 2017, arXiv:1612.00796, equation 3). The state with the lowest
cross-entropy on held-out samples wins, the untrained one included.

Left out: augmentation, which is the user's data's business, and the warm-up of new rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgec.passes.contract import PassError, Progress
from edgec.passes.curriculum import Example
from edgec.passes.responses import log_probabilities
from edgec.passes.stacks import in_stacks, keeps_apart

if TYPE_CHECKING:
    from torch import Tensor

    from edgec.passes.adapt import Adapt
    from edgec.passes.head import Head
    from edgec.passes.torch_graph import TorchGraph

_JUDGEMENTS = 10  # times the held-out loss is taken, besides before the training
_STACK = 64  # samples of a judgement at once


@dataclass(frozen=True)
class Lore:
    """What a training learns from. held_out, held_memory: for judgements only."""

    samples: Sequence[Example]
    memory: Sequence[Example] = ()
    held_out: Sequence[Example] = ()
    held_memory: Sequence[Example] = ()


@dataclass(frozen=True)
class Ties:
    """What holds a model to what it was.

    before: its twin, for learning without forgetting. classes: those that it knew.
    importance: of each weight, by initializer name; empty without consolidation.
    """

    before: TorchGraph | None = None
    classes: tuple[int, ...] = ()
    importance: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The best state's step, and the held-out cross-entropy before and after, in nats."""

    step: int
    before: float
    after: float


class Course:
    """A twin, what of it is trained, and what it is trained on."""

    def __init__(
        self, twin: TorchGraph, head: Head, lore: Lore, ties: Ties, settings: Adapt
    ) -> None:
        """The twin is trained in place; every sample has one array of labels, checked."""
        self._twin, self._head = twin, head
        self._lore, self._ties, self._settings = lore, ties, settings
        self._together = keeps_apart(twin, lore.samples, ())

    def scores(self, values: Mapping[str, Tensor]) -> Tensor:
        """Logits, or logarithms of probabilities, of a twin's answer: [rows, classes]."""
        return scores(self._head, values)

    def train(self, rates: Mapping[str, float], seed: int, progress: Progress) -> Outcome:
        """Train and leave the twin in its best state.

        rates: Adam's, at the peak of the schedule, by the name of the initializer.
        """
        import torch

        settings, lore = self._settings, self._lore
        learned = {name: self._twin.initializer(name) for name in rates}
        start = {name: tensor.detach().clone() for name, tensor in learned.items()}
        optimizer = torch.optim.Adam([{"params": [p], "lr": rates[n]} for n, p in learned.items()])
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [rates[name] for name in learned], total_steps=settings.steps + 1
        )
        random = np.random.default_rng(seed)
        recalled = round(settings.replay * settings.batch) if lore.memory else 0
        new = _Deck(lore.samples, random)
        old = _Deck(lore.memory, random)
        first = best = self._held_out()
        state, best_step = dict(start), 0
        every = max(settings.steps // _JUDGEMENTS, 1)
        for step in range(1, settings.steps + 1):
            drawn = new.draw(settings.batch - recalled) + old.draw(recalled)
            optimizer.zero_grad()
            for stack in in_stacks(drawn, settings.batch if self._together else 1):
                loss = self._loss(stack) * (len(stack) / settings.batch)
                loss.backward()  # type: ignore[no-untyped-call]
            if self._ties.importance:
                held = self._pull(learned, start)
                held.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            progress("adapt", step, settings.steps)
            if step % every == 0 or step == settings.steps:
                loss_now = self._held_out()
                if loss_now < best:
                    best, best_step = loss_now, step
                    state = {name: tensor.detach().clone() for name, tensor in learned.items()}
        with torch.no_grad():
            for name, tensor in learned.items():
                tensor.copy_(state[name])
        return Outcome(best_step, first, best)

    def _loss(self, stack: Sequence[Example]) -> Tensor:
        """Cross-entropy, and the distance to the answers from before, of one stack."""
        import torch
        import torch.nn.functional as functional

        settings, ties = self._settings, self._ties
        feeds = _feeds(stack)
        answer = self.scores(self._twin(feeds))
        loss = functional.cross_entropy(answer, _classes(stack, len(answer)))
        if ties.before is None:
            return loss
        with torch.no_grad():
            was = self.scores(ties.before(feeds))
        columns, warmth = list(ties.classes), settings.temperature
        ours, theirs = (log_probabilities("logits", v[:, columns], warmth) for v in (answer, was))
        apart = functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
        return loss + settings.keep_weight * warmth**2 * apart

    def _pull(self, learned: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        """How far the weights are from where they were, where it matters."""
        import torch

        parts = [
            (matters * (learned[name] - start[name]).square()).sum()
            for name, matters in self._ties.importance.items()
        ]
        return self._settings.ewc_weight / 2 * torch.stack(parts).sum()

    def _held_out(self) -> float:
        """Mean cross-entropy of held-out samples; new and remembered ones count alike."""
        lore = self._lore
        sides = [side for side in (lore.held_out or lore.samples, lore.held_memory) if side]
        return sum(self._mean_loss(side) for side in sides) / len(sides)

    def _mean_loss(self, samples: Sequence[Example]) -> float:
        import torch
        import torch.nn.functional as functional

        total, count = 0.0, 0
        with torch.no_grad():
            for stack in in_stacks(samples, _STACK if self._together else 1):
                answer = self.scores(self._twin(_feeds(stack)))
                classes = _classes(stack, len(answer))
                total += float(functional.cross_entropy(answer, classes, reduction="sum"))
                count += len(classes)
        return total / count


def scores(head: Head, values: Mapping[str, Tensor]) -> Tensor:
    """Logits, or logarithms of probabilities, from the values of a twin: [rows, classes]."""
    answer = values[head.output]
    if head.layer.is_conv and answer.ndim > 2:
        answer = answer.movedim(1, -1)  # [n, classes, h, w]
    if head.kind == "probabilities":
        answer = log_probabilities("probabilities", answer, 1.0)
    return answer.reshape(-1, answer.shape[-1])


class _Deck:
    """Samples in random order, each as often as any other."""

    def __init__(self, samples: Sequence[Example], random: np.random.Generator) -> None:
        self._samples, self._random = samples, random
        self._order: list[int] = []

    def draw(self, count: int) -> list[Example]:
        drawn = []
        for _ in range(count):
            self._order = self._order or self._random.permutation(len(self._samples)).tolist()
            drawn.append(self._samples[self._order.pop()])
        return drawn


def _feeds(stack: Sequence[Example]) -> dict[str, Tensor]:
    import torch

    names = stack[0].feeds
    return {
        name: torch.from_numpy(np.concatenate([np.asarray(s.feeds[name]) for s in stack]))
        if len(stack) > 1
        else torch.from_numpy(np.array(stack[0].feeds[name]))
        for name in names
    }


def _classes(stack: Sequence[Example], rows: int) -> Tensor:
    """The labels of a stack, int64 [rows]. Raises PassError if there are more or fewer."""
    import torch

    classes = np.concatenate([next(iter(sample.labels.values())) for sample in stack])
    if len(classes) != rows:
        raise PassError(
            f"adapt: {len(classes)} labels for {rows} rows of class scores; give one label for "
            "each row of the output"
        )
    return torch.from_numpy(classes)
