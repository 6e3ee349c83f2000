"""The groups of a graph: dimensions that can be cut, and everything that goes with them.

A group is an atom of ``dimensions`` that nothing froze and that a weight makes. Where two atoms
share an axis as factors (heads and the width of a head, groups of a Conv and the channels of
each), the outer one is the group and the inner one stays whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from edgec.passes.cleanup_shapes import refresh_shapes
from edgec.passes.contract import Skip
from edgec.passes.coupling_layers import LAYERS
from edgec.passes.coupling_shapes import SHAPES
from edgec.passes.couplings import Axes, Role
from edgec.passes.dimensions import Dim, Form, atoms, find, freeze, labels, squared
from edgec.passes.weights import label

Kind = Literal["channel", "head", "hidden"]
Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Slice:
    """What a group holds of an axis of a tensor.

    role: produces (makes the units), consumes (sums over them), scales (of a norm), follows.
    indices: int64 [units, positions of each].
    """

    name: str
    axis: int
    role: Literal["produces", "consumes", "scales", "follows"]
    indices: Indices


@dataclass(frozen=True, eq=False)
class Length:
    """A number in the graph that is the length of a dimension with units of a group.

    node: name of its first output. path, position: as in ``couplings.Number``.
    indices: int64 [units, positions of each] of 0..length.
    """

    node: str
    path: tuple[int | str, ...]
    position: int
    length: int
    indices: Indices


@dataclass(frozen=True, eq=False)
class Group:
    """Indices of many axes that can only be cut together.

    name: of the node that makes the units first. layers: all nodes that make them.
    kind: head (of attention), channel (of convolutions), hidden (of dense and recurrent layers).
    units: how many there are.
    slices: initializers. shapes: values that are computed. lengths: numbers to be rewritten.
    mixed: why cutting a unit without weight changes those left; empty where it does not.
    least: units that have to stay: 2 where a Squeeze without axes would drop an axis of one.
    """

    name: str
    layers: tuple[str, ...]
    kind: Kind
    units: int
    slices: tuple[Slice, ...]
    shapes: tuple[Slice, ...]
    lengths: tuple[Length, ...]
    mixed: str = ""
    least: int = 1


@dataclass(frozen=True)
class Groups:
    """What can be cut of a model, in the order of its nodes, and what cannot."""

    found: tuple[Group, ...]
    skipped: tuple[Skip, ...]


def coupled_groups(model: ir.Model) -> Groups:
    """The groups of a model of standard ONNX, and the layers that no group is in.

    The model is left as it is; names in the groups are its names.
    """
    work = model.clone()
    refresh_shapes(work)
    axes = Axes({**SHAPES, **LAYERS})
    axes.visit(work)
    _freeze_unclear(axes)
    return _Collector(axes).groups()


def _freeze_unclear(axes: Axes) -> None:
    for value, dims in axes.values().items():
        for dim in dims:
            for atom in squared(dim):
                freeze(atom, Skip(str(value.name), "it multiplies the dimension with itself"))
    for number, dim in axes.numbers.items():
        if dim.size is None:
            freeze(dim, Skip(label(number.node), "it writes down a size that is not known"))


class _Collector:
    """Sorts the axes of a model by the atoms that they consist of."""

    def __init__(self, axes: Axes) -> None:
        self._axes = axes
        self._layers: dict[Dim, list[Role]] = {}  # in the order of the nodes
        for (value, axis), role in axes.roles.items():
            if role.does == "produces":
                for atom in atoms(axes.of(value)[axis]):
                    self._layers.setdefault(atom, []).append(role)
        chosen = [a for a in self._layers if a.frozen is None and (a.size or 0) > 1]
        inner = {
            atom
            for value, dims in axes.values().items()
            if value.is_initializer()
            for dim in dims
            for atom in _inner(dim, set(chosen))
        }
        # in the order of the nodes, as keys: looked up often
        self._chosen = dict.fromkeys(atom for atom in chosen if atom not in inner)
        self._indices: dict[tuple[Dim, Dim], Indices] = {}

    def groups(self) -> Groups:
        slices: dict[Dim, list[Slice]] = {atom: [] for atom in self._chosen}
        shapes: dict[Dim, list[Slice]] = {atom: [] for atom in self._chosen}
        lengths: dict[Dim, list[Length]] = {atom: [] for atom in self._chosen}
        for value, dims in self._axes.values().items():
            for axis, dim in enumerate(dims):
                role = self._axes.roles.get((value, axis))
                found = slices if value.is_initializer() else shapes
                for atom, indices in self._parts(dim):
                    does = "follows" if role is None else role.does
                    found[atom].append(Slice(str(value.name), axis, does, indices))
        for number, dim in self._axes.numbers.items():
            name = str(number.node.outputs[0].name)
            for atom, indices in self._parts(dim):
                size = dim.size or 0
                length = Length(name, number.path, number.position, size, indices)
                lengths[atom].append(length)
        names = _unique([label(self._layers[atom][0].node) for atom in self._chosen])
        found_groups = tuple(
            Group(
                name,
                tuple(dict.fromkeys(label(role.node) for role in self._layers[atom])),
                self._kind(atom),
                atom.size or 0,
                tuple(slices[atom]),
                tuple(shapes[atom]),
                tuple(lengths[atom]),
                "" if atom.mixed is None else f"{atom.mixed.reason} ('{atom.mixed.node}')",
                atom.least,
            )
            for name, atom in zip(names, self._chosen, strict=True)
        )
        return Groups(found_groups, tuple(self._skipped()))

    def _parts(self, dim: Dim) -> Iterator[tuple[Dim, Indices]]:
        """The chosen atoms of a dimension of known size, and the positions of their units."""
        if dim.size is None:
            return
        root = find(dim)
        for atom in dict.fromkeys(atoms(root)):
            if atom in self._chosen:
                if (root, atom) not in self._indices:
                    self._indices[root, atom] = _positions(root, atom)
                yield atom, self._indices[root, atom]

    def _kind(self, atom: Dim) -> Kind:
        if atom.heads:
            return "head"
        convolves = any(role.node.op_type.startswith("Conv") for role in self._layers[atom])
        return "channel" if convolves else "hidden"

    def _skipped(self) -> Iterator[Skip]:
        """Layers whose outputs are in no group, each once."""
        seen: set[ir.Node] = set()
        for (value, axis), role in self._axes.roles.items():
            inside = list(atoms(self._axes.of(value)[axis]))
            if role.does != "produces" or role.node in seen:
                continue
            seen.add(role.node)
            if any(atom in self._chosen for atom in inside):
                continue
            frozen = [atom for atom in inside if atom.frozen is not None]
            why = max(frozen, key=lambda atom: atom.size or 0).frozen if frozen else None
            if why is not None:
                yield Skip(label(role.node), f"its outputs stay: {why.reason} ('{why.node}')")


def _inner(dim: Dim, candidates: set[Dim]) -> Iterator[Dim]:
    """Candidates that lie within another one: later factors of a product."""
    dim = find(dim)
    if dim.form is Form.PRODUCT:
        holds = [any(atom in candidates for atom in atoms(part)) for part in dim.parts]
        if any(holds):
            for part in dim.parts[holds.index(True) + 1 :]:
                yield from atoms(part)
    for part in dim.parts:
        yield from _inner(part, candidates)


def _positions(dim: Dim, atom: Dim) -> Indices:
    """int64 [units, positions of each], in order."""
    units = labels(dim, atom)
    places = np.flatnonzero(units >= 0)
    order = np.argsort(units[places], kind="stable")
    return places[order].reshape(atom.size or 0, -1)


def _unique(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that came before."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return result
