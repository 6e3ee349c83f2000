"""One training of a quantized graph towards its reference: what ``recover`` runs.

The reference answers in ONNX Runtime (teacher), the differentiable twin learns (student).
Samples are stacked along their first axis where the twin gives the same for a stack; every
other one is put together from two, which gives the teacher more to say about than the few
samples of a calibration. The state that is nearest on held-out samples wins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, Feeds, PassError
from edgec.passes.execution import open_session, run_feeds

if TYPE_CHECKING:
    from torch import Tensor

    from edgec.passes.recover import Recover
    from edgec.passes.torch_graph import TorchGraph

THREADS = 1  # sums depend on the number of threads: one gives the same bytes everywhere
NOTHING = 1e-8  # distance of two float32 implementations of the same graph
LAYERS = frozenset({"Add", "Conv", "ConvTranspose", "Gemm", "LayerNormalization", "MatMul"})
_JUDGED = 48  # samples of a judgement
_JUDGEMENTS = 10  # times the held-out distance is taken, besides before the training
_SAME_ANSWER = 0.05  # relative squared error that single flipped steps may cause in a deep graph
_SPLICEABLE_RANK = 3  # batch, channels or time, and more


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
        """twin: of the model; it is trained in place."""
        self._twin, self._context, self._settings = twin, context, settings
        self._outputs = twin.outputs
        self._kinds = {str(v.name): _kind(v) for v in model.graph.outputs}
        self._features = _shared_values(model, context.reference, settings.features)
        self._teacher = open_session(
            context.reference, outputs=[*self._outputs, *self._features], threads=THREADS
        )

    def train(self) -> Outcome:
        """Train the twin and leave it in its best state on held-out samples."""
        import torch

        settings, twin, context = self._settings, self._twin, self._context
        assert context.calibration is not None
        samples = list(context.calibration)
        groups = _groups(twin, settings)
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [g["lr"] for g in groups], total_steps=settings.steps + 1
        )
        size = settings.batch if self._stacks(samples) else 1
        held_out = samples if context.validation is None else list(context.validation)
        judged = self._answered(_judged(held_out, settings, context.seed), size)
        first = best = self._held_out(judged)
        if first <= NOTHING:
            return Outcome(0, first, first)
        state, best_step = _copy(twin), 0
        lessons = _lessons(samples, settings, np.random.default_rng(context.seed))
        every = max(settings.steps // _JUDGEMENTS, 1)
        for step in range(1, settings.steps + 1):
            optimizer.zero_grad()
            for part in self._answered(next(lessons), size):
                share = part.count / settings.batch
                (self._loss(part) * share).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            context.progress("recover", step, settings.steps)
            if step % every == 0 or step == settings.steps:
                loss = self._held_out(judged)
                if loss < best:
                    best, best_step, state = loss, step, _copy(twin)
        twin.load_state_dict(state)
        return Outcome(best_step, first, best)

    def _stacks(self, samples: Sequence[Feeds]) -> bool:
        """True if the twin gives for two samples on top of each other what it gives for each.

        A graph may count on its batch: in the constant of a Reshape, or across samples. And
        its values may have the batch along another axis, or none.
        """
        import torch

        pair = list(samples[:2])
        if len(pair) < 2 or not _alike(pair):
            return False
        with torch.no_grad():
            keep = self._features
            singles = [self._twin(_tensors(feeds), keep=keep) for feeds in pair]
            try:
                stacked = self._twin(_tensors(_stack(pair)), keep=keep)
            except PassError:
                return False
        for name in (*self._outputs, *self._features):
            parts = [values[name] for values in singles]
            if not parts[0].ndim:
                return False
            apart = torch.cat(parts)
            if stacked[name].shape != apart.shape:
                return False
            error = _squared_error(stacked[name].float(), apart.float())
            if name in self._outputs and float(error) > _SAME_ANSWER:
                return False
        return True

    def _answered(self, samples: Iterable[Feeds], size: int) -> list[_Part]:
        """The samples in stacks of up to ``size``, with what the teacher says of each."""
        import torch

        names = [*self._outputs, *self._features]
        parts: list[list[Feeds]] = []
        for feeds in samples:
            if parts and len(parts[-1]) < size and _alike([parts[-1][0], feeds]):
                parts[-1].append(feeds)
            else:
                parts.append([feeds])
        answered = []
        for part in parts:
            answers = [run_feeds(self._teacher, feeds) for feeds in part]
            tensors = {
                name: torch.from_numpy(np.concatenate(arrays) if len(part) > 1 else arrays[0])
                for name, arrays in zip(names, zip(*answers, strict=True), strict=True)
            }
            answered.append(_Part(_tensors(_stack(part)), tensors, len(part)))
        return answered

    def _loss(self, part: _Part) -> Tensor:
        import torch

        values = self._twin(part.feeds, keep=self._features)
        loss = torch.stack(
            [_output_loss(self._kinds[n], values[n], part.answers[n]) for n in self._outputs]
        ).sum()
        if self._features and self._settings.feature_weight:
            errors = [_squared_error(values[n], part.answers[n]) for n in self._features]
            loss = loss + self._settings.feature_weight * torch.stack(errors).mean()
        return loss

    def _held_out(self, parts: Sequence[_Part]) -> float:
        """Mean distance of the outputs alone: what the user will notice."""
        import torch

        total = 0.0
        with torch.no_grad():
            for part in parts:
                values = self._twin(part.feeds)
                total += part.count * sum(
                    float(_distance(self._kinds[n], values[n], part.answers[n]))
                    for n in self._outputs
                )
        return total / sum(part.count for part in parts)


@dataclass(frozen=True)
class _Part:
    """Samples that the twin sees at once, on top of each other, and the teacher's answers."""

    feeds: Mapping[str, Tensor]
    answers: Mapping[str, Tensor]
    count: int


