"""Sets the smallest weights of each layer to zero, unstructured or N:M.

Idea: within one layer the weights of smallest magnitude matter least (Han et al. 2015,
arXiv:1506.02626). The layer's own share is cut, not a global one, so no layer is emptied.
N:M keeps the N largest of every M neighbours along the input dimension (Mishra et al. 2021,
arXiv:2104.08378).

What it buys, honestly: ONNX Runtime multiplies zeros like any other number, so the model
becomes smaller when compressed and not faster. Structured pruning is another pass.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, PassError, Result, Skip, Stage
from edgec.passes.progressive import check_rounds
from edgec.passes.weights import (
    Array,
    Editor,
    Refused,
    check_skip,
    float_weight,
    home,
    is_float_constant,
    label,
)

_PRUNED_OPS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class PruneMagnitude:
    """Zeroes the smallest weights of Conv, Gemm and MatMul."""

    name: ClassVar[str] = "prune-magnitude"
    stage: ClassVar[Stage] = Stage.PRUNE
    lossless: ClassVar[bool] = False
    version: ClassVar[int] = 1

    sparsity: float = (
        0.5  # share of zeros in each layer, 0 to below 1; unused when pattern is given
    )
    pattern: str = ""  # "N:M" keeps N of every M weights along the input dimension
    min_weights: int = 1024  # smaller layers are left alone
    skip: tuple[str, ...] = ()  # names of nodes to leave alone
    rounds: int = 1  # of this pass and the training behind it, the sparsity rising; not for N:M

    def __post_init__(self) -> None:
        """Raise PassError for parameters out of range."""
        if not 0.0 <= self.sparsity < 1.0:
            raise PassError(
                f"prune-magnitude: sparsity is {self.sparsity}, expected a share from 0 to "
                "below 1 (0.5 sets half of the weights to zero)"
            )
        if self.pattern and self._pattern() is None:
            raise PassError(
                f"prune-magnitude: pattern is '{self.pattern}', expected 'N:M' with "
                "0 < N < M, for example '2:4'"
            )
        if self.min_weights < 0:
            raise PassError(f"prune-magnitude: min_weights is {self.min_weights}, expected >= 0")
        check_rounds(self.name, self.rounds)
        if self.pattern and self.rounds > 1:
            raise PassError(
                f"prune-magnitude: rounds is {self.rounds}, but a pattern has no share that could "
                f"rise; leave out rounds, or give sparsity in the place of pattern {self.pattern}"
            )

    def run(self, model: ir.Model, context: Context) -> Result:
        """Prune; ``changed`` counts the weight tensors that lost a value."""
        nodes = list(model.graph.all_nodes())
        check_skip(self.name, self.skip, nodes)
        editor = Editor(model)
        seen: set[ir.Value | None] = set()
        skipped: list[Skip] = []
        touched: list[str] = []
        changed = zeros = total = 0
        for node in nodes:
            if node.op_type not in _PRUNED_OPS or node.domain:
                continue
            value = node.inputs[1]
            if value in seen or not is_float_constant(value):
                continue
            try:
                weight = self._weight(node)
                pruned = self._pruned(node, weight)
            except Refused as reason:
                skipped.append(Skip(label(node), str(reason)))
                continue
            seen.add(value)
            zeros += pruned.size - int(np.count_nonzero(pruned))
            total += pruned.size
            if np.array_equal(pruned, weight):
                continue
            touched.extend(_put(editor, node, pruned))
            changed += 1
        findings = (_finding(zeros, total),) if total else ()
        return Result(model, changed, tuple(skipped), tuple(touched), findings=findings)

    def _pattern(self) -> tuple[int, int] | None:
        match = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if match is None:
            return None
        kept, group = int(match[1]), int(match[2])
        return (kept, group) if 0 < kept < group else None

    def _weight(self, node: ir.Node) -> Array:
        if label(node) in self.skip:
            raise Refused("named in skip")
        value = node.inputs[1]
        weight = float_weight(value)
        if weight.size < self.min_weights:
            raise Refused(f"it has {weight.size} weights, fewer than min_weights")
        if value is not None and value.is_graph_output():
            raise Refused("its weight is an output of the model")
        for other, index in value.uses() if value is not None else ():
            if other.op_type not in _PRUNED_OPS or index != 1:
                raise Refused(f"its weight is also used by '{label(other)}'")
            if label(other) in self.skip:
                raise Refused(f"its weight is also used by '{label(other)}', named in skip")
        return weight

    def _pruned(self, node: ir.Node, weight: Array) -> Array:
        pattern = self._pattern()
        if pattern is None:
            return prune_unstructured(weight, self.sparsity)
        kept, group = pattern
        axis = _input_axis(node, weight)
        if weight.shape[axis] % group:
            raise Refused(
                f"its input dimension is {weight.shape[axis]}, pattern {self.pattern} needs "
                f"a multiple of {group}"
            )
        return prune_groups(weight, axis, kept=kept, group=group)


def prune_unstructured(weight: Array, sparsity: float) -> Array:
    """A copy of the weight whose floor(sparsity * size) smallest magnitudes are zero.

    Among equals the last stay.
    """
    count = int(sparsity * weight.size)
    if not count:
        return weight.copy()
    magnitudes = np.abs(weight).reshape(-1)
    # not argpartition: which of several equals it takes depends on the CPU's vector unit
    limit = np.partition(magnitudes, count - 1)[count - 1]
    cut = magnitudes < limit
    equals = np.flatnonzero(magnitudes == limit)
    cut[equals[: count - int(cut.sum())]] = True
    return np.where(cut.reshape(weight.shape), np.float32(0), weight)


def prune_groups(weight: Array, axis: int, *, kept: int, group: int) -> Array:
    """A copy with the ``kept`` largest magnitudes of every ``group`` along ``axis``.

    The axis must be a multiple of the group. Among equals the first stays.
    """
    moved = np.moveaxis(weight, axis, -1)
    blocks = moved.reshape(*moved.shape[:-1], -1, group)
    order = np.argsort(-np.abs(blocks), axis=-1, kind="stable")
    mask = np.zeros(blocks.shape, bool)
    np.put_along_axis(mask, order[..., :kept], True, axis=-1)
    pruned = np.where(mask, blocks, np.float32(0)).reshape(moved.shape)
    return np.ascontiguousarray(np.moveaxis(pruned, -1, axis))


def _input_axis(node: ir.Node, weight: Array) -> int:
    if node.op_type == "Conv":
        return 1  # [out, in / groups, kernel...]
    if node.op_type == "Gemm":
        transposed = node.attributes.get_int("transB", 0)
        return 1 if transposed else 0
    if weight.ndim < 2:
        raise Refused("its weight is a vector")
    return weight.ndim - 2


def _put(editor: Editor, node: ir.Node, pruned: Array) -> list[str]:
    """Store the new weight for all nodes that use it; the names of their outputs."""
    value = node.inputs[1]
    if value is None:
        return []
    users = [user for user, _ in value.uses()]
    if value.is_initializer():
        value.const_value = ir.tensor(pruned, name=value.name)  # a new tensor: clones share
    else:
        new = editor.constant(home(value), f"{value.name}_pruned", pruned)
        for user in users:
            editor.rewire(user, 1, new)
    return [user.outputs[0].name or "" for user in users]


def _finding(zeros: int, total: int) -> str:
    return (
        f"{100 * zeros / total:.1f} % of {total} weights are zero: the model compresses better "
        "(zip, app store, update), but it is neither smaller in memory nor faster, since ONNX "
        "Runtime computes zeros like any other number"
    )
