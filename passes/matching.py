"""Reads and edits small neighbourhoods of a graph: what the lossless rewrites share.

A rewrite looks at one node, walks to its neighbours and either rewrites, refuses with a
reason, or finds nothing. Values keep their names across a rewrite where they keep their
numbers, since later passes match values of two graphs by name. Nodes that a rewrite
bypasses are removed at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Skip
from edgec.passes.weights import Array, constant

# node, opset -> True: rewritten, Skip: looked at and left alone, None: not the pattern
Rule = Callable[[ir.Node, int], bool | Skip | None]


def scalar(value: ir.Value | None) -> float | None:
    """The number held by a constant with one element, whatever its rank."""
    if value is None or (value.const_value is not None and value.const_value.size != 1):
        return None
    array = constant(value)
    return float(array.item()) if array is not None and array.size == 1 else None


def is_close(value: ir.Value | None, number: float) -> bool:
    """True if the value is a constant scalar equal to ``number`` within float16 noise."""
    found = scalar(value)
    return found is not None and math.isclose(found, number, rel_tol=1e-3, abs_tol=1e-6)


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """True if the node is one of these operators of standard ONNX."""
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in op_types


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that computes the value, if it is one of these standard operators."""
    node = None if value is None else value.producer()
    return node if is_op(node, *op_types) else None


def sole_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads the value; None if others do, or if it is a graph output."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def shared_reason(value: ir.Value) -> str | None:
    """Why the value cannot be fused away, or None if it can."""
    if value.is_graph_output():
        return f"its input '{value.name}' is a graph output"
    if len(value.uses()) != 1:
        return f"its input '{value.name}' is read by {len(value.uses())} nodes"
    return None


def is_double(node: ir.Node) -> bool:
    """True for a node on float64; few of ONNX Runtime's activations have a kernel for it."""
    return any(v is not None and v.dtype == ir.DataType.DOUBLE for v in node.inputs)


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other operand of a node with two inputs."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def rank(value: ir.Value | None) -> int | None:
    """Number of dimensions, or None where it is not known."""
    return None if value is None or value.shape is None else len(value.shape)


def same_rank(first: ir.Value, second: ir.Value) -> bool:
    """False if the two are known to differ in rank: a constant of more dimensions adds some."""
    ranks = rank(first), rank(second)
    return None in ranks or ranks[0] == ranks[1]


def reduction_axes(node: ir.Node) -> list[int] | None:
    """Axes of a Reduce* node, from its attribute (to opset 17) or its input (from 18)."""
    attribute = node.attributes.get("axes")
    if attribute is not None:
        return [int(axis) for axis in attribute.as_ints()]
    if len(node.inputs) > 1:
        array = constant(node.inputs[1])
        return None if array is None else [int(axis) for axis in array.ravel()]
    return None


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` stand wherever ``old`` stood, under its name, type and shape."""
    new.name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name = None
    remove_unused(old.producer())


def remove_unused(node: ir.Node | None) -> None:
    """Remove the node if nothing reads it, then what only it read."""
    if node is None or node.graph is None:
        return
    if any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    sources = [value.producer() for value in node.inputs if value is not None]
    node.graph.remove(node, safe=True)
    for source in sources:
        remove_unused(source)


def bypass_identities(model: ir.Model) -> int:
    """Remove Identity nodes that only rename; the count of those removed.

    Kept: an Identity that makes an output of a graph from what is not computed in that graph.
    onnx_ir's own pass fails on such an Identity in the branch of an If.
    """
    count = 0
    for graph in model.graphs():
        for node in list(graph):
            if not is_op(node, "Identity") or node.inputs[0] is None:
                continue
            source, result = node.inputs[0], node.outputs[0]
            if not result.is_graph_output():
                ir.convenience.replace_all_uses_with(result, source)
                graph.remove(node, safe=True)
            elif _computed_in(source, node.graph) and not source.is_graph_output():
                take_over(result, source)
            else:
                continue
            count += 1
    return count


def _computed_in(value: ir.Value, graph: object) -> bool:
    node = value.producer()
    return node is not None and node.graph is graph


def add_initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """A new initializer of the graph; a number is appended to a name that is taken."""
    taken, unique, count = graph.initializers, name, 0
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    value = ir.Value(
        name=unique,
        const_value=ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=unique),
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
    )
    graph.register_initializer(value)
    return value


def with_new_numbers(value: ir.Value, array: Array) -> ir.Value:
    """An initializer holding ``array``: the same one if nothing else reads it, else a copy."""
    graph = value.graph
    shared = len(value.uses()) != 1 or value.is_graph_output()
    if shared or not isinstance(graph, ir.Graph) or not value.is_initializer():
        node = tuple(value.uses())[0].node
        owner = graph if isinstance(graph, ir.Graph) else node.graph
        assert isinstance(owner, ir.Graph)
        return add_initializer(owner, f"{value.name}_folded", array)
    value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)
    value.shape = ir.Shape(array.shape)
    return value


def insert(
    anchor: ir.Node, op_type: str, inputs: list[ir.Value | None], **attributes: Any
) -> ir.Node:
    """A new node in front of ``anchor``.

    Of the attributes ``domain`` names another operator set, ``num_outputs`` is how many there are.
    """
    domain, outputs = attributes.pop("domain", ""), attributes.pop("num_outputs", 1)
    node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs)
    assert anchor.graph is not None
    anchor.graph.insert_before(anchor, node)
    return node
