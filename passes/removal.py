"""Takes units of groups out of a graph: smaller weights, and the numbers that state sizes.

Weights are sliced, shapes and written-down sizes follow. Names stay: a constant that other
nodes read too gets a copy for the node that needs another number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import PassError
from edgec.passes.dimension_groups import Group, Length, Slice
from edgec.passes.weights import Editor, graph_of, home


@dataclass(frozen=True, eq=False)
class Cut:
    """Units of a group that are to go: numbers from 0 to below ``group.units``."""

    group: Group
    units: tuple[int, ...]


def remove(model: ir.Model, cuts: Sequence[Cut]) -> int:
    """Take the units out of the model in place; the count of initializers that shrank.

    The groups are those of this very model. Raises PassError for a unit that a group does not
    have, or if a group would have none left.
    """
    for cut in cuts:
        if not set(cut.units) < set(range(cut.group.units)):
            raise PassError(
                f"group '{cut.group.name}' has {cut.group.units} units, of which some have to "
                f"stay: units {sorted(cut.units)} cannot be removed"
            )
    cuts = [cut for cut in cuts if cut.units]
    changed = _slice_initializers(model, cuts)
    _shrink_values(model, cuts)
    _rewrite_numbers(model, cuts)
    return changed


def _slice_initializers(model: ir.Model, cuts: Sequence[Cut]) -> int:
    gone = positions_gone((part, cut) for cut in cuts for part in cut.group.slices)
    values = {v.name: v for graph in model.graphs() for v in graph.initializers.values()}
    for name, axes in gone.items():
        value = values[name]
        tensor = value.const_value
        assert tensor is not None  # an initializer has data
        array = tensor.numpy()
        for axis, places in axes.items():
            array = np.delete(array, places, axis)
        value.const_value = ir.tensor(np.ascontiguousarray(array), dtype=tensor.dtype, name=name)
        value.shape = ir.Shape(array.shape)
    return len(gone)


def _shrink_values(model: ir.Model, cuts: Sequence[Cut]) -> None:
    gone = positions_gone((part, cut) for cut in cuts for part in cut.group.shapes)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            axes = gone.get(str(value.name))
            if axes and value.shape is not None:
                sizes = list(value.shape)
                for axis, places in axes.items():
                    size = sizes[axis]
                    sizes[axis] = size - len(places) if isinstance(size, int) else size
                value.shape = ir.Shape(sizes)


def positions_gone(parts: Iterable[tuple[Slice, Cut]]) -> dict[str, dict[int, list[int]]]:
    """By name and axis the positions to remove, sorted."""
    found: dict[str, dict[int, set[int]]] = {}
    for part, cut in parts:
        places = part.indices[list(cut.units)].reshape(-1).tolist()
        found.setdefault(part.name, {}).setdefault(part.axis, set()).update(places)
    return {
        name: {axis: sorted(places) for axis, places in axes.items()}
        for name, axes in found.items()
    }


def _rewrite_numbers(model: ir.Model, cuts: Sequence[Cut]) -> None:
    gone: dict[tuple[str, tuple[int | str, ...], int], set[int]] = {}
    lengths: dict[tuple[str, tuple[int | str, ...], int], Length] = {}
    for cut in cuts:
        for length in cut.group.lengths:
            key = (length.node, length.path, length.position)
            lengths[key] = length
            places = length.indices[list(cut.units)].reshape(-1).tolist()
            gone.setdefault(key, set()).update(places)
    nodes = {node.outputs[0].name: node for node in model.graph.all_nodes() if node.outputs}
    editor = Editor(model)
    for key, length in lengths.items():
        left = length.length - len(gone[key])
        _rewrite(editor, nodes[length.node], length.path, length.position, left)


def _rewrite(
    editor: Editor, node: ir.Node, path: Sequence[int | str], position: int, number: int
) -> None:
    """Put the number into the node's attribute or into the constant at the end of the path."""
    step, *rest = path
    if isinstance(step, str):
        attribute = node.attributes[step]
        if attribute.type is ir.AttributeType.INTS:
            numbers = list(attribute.as_ints())
            numbers[position] = number
            node.attributes[step] = ir.AttrInt64s(step, numbers)
        else:
            node.attributes[step] = ir.AttrInt64(step, number)
        return
    value = node.inputs[step]
    assert value is not None  # the path was found along it
    if rest:
        source = value.producer()
        assert source is not None  # what a path goes through is computed
        if len(value.uses()) > 1 or value.is_graph_output():
            source = _copy(editor, source, node)
            node.replace_input_with(step, source.outputs[0])
        _rewrite(editor, source, rest, position, number)
        return
    tensor = value.const_value
    assert tensor is not None  # a path ends at an initializer
    array = tensor.numpy().copy()
    array.reshape(-1)[position] = number
    if len(value.uses()) > 1 or value.is_graph_output():
        new = editor.constant(home(value), f"{value.name}_cut", array)
        node.replace_input_with(step, new)
    else:
        value.const_value = ir.tensor(array, name=value.name)


def _copy(editor: Editor, source: ir.Node, user: ir.Node) -> ir.Node:
    """A copy of a node with one output, for one of its users."""
    [output] = source.outputs
    new = ir.node(
        source.op_type,
        list(source.inputs),
        attributes=dict(source.attributes),
        name=editor.fresh(f"{source.name or source.op_type}_cut"),
    )
    made = new.outputs[0]
    made.name = editor.fresh(f"{output.name}_cut")
    made.type, made.shape = output.type, output.shape
    graph_of(user).insert_before(user, new)
    return new
