"""Tables of a rotary embedding's angles: one row for each position that a decoder can read.

A decoder computes cos and sin of the positions that it is given. The attention kernel rotates
queries and keys itself where it has them for all positions. The table is made by a copy of the
very nodes that the model has, fed with 0, 1, 2, ...: ONNX Runtime folds it once at load, so that
it takes memory and no room in the file.

What the kernel does with a padded prompt shifts the positions of a row by its padding. That
changes no score where angles grow evenly: the score of a query and a key is a function of the
distance between them (Su et al. 2021, arXiv:2104.09864, section 3.2.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from edgec.passes.execution import open_session, run_feeds
from edgec.passes.weights import Array, constant

LARGEST_BYTES = 8 << 20  # of cos and sin together; Llama's 2,048 positions of 128 take 1 MB
_EVEN = 5e-3  # of a radius; float32 holds angles of thousands to a few 1e-4


def nodes_between(source: ir.Value, angle: ir.Value) -> list[ir.Node] | None:
    """What computes angles from positions, in order; None if it reads anything else."""
    found: dict[ir.Node, None] = {}
    reached = False

    def visit(value: ir.Value | None) -> bool:
        nonlocal reached
        if value is None or constant(value) is not None:
            return True
        if value is source:
            reached = True
            return True
        node = value.producer()
        if node is None or any(a.type in _GRAPHS for a in node.attributes.values()):
            return False
        if node not in found:
            if not all(visit(one) for one in node.inputs):
                return False
            found[node] = None
        return True

    return list(found) if visit(angle) and reached else None


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def copied(
    nodes: list[ir.Node],
    source: ir.Value,
    given: ir.Value,
    add: Callable[[ir.Node], None],
    others: Mapping[ir.Value, ir.Value] | None = None,
) -> dict[ir.Value, ir.Value]:
    """A copy of the nodes that reads ``given`` in the place of ``source``: old value -> new one.

    others: what else is read in the place of something.
    """
    known = {source: given, **(others or {})}
    for node in nodes:
        inputs = [None if value is None else known.get(value, value) for value in node.inputs]
        twin = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
        )
        add(twin)
        for old, new in zip(node.outputs, twin.outputs, strict=True):
            new.type = old.type
            known[old] = new
    return known


def evaluated(nodes: list[ir.Node], source: ir.Value, angle: ir.Value, count: int) -> Array:
    """The angles' cos or sin for the positions 0 to ``count`` - 1, float [count, n].

    Raises PassError if ONNX Runtime cannot compute them.
    """
    given = ir.Value(name="positions", type=source.type, shape=ir.Shape([1, count]))
    constants: dict[ir.Value, ir.Value] = {}
    for value in (value for node in nodes for value in node.inputs if value is not None):
        if value.is_initializer():
            constants[value] = ir.Value(
                name=value.name, const_value=value.const_value, type=value.type, shape=value.shape
            )
    made: list[ir.Node] = []
    known = copied(nodes, source, given, made.append, constants)
    result = known[angle]
    result.name = "angles"
    graph = ir.Graph(
        [given],
        [result],
        nodes=made,
        initializers=list(constants.values()),
        opset_imports=dict(_imports(source)),
        name="angles",
    )
    session = open_session(ir.Model(graph, ir_version=10), optimized=False)
    [array] = run_feeds(session, {"positions": np.arange(count, dtype=np.int64)[None]})
    return np.asarray(array).reshape(count, -1)


def _imports(value: ir.Value) -> Mapping[str, int]:
    graph = value.graph
    assert graph is not None
    return graph.opset_imports


def grow_evenly(cos: Array, sin: Array) -> bool:
    """True if every position turns by the same angle from the one before it, at one radius.

    cos, sin: float [positions, n].
    """
    points = cos.astype(np.float64) + 1j * sin.astype(np.float64)
    if len(points) < 2 or not np.isfinite(points).all():
        return False
    radius = np.abs(points)
    steps = points[1:] * np.conj(points[:-1])
    largest = float(radius.max())
    even = np.abs(steps - steps[:1]).max() <= _EVEN * largest**2
    return bool(even and np.abs(radius - radius[:1]).max() <= _EVEN * largest)
