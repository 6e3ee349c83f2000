"""How far a student's answers are from its teacher's: what ``recover`` lessens, and judges by.

Loss: KL divergence of the output probabilities or normalised squared error, plus normalised
squared error at values that both graphs share (FitNets, Romero et al. 2015,
arXiv:1412.6550). The held-out measure is another one, which no single answer can dominate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir

from edgec.passes.contract import PassError
from edgec.passes.curriculum import Example

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from edgec.passes.recover import Recover

LAYERS = frozenset({"Add", "Conv", "ConvTranspose", "Gemm", "LayerNormalization", "MatMul"})
PROJECTION_RATE = 0.003  # Adam's, of learned projections


class Losses:
    """What one training lessens.

    features, student_features: names of the inner values to keep of the teacher's and of the
    student's graph for ``loss``, besides the outputs, which both name alike.
    """

    def __init__(
        self, model: ir.Model, reference: ir.Model, settings: Recover, seed: int, example: Example
    ) -> None:
        """model: the student. reference: the teacher. example: any sample of the data."""
        self._settings = settings
        self._kinds = {str(v.name): _kind(v) for v in model.graph.outputs}
        self.features = _shared_values(model, reference, settings.features)
        self.student_features = self.features

    def parameters(self) -> list[Parameter]:
        """Learned projections: trained beside the student, never shipped."""
        return []

    def check_rows(self, rows: int) -> None:
        """Raise PassError if a loss needs more samples on top of each other than there are."""

    def doubt(self, answers: Mapping[str, Tensor]) -> float:
        """How unsure the teacher is: 1 less the probability of its likeliest class, 0..1.

        Mean over rows and outputs. Raises PassError if no output is of classes.
        """
        import torch

        doubts = []
        for name, kind in self._kinds.items():
            if kind != "numbers":
                answer = answers[name]
                sure = torch.softmax(answer, -1) if kind == "logits" else answer
                doubts.append(1.0 - float(sure.amax(-1).mean()))
        if not doubts:
            raise PassError(
                "recover: order is easy-first, but no output is of classes (Softmax, or a matrix "
                "product of rank 2), so the teacher has no confidence; leave order random"
            )
        return sum(doubts) / len(doubts)

    def loss(
        self,
        values: Mapping[str, Tensor],
        answers: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
    ) -> Tensor:
        """What a training step lessens, the mean over the samples of a stack.

        values: the student's outputs and ``student_features``. answers: the teacher's outputs
        and ``features``. labels: integers by name; empty where there are none.
        """
        import torch

        loss = torch.stack(
            [_output_loss(kind, values[n], answers[n]) for n, kind in self._kinds.items()]
        ).sum()
        if self.features and self._settings.feature_weight:
            errors = [squared_error(values[n], answers[n]) for n in self.features]
            loss = loss + self._settings.feature_weight * torch.stack(errors).mean()
        return loss

    def distance(
        self,
        values: Mapping[str, Tensor],
        answers: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
    ) -> Tensor:
        """How far the outputs alone are apart: what the user will notice."""
        import torch

        return torch.stack(
            [_distance(kind, values[n], answers[n]) for n, kind in self._kinds.items()]
        ).sum()


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error over the teacher's mean square."""
    return (student - teacher).square().mean() / teacher.square().mean().clamp_min(1e-12)


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
        return squared_error(student, teacher)
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
