"""Finds residual branches, x + f(x), and takes them out: what is left of the sum is x.

A branch is everything on the way from the shortcut x to the other side of an Add. It can go if
x is the only value of the stream that enters it, and the Add the only reader of what it makes.
Side inputs, which do not come from x (an attention mask, states of an encoder), may enter, and so
may sizes of x. Two sums look alike and are none: GELU's x + 0.04 x^3 has no layer, and a mask that
is added to scores, which earlier layers made with the same mask, is no stream of its own.

Names stay, but for the sum's: its readers read the shortcut. Norms and activations behind the
sum stay too.

Left out: branches inside of If and loops; sums of more than two (Sum); branches whose input is
not itself the other side of the Add, as with x + f(x) + g(x) summed from the left.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgec.passes.contract import Skip
from edgec.passes.matching import is_op
from edgec.passes.weights import Refused, constant, graph_of, home, label

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class Block:
    """A branch that can go, with the Add that ends it.

    name: of the Add. result: the value that the Add makes. shortcut: the value that stays.
    nodes: names of the nodes that go, the Add among them. values: what they make.
    weights: numbers in the initializers that go. convolves: a Conv is among the nodes.
    """

    name: str
    result: str
    shortcut: str
    nodes: tuple[str, ...]
    values: frozenset[str]
    weights: int
    convolves: bool


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model in the order of its nodes, and branches that cannot go."""

    found: tuple[Block, ...]
    skipped: tuple[Skip, ...]


def find_blocks(model: ir.Model) -> Blocks:
    """The residual branches of the main graph; a branch within another one is found, too."""
    order = {node: position for position, node in enumerate(model.graph)}
    found: list[Block] = []
    skipped: list[Skip] = []
    streams: dict[ir.Node, ir.Value] = {}  # what goes into a sum past its branch
    for add in order:
        sides = _sides(add)
        if sides is None:
            continue
        for shortcut, branch in (sides, sides[::-1]):
            way = _way(shortcut, branch, order)
            inside = {shortcut, *(value for node in way for value in node.outputs)}
            if not any(_has_weight(node) for node in way):
                continue
            if any(node in streams and streams[node] not in inside for node in way):
                continue  # another stream runs through it
            streams[add] = shortcut
            try:
                found.append(_block(add, shortcut, branch, way, order))
            except Refused as reason:
                skipped.append(Skip(label(add), str(reason)))
    return Blocks(tuple(found), tuple(skipped))


def remove_blocks(model: ir.Model, blocks: Sequence[Block]) -> tuple[str, ...]:
    """Take blocks of a model out of it or of its clone, in place; the values that change by that.

    A block within another one of them goes with it; they are given in the order of their nodes.
    """
    adds = {node.outputs[0].name: node for node in model.graph if is_op(node, "Add")}
    touched: dict[ir.Value, None] = {}
    for block in reversed(blocks):  # those around others first
        add = adds[block.result]
        if add.graph is None:  # it went with the block around it
            continue
        sides = _sides(add)
        assert sides is not None  # a block's Add has two sides
        branch = next(v for v in sides if v.name in block.values)
        shortcut = next(v for v in sides if v is not branch)
        touched |= dict.fromkeys(user.outputs[0] for user, _ in add.outputs[0].uses())
        if add.outputs[0].is_graph_output():
            shortcut = _renamed(add, shortcut)
            touched[shortcut] = None
        ir.convenience.replace_all_uses_with(
            add.outputs[0], shortcut, replace_graph_outputs=add.outputs[0].is_graph_output()
        )
        graph_of(add).remove(add, safe=True)
        _drop([branch])
    return tuple(str(v.name) for v in touched if _is_there(v))


