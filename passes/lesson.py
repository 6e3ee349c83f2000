"""One training of a quantized graph towards its reference: what ``recover`` runs.

The reference answers in ONNX Runtime (teacher), the differentiable twin learns (student).
What is learned from is in `edgec.passes.curriculum`, what is lessened in
`edgec.passes.losses`. Samples are stacked along their first axis where the twin gives the
same for a stack. The state that is nearest on held-out samples wins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, Feeds, PassError
from edgec.passes.curriculum import Example, alike, examples, judged, lessons
from edgec.passes.execution import open_session, run_feeds
from edgec.passes.losses import PROJECTION_RATE, Losses, squared_error

if TYPE_CHECKING:
    from torch import Tensor

    from edgec.passes.recover import Recover
    from edgec.passes.torch_graph import TorchGraph

THREADS = 1  # sums depend on the number of threads: one gives the same bytes everywhere
NOTHING = 1e-8  # distance of two float32 implementations of the same graph
_JUDGEMENTS = 10  # times the held-out distance is taken, besides before the training
_SAME_ANSWER = 0.05  # relative squared error that single flipped steps may cause in a deep graph


@dataclass(frozen=True)
class Outcome:
    """The best state's step and held-out loss; before: the untrained one's."""

    step: int
    before: float
    after: float

    @property
    def improved(self) -> bool:
        """True if a trained state is nearer than the untrained one."""
        return self.after < self.before


class Lesson:
    """One training: twin, teacher, data and settings."""

    def __init__(
        self, twin: TorchGraph, model: ir.Model, context: Context, settings: Recover
    ) -> None:
        """twin: of the model; it is trained in place. The context has calibration data."""
        assert context.calibration is not None
        self._twin, self._context, self._settings = twin, context, settings
        self._samples = examples(context.calibration, context.calibration_labels)
        reference = context.reference
        self._losses = Losses(model, reference, settings, context.seed, self._samples[0])
        self._kept = self._losses.student_features
        self._asked = [*twin.outputs, *self._losses.features]  # of the teacher
        self._teacher = open_session(reference, outputs=self._asked, threads=THREADS)

    def train(self) -> Outcome:
        """Train the twin and leave it in its best state on held-out samples."""
        import torch

        settings, twin, context = self._settings, self._twin, self._context
        samples = self._samples
        groups = _groups(twin, settings)
        if projections := self._losses.parameters():
            groups.append({"params": projections, "lr": PROJECTION_RATE})
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [g["lr"] for g in groups], total_steps=settings.steps + 1
        )
        size = settings.batch if self._stacks(samples) else 1
        self._losses.check_rows(size * _rows(samples[0]))
        held_out = samples
        if context.validation is not None:
            held_out = examples(context.validation, context.validation_labels)
        judges = self._answered(judged(held_out, settings, context.seed), size)
        first = best = self._held_out(judges)
        if first <= NOTHING:
            return Outcome(0, first, first)
        state, best_step = _copy(twin), 0
        doubts = self._doubts() if settings.order == "easy-first" else ()
        taught = lessons(samples, settings, np.random.default_rng(context.seed), doubts)
        every = max(settings.steps // _JUDGEMENTS, 1)
        for step in range(1, settings.steps + 1):
            optimizer.zero_grad()
            for part in self._answered(next(taught), size):
                share = part.count / settings.batch
                (self._loss(part) * share).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            context.progress("recover", step, settings.steps)
            if step % every == 0 or step == settings.steps:
                loss = self._held_out(judges)
                if loss < best:
                    best, best_step, state = loss, step, _copy(twin)
        twin.load_state_dict(state)
        return Outcome(best_step, first, best)

    def _stacks(self, samples: Sequence[Example]) -> bool:
        """True if the twin gives for two samples on top of each other what it gives for each.

        A graph may count on its batch: in the constant of a Reshape, or across samples. And
        its values may have the batch along another axis, or none.
        """
        import torch

        pair = list(samples[:2])
        if len(pair) < 2 or not alike(pair):
            return False
        with torch.no_grad():
            keep = self._kept
            singles = [self._twin(_tensors(sample.feeds), keep=keep) for sample in pair]
            try:
                stacked = self._twin(_stacked([sample.feeds for sample in pair]), keep=keep)
            except PassError:
                return False
        for name in (*self._twin.outputs, *self._kept):
            parts = [values[name] for values in singles]
            if not parts[0].ndim:
                return False
            apart = torch.cat(parts)
            if stacked[name].shape != apart.shape:
                return False
            error = squared_error(stacked[name].float(), apart.float())
            if name in self._twin.outputs and float(error) > _SAME_ANSWER:
                return False
        return True

    def _answered(self, samples: Iterable[Example], size: int) -> list[_Part]:
        """The samples in stacks of up to ``size``, with what the teacher says of each."""
        import torch

        parts: list[list[Example]] = []
        for sample in samples:
            if parts and len(parts[-1]) < size and alike([parts[-1][0], sample]):
                parts[-1].append(sample)
            else:
                parts.append([sample])
        answered = []
        for part in parts:
            answers = [run_feeds(self._teacher, sample.feeds) for sample in part]
            tensors = {
                name: torch.from_numpy(np.concatenate(arrays) if len(part) > 1 else arrays[0])
                for name, arrays in zip(self._asked, zip(*answers, strict=True), strict=True)
            }
            feeds = _stacked([sample.feeds for sample in part])
            labels = _stacked(_labels(part))
            answered.append(_Part(feeds, tensors, labels, len(part)))
        return answered

    def _doubts(self) -> list[float]:
        """How unsure the teacher is of each sample."""
        parts = (self._answered([sample], 1)[0] for sample in self._samples)
        return [self._losses.doubt(part.answers) for part in parts]

    def _loss(self, part: _Part) -> Tensor:
        values = self._twin(part.feeds, keep=self._kept)
        return self._losses.loss(values, part.answers, part.labels)

    def _held_out(self, parts: Sequence[_Part]) -> float:
        """Mean distance to the teacher's answers."""
        import torch

        total = 0.0
        with torch.no_grad():
            for part in parts:
                values = self._twin(part.feeds)
                distance = self._losses.distance(values, part.answers, part.labels)
                total += part.count * float(distance)
        return total / sum(part.count for part in parts)


