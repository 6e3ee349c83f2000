"""Wins back what quantization lost: trains the graph towards the reference, without labels.

The reference runs in ONNX Runtime and gives the answers (teacher); the quantized graph runs
as its differentiable twin (student). Loss: KL divergence of the output probabilities or
normalised squared error, plus normalised squared error at values that both graphs share
(FitNets, Romero et al. 2015, arXiv:1412.6550). What is trained is what ships: integer
weights move under their fixed scales and are rounded back (quantization-aware training,
Jacob et al. 2018, arXiv:1712.05877). The best state on held-out samples wins, the
untrained one included, so the pass cannot make the held-out figure worse.

Left out: labels, relation distillation, learned scales, blocks on disk, several processes.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, Feeds, PassError, Result, Skip, Stage
from edgec.passes.execution import open_session, run_feeds
from edgec.passes.weights import label

if TYPE_CHECKING:
    from torch import Tensor

    from edgec.passes.torch_graph import TorchGraph

Array = np.ndarray[Any, Any]

_JUDGEMENTS = 10  # times the held-out loss is taken, besides before the training
_THREADS = 1  # sums depend on the number of threads: one gives the same bytes everywhere
_NOTHING = 1e-8  # loss of two float32 implementations of the same graph
_LAYERS = frozenset({"Add", "Conv", "ConvTranspose", "Gemm", "LayerNormalization", "MatMul"})


@dataclass(frozen=True)
class Recover:
    """Train weights and biases so that the outputs come back to the reference's.

    Needs calibration data; labels are not used. A step sees ``batch`` samples.
    """

    name: ClassVar[str] = "recover"
    stage: ClassVar[Stage] = Stage.TRAIN
    lossless: ClassVar[bool] = False
    version: ClassVar[int] = 1

    steps: int = 200  # optimizer steps
    batch: int = 8  # samples a step
    rate: float = 0.01  # of weights: quantization steps a step, at the peak of the cycle
    bias_rate: float = 0.002  # of biases: share of their root mean square a step, at the peak
    features: int = 12  # inner values that are matched besides the outputs; 0: none
    feature_weight: float = 1.0  # of the inner values' loss against the outputs'

    def __post_init__(self) -> None:
        """Check the parameters."""
        for name in ("steps", "batch", "rate", "bias_rate"):
            if not getattr(self, name) > 0:
                raise PassError(f"recover: {name} is {getattr(self, name)}, expected above 0")
        if self.features < 0 or self.feature_weight < 0:
            raise PassError("recover: features and feature_weight are negative, expected 0 or more")

    def run(self, model: ir.Model, context: Context) -> Result:
        """Train, keep the best held-out state, write it into the same graph."""
        if context.lock:
            changed = _replay(model, context.lock)
            return Result(model, changed, touched=(), decisions=dict(context.lock))
        if context.calibration is None or not len(context.calibration):
            raise PassError(
                "recover needs calibration data to learn from: give some dozen typical inputs"
            )
        import torch

        from edgec.passes.torch_graph import to_torch

        before = {n: _bytes(v) for n, v in model.graph.initializers.items()}
        try:
            twin = to_torch(model)
        except PassError as error:
            node = next(n for n in model.graph if f"'{n.name}'" in str(error))
            skip = Skip(label(node), str(error))
            finding = f"nothing was trained: {error}"
            return Result(model, 0, (skip,), findings=(finding,), decisions={"changes": {}})
        threads = torch.get_num_threads()
        torch.set_num_threads(_THREADS)
        try:
            found = _Lesson(twin, model, context, self).train()
        finally:
            torch.set_num_threads(threads)
        if not found.improved:
            finding = (
                "there is nothing to win back: the outputs are the reference's"
                if found.before <= _NOTHING
                else "training did not lower the held-out loss; the model is unchanged"
            )
            return Result(model, 0, findings=(finding,), decisions={"changes": {}})
        changed = twin.write_back(model)
        changes = {
            name: _difference(before[name], _bytes(value))
            for name, value in model.graph.initializers.items()
            if _bytes(value) != before[name]
        }
        finding = (
            f"held-out loss {found.before:.4g} before, {found.after:.4g} after "
            f"{found.step} of {self.steps} steps"
        )
        return Result(
            model,
            changed,
            touched=tuple(
                str(v.name) for n in model.graph if n.op_type in _LAYERS for v in n.outputs
            ),
            decisions={"changes": changes},
            findings=(finding,),
        )


@dataclass(frozen=True)
class _Outcome:
    """The best state's step and held-out loss; before: the untrained one's."""

    step: int
    before: float
    after: float

    @property
    def improved(self) -> bool:
        return self.after < self.before


class _Lesson:
    """One training: twin, teacher, data and settings."""

    def __init__(
        self, twin: TorchGraph, model: ir.Model, context: Context, settings: Recover
    ) -> None:
        self._twin, self._context, self._settings = twin, context, settings
        self._outputs = twin.outputs
        self._kinds = {str(v.name): _kind(v) for v in model.graph.outputs}
        self._features = _shared_values(model, context.reference, settings.features)
        self._teacher = open_session(
            context.reference, outputs=[*self._outputs, *self._features], threads=_THREADS
        )

    def train(self) -> _Outcome:
        import torch

        settings, twin = self._settings, self._twin
        assert self._context.calibration is not None
        samples = list(self._context.calibration)
        held_out = self._context.validation
        groups = _groups(twin, settings)
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [g["lr"] for g in groups], total_steps=settings.steps + 1
        )
        judged = list(held_out) if held_out is not None else samples
        first = best = self._held_out(judged)
        if first <= _NOTHING:
            return _Outcome(0, first, first)
        state, best_step = _copy(twin), 0
        random = np.random.RandomState(self._context.seed)
        order: list[int] = []
        every = max(settings.steps // _JUDGEMENTS, 1)
        for step in range(1, settings.steps + 1):
            optimizer.zero_grad()
            for _ in range(settings.batch):
                order = order or list(random.permutation(len(samples)))
                (self._loss(samples[order.pop()]) / settings.batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            self._context.progress("recover", step, settings.steps)
            if step % every == 0 or step == settings.steps:
                loss = self._held_out(judged)
                if loss < best:
                    best, best_step, state = loss, step, _copy(twin)
        twin.load_state_dict(state)
        return _Outcome(best_step, first, best)

    def _loss(self, feeds: Feeds) -> Tensor:
        import torch

        answers = self._answers(feeds)
        values = self._twin(_tensors(feeds), keep=self._features)
        loss = torch.stack(
            [_output_loss(self._kinds[n], values[n], answers[n]) for n in self._outputs]
        ).sum()
        if self._features and self._settings.feature_weight:
            errors = [_squared_error(values[n], answers[n]) for n in self._features]
            loss = loss + self._settings.feature_weight * torch.stack(errors).mean()
        return loss

    def _held_out(self, samples: Sequence[Feeds]) -> float:
        """Mean loss of the outputs alone: what the user will notice."""
        import torch

        total = 0.0
        with torch.no_grad():
            for feeds in samples:
                answers, values = self._answers(feeds), self._twin(_tensors(feeds))
                total += sum(
                    float(_output_loss(self._kinds[n], values[n], answers[n]))
                    for n in self._outputs
                )
        return total / len(samples)

    def _answers(self, feeds: Feeds) -> dict[str, Tensor]:
        import torch

        names = [*self._outputs, *self._features]
        arrays = run_feeds(self._teacher, feeds)
        return {n: torch.from_numpy(a) for n, a in zip(names, arrays, strict=True)}


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


def _squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error over the teacher's mean square."""
    return (student - teacher).square().mean() / teacher.square().mean().clamp_min(1e-12)