def _sides(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The two sides of an Add of two values that are computed."""
    if not is_op(node, "Add"):
        return None
    first, second = node.inputs
    if first is None or second is None or first is second:
        return None
    if constant(first) is not None or constant(second) is not None:
        return None
    return first, second


def _way(shortcut: ir.Value, branch: ir.Value, order: Mapping[ir.Node, int]) -> list[ir.Node]:
    """The nodes through which numbers of the shortcut reach the branch's end, in their order."""
    start, end = shortcut.producer(), branch.producer()
    # nothing that is made before the shortcut can come from it
    limit = -1 if start is None else order.get(start, -1)
    seen: set[ir.Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node is not None and order.get(node, -1) > limit and node not in seen:
            seen.add(node)
            waiting.extend(value.producer() for value in _reads(node))
    reached = {shortcut}
    way = []
    for node in sorted(seen, key=order.__getitem__):
        if is_op(node, "Shape", "Size") and node.inputs[0] is shortcut:
            continue  # the shortcut stays, and so do its sizes
        if not reached.isdisjoint(_reads(node)):
            way.append(node)
            reached.update(node.outputs)
    return way


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node and the graphs within it read."""
    yield from (value for value in node.inputs if value is not None)
    for graph in _subgraphs(node):
        for inner in ir.traversal.RecursiveGraphIterator(graph):
            yield from (value for value in inner.inputs if value is not None)
        yield from graph.outputs


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type is ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _has_weight(node: ir.Node) -> bool:
    if not is_op(node, *_LAYERS):
        return False
    arrays = (constant(value) for value in node.inputs)
    return any(array is not None and array.ndim > 1 for array in arrays)


def _block(
    add: ir.Node,
    shortcut: ir.Value,
    branch: ir.Value,
    way: Sequence[ir.Node],
    order: Mapping[ir.Node, int],
) -> Block:
    """The block that an Add ends. Raises Refused where it cannot go."""
    within = {add, *way}
    _refuse_control_flow(way)
    for node in way:
        for value in node.outputs:
            if value.is_graph_output():
                raise Refused(f"its value '{value.name}' is an output of the model")
            for user, _ in value.uses():
                if user not in within:
                    raise Refused(
                        f"its value '{value.name}' is read by '{label(user)}', which stays"
                    )
    if _differ(shortcut, branch):
        raise Refused(
            f"its sides are of different shapes: {shortcut.shape} and {branch.shape}, so that the "
            "sum is more than the shortcut"
        )
    gone = [*_only_for(add, branch, order), add]
    _refuse_control_flow(gone)
    return Block(
        name=label(add),
        result=str(add.outputs[0].name),
        shortcut=str(shortcut.name),
        nodes=tuple(label(node) for node in gone),
        values=frozenset(str(value.name) for node in gone for value in node.outputs),
        weights=_weights(gone),
        convolves=any(is_op(node, "Conv") for node in gone),
    )


def _refuse_control_flow(nodes: Sequence[ir.Node]) -> None:
    for node in nodes:
        if next(_subgraphs(node), None) is not None:
            raise Refused(f"it contains control flow: '{label(node)}'")


def _differ(first: ir.Value, second: ir.Value) -> bool:
    """True if the shapes are known to differ; two sizes with names may be the same."""
    if first.shape is None or second.shape is None:
        return False
    if len(first.shape) != len(second.shape):
        return True
    return any(
        one != other and (1 in (one, other) or isinstance(one, int) and isinstance(other, int))
        for one, other in zip(first.shape, second.shape, strict=True)
    )


def _only_for(add: ir.Node, branch: ir.Value, order: Mapping[ir.Node, int]) -> tuple[ir.Node, ...]:
    """The nodes that nothing but the branch needs, side computations among them, in order."""
    gone: set[ir.Node] = set()
    for node in reversed(list(order)[: order[add]]):
        uses = [user for value in node.outputs for user, _ in value.uses()]
        if any(value.is_graph_output() for value in node.outputs) or not uses:
            continue
        ends = branch in node.outputs
        if all(user in gone or (ends and user is add) for user in uses):
            gone.add(node)
    return tuple(sorted(gone, key=order.__getitem__))


def _weights(nodes: Sequence[ir.Node]) -> int:
    """Numbers in initializers that only these nodes read."""
    within = set(nodes)
    values = dict.fromkeys(v for node in nodes for v in node.inputs if v is not None)
    return sum(
        int(value.const_value.size)
        for value in values
        if value.is_initializer() and value.const_value is not None and _is_free(value, within)
    )


def _is_free(value: ir.Value, within: Collection[ir.Node]) -> bool:
    fixed = value.is_graph_output() or value.is_graph_input()
    return not fixed and all(user in within for user, _ in value.uses())


def _renamed(add: ir.Node, shortcut: ir.Value) -> ir.Value:
    """The shortcut under the name of the sum, which is an output of the model."""
    node = ir.node("Identity", [shortcut], name=add.name)
    value, old = node.outputs[0], add.outputs[0]
    value.name, value.type, value.shape = old.name, old.type, old.shape
    old.name = None
    graph_of(add).insert_before(add, node)
    return value


def _drop(values: list[ir.Value]) -> None:
    """Remove what makes these values, and then what only that needed, initializers too."""
    while values:
        value = values.pop()
        if value.uses() or value.is_graph_output() or value.is_graph_input():
            continue
        node = value.producer()
        if node is None:
            if value.is_initializer():
                del home(value).initializers[str(value.name)]
        elif node.graph is not None and not any(
            output.uses() or output.is_graph_output() for output in node.outputs
        ):
            values.extend(dict.fromkeys(v for v in node.inputs if v is not None))
            graph_of(node).remove(node, safe=True)


def _is_there(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.graph is not None
