"""How much each unit of a group matters, from its weights alone.

Everything that goes with a unit counts: what makes it, in all layers, and what reads it
(group importance of DepGraph, Fang et al. 2023, arXiv:2301.12900, section 3.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from edgec.passes.dimension_groups import Group, Slice
from edgec.passes.weights import Refused

FromWeights = Literal["l1", "l2", "bn-scale", "geometric-median"]
Scores = np.ndarray[Any, np.dtype[np.float64]]


def unit_importance(
    group: Group, weights: Mapping[str, ir.TensorProtocol], how: FromWeights
) -> Scores:
    """float64 [units], 0 or more: the lowest matter least.

    l1, l2: sum of magnitudes, or of squares (Li et al. 2017, arXiv:1608.08710).
    bn-scale: magnitude of the BatchNormalization scales (Liu et al. 2017, arXiv:1708.06519).
    geometric-median: sum of the distances to all other units of what makes a unit, small for one
    that others can replace (He et al. 2019, arXiv:1811.00250).
    weights: all initializers by name. Raises Refused where the group has no such weights.
    """
    if how == "bn-scale":
        used = [part for part in group.slices if part.role == "scales"]
        if not used:
            raise Refused("no BatchNormalization scales it; fuse folds them away")
        return _sums(group, used, weights, power=1)
    if how == "geometric-median":
        made = [part for part in group.slices if part.role == "produces"]
        return _distances(np.concatenate([_rows(part, weights) for part in made], axis=1))
    used = [part for part in group.slices if part.role in ("produces", "consumes")]
    return _sums(group, used, weights, power=1 if how == "l1" else 2)


def _sums(
    group: Group, parts: list[Slice], weights: Mapping[str, ir.TensorProtocol], *, power: int
) -> Scores:
    found = np.zeros(group.units)
    for part in parts:
        array = weights[part.name].numpy().astype(np.float64)
        others = tuple(axis for axis in range(array.ndim) if axis != part.axis)
        found += (np.abs(array) ** power).sum(axis=others)[part.indices].sum(axis=1)
    return found


def _rows(part: Slice, weights: Mapping[str, ir.TensorProtocol]) -> Scores:
    """float64 [units, weights of each]."""
    array = np.moveaxis(weights[part.name].numpy().astype(np.float64), part.axis, 0)
    return array[part.indices].reshape(len(part.indices), -1)


def _distances(rows: Scores) -> Scores:
    squares = (rows * rows).sum(axis=1)
    between = squares[:, None] + squares[None] - 2 * rows @ rows.T
    return np.asarray(np.sqrt(np.maximum(between, 0)).sum(axis=1))
