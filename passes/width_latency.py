"""The latency of a model at other widths: the sum over its operators, from a table.

Sizes are taken from one run of the model. Where a group loses units, every size that holds them
shrinks: of tensors, in attributes, in lists of sizes. So an operator can be asked for at any
widths, and is measured when it is first needed.

Not counted: what moves no numbers (Reshape and the like), what ONNX Runtime computes inside of
the convolution before it (activations, a residual sum: it has kernels for both), branches and
loops. Fusions of more than two operators are counted as if they were none. So the sum has an
error, which is to be measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Feeds
from edgec.passes.dimension_groups import Group
from edgec.passes.execution import run_values
from edgec.passes.latency_table import LatencyTable
from edgec.passes.operator_latency import Operand, Operator
from edgec.passes.placement import place
from edgec.passes.weights import constant
from edgec.targets.schema import Int8

Widths = Mapping[str, int]  # group -> units that it has lost; negative: units more than now

_FREE = frozenset("Constant Dropout Flatten Identity Reshape Shape Size Squeeze Unsqueeze".split())
_INSIDE_CONV = frozenset("Clip HardSigmoid LeakyRelu Relu Sigmoid Tanh".split())
_KEPT = 4096  # numbers of an integer tensor that are kept: sizes, indices


@dataclass(frozen=True)
class _Size:
    """Where units of a group are: so many positions of each, along an axis or in a number."""

    group: str
    positions: int


class WidthLatency:
    """Predicts latencies of one model whose groups have other widths."""

    def __init__(
        self,
        model: ir.Model,
        groups: Sequence[Group],
        feeds: Feeds,
        table: LatencyTable,
        integers: Int8 | None = None,
    ) -> None:
        """feeds: what the model is run with. integers: the scheme of quantize-static behind it.

        Without a scheme operators are measured as they are. Raises PassError if the model cannot
        be run on the feeds.
        """
        self._table, self._integers = table, integers
        self._opset = model.opset_imports.get("", 0)
        self._arrays = _run(model, feeds)
        self._quantized, inside = _forms(model.graph, integers)
        self._nodes = [node for node in model.graph if self._counts(node) and node not in inside]
        self._axes: dict[tuple[str, int], list[_Size]] = {}
        self._numbers: dict[str, list[tuple[tuple[int | str, ...], int, _Size]]] = {}
        for group in groups:
            for part in (*group.slices, *group.shapes):
                size = _Size(group.name, part.indices.shape[1])
                self._axes.setdefault((part.name, part.axis), []).append(size)
            for length in group.lengths:
                size = _Size(group.name, length.indices.shape[1])
                entry = (length.path, length.position, size)
                self._numbers.setdefault(length.node, []).append(entry)
        self._groups = {node: tuple(dict.fromkeys(self._touching(node))) for node in self._nodes}
        self._known: dict[tuple[ir.Node, tuple[int, ...]], float] = {}
        self.left_out: dict[str, None] = {}  # operators that cannot be measured by themselves

    def milliseconds(self, asked: Sequence[tuple[str | None, Widths]]) -> list[float]:
        """The latency of the operators that a group's width is in, or of all (None), at widths.

        Everything that has to be measured for all of the answers takes turns.
        """
        wanted = [(self._of(group), widths) for group, widths in asked]
        missing: dict[tuple[ir.Node, tuple[int, ...]], Operator] = {}
        for nodes, widths in wanted:
            for node in nodes:
                key = self._key(node, widths)
                if key not in self._known and key not in missing:
                    operator = self._operator(node, widths)
                    if operator is None:
                        self._leave_out(key)
                    else:
                        missing[key] = operator
        taken = self._table.milliseconds(list(missing.values()))
        for key, latency in zip(missing, taken, strict=True):
            if latency is None:
                self._leave_out(key)
            else:
                self._known[key] = latency
        return [
            sum(self._known[self._key(node, widths)] for node in nodes) for nodes, widths in wanted
        ]

    def _of(self, group: str | None) -> list[ir.Node]:
        if group is None:
            return self._nodes
        return [node for node in self._nodes if group in self._groups[node]]

    def _key(self, node: ir.Node, widths: Widths) -> tuple[ir.Node, tuple[int, ...]]:
        return node, tuple(widths.get(group, 0) for group in self._groups[node])

    def _leave_out(self, key: tuple[ir.Node, tuple[int, ...]]) -> None:
        self._known[key] = 0.0
        self.left_out[key[0].op_type] = None

    def _counts(self, node: ir.Node) -> bool:
        """True if the node computes floating-point numbers, and not once and for all."""
        computes = any(
            v.name in self._arrays and self._arrays[v.name].dtype.kind == "f" for v in node.outputs
        )
        fixed = all(v is None or constant(v) is not None for v in node.inputs)
        return computes and not fixed and node.op_type not in _FREE

    def _touching(self, node: ir.Node) -> Iterator[str]:
        """The groups that a size of the node depends on."""
        for value in (*node.inputs, *node.outputs):
            if value is None or value.name not in self._arrays:
                continue
            for axis in range(len(self._arrays[value.name].shape)):
                yield from (size.group for size in self._sizes(str(value.name), axis))
        for _, _, size in self._numbers.get(str(node.outputs[0].name), ()):
            yield size.group

    def _sizes(self, name: str, axis: int) -> Sequence[_Size]:
        return self._axes.get((name, axis), ())

    def _operator(self, node: ir.Node, widths: Widths) -> Operator | None:
        """What the node is at these widths; None if it is not known well enough."""
        numbers = [
            (path, position, size.positions * widths.get(size.group, 0))
            for path, position, size in self._numbers.get(str(node.outputs[0].name), ())
        ]
        operands: list[Operand | None] = []
        for index, value in enumerate(node.inputs):
            if value is None:
                operands.append(None)
                continue
            found = self._arrays.get(str(value.name))
            if found is None:
                return None
            own = [(position, less) for path, position, less in numbers if path == (index,)]
            operands.append(self._operand(str(value.name), found, own, widths))
        attributes = dict(node.attributes)
        for path, position, less in numbers:
            if isinstance(path[0], str):
                attributes[path[0]] = _less(attributes[path[0]], position, less)
        operator = Operator(
            node.domain if node.domain != "ai.onnx" else "",
            node.op_type,
            self._opset,
            attributes,
            tuple(operands),
            len(node.outputs),
            self._integers if node in self._quantized else None,
        )
        return operator if operator.is_plain() else None

    def _operand(
        self, name: str, found: Operand, numbers: Sequence[tuple[int, int]], widths: Widths
    ) -> Operand:
        shape = tuple(
            length - sum(s.positions * widths.get(s.group, 0) for s in self._sizes(name, axis))
            for axis, length in enumerate(found.shape)
        )
        values = found.values
        if values is not None:
            values = np.resize(values, shape)
            for position, less in numbers:
                values.reshape(-1)[position] -= less
        return replace(found, shape=shape, values=values)


def _run(model: ir.Model, feeds: Feeds) -> dict[str, Operand]:
    """The sizes of all values of the graph, with the numbers of small integer tensors."""
    computed = [v for node in model.graph for v in node.outputs if v.name]
    names = [str(v.name) for v in (*model.graph.inputs, *computed)]
    [arrays] = run_values(model, names, [feeds])
    constants = {str(v.name): v for node in model.graph for v in node.inputs if v is not None}
    held = {name: constant(value) for name, value in constants.items()}
    found = {}
    for name, array in {**arrays, **{k: a for k, a in held.items() if a is not None}}.items():
        if isinstance(array, np.ndarray) and array.dtype.kind in "fiub":
            known = array.dtype.kind != "f" and array.size <= _KEPT
            values = np.array(array) if known else None
            fixed = held.get(name) is not None
            found[name] = Operand(array.dtype, array.shape, constant=fixed, values=values)
    return found


def _forms(graph: ir.Graph, integers: Int8 | None) -> tuple[set[ir.Node], set[ir.Node]]:
    """The nodes that compute in integers, and those that cost nothing behind another one."""
    quantized: set[ir.Node] = set()
    inside: set[ir.Node] = set()
    for unit in () if integers is None else place(graph, integers, ()).units:
        quantized.add(unit.node)
        last = unit.output.producer()
        if last is not None and last is not unit.node:
            inside.add(last)  # saturating at the limits of 8 bits does the same

    def hosts(value: ir.Value | None) -> bool:
        """True for what a float convolution gives to one reader only."""
        node = None if value is None else value.producer()
        if value is None or node is None or value.is_graph_output() or len(value.uses()) != 1:
            return False
        return (node.op_type == "Conv" and node not in quantized) or node in residual

    residual: set[ir.Node] = set()
    for node in graph:
        if node in quantized or node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in _INSIDE_CONV and hosts(node.inputs[0]):
            inside.add(node)
        elif node.op_type == "Add" and any(map(hosts, node.inputs)):
            residual.add(node)
            inside.add(node)
    return quantized, inside


def _less(attribute: ir.Attr, position: int, less: int) -> ir.Attr:
    if attribute.type is ir.AttributeType.INTS:
        numbers = list(attribute.as_ints())
        numbers[position] -= less
        return ir.AttrInt64s(attribute.name, numbers)
    return ir.AttrInt64(attribute.name, attribute.as_int() - less)


__all__ = ["WidthLatency", "Widths"]