def _lessons(
    samples: Sequence[Feeds], settings: Recover, random: np.random.Generator
) -> Iterator[list[Feeds]]:
    """Without end: the samples of one step after the other, every sample as often as any."""
    order: list[int] = []
    while True:
        chosen = []
        for _ in range(settings.batch):
            order = order or [int(i) for i in random.permutation(len(samples))]
            chosen.append(samples[order.pop()])
        if settings.splice:  # every other one
            for i in range(0, len(chosen), 2):
                other = samples[int(random.integers(len(samples)))]
                chosen[i] = joined(chosen[i], other, random.random()) or chosen[i]
        yield chosen


def _judged(samples: Sequence[Feeds], settings: Recover, seed: int) -> list[Feeds]:
    """Held-out samples, and pieces of them put together up to a number that tells states apart."""
    random = np.random.default_rng(seed)
    judged = list(samples[:_JUDGED])
    while settings.splice and len(judged) < _JUDGED:
        first, second = (samples[int(random.integers(len(samples)))] for _ in range(2))
        piece = joined(first, second, random.random())
        if piece is None:
            break
        judged.append(piece)
    return judged


def joined(feeds: Feeds, other: Feeds, share: float) -> Feeds | None:
    """The start of one sample and the rest of another, cut at a share of the longest axis.

    A new sample with the contents of real ones, on which the teacher has its opinion (CutMix,
    Yun et al. 2019, arXiv:1905.04899, without its labels). None if the samples are no images
    or sequences of features, or of different shapes.
    """
    if not _alike([feeds, other]):
        return None
    joined = {}
    for name, array in feeds.items():
        if array.ndim < _SPLICEABLE_RANK or array.dtype.kind != "f":
            return None
        axis = max(range(1, array.ndim), key=lambda i: array.shape[i])
        cut = round(share * array.shape[axis])
        before, after = (np.s_[:],) * axis + (np.s_[:cut],), (np.s_[:],) * axis + (np.s_[cut:],)
        joined[name] = np.concatenate([array[before], other[name][after]], axis)
    return joined


def _alike(samples: Sequence[Feeds]) -> bool:
    """True if the samples have the same shapes, with a first axis to stack along."""
    shapes = [{name: array.shape for name, array in feeds.items()} for feeds in samples]
    return all(shape == shapes[0] for shape in shapes) and all(shapes[0].values())


def _stack(samples: Sequence[Feeds]) -> Feeds:
    if len(samples) == 1:
        return samples[0]
    return {name: np.concatenate([feeds[name] for feeds in samples]) for name in samples[0]}


def _kind(output: ir.Value) -> str:
    """How an output is compared: as probabilities, logits or numbers."""
    node = output.producer()
    while node is not None and node.op_type in {"Reshape", "Squeeze", "Identity", "Flatten"}:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is not None and node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
        quantizer = node.inputs[0].producer()
        source = quantizer.inputs[0] if quantizer is not None else None
        node = source.producer() if source is not None else None
    op = "" if node is None else node.op_type
    if op == "Softmax":
        return "probabilities"
    rank = 0 if output.shape is None else len(output.shape)
    return "logits" if op in {"Gemm", "MatMul", "Add"} and rank == 2 else "numbers"


def _output_loss(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    import torch
    import torch.nn.functional as functional

    if not student.is_floating_point():
        return torch.zeros(())
    if kind == "numbers":
        return _squared_error(student, teacher)
    if kind == "logits":
        log_student, log_teacher = (torch.log_softmax(v, -1) for v in (student, teacher))
    else:
        log_student, log_teacher = (torch.log(v.clamp_min(1e-9)) for v in (student, teacher))
    rows = log_student.reshape(-1, log_student.shape[-1])
    return functional.kl_div(
        rows, log_teacher.reshape(rows.shape), log_target=True, reduction="batchmean"
    )


def _distance(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """How far the answers are apart, in numbers that no single answer can dominate.

    Total variation of probabilities (0..1), near the share of changed decisions; the KL
    divergence of a few dozen samples hangs on the few rows where a decision flipped.
    """
    import torch

    if kind == "numbers" or not student.is_floating_point():
        return _output_loss(kind, student, teacher)
    if kind == "logits":
        student, teacher = (torch.softmax(v, -1) for v in (student, teacher))
    return (student - teacher).abs().sum(-1).mean() / 2


def _squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error over the teacher's mean square."""
    return (student - teacher).square().mean() / teacher.square().mean().clamp_min(1e-12)


def _shared_values(model: ir.Model, reference: ir.Model, count: int) -> tuple[str, ...]:
    """Outputs of layers that both graphs name alike, ``count`` of them, evenly spread."""
    known = {v.name for node in reference.graph for v in node.outputs if node.op_type in LAYERS} - {
        v.name for v in reference.graph.outputs
    }
    names = [
        str(v.name)
        for node in model.graph
        if node.op_type in LAYERS
        for v in node.outputs
        if v.name in known
    ]
    if count >= len(names):
        return tuple(names)
    return tuple(names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count))


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
