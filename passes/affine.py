"""Scalar Mul and Add before a QuantizeLinear, folded into its scale and zero point.

    Q(a*x + b; s, z)  ->  Q(x; s/a, z + b/s)      the DequantizeLinear keeps s and z

The integers are the same if b / s is an integer. Where it nearly is, the rest is left to bias
correction; elsewhere the scale is enlarged a little until it is, or, where that would take
too much, the rest is left all the same: less than half a step, and wrong at padded borders
only. This holds where the affine map cannot be folded into the convolution behind it because
of padding: the padded zero keeps its integer z. A learned affine map around an activation
(PP-LCNet) costs two passes over the tensor otherwise.

Engines that keep one scale per integer tensor (QNN) compute something else: their targets say
``int8.two_scales = false``, and the map stays.

Left out: negative factors, and factors per channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgec.passes.qdq import Parameters, limits
from edgec.passes.weights import constant

_MOST_ENLARGED = 1.0 / 8  # share by which a scale may grow to make b / s an integer
_MOST_REDUCED = 1.0 / 256  # share by which it may shrink: cuts the range by less than a step
_NEGLIGIBLE = 1.0 / 6  # of a step: what may be left to bias correction before a scale grows


@dataclass(frozen=True)
class Affine:
    """value = factor * source + offset, where nothing else reads what lies between."""

    source: ir.Value
    factor: float
    offset: float


def affine_before(value: ir.Value) -> Affine | None:
    """The scalar Mul and Add that end in a value; None if there are none.

    The value itself may have any number of readers: all of them must be quantized.
    """
    found = Affine(value, 1.0, 0.0)
    while True:
        step = _step(found.source)
        if step is None or (found.source is not value and len(found.source.uses()) != 1):
            break
        found = Affine(
            step.source,
            found.factor * step.factor,
            found.offset + found.factor * step.offset,
        )
    return None if found.source is value or found.factor <= 0.0 else found


def folded(affine: Affine, parameters: Parameters) -> tuple[Parameters, Parameters] | None:
    """Parameters of the QuantizeLinear of the source and of the DequantizeLinear behind it.

    None if the zero point of the QuantizeLinear would not fit into its type.
    """
    steps = abs(affine.offset) / parameters.scale
    scale, whole = parameters.scale, round(steps)
    if abs(steps - whole) > _NEGLIGIBLE:
        below = math.floor(steps / (1.0 - _MOST_REDUCED))
        if below and steps / below <= 1.0 + _MOST_ENLARGED:
            scale, whole = abs(affine.offset) / below, below
    shift = whole if affine.offset > 0 else -whole
    after = replace(parameters, scale=float(np.float32(scale)))
    before = Parameters(
        float(np.float32(scale / affine.factor)), after.zero_point + shift, after.dtype
    )
    least, greatest = limits(after.dtype)
    return (before, after) if least <= before.zero_point <= greatest else None


def _step(value: ir.Value) -> Affine | None:
    node = value.producer()
    if node is None or node.domain or node.op_type not in ("Add", "Mul"):
        return None
    if value.is_graph_output():
        return None
    for index in (0, 1):
        array, other = constant(node.inputs[index]), node.inputs[1 - index]
        if array is None or array.size != 1 or array.dtype != np.float32 or other is None:
            continue
        if array.ndim and (other.shape is None or array.ndim > len(other.shape)):
            return None  # the constant might add dimensions
        number = float(array.item())
        return Affine(other, 1.0, number) if node.op_type == "Add" else Affine(other, number, 0.0)
    return None
