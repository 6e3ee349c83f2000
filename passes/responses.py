"""How an output of a student is compared with its teacher's: as classes or as numbers.

Classes: KL divergence of probabilities softened by a temperature T, times T^2 (Hinton et al.
2015, arXiv:1503.02531, section 2). Numbers: squared error over the teacher's mean square.
For a judgement, distances that no single answer can dominate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["probabilities", "logits", "numbers"]

_LEAST_PROBABILITY = 1e-9


def kind_of(output: ir.Value) -> Kind:
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


def response_error(kind: Kind, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """What a training lessens at an output: softened KL divergence, or squared error.

    Integers cannot be trained and count nothing.
    """
    import torch
    import torch.nn.functional as functional

    if not student.is_floating_point():
        return torch.zeros((), requires_grad=True)
    if kind == "numbers":
        return squared_error(student, teacher)
    ours, theirs = (log_probabilities(kind, v, temperature) for v in (student, teacher))
    rows = ours.reshape(-1, ours.shape[-1])
    divergence = functional.kl_div(
        rows, theirs.reshape(rows.shape), log_target=True, reduction="batchmean"
    )
    return divergence * temperature**2


def log_probabilities(kind: Kind, answer: Tensor, temperature: float) -> Tensor:
    """Logarithms of the class probabilities, softened by a temperature."""
    import torch

    if kind == "probabilities":
        answer = torch.log(answer.clamp_min(_LEAST_PROBABILITY))
        if temperature == 1.0:
            return answer
    return torch.log_softmax(answer / temperature, -1)


def probabilities(kind: Kind, answer: Tensor) -> Tensor:
    """The class probabilities of an output of classes."""
    import torch

    return torch.softmax(answer, -1) if kind == "logits" else answer


def distance_of(kind: Kind, student: Tensor, teacher: Tensor) -> Tensor:
    """How far the answers are apart, in numbers that no single answer can dominate.

    Total variation of probabilities (0..1), near the share of changed decisions; the KL
    divergence of a few dozen samples hangs on the few rows where a decision flipped.
    """
    if kind == "numbers" or not student.is_floating_point():
        return response_error(kind, student, teacher, 1.0)
    ours, theirs = (probabilities(kind, v) for v in (student, teacher))
    return (ours - theirs).abs().sum(-1).mean() / 2


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error over the teacher's mean square."""
    return (student - teacher).square().mean() / teacher.square().mean().clamp_min(1e-12)
