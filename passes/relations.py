"""How samples relate to each other in a graph's eyes: distances and angles between them.

Relational knowledge distillation (Park et al. 2019, arXiv:1904.05068, section 3.2): the
student need not give each sample the teacher's numbers, only the teacher's picture of which
samples are near each other and in which corner of a triangle. So the widths of the two may
differ, without a projection.

Left out: relations of more than three samples, and weights per pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from torch import Tensor

_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_SAME_NUMBERS = frozenset(
    {"DequantizeLinear", "Flatten", "Identity", "QuantizeLinear", "Reshape", "Squeeze"}
)
_TINY = 1e-6  # of the mean square: squares below are rounding errors of equal samples


def last_layer_inputs(model: ir.Model) -> tuple[str, ...]:
    """Names of the value that the last matrix product or convolution reads, nearest first.

    Several, because reshapes and Q/DQ pairs give the same numbers other names. Empty if no
    such layer lies before the first output.
    """
    node = model.graph.outputs[0].producer()
    while node is not None and node.op_type not in _PRODUCTS:
        node = _before(node)
    names: list[str] = []
    value = None if node is None else node.inputs[0]
    while value is not None:
        names.append(str(value.name))
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in _SAME_NUMBERS else None
    return tuple(names)


def relation_errors(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Distance-wise and angle-wise loss between two values of the same samples.

    student, teacher: [n, ...] with n >= 3, of any widths. Huber loss of the distances over
    their mean, and of the cosines at every corner of every triangle of samples.
    """
    import torch.nn.functional as functional

    ours, theirs = _relations(student), _relations(teacher)
    distance, angle = (functional.smooth_l1_loss(a, b) for a, b in zip(ours, theirs, strict=True))
    return distance, angle


def _relations(value: Tensor) -> tuple[Tensor, Tensor]:
    """Distances [n, n] over their mean, cosines [n, n, n] at the first of three samples."""
    import torch

    rows = value.reshape(len(value), -1)
    rows = rows - rows.mean(0)  # nearer to zero, where float32 is finer
    products = rows @ rows.T
    squares = products.diagonal()
    squared = squares[:, None] + squares - 2 * products
    least = (_TINY * squares.detach().mean()).clamp_min(1e-12)
    apart = squared.clamp_min(least).sqrt()
    others = ~torch.eye(len(rows), dtype=torch.bool)
    # (x_i - x_j) . (x_k - x_j) by products alone: [j, i, k]
    corners = products - products[:, :, None] - products[:, None, :] + squares[:, None, None]
    cosines = corners / (apart[:, :, None] * apart[:, None, :])
    distinct = others[:, :, None] & others[:, None, :]
    return apart[others] / apart[others].mean(), cosines[distinct]


def _before(node: ir.Node) -> ir.Node | None:
    """The node that computes what this one works on: its first input that is computed."""
    for value in node.inputs:
        if value is not None and value.producer() is not None:
            return value.producer()
    return None
