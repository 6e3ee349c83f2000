"""The twin beside ONNX Runtime, before anything is trained: a training of another graph is none.

What is trained in torch ships in ONNX Runtime. Both follow one specification, which leaves
corners open; where the two do not give the same, the gradients are those of another model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import PassError
from edgec.passes.curriculum import Example
from edgec.passes.execution import open_session, run_feeds
from edgec.passes.matching import is_op
from edgec.passes.stacks import stacked
from edgec.passes.weights import Array

if TYPE_CHECKING:
    from edgec.passes.torch_graph import TorchGraph

_SAMPLES = 4  # at most: zeros in a single answer say little
_FLOAT = 0.01  # relative error (L2) that sums in another order stay far below
_STEPPED = 0.22  # where a value is rounded: single steps that flip, in a deep graph
_ROUNDS = (
    "ArgMax",
    "ArgMin",
    "Ceil",
    "DynamicQuantizeLinear",
    "Floor",
    "QuantizeLinear",
    "Round",
    "Sign",
    "TopK",
)


def how_apart(twin: TorchGraph, model: ir.Model, samples: Sequence[Example]) -> str:
    """In which output the twin of a model differs from ONNX Runtime, in words; empty if in none.

    samples: of the data, the first few of which both are run on. Judged are the outputs of
    floating-point numbers: up to 1 % (L2) is noise; where the graph rounds values, up to 22 %,
    since a step there may flip. ONNX Runtime takes the graph as it is written, not optimized.
    """
    import torch

    names = [str(v.name) for v in model.graph.outputs]
    session = open_session(model, outputs=names, optimized=False)
    allowed = _STEPPED if any(is_op(node, *_ROUNDS) for node in model.graph) else _FLOAT
    errors, sizes = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for sample in samples[:_SAMPLES]:
        expected = run_feeds(session, sample.feeds)
        try:
            with torch.no_grad():
                actual = twin(stacked([sample.feeds]))
        except PassError as error:
            return f"cannot be run: {error}"
        for name, theirs in zip(names, expected, strict=True):
            ours = actual[name]
            if tuple(ours.shape) != theirs.shape:
                shapes = f"{list(ours.shape)}, ONNX Runtime in {list(theirs.shape)}"
                return f"gives output '{name}' in shape {shapes}"
            if theirs.dtype.kind == "f":
                sure = np.isfinite(theirs)
                errors[name] += _energy((ours.double().numpy() - theirs)[sure])
                sizes[name] += _energy(theirs[sure])
    for name in names:
        apart = (errors[name] / max(sizes[name], 1e-12)) ** 0.5
        if not apart <= allowed:
            return (
                f"gives output '{name}' otherwise than ONNX Runtime, {apart:.2g} of its size apart"
            )
    return ""


def _energy(values: Array) -> float:
    return float(np.square(values.astype(np.float64)).sum())
