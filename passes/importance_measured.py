"""How much each unit matters on real inputs: by gradients, or by what its readers see.

Left out: second-order terms, and labels. Both measures use the first calibration samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, Feeds, PassError
from edgec.passes.dimension_groups import Group, Slice
from edgec.passes.execution import run_values
from edgec.passes.importance import Scores
from edgec.passes.matching import is_op

if TYPE_CHECKING:
    from edgec.passes.torch_graph import TorchGraph

Measured = Literal["taylor", "wanda"]
SAMPLES = 64  # of the calibration data, at most


def measured_importance(
    groups: Sequence[Group], model: ir.Model, context: Context, how: Measured
) -> dict[str, Scores]:
    """By group name float64 [units], 0 or more: the lowest matter least.

    taylor: squared first-order change of the outputs, relative to them, if the unit goes: the
    sum of weight times gradient over its weights (Molchanov et al. 2019, arXiv:1906.10771,
    section 3), with a random projection of the outputs in the place of a loss, so that no
    labels are needed.
    wanda: magnitudes of the weights that read the unit, times the root mean square of what they
    read (Sun et al. 2023, arXiv:2306.11695, section 3). Groups that no plain Conv, Gemm or MatMul
    reads are left out.
    Raises PassError without calibration data, or where the graph has no gradients.
    """
    if context.calibration is None or not len(context.calibration):
        raise PassError(
            f"prune-structured: importance '{how}' needs calibration data: give some dozen typical "
            "inputs, or choose l1"
        )
    samples = list(itertools.islice(context.calibration, SAMPLES))
    if how == "wanda":
        return _wanda(groups, model, samples)
    return _taylor(groups, model, samples, context.seed)


def _taylor(
    groups: Sequence[Group], model: ir.Model, samples: Sequence[Feeds], seed: int
) -> dict[str, Scores]:
    import torch

    from edgec.passes.torch_graph import to_torch

    try:
        twin = to_torch(model)
    except PassError as error:
        raise PassError(f"importance 'taylor' needs gradients: {error}; choose l1") from error
    parts = {group.name: _differentiated(group, set(twin.trained())) for group in groups}
    names = sorted({part.name for used in parts.values() for part in used})
    scores = {group.name: np.zeros(group.units) for group in groups if parts[group.name]}
    generator = torch.Generator().manual_seed(seed)
    for feeds in samples if names else ():
        products = _weight_times_gradient(twin, names, feeds, generator)
        for group in groups:
            if group.name in scores:
                change = np.zeros(group.units)
                for part in parts[group.name]:
                    change += _by_unit(_sums(products[part.name], part.axis), part)
                scores[group.name] += np.square(change) / len(samples)
    return scores


def _differentiated(group: Group, trained: set[str]) -> list[Slice]:
    """The weights that read the unit, or those that make it: either tells what it adds."""
    read = [p for p in group.slices if p.role == "consumes" and p.name in trained]
    return read or [p for p in group.slices if p.role == "produces" and p.name in trained]


def _weight_times_gradient(
    twin: TorchGraph, names: Sequence[str], feeds: Feeds, generator: Any
) -> dict[str, np.ndarray[Any, Any]]:
    """By name, for a random direction of the outputs, each scaled to length 1."""
    import torch

    outputs = twin({name: torch.from_numpy(np.array(array)) for name, array in feeds.items()})
    directed = []
    for output in outputs.values():
        if output.is_floating_point() and output.requires_grad:
            direction = torch.randn(output.shape, generator=generator)
            length = output.detach().norm().clamp_min(1e-12)
            directed.append((output * direction).sum() / length)
    parameters = [twin.initializer(name) for name in names]
    gradients = torch.autograd.grad(torch.stack(directed).sum(), parameters, allow_unused=True)
    return {
        name: (parameter.detach() * (0 if gradient is None else gradient)).double().numpy()
        for name, parameter, gradient in zip(names, parameters, gradients, strict=True)
    }


@dataclass(frozen=True, eq=False)
class _Reader:
    """A weight that reads the units, and where: the axis of what the layer is given."""

    part: Slice
    value: str
    axis: int


def _wanda(groups: Sequence[Group], model: ir.Model, samples: Sequence[Feeds]) -> dict[str, Scores]:
    readers = {group.name: list(_readers(group, model)) for group in groups}
    seen = _root_mean_squares(model, [r for used in readers.values() for r in used], samples)
    scores = {group.name: np.zeros(group.units) for group in groups if readers[group.name]}
    for name, used in readers.items():
        for reader in used:
            weight = model.graph.initializers[reader.part.name].const_value
            assert weight is not None  # an initializer has data
            sums = _sums(np.abs(weight.numpy().astype(np.float64)), reader.part.axis)
            scores[name] += _by_unit(sums * seen[reader.value], reader.part)
    return scores


def _readers(group: Group, model: ir.Model) -> Iterator[_Reader]:
    """Plain layers of the main graph: each channel of what they are given has one weight row."""
    for part in group.slices:
        value = model.graph.initializers.get(part.name)
        if part.role != "consumes" or value is None:
            continue
        for node, index in value.uses():
            given = node.inputs[0]
            plain = is_op(node, "MatMul") or (
                is_op(node, "Gemm")
                and not node.attributes.get_int("transA", 0)
                or is_op(node, "Conv")
                and node.attributes.get_int("group", 1) == 1
            )
            if index == 1 and plain and given is not None and node.graph is model.graph:
                yield _Reader(part, str(given.name), 1 if is_op(node, "Conv") else -1)


def _root_mean_squares(
    model: ir.Model, readers: Sequence[_Reader], samples: Sequence[Feeds]
) -> dict[str, Scores]:
    """By value, of each of its channels, over all samples."""
    axes = {reader.value: reader.axis for reader in readers}
    means: dict[str, Scores] = {}
    for values in run_values(model, list(axes), samples) if axes else ():
        for name, axis in axes.items():
            square = np.square(values[name].astype(np.float64))
            channels = _sums(square, axis % square.ndim) / (square.size // square.shape[axis])
            means[name] = means.get(name, 0) + channels / len(samples)
    return {name: np.sqrt(mean) for name, mean in means.items()}


def _sums(array: Scores, axis: int) -> Scores:
    """Over all axes but one."""
    return np.asarray(array.sum(axis=tuple(i for i in range(array.ndim) if i != axis)))


def _by_unit(sums: Scores, part: Slice) -> Scores:
    """Of the positions of a slice's axis, [units]."""
    return np.asarray(sums[part.indices].sum(axis=1))
