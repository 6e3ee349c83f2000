"""Keeps weights that pruning set to zero at zero while a graph is trained.

A zero stays where its gradient is masked, since Adam moves nothing that never had one. Which
zeros pruning made: in a float weight, all; in a quantized one, those that were zero before
the quantization, since small weights round to zero, too.

Left out: pruning further while training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from edgec.passes.weights import constant, label

if TYPE_CHECKING:
    from torch import Tensor

    from edgec.passes.torch_graph import TorchGraph

_WEIGHT = 1  # input of Conv, Gemm and MatMul


def keep_zeros(twin: TorchGraph, model: ir.Model, unquantized: ir.Model | None) -> int:
    """Mask the gradients of the twin's pruned weights; the number of weights that stay zero.

    model: the graph of the twin. unquantized: the graph before it was quantized, if it was.
    """
    import torch

    trained = set(twin.trained())
    before = {} if unquantized is None else {label(node): node for node in unquantized.graph}
    kept = 0
    for node in model.graph:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        value = _initializer(node)
        if value is None or value.name not in trained:
            continue
        trained.discard(str(value.name))  # a weight that nodes share is masked once
        parameter = twin.initializer(str(value.name))
        zeros = parameter.detach().numpy() == 0
        if value is not node.inputs[_WEIGHT]:  # integers
            original = before.get(label(node))
            floats = None if original is None else constant(original.inputs[_WEIGHT])
            if floats is None or floats.shape != zeros.shape:
                continue
            zeros &= floats == 0
        if zeros.any() and not zeros.all():  # a weight of nothing but zeros was not pruned
            parameter.register_hook(_masked(torch.from_numpy(~zeros)))  # type: ignore[no-untyped-call]
            kept += int(zeros.sum())
    return kept


def _initializer(node: ir.Node) -> ir.Value | None:
    """The initializer that holds a layer's weight, maybe behind a DequantizeLinear."""
    value = node.inputs[_WEIGHT]
    source = None if value is None else value.producer()
    if source is not None and source.op_type == "DequantizeLinear":
        value = source.inputs[0]
    return value if value is not None and value.is_initializer() else None


def _masked(mask: Tensor) -> Any:
    def hook(gradient: Tensor) -> Tensor:
        return gradient * mask

    return hook
