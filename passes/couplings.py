"""Follows the dimensions of every value of a graph: which axes are one, and which stay.

Nodes are visited in order. A rule for each operator (``coupling_layers``, ``coupling_shapes``)
ties the dimensions of its inputs and says what its outputs consist of; an operator without a
rule, an input or output of a graph and a branch's result freeze what they touch, with the
reason. Numbers in the graph that state a dimension (a Reshape's sizes, a Conv's groups) are
noted, since they have to follow. A length that a node takes as a number, to calculate with it or to
count positions, stays: it would be another number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from edgec.passes.contract import Skip
from edgec.passes.dimensions import Clash, Dim, atoms, find, freeze, tie
from edgec.passes.matching import is_op
from edgec.passes.weights import Array, Refused, constant, label

OPEN = "its size is known at run time only"
_NEWEST = 1 << 31  # opset of a model that names none

Does = Literal["produces", "consumes", "scales"]
# what the outputs consist of: None for an axis of its own, that nothing may cut
Shape = Sequence[Dim | None]
Rule = Callable[["Axes", ir.Node], Sequence[Shape]]


@dataclass(frozen=True)
class Number:
    """A number in the graph that states the length of a dimension.

    path: the node's input, then the inputs of what computes it, down to a constant; or the name
    of an attribute of the node. position: in that list of numbers.
    """

    node: ir.Node
    path: tuple[int | str, ...]
    position: int


@dataclass(frozen=True)
class Role:
    """What an axis of an initializer does in a layer."""

    node: ir.Node
    does: Does


@dataclass(frozen=True)
class _Entry:
    """One number of a list of sizes, and the way to it where it is a constant."""

    what: int | Dim | None
    path: tuple[int, ...] = ()
    position: int = 0

    def through(self, index: int) -> _Entry:
        """The same number, seen by who reads it from input ``index``."""
        return _Entry(self.what, (index, *self.path), self.position)


class Axes:
    """The dimensions of all values of a graph, tied as far as its nodes were visited."""

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        """rules: by operator of standard ONNX."""
        self._rules = rules
        self.opset = _NEWEST  # of the model that is visited
        self._dims: dict[ir.Value, tuple[Dim, ...]] = {}
        self._symbols: dict[str, Dim] = {}
        self.numbers: dict[Number, Dim] = {}
        self.roles: dict[tuple[ir.Value, int], Role] = {}

    def visit(self, model: ir.Model) -> None:
        """Follow all nodes of the model, those of branches and bodies included."""
        self.opset = model.opset_imports.get("", _NEWEST)
        for value in model.graph.inputs:
            self._freeze_value(value, Skip(str(value.name), "it is an input of the model"))
        for node in model.graph.all_nodes():
            for graph in _inner_graphs(node):
                for value in graph.inputs:
                    self._freeze_value(value, Skip(label(node), "a loop hands it over"))
            self._visit(node)
        for value in model.graph.outputs:
            why = Skip(str(value.name), "it is an output of the model")
            self._freeze_value(value, why)
            self._freeze_lengths(value, why)
        for node in model.graph.all_nodes():
            for graph in _inner_graphs(node):
                for value in graph.outputs:
                    why = Skip(label(node), "a branch or loop returns it")
                    self._freeze_value(value, why)
                    self._freeze_lengths(value, why)

    def values(self) -> Mapping[ir.Value, tuple[Dim, ...]]:
        """The dimensions of every value whose rank is known."""
        return self._dims

    def of(self, value: ir.Value | None) -> tuple[Dim, ...]:
        """The dimensions of a value. Raises Refused if it is missing or its rank unknown."""
        if value is None:
            raise Refused("an input is missing")
        if value not in self._dims:
            shape = value.shape
            if value.const_value is not None:
                shape = value.const_value.shape  # type: ignore[assignment]
            if shape is None:
                raise Refused(f"the shape of '{value.name}' is unknown")
            self._dims[value] = tuple(self._dim(value, size) for size in shape)
        return self._dims[value]

    def inputs(self, node: ir.Node) -> list[tuple[Dim, ...]]:
        """The dimensions of all inputs that are given."""
        return [self.of(value) for value in node.inputs if value is not None]

    def tie(self, node: ir.Node, first: Dim, second: Dim) -> None:
        """Make two dimensions one; if they cannot be, neither may be cut."""
        try:
            tie(first, second)
        except Clash as clash:
            for dim in (first, second):
                self.freeze(node, dim, clash.reason)

    def freeze(self, node: ir.Node, dim: Dim, reason: str) -> None:
        """Nothing of the dimension may be cut, because of this node."""
        freeze(dim, Skip(label(node), f"{node.op_type}: {reason}"))

    def mix(self, node: ir.Node, dim: Dim) -> None:
        """The node takes all units of the dimension together: a mean or a norm over them."""
        for atom in atoms(dim):
            atom.mixed = atom.mixed or Skip(
                label(node), f"{node.op_type} takes its mean over them, so those left change, too"
            )

    def layer(self, node: ir.Node, index: int, axis: int, does: Does) -> None:
        """Say what an axis of an input does in the node, if the input is a weight."""
        value = node.inputs[index]
        source = _source(value, axis % len(self.of(value)))
        if source is not None:
            self.roles.setdefault(source, Role(node, does))

    def heads(self, dim: Dim) -> None:
        """There is one matrix product of computed operands for each unit of the dimension."""
        for atom in atoms(dim):
            atom.heads = True

    def stays_an_axis(self, dim: Dim) -> None:
        """A node drops axes of length 1: two units stay of each dimension that is longer."""
        for atom in atoms(dim):
            atom.least = min(2, atom.size or 1)

    def number(self, node: ir.Node, index: int | str, position: int, dim: Dim) -> None:
        """Note a number of the node, in an input or an attribute, that states this length."""
        if isinstance(index, str):
            self.numbers[Number(node, (index,), position)] = dim
        else:
            entry = self._entries(node.inputs[index])[position].through(index)
            self.numbers[Number(node, entry.path, entry.position)] = dim

    def entries(self, node: ir.Node, index: int) -> list[int | Dim | None]:
        """The numbers of a list of sizes: constants, dimensions taken by Shape, or unknown."""
        value = node.inputs[index] if index < len(node.inputs) else None
        return [entry.what for entry in self._entries(value)]

    def _visit(self, node: ir.Node) -> None:
        rule = self._rules.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        self._freeze_numbers(node)
        try:
            if rule is None:
                raise Refused("it is not followed")
            for value, dims in zip(node.outputs, rule(self, node), strict=False):
                self._give(node, value, dims)
        except Refused as refused:
            why = Skip(label(node), f"{node.op_type}: {refused}")
            for touched in (*node.inputs, *node.outputs):
                if touched is not None:
                    self._freeze_value(touched, why)
                    self._freeze_lengths(touched, why)

    def _give(self, node: ir.Node, value: ir.Value, dims: Shape) -> None:
        """Let an output consist of these dimensions, as far as its inferred shape agrees."""
        shape = value.shape
        if shape is not None and len(shape) != len(dims):
            raise Refused(f"'{value.name}' was inferred with {len(shape)} dimensions")
        given = []
        for axis, dim in enumerate(dims):
            size = None if shape is None else shape[axis]
            if dim is None:
                dim = Dim(size if isinstance(size, int) else None)
                freeze(dim, Skip(label(node), f"{node.op_type}: it computes the size"))
            elif isinstance(size, int) and dim.size != size:
                self.freeze(node, dim, f"its output has {size} positions in that place")
                dim = Dim(size)
                self.freeze(node, dim, "the size depends on the data")
            given.append(dim)
        self._dims[value] = tuple(given)

    def _freeze_value(self, value: ir.Value, why: Skip) -> None:
        if value in self._dims or value.shape is not None or value.const_value is not None:
            for dim in self.of(value):
                freeze(dim, why)

    def _freeze_numbers(self, node: ir.Node) -> None:
        """Lengths that the node takes as numbers stay, those that it hands on follow."""
        for index, value in enumerate(node.inputs):
            if value is not None and not _follows(node, index):
                why = Skip(label(node), f"{node.op_type}: its length is calculated with")
                self._freeze_lengths(value, why)

    def _freeze_lengths(self, value: ir.Value, why: Skip) -> None:
        """Freeze the dimensions whose lengths a value holds."""
        if not _holds_lengths(value):
            return
        try:
            found = [entry.what for entry in self._entries(value)]
        except Refused:  # which of them is not known
            for source in _sources(value):
                self._freeze_lengths(source, why)
            return
        for dim in found:
            if isinstance(dim, Dim):
                freeze(dim, why)

    def _dim(self, value: ir.Value, size: object) -> Dim:
        if isinstance(size, int):
            return Dim(size)
        name = size.value if isinstance(size, ir.SymbolicDim) else None
        why = Skip(str(value.name), OPEN)
        return Dim(None, why) if name is None else self._symbols.setdefault(name, Dim(None, why))

    def _entries(self, value: ir.Value | None) -> list[_Entry]:
        array = constant(value)
        node = None if value is None else value.producer()
        if array is not None:
            # a Constant node or a transposed one is no initializer that could be rewritten
            held = value is not None and value.is_initializer()
            numbers = [int(number) for number in array.reshape(-1)]
            return [_Entry(n if held else None, (), i) for i, n in enumerate(numbers)]
        if node is None or node.domain not in ("", "ai.onnx"):
            return self._unknown(value)
        if node.op_type == "Shape":
            dims = self.of(node.inputs[0])
            last = node.attributes.get_int("end", len(dims))
            return [_Entry(dim) for dim in dims[node.attributes.get_int("start", 0) : last]]
        parts = [(i, self._entries(node.inputs[i])) for i in _handed_on(node)]
        found = [entry.through(i) for i, part in parts for entry in part]
        operands = [constant(operand) for operand in node.inputs[1:]]
        if parts and node.op_type == "Gather":
            chosen = [int(i) for i in _array(operands[0]).reshape(-1)]
            return [found[i] for i in chosen if -len(found) <= i < len(found)]
        if parts and node.op_type == "Slice":
            start, end, step = (
                int(_array(operands[i]).item()) if i < len(operands) else 1 for i in (0, 1, 3)
            )
            return found[start:end:step]
        if parts:
            return found
        return self._unknown(value)

    def _unknown(self, value: ir.Value | None) -> list[_Entry]:
        sizes = [dim.size for dim in self.of(value)] or [1]
        if len(sizes) > 1 or sizes[0] is None:
            raise Refused("a list of sizes is computed at run time")
        return [_Entry(None)] * sizes[0]


_SAME_NUMBERS = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")
# inputs of which the rules follow a length, or that are looked at for their shape alone
_FOLLOWED = {"ConstantOfShape": 0, "Expand": 1, "Reshape": 1, "Resize": 3, "Shape": 0, "Size": 0}


def _handed_on(node: ir.Node) -> Sequence[int]:
    """The inputs whose numbers are those of the output, all or some that are known which."""
    if is_op(node, *_SAME_NUMBERS):
        return (0,)
    if is_op(node, "Concat"):
        return range(len(node.inputs))
    chosen = [constant(value) for value in node.inputs[1:]]
    known = bool(chosen) and all(array is not None for array in chosen)
    return (0,) if is_op(node, "Gather", "Slice") and known else ()


def _follows(node: ir.Node, index: int) -> bool:
    """True if lengths that the node reads there are not calculated with."""
    own = is_op(node, *_FOLLOWED) and _FOLLOWED[node.op_type] == index
    return own or index in _handed_on(node)


def _sources(value: ir.Value) -> list[ir.Value]:
    """The values whose numbers this one holds."""
    node = value.producer()
    given = [] if node is None else [node.inputs[index] for index in _handed_on(node)]
    return [source for source in given if source is not None]


def _holds_lengths(value: ir.Value) -> bool:
    """True if a value holds sizes that Shape took of another one."""
    return is_op(value.producer(), "Shape") or any(map(_holds_lengths, _sources(value)))


def _array(found: Array | None) -> Array:
    assert found is not None  # _handed_on has seen to it
    return found


def _inner_graphs(node: ir.Node) -> list[ir.Graph]:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type is kinds[0]:
            found.append(attribute.as_graph())
        elif attribute.type is kinds[1]:
            found.extend(attribute.as_graphs())
    return found


def _source(value: ir.Value | None, axis: int) -> tuple[ir.Value, int] | None:
    """The initializer, and its axis, behind a value that is only stored in another way."""
    if value is None:
        return None
    if value.is_initializer() and not value.is_graph_input():
        return value, axis
    node = value.producer()
    if node is None or node.domain:
        return None
    if node.op_type in ("Cast", "DequantizeLinear", "Identity"):
        return _source(node.inputs[0], axis)
    if node.op_type == "Transpose":
        order = node.attributes.get("perm")
        rank = None if value.shape is None else len(value.shape)
        if order is not None:
            return _source(node.inputs[0], int(order.as_ints()[axis]))
        return None if rank is None else _source(node.inputs[0], rank - 1 - axis)
    return None


def is_same(first: Dim, second: Dim) -> bool:
    """True if two dimensions were found to be one."""
    return find(first) is find(second)