def _shared_values(model: ir.Model, reference: ir.Model, count: int) -> tuple[str, ...]:
    """Outputs of layers that both graphs name alike, ``count`` of them, evenly spread."""
    known = {
        v.name for node in reference.graph for v in node.outputs if node.op_type in _LAYERS
    } - {v.name for v in reference.graph.outputs}
    names = [
        str(v.name)
        for node in model.graph
        if node.op_type in _LAYERS
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
        if rate > 0:
            groups.append({"params": [parameter], "lr": rate})
    return groups


def _copy(twin: TorchGraph) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in twin.state_dict().items()}


def _tensors(feeds: Feeds) -> dict[str, Tensor]:
    import torch

    return {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}


def _bytes(value: ir.Value) -> bytes:
    assert value.const_value is not None
    return value.const_value.tobytes()


def _difference(before: bytes, after: bytes) -> str:
    """What turns one into the other, byte by byte, as text: mostly zeros, so it packs well."""
    a, b = np.frombuffer(before, np.uint8), np.frombuffer(after, np.uint8)
    return base64.b64encode(zlib.compress((b - a).tobytes(), 9)).decode("ascii")


def _replay(model: ir.Model, lock: Mapping[str, Any]) -> int:
    """Apply the recorded differences. Raises PassError if they are of another model."""
    for name, text in lock.get("changes", {}).items():
        value = model.graph.initializers.get(name)
        tensor = None if value is None else value.const_value
        change = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
        if value is None or tensor is None or len(change) != tensor.nbytes:
            raise PassError(f"the lock changes '{name}', which this model does not have")
        array = np.frombuffer(tensor.tobytes(), np.uint8) + change
        typed = array.view(tensor.numpy().dtype).reshape(tensor.numpy().shape)
        value.const_value = ir.tensor(typed, dtype=tensor.dtype, name=name)
    return len(lock.get("changes", {}))
