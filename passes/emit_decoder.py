"""Puts the kernels of a decoder's attention into a graph, beside what they replace.

What all layers read (lengths, the bias that hides masked positions, tables of angles) is
computed once, in front of the first attention. Lengths are those of ids and mask, never of
the cache: so past and present may be one buffer that is longer than what it holds.

Source: the operators' documentation in ONNX Runtime (docs/ContribOperators.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.passes.decode_trials import IDS, MASK, POSITIONS
from edgec.passes.match_decoder import CachedAttention, Heads, Mask
from edgec.passes.matching import add_initializer
from edgec.passes.rotary_tables import copied, nodes_between

KERNEL, ROTARY = "GroupQueryAttention", "RotaryEmbedding"
CONTRIB = "com.microsoft"
# Finite, or a row that attends to nothing would give NaN, and NaN in the caches of all layers
# behind; low, since scores of a language model lie some hundred apart.
_HIDDEN = -10000.0
_END = np.iinfo(np.int64).max


@dataclass
class Emission:
    """Puts kernels into one model, which has the inputs of a decoder (``decoder_of``).

    rows: of the tables with which the attention kernel rotates queries and keys itself; 0 leaves
    that to kernels in front of it. plain: masks, by name, that hide padding and later positions
    alone.
    """

    model: ir.Model
    rows: int = 0
    plain: frozenset[str] = frozenset()
    _shared: dict[tuple[str, ...], ir.Value] = field(default_factory=dict)

    def emit(self, match: CachedAttention) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Result [batch, sequence, heads * size], present keys and present values."""
        self.model.opset_imports[CONTRIB] = 1
        anchor = match.end.producer()
        assert anchor is not None
        at = _Inserter(anchor, str(match.end.name))
        inside = match.rotary is not None and self.rows > 0
        query, key = self._operands(at, match) if inside else self._rotated(at, match)
        value = _merged(at, match.value, match.kv_heads * match.size)
        inputs: list[ir.Value | None] = [query, key, value, match.keys.past, match.values.past]
        inputs += [self._last(at), self._total(at)]
        inputs += self._rotation(at, match) if inside else [None, None, None]
        inputs.append(None if match.mask is None else self._bias(at, match.mask))
        while inputs[-1] is None:
            inputs.pop()
        attributes = {"num_heads": match.heads, "kv_num_heads": match.kv_heads}
        node = at.node(
            KERNEL,
            inputs,
            {**attributes, "scale": match.scale, **({"do_rotary": 1} if inside else {})},
            outputs=3,
            domain=CONTRIB,
        )
        node.name = f"{match.end.name}_attention"
        return node.outputs[0], node.outputs[1], node.outputs[2]

    def past_shape(self, shape: ir.Node, heads: int, size: int) -> ir.Value:
        """[batch, heads, past, size] of a cache, from ids and mask, in front of its Shape node."""
        at = _Inserter(shape, str(shape.outputs[0].name))
        ids, mask = self._input(IDS), self._input(MASK)
        past = at.value("Sub", [at.size(mask, 1), at.size(ids, 1)])
        parts = [at.size(ids, 0), at.numbers([heads]), past, at.numbers([size])]
        return at.value("Concat", parts, axis=0)

    def _operands(self, at: _Inserter, match: CachedAttention) -> tuple[ir.Value, ir.Value]:
        """Queries and keys [batch, sequence, heads * size], not rotated."""
        query = _merged(at, match.query, match.heads * match.size)
        return query, _merged(at, match.key, match.kv_heads * match.size)

    def _rotation(self, at: _Inserter, match: CachedAttention) -> list[ir.Value]:
        """Tables [rows, size / 2] of cos and sin, and the positions that the kernel counts by.

        It counts the tokens of a prompt from the first row's first position on, padding included,
        whatever the others are; so the tokens behind one count from the padding on, too: as many
        more as the row has on its left. Padding is 0, and with it the first row's beginning.
        """
        assert match.rotary is not None
        tables = [self._whole_table(at, angle, match.size) for angle in match.rotary]

        def made() -> ir.Value:
            mask = self._input(MASK)
            before = at.node("ArgMax", [mask], {"axis": 1, "keepdims": 1}).outputs[0]
            counted = at.value("Add", [self._input(POSITIONS), before])
            ends = [at.value("Neg", [self._new(at)]), at.numbers([_END]), at.numbers([1])]
            return at.value("Mul", [counted, at.value("Slice", [mask, *ends])])

        return [*tables, self._once(("counted",), made)]

    def _whole_table(self, at: _Inserter, angle: ir.Value, size: int) -> ir.Value:
        """cos or sin of the positions 0 to ``rows`` - 1, [rows, size / 2]."""

        def made() -> ir.Value:
            positions = self._input(POSITIONS)
            nodes = nodes_between(positions, angle)
            assert nodes is not None  # or ``rows`` is 0
            zero, one, end = (at.constant(np.array(n, np.int64)) for n in (0, 1, self.rows))
            counted = at.value("Range", [zero, end, one])
            given = at.value("Reshape", [counted, at.numbers([1, self.rows])])
            whole = copied(nodes, positions, given, at.add)[angle]
            half = at.slice(whole, 0, size // 2, axis=3)
            return at.value("Reshape", [half, at.numbers([self.rows, size // 2])])

        return self._once(("whole", str(angle.name), str(size)), made)

    def _rotated(self, at: _Inserter, match: CachedAttention) -> tuple[ir.Value, ir.Value]:
        """Queries and keys [batch, sequence, heads * size], rotated."""
        first, second = self._operands(at, match)
        if match.rotary is None:
            return first, second
        tables = [self._table(at, angle, match.size) for angle in match.rotary]
        results = []
        for merged, part in ((first, "query"), (second, "key")):
            node = at.node(ROTARY, [merged, self._rows(at), *tables], {}, domain=CONTRIB)
            node.name = f"{at.stem}_{part}_rotary"
            results.append(node.outputs[0])
        return results[0], results[1]

    def _table(self, at: _Inserter, angle: ir.Value, size: int) -> ir.Value:
        """cos or sin [batch or 1, 1, sequence, size] as rows [batch * sequence, size / 2]."""

        def made() -> ir.Value:
            half = at.slice(angle, 0, size // 2, axis=3)
            # one row for each position of each row of the batch, however the angles broadcast
            whole = at.value("Concat", [self._batch(at), at.numbers([1, 1, 1])], axis=0)
            return at.value(
                "Reshape", [at.value("Expand", [half, whole]), at.numbers([-1, size // 2])]
            )

        return self._once(("table", str(angle.name), str(size)), made)

    def _rows(self, at: _Inserter) -> ir.Value:
        """The row of the table for each position: 0, 1, ... as [batch, sequence]."""

        def made() -> ir.Value:
            sizes = [self._batch(at), self._new(at)]
            count = at.value("Squeeze", [at.value("Mul", sizes)])
            zero, one = (at.constant(np.array(n, np.int64)) for n in (0, 1))
            numbers = at.value("Range", [zero, count, one])
            return at.value("Reshape", [numbers, at.value("Concat", sizes, axis=0)])

        return self._once(("rows",), made)

    def _batch(self, at: _Inserter) -> ir.Value:
        """Number of rows, int64 [1]."""
        return self._once(("batch",), lambda: at.size(self._input(IDS), 0))

    def _new(self, at: _Inserter) -> ir.Value:
        """Number of positions of this run, int64 [1]."""
        return self._once(("new",), lambda: at.size(self._input(IDS), 1))

    def _all(self, at: _Inserter) -> ir.Value:
        """Number of past and new positions, int64 [1]."""
        return self._once(("all",), lambda: at.size(self._input(MASK), 1))

    def _total(self, at: _Inserter) -> ir.Value:
        """The same as int32 [1]."""

        def made() -> ir.Value:
            return at.value("Cast", [self._all(at)], to=ir.DataType.INT32.value)

        return self._once(("total",), made)

    def _last(self, at: _Inserter) -> ir.Value:
        """The last position of each row, int32 [batch]: padding is hidden by the bias alone."""

        def made() -> ir.Value:
            last = at.value("Sub", [self._total(at), at.constant(np.array([1], np.int32))])
            return at.value("Expand", [last, self._batch(at)])

        return self._once(("last",), made)

    def _bias(self, at: _Inserter, mask: Mask) -> ir.Value:
        """What is added to the scores, [batch or 1, heads or 1, new, all]: 0 or very low."""

        if mask.root.name in self.plain:
            return self._padding(at)

        def made() -> ir.Value:
            if mask.shown is None or mask.hidden is None:
                floor = at.constant(np.array(_HIDDEN, np.float32))
                bias = at.value("Max", [mask.root, floor])
            else:
                numbers = (max(n, _HIDDEN) for n in (mask.shown, mask.hidden))
                sides = [at.constant(np.array(n, np.float32)) for n in numbers]
                bias = at.value("Where", [mask.root, *sides])
            lengths = at.value("Concat", [self._new(at), self._all(at)], axis=0)
            return at.value("Expand", [bias, lengths])

        return self._once(("bias", str(mask.root.name), str(mask.shown), str(mask.hidden)), made)

    def _padding(self, at: _Inserter) -> ir.Value:
        """The bias where padding alone is to be hidden: the kernel hides later positions."""

        def made() -> ir.Value:
            shown = at.value("Cast", [self._input(MASK)], to=ir.DataType.BOOL.value)
            sides = [at.constant(np.array(n, np.float32)) for n in (0.0, _HIDDEN)]
            row = at.value("Where", [shown, *sides])
            rows = at.value("Unsqueeze", [row, at.numbers([1, 2])])
            ends = [at.numbers([1, 1]), self._new(at), at.numbers([1])]
            return at.value("Expand", [rows, at.value("Concat", ends, axis=0)])

        return self._once(("padding",), made)

    def _input(self, name: str) -> ir.Value:
        return next(value for value in self.model.graph.inputs if value.name == name)

    def _once(self, key: tuple[str, ...], made: Callable[[], ir.Value]) -> ir.Value:
        if key not in self._shared:
            self._shared[key] = made()
        return self._shared[key]


@dataclass(frozen=True)
class _Inserter:
    """Adds nodes in front of one node. stem: of the names of new constants."""

    anchor: ir.Node
    stem: str

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, int | float | list[int]],
        *,
        outputs: int = 1,
        domain: str = "",
    ) -> ir.Node:
        """A new node."""
        made = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs)
        self.add(made)
        return made

    def add(self, made: ir.Node) -> None:
        """Put a new node in its place."""
        assert self.anchor.graph is not None
        self.anchor.graph.insert_before(self.anchor, made)

    def value(self, op_type: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Value:
        """The result of a new node of standard ONNX."""
        return self.node(op_type, inputs, attributes).outputs[0]

    def constant(self, array: np.ndarray[Any, Any]) -> ir.Value:
        """A new initializer."""
        assert isinstance(self.anchor.graph, ir.Graph)
        return add_initializer(self.anchor.graph, f"{self.stem}_constant", array)

    def numbers(self, values: Sequence[int]) -> ir.Value:
        """A new initializer of int64 [n]."""
        return self.constant(np.array(values, np.int64))

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """One dimension, int64 [1]."""
        return self.value("Shape", [value], start=axis, end=axis + 1)

    def slice(self, value: ir.Value, start: int, end: int, *, axis: int) -> ir.Value:
        """A part of a value along one axis."""
        return self.value("Slice", [value, *(self.numbers([n]) for n in (start, end, axis))])


def _merged(at: _Inserter, heads: Heads, width: int) -> ir.Value:
    """[batch, sequence, heads * size] of an operand."""
    if heads.merged is not None:
        return heads.merged
    split = heads.split
    if split is None:
        split = at.node("Transpose", [heads.value], {"perm": [0, 2, 1, 3]}).outputs[0]
    return at.value("Reshape", [split, at.numbers([0, 0, width])])
