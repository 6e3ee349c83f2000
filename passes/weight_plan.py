"""Finds the weights of a model and groups the nodes that read the same one.

Products of one matrix are a group. An embedding table that is also the matrix of a product,
transposed or not, joins that group if the target's kernels can read both from one storage;
other tables are a group of their own if they are wanted in blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import onnx_ir as ir

from edgec.passes.contract import Skip
from edgec.passes.grids import Scheme
from edgec.passes.matching import producer
from edgec.passes.weight_choices import Matrix
from edgec.passes.weight_storage import PRODUCT_OPS, is_candidate, opset_of, product_weight
from edgec.passes.weights import (
    BLOCK_OPSET,
    Refused,
    float_weight,
    is_float_constant,
    label,
    required,
)
from edgec.targets import Target

TABLE_KERNEL = "GatherBlockQuantized"
_LEAST_BLOCK = 16


@dataclass(frozen=True)
class Wishes:
    """What is wanted. tables: None stores embedding tables by row, in a form of their own.

    long_blocks: shell patterns of the names of products whose blocks are twice as long.
    """

    products: Scheme
    tables: Scheme | None
    min_weights: int
    skip: tuple[str, ...]
    long_blocks: tuple[str, ...] = ()

    def product(self, node: ir.Node) -> Scheme:
        """What is wanted of the matrix of a product."""
        if any(fnmatchcase(label(node), pattern) for pattern in self.long_blocks):
            return replace(self.products, block_size=2 * self.products.block_size)
        return self.products


@dataclass(frozen=True)
class Plan:
    """The matrices in blocks, the other nodes with weights, and what is left alone.

    notes: tables that could not be stored as wanted, in words for the report.
    """

    matrices: tuple[Matrix, ...]
    others: tuple[ir.Node, ...]
    skipped: tuple[Skip, ...]
    notes: tuple[str, ...]


def plan_weights(model: ir.Model, wishes: Wishes, target: Target) -> Plan:
    """The plan for a model; nothing is changed."""
    planner = _Planner(model, wishes, target)
    nodes = [node for node in model.graph.all_nodes() if is_candidate(node)]
    # tables last: what their output layers become is known by then
    for node in sorted(nodes, key=lambda node: node.op_type == "Gather"):
        try:
            planner.add(node)
        except Refused as reason:
            planner.skipped.append(Skip(label(node), str(reason)))
    return Plan(
        tuple(planner.matrices.values()),
        tuple(planner.others),
        tuple(planner.skipped),
        tuple(dict.fromkeys(planner.notes)),
    )


@dataclass
class _Planner:
    model: ir.Model
    wishes: Wishes
    target: Target
    matrices: dict[tuple[ir.Value, int], Matrix] = field(default_factory=dict)
    others: list[ir.Node] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, node: ir.Node) -> None:
        """Give a node its place. Raises Refused if it is to be left alone."""
        if label(node) in self.wishes.skip:
            raise Refused("named in skip")
        index = 0 if node.op_type == "Gather" else 1
        if node.op_type not in PRODUCT_OPS or is_float_constant(node.inputs[index]):
            weight = float_weight(required(node, index))
            if weight.size < self.wishes.min_weights:
                raise Refused(f"it has {weight.size} weights, fewer than min_weights")
        if node.op_type in PRODUCT_OPS:
            self._product(node)
        elif node.op_type == "Gather":
            self._table(node)
        else:
            self.others.append(node)

    def _product(self, node: ir.Node) -> None:
        opset = opset_of(self.model)
        if opset < BLOCK_OPSET:
            raise Refused(
                f"block-wise weights need opset {BLOCK_OPSET}, the model has {opset}; "
                "export it with a newer opset"
            )
        _, axis = product_weight(node)
        if node.attributes.get_int("transA", 0) != 0:
            raise Refused("its first operand is transposed (transA)")
        if node.graph is not self.model.graph:
            # its fusion of DequantizeLinear looks for the weight in the branch alone
            raise Refused("ONNX Runtime cannot load block-wise weights inside a branch")
        value, scheme = required(node, 1), self.wishes.product(node)
        root, root_axis = _root(value, axis)
        tables = _tables(root)
        if tables:
            try:
                scheme = self._for_rows(root, scheme)
                self._check_tied(root, root_axis)
                value, axis = root, root_axis
            except Refused as reason:
                self.notes.append(
                    f"table '{root.name}' and the output layer that shares it are stored apart: "
                    f"{reason}"
                )
                scheme = self.wishes.product(node)
        self._join(node, value, axis, scheme)

    def _table(self, node: ir.Node) -> None:
        value = required(node, 0)
        matrix = self.matrices.get((value, 1))
        if matrix is not None and node in _tables(value):
            self.matrices[value, 1] = replace(matrix, tables=(*matrix.tables, node))
        elif self.wishes.tables is None or opset_of(self.model) < BLOCK_OPSET:
            self.others.append(node)
        else:
            try:
                scheme = self._for_rows(value, self.wishes.tables)
                if len(_tables(value)) != len(value.uses()):
                    raise Refused("not all of its readers look up rows")
            except Refused as reason:
                self.notes.append(
                    f"table '{value.name}' is stored in 8 bits with one scale a row: {reason}"
                )
                self.others.append(node)
            else:
                self.matrices[value, 1] = Matrix(value, 1, scheme, tables=(node,))

    def _join(self, node: ir.Node, value: ir.Value, axis: int, scheme: Scheme) -> None:
        known = self.matrices.get((value, axis))
        if known is None:
            self.matrices[value, axis] = Matrix(value, axis, scheme, (node,))
        else:
            self.matrices[value, axis] = replace(known, products=(*known.products, node))

    def _for_rows(self, table: ir.Value, scheme: Scheme) -> Scheme:
        """The scheme with blocks that rows can be looked up in. Raises Refused."""
        if TABLE_KERNEL not in self.target.kernels:
            raise Refused(f"{self.target.name} has no {TABLE_KERNEL} kernel")
        width, size = float_weight(table, rank=2).shape[1], scheme.block_size
        while width % size:
            size //= 2
        if size < _LEAST_BLOCK:
            raise Refused(f"rows of {width} are no whole number of blocks")
        return replace(scheme, block_size=size)

    def _check_tied(self, root: ir.Value, axis: int) -> None:
        """Raises Refused unless every reader of a table takes it in blocks along its rows."""
        if axis != 1:
            raise Refused("the product sums over its rows")
        readers = list(_readers(root))
        for user, index in readers:
            named = label(user) in self.wishes.skip
            product = user.op_type in PRODUCT_OPS and index == 1 and not named
            lookup = user in _tables(root) and not named
            if user.domain or not (product or lookup):
                raise Refused(f"'{label(user)}' reads it in float32")


def _root(value: ir.Value, axis: int) -> tuple[ir.Value, int]:
    """The initializer behind transposes of a matrix, and the axis there."""
    node = producer(value, "Transpose")
    while node is not None and node.inputs[0] is not None:
        value, axis = node.inputs[0], 1 - axis
        node = producer(value, "Transpose")
    return value, axis


def _tables(value: ir.Value) -> list[ir.Node]:
    """The Gathers that look up rows of a value."""
    return [
        user
        for user, index in value.uses()
        if user.op_type == "Gather"
        and not user.domain
        and index == 0
        and user.attributes.get_int("axis", 0) == 0
    ]


def _readers(value: ir.Value) -> Iterable[tuple[ir.Node, int]]:
    """The nodes that read a value or a transpose of it, and at which input."""
    for user, index in value.uses():
        if user.op_type == "Transpose" and not user.domain:
            yield from _readers(user.outputs[0])
        else:
            yield user, index
