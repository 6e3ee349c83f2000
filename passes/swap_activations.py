"""Puts ReLU6 in the place of smooth activations that int8 kernels lack. Lossy, before training.

    HardSwish(x)            -> Clip(x, 0, 6)
    x * HardSigmoid(x)      -> Clip(x, 0, 6)     slope 1/6, offset 1/2: HardSwish written out
    x * Sigmoid(x)          -> Clip(x, 0, 6)     SiLU

Behind a quantized convolution ReLU6 costs nothing, since it is the range of its output
(Jacob et al. 2018, arXiv:1712.05877, section 2.4); HardSwish and SiLU become float islands
or several integer operators that take more time than the convolution saves. Up to 6 they lie
within 0.38 of ReLU6; what the swap costs in accuracy is to be won back by ``recover`` with
weights trained (``rate`` above 0).

Left out: Gelu, whose networks spend their time in matrix products, and other replacements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, Result, Skip, Stage
from edgec.passes.matching import add_initializer, insert, is_op, other_input, take_over
from edgec.passes.weights import check_skip, label

_HIGHEST = 6.0
_LEAST_OPSET = 11  # Clip with its bounds as inputs


@dataclass(frozen=True)
class SwapActivations:
    """Replace HardSwish and SiLU by ReLU6; ``recover`` behind it trains the weights to that."""

    name: ClassVar[str] = "swap-activations"
    stage: ClassVar[Stage] = Stage.PRUNE
    lossless: ClassVar[bool] = False
    version: ClassVar[int] = 1

    skip: tuple[str, ...] = ()  # names of nodes to leave alone: the HardSwish, or the product

    def run(self, model: ir.Model, context: Context) -> Result:
        """Swap; ``changed`` counts the activations that became ReLU6."""
        nodes = list(model.graph.all_nodes())
        check_skip(self.name, self.skip, nodes)
        opset = model.opset_imports.get("", 0)
        skipped: list[Skip] = []
        touched: list[str] = []
        for node in nodes:
            x = _smooth_input(node)
            if x is None:
                continue
            reason = _refusal(node, x, opset, self.skip)
            if reason:
                skipped.append(Skip(label(node), reason))
                continue
            touched.append(str(node.outputs[0].name))
            _swap(node, x)
        return Result(model, len(touched), tuple(skipped), tuple(touched))


def _smooth_input(node: ir.Node) -> ir.Value | None:
    """x where the node gives HardSwish or SiLU of x."""
    if is_op(node, "HardSwish"):
        return node.inputs[0]
    if not is_op(node, "Mul"):
        return None
    for value in node.inputs:
        gate = None if value is None else value.producer()
        if value is None or gate is None or not _is_gate(gate):
            continue
        x = gate.inputs[0]
        if x is not None and other_input(node, value) is x:
            return x
    return None


def _is_gate(node: ir.Node) -> bool:
    """True for the factor that makes SiLU or HardSwish of x."""
    if is_op(node, "Sigmoid"):
        return True
    alpha = node.attributes.get_float("alpha", 0.2)
    beta = node.attributes.get_float("beta", 0.5)
    return is_op(node, "HardSigmoid") and math.isclose(alpha, 1 / 6, rel_tol=1e-5) and beta == 0.5


def _refusal(node: ir.Node, x: ir.Value, opset: int, skip: tuple[str, ...]) -> str:
    """Why an activation stays; empty if it does not."""
    if label(node) in skip:
        return "named in skip"
    if opset < _LEAST_OPSET:
        return f"opset {opset} has no Clip with bounds as inputs; {_LEAST_OPSET} is needed"
    if x.dtype != ir.DataType.FLOAT:
        return f"its input is {x.dtype}, not float32"
    return ""


def _swap(node: ir.Node, x: ir.Value) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    name = node.outputs[0].name
    bounds = [
        add_initializer(graph, f"{name}_{side}", np.array(bound, np.float32))
        for side, bound in (("low", 0.0), ("high", _HIGHEST))
    ]
    clip = insert(node, "Clip", [x, *bounds])
    clip.name = f"{label(node)}_relu6" if node.name else None
    take_over(node.outputs[0], clip.outputs[0])
