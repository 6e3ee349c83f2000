"""Writes HardSwish between two quantizations in operators that run in integers.

    Q(HardSwish(x))  ->  h = Q(x + 3; 6/255, 0),  Q(x * h; as before)     h is read in 1/255

HardSwish is x clip(x + 3, 0, 6) / 6. ONNX Runtime has no integer kernel for it and makes
four passes over float32; it has one for sums, one for products, and a sum that saturates at
0 and 255 is clipped. Measured on 230,400 values, one thread: 355 us in float, 133 us so, and
from 0.75 to 0.62 of the float32 time for a whole text recogniser. The gate h has 8 bits, more
than a product that is rounded to 8 bits can show: 3 % of the results differ, by one step.

Left out: HardSigmoid with another slope, and SiLU, whose Sigmoid is a table look-up that
takes as long as float32 arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.passes.matching import add_initializer, insert, is_op, remove_unused, sole_user
from edgec.passes.weights import constant, graph_of

_STEPS = 255  # of the gate, from 0 to 1
_OFFSET, _WIDTH = 3.0, 6.0  # clip(x + 3, 0, 6) / 6


def quantize_gates(nodes: Iterable[ir.Node]) -> int:
    """Rewrite each HardSwish among the nodes that is between quantizations per tensor.

    Returns the count of them.
    """
    changed = 0
    for node in list(nodes):
        if not is_op(node, "HardSwish") or node.inputs[0] is None:
            continue
        dequantize, quantize = node.inputs[0].producer(), sole_user(node.outputs[0])
        if quantize is None or not is_op(quantize, "QuantizeLinear"):
            continue
        dtypes = {_dtype(quantize), None if dequantize is None else _dtype(dequantize)}
        if not is_op(dequantize, "DequantizeLinear") or len(dtypes) != 1 or None in dtypes:
            continue
        _rewrite(graph_of(node), node)
        changed += 1
    return changed


def _dtype(node: ir.Node) -> np.dtype[Any] | None:
    """The 8-bit type of a quantization per tensor; None for any other."""
    scale, zero = (constant(v) for v in (node.inputs[1:3] if len(node.inputs) > 2 else (None,) * 2))
    if scale is None or zero is None or scale.size != 1 or zero.dtype not in (np.uint8, np.int8):
        return None
    return np.dtype(zero.dtype)


def _rewrite(graph: ir.Graph, swish: ir.Node) -> None:
    x, result = swish.inputs[0], swish.outputs[0]
    quantize = sole_user(result)
    dtype = None if quantize is None else _dtype(quantize)
    assert x is not None and dtype is not None  # checked before
    least = np.array(np.iinfo(dtype).min, dtype)
    name = str(result.name)

    def scale(part: str, number: float) -> ir.Value:
        return add_initializer(graph, f"{name}_{part}_scale", np.array(number, np.float32))

    def step(op_type: str, inputs: list[ir.Value | None], part: str) -> ir.Value:
        node = insert(swish, op_type, inputs)
        value = node.outputs[0]
        node.name = value.name = f"{name}_{part}"
        value.shape, value.type = x.shape, x.type
        return value

    zero = add_initializer(graph, f"{name}_gate_zero_point", least)
    one = add_initializer(graph, f"{name}_offset_quantized", least + dtype.type(1))
    offset = step("DequantizeLinear", [one, scale("offset", _OFFSET), zero], "offset")
    offset.shape = ir.Shape([])
    shifted = step("Add", [x, offset], "shifted")
    gate = step("QuantizeLinear", [shifted, scale("gate", _WIDTH / _STEPS), zero], "gate_quantized")
    gate.type = zero.type
    share = step("DequantizeLinear", [gate, scale("share", 1 / _STEPS), zero], "gate")
    product = step("Mul", [x, share], "product")
    product.name, result.name = name, None
    ir.convenience.replace_all_uses_with(result, product)
    remove_unused(swish)