@dataclass(frozen=True)
class _Part:
    """Samples that the twin sees at once, on top of each other, and the teacher's answers."""

    feeds: Mapping[str, Tensor]
    answers: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]
    count: int


def _stacked(samples: Sequence[Feeds]) -> dict[str, Tensor]:
    """The arrays of several samples on top of each other, as tensors."""
    if len(samples) == 1:
        return _tensors(samples[0])
    return _tensors({n: np.concatenate([feeds[n] for feeds in samples]) for n in samples[0]})


def _rows(sample: Example) -> int:
    """Length of the first axis of a sample's first input."""
    shape = next(iter(sample.feeds.values())).shape
    return shape[0] if shape else 1


def _labels(part: Sequence[Example]) -> list[Feeds]:
    """The labels that all samples of a part have, int64 [rows] each."""
    names = [n for n in part[0].labels if all(n in sample.labels for sample in part)]
    return [{n: sample.labels[n].reshape(-1).astype(np.int64) for n in names} for sample in part]


def _groups(twin: TorchGraph, settings: Recover) -> list[dict[str, Any]]:
    """One group per parameter, its rate in units of what one step of it means."""
    groups = []
    for name in twin.trained():
        parameter = twin.initializer(name)
        size = float(parameter.detach().square().mean().sqrt())
        step = twin.quantization_step(name)
        if parameter.dim() > 1 and step:
            rate = settings.rate * step
        elif parameter.dim() > 1:
            rate = settings.rate * size / 64  # a float weight moves as an int8 one would
        else:
            rate = settings.bias_rate * size
        parameter.requires_grad_(rate > 0)  # what is not trained needs no gradient either
        if rate > 0:
            groups.append({"params": [parameter], "lr": rate})
    return groups


def _copy(twin: TorchGraph) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in twin.state_dict().items()}


def _tensors(feeds: Feeds) -> dict[str, Tensor]:
    import torch

    return {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}
