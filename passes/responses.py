"""How an output of a student is compared with its teacher's: as classes or as numbers.

Classes: KL divergence of probabilities softened by a temperature T, times T^2 (Hinton et al.
2015, arXiv:1503.02531, section 2). Numbers: squared error over the teacher's mean square.
For a judgement, distances that no single answer can dominate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from edgec.passes.matching import is_op

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["probabilities", "logits", "numbers"]

_LEAST_PROBABILITY = 1e-9
_CARRIERS = frozenset(
    {"Cast", "DequantizeLinear", "Flatten", "Identity", "QuantizeLinear", "Reshape", "Squeeze"}
)


def kind_of(output: ir.Value, *, sole: bool = True) -> Kind:
    """How an output is compared: as probabilities, logits or numbers.

    Classes are along the last axis of two and more: of a Softmax or a LogSoftmax over it, and, if
    it is the sole output of floating-point numbers, of a matrix product of rank 2 with its bias.
    `edgec.agreement` judges a build by the same tests.
    """
    shape, node = output.shape, _source(output)
    if node is None or (shape and shape[-1] == 1):  # softmax of one number is always 1
        return "numbers"
    if is_op(node, "Softmax", "LogSoftmax"):
        before = node.outputs[0].shape
        axis = node.attributes.get_int("axis", -1)
        if axis != -1 and (before is None or axis != len(before) - 1):
            return "numbers"
        return "probabilities" if is_op(node, "Softmax") else "logits"
    of_rank_2 = shape is not None and len(shape) == 2
    return "logits" if sole and of_rank_2 and _is_product(node) else "numbers"


def _is_product(node: ir.Node) -> bool:
    """True for a matrix product, also one with a bias, or of integers and scaled back."""
    if not is_op(node, "Add", "Sub"):  # quantize-static subtracts a bias
        return is_op(node, "Gemm", "MatMul")
    for before in (_source(value) for value in node.inputs):
        factors = before.inputs if is_op(before, "Mul") and before is not None else ()
        if is_op(before, "Gemm", "MatMul") or any(
            is_op(_source(factor), "MatMulInteger") for factor in factors
        ):
            return True
    return False


def _source(value: ir.Value | None) -> ir.Node | None:
    """The node that computes the numbers, past operators that only carry or round them."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _CARRIERS:
        value = node.inputs[0]
        node = None if value is None else value.producer()
    return node


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
