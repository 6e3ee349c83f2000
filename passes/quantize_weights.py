"""Stores weights as 8-, 4- or 3-bit integers; activations stay float32 (weight-only).

Matrix products get one scale for each block along the input dimension, in the standard form
DequantizeLinear(axis, block_size); `lower` makes com.microsoft.MatMulNBits of it where the
target's kernel pays. How the integers are chosen is the ``method``: see weight_choices.py.
An embedding table that is the output layer's weight too is stored once for both, where the
target can look up rows of blocks (GatherBlockQuantized).

Convolutions, recurrent layers and other embedding tables get int8 with one scale a channel,
gate unit or row: their runtime has no weight-only kernel, so `lower` lets the runtime expand
them once at load (small file, float speed).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import onnx_ir as ir

from edgec.passes.choice_record import recorded, replayed, replayed_method, replayed_scaling
from edgec.passes.contract import Context, PassError, Result, Skip, Stage
from edgec.passes.grids import Scheme
from edgec.passes.weight_budget import FEW, MANY, mean_bits, widths_within, with_widths
from edgec.passes.weight_choices import (
    CALIBRATED,
    METHODS,
    WIDEST,
    Method,
    Scaling,
    choose,
    fold_scaling,
    measure_scaling,
    resolved,
)
from edgec.passes.weight_plan import Plan, Wishes, plan_weights
from edgec.passes.weight_storage import CHANNEL_OPS, WeightStore, opset_of
from edgec.passes.weights import Editor, Refused, check_skip, label
from edgec_runtime.errors import suggestion

_LONGEST = 256  # block that MatMulNBits takes


@dataclass(frozen=True)
class QuantizeWeights:
    """Weights as integers, activations in float32."""

    name: ClassVar[str] = "quantize-weights"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    lossless: ClassVar[bool] = False
    version: ClassVar[int] = 3

    bits: int = 8  # of matrix products: 8, 4, or 3 (8 levels in 4 bits of storage)
    # how products are rounded; auto: gptq with calibration data, clip without, rtn at 8 bits
    method: Literal["auto", "rtn", "clip", "hqq", "awq", "gptq"] = "auto"
    scheme: Literal["symmetric", "asymmetric"] = "symmetric"  # of matrix products
    block_size: int = 0  # weights that share a scale; 0 takes the target's
    # shell patterns of the names of products whose blocks are twice as long: they run faster and
    # lose more
    long_blocks: tuple[str, ...] = ()
    embedding_bits: int = 8  # of embedding tables: 8, or 4 in blocks
    # instead of bits: 4 or 8 for each product by what it loses, this many on average with scales
    bits_per_weight: float = 0.0
    min_weights: int = 1024  # smaller weights stay float32
    skip: tuple[str, ...] = ()  # names of nodes to leave alone

    def __post_init__(self) -> None:
        """Raise PassError for parameters out of range."""
        if self.bits not in (3, 4, 8):
            raise PassError(f"quantize-weights: bits is {self.bits}, expected 8, 4 or 3")
        if self.method not in ("auto", *METHODS):
            near = suggestion(self.method, ("auto", *METHODS))
            raise PassError(f"quantize-weights: no method '{self.method}'{near}")
        if self.scheme not in ("symmetric", "asymmetric"):
            raise PassError(
                f"quantize-weights: scheme is '{self.scheme}', expected 'symmetric' or 'asymmetric'"
            )
        if self.embedding_bits not in (4, 8):
            raise PassError(
                f"quantize-weights: embedding_bits is {self.embedding_bits}, expected 8 or 4"
            )
        size = self.block_size
        if size and (size < 16 or size & (size - 1)):
            raise PassError(
                f"quantize-weights: block_size is {size}, expected a power of two from 16, or "
                "0 for the target's"
            )
        if self.long_blocks and size > _LONGEST // 2:
            raise PassError(
                f"quantize-weights: block_size is {size}; with long_blocks expected at most "
                f"{_LONGEST // 2}: kernels take blocks of {_LONGEST}"
            )
        mean = self.bits_per_weight
        if mean and (self.bits == 3 or not FEW < mean <= 2 * MANY):
            raise PassError(
                f"quantize-weights: bits_per_weight is {mean:g}, expected more than "
                f"{FEW} and at most {2 * MANY} (scales count), without bits = 3; 0 gives all the "
                "same width"
            )
        if self.min_weights < 0:
            raise PassError(f"quantize-weights: min_weights is {self.min_weights}, expected >= 0")

    def run(self, model: ir.Model, context: Context) -> Result:
        """Quantize; ``changed`` counts the nodes that read integer weights afterwards."""
        nodes = list(model.graph.all_nodes())
        check_skip(self.name, self.skip, nodes)
        plan = self._plan(model, context, {})
        self._check_patterns(plan)
        widths = self._widths(plan, model, context)
        plan = self._plan(model, context, widths)
        if context.lock:
            method, why = replayed_method(context.lock), ""
            scaling = replayed_scaling(context.lock)
        else:
            method, why = resolved(self.method, self._fewest_bits, context)
            scaling = measure_scaling(plan.matrices, model, context) if method == "awq" else None
        divided: tuple[ir.Value, ...] = ()
        if scaling is not None:
            divided = fold_scaling(plan.matrices, scaling.channels)
            # weights in front of scaled values are other values now
            plan = self._plan(model, context, widths)
        if context.lock and method != "rtn":
            choices = replayed(context.lock, plan.matrices, scaling)
        else:
            choices = choose(plan.matrices, method, model, context, scaling)
        decisions = recorded(method, plan.matrices, choices, scaling)
        if widths:
            decisions["bits"] = widths
        store = WeightStore(Editor(model), opset_of(model))
        for matrix in plan.matrices:
            store.matrix(matrix, choices[matrix.name])
        done, refused = _store_others(store, plan)
        done.update(node for m in plan.matrices for node in (*m.products, *m.tables))
        for value in divided:  # they no longer hold what the reference's values hold
            value.name = store.editor.fresh(f"{value.name}_scaled")
        touched = tuple(node.outputs[0].name or "" for node in nodes if node in done)
        findings = self._findings(plan, method, why, scaling)
        skipped = plan.skipped + refused
        return Result(model, len(done), skipped, touched, decisions, findings)

    @property
    def _fewest_bits(self) -> int:
        return FEW if self.bits_per_weight else self.bits

    def _plan(self, model: ir.Model, context: Context, widths: Mapping[str, int]) -> Plan:
        plan = plan_weights(model, self._wishes(context), context.target)
        return replace(plan, matrices=with_widths(plan.matrices, widths))

    def _widths(self, plan: Plan, model: ir.Model, context: Context) -> dict[str, int]:
        """Bits of each matrix by its name where they are to differ."""
        if not self.bits_per_weight or not plan.matrices:
            return {}
        if context.lock:
            return {str(name): int(bits) for name, bits in context.lock.get("bits", {}).items()}
        return widths_within(plan.matrices, self.bits_per_weight, model, context)

    def _wishes(self, context: Context) -> Wishes:
        symmetric = self.scheme == "symmetric"
        size = self.block_size or context.target.int4.block_size
        products = Scheme(self._fewest_bits, symmetric, size)
        tables = Scheme(4, symmetric, size) if self.embedding_bits == 4 else None
        return Wishes(products, tables, self.min_weights, self.skip, self.long_blocks)

    def _check_patterns(self, plan: Plan) -> None:
        """Raise PassError for one that no product has."""
        names = [label(node) for matrix in plan.matrices for node in matrix.products]
        for pattern in self.long_blocks:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise PassError(
                    f"quantize-weights: long_blocks has '{pattern}', the name of no product that "
                    f"is stored in blocks{suggestion(pattern, names)}"
                )

    def _width(self, plan: Plan) -> str:
        if not self.bits_per_weight:
            return f"{self.bits} bits"
        many = sum(matrix.scheme.bits == MANY for matrix in plan.matrices)
        mean = mean_bits(plan.matrices)
        return f"{FEW} bits, {many} of them in {MANY} ({mean:.2f} bits a weight with scales)"

    def _findings(
        self, plan: Plan, method: Method, why: str, scaling: Scaling | None
    ) -> tuple[str, ...]:
        """What the user should know."""
        if not plan.matrices:
            return plan.notes
        reason = f" (auto: {why})" if why else ""
        found = [f"{len(plan.matrices)} weight matrices in {self._width(plan)} by {method}{reason}"]
        if self.bits == 3:
            found.append(
                "3-bit weights have 8 levels, but take 4 bits in the file and at run time: they "
                "compress better, and are not smaller otherwise"
            )
        if method in CALIBRATED:
            found += _clipped(plan)
        if scaling is not None and scaling.refusals:
            count, example = sum(scaling.refusals.values()), min(scaling.refusals)
            found.append(f"awq left the inputs of {count} products unscaled: {example}, ...")
        return (*found, *plan.notes)


def _clipped(plan: Plan) -> list[str]:
    """Why some matrices get clip although there is calibration data."""
    count = sum(bool(m.wide and m.products) for m in plan.matrices)
    reason = f"moments of more than {WIDEST} inputs take too much memory"
    return [f"{count} of them by clip: {reason}"] if count else []


def _store_others(store: WeightStore, plan: Plan) -> tuple[set[ir.Node], tuple[Skip, ...]]:
    """Convolutions, recurrent layers and tables by row: those done, and those refused."""
    done, skipped = set(), []
    for node in plan.others:
        try:
            if node.op_type == "Gather":
                store.table(node)
            elif node.op_type in CHANNEL_OPS:
                store.channels(node)
            else:
                store.recurrent(node)
        except Refused as reason:
            skipped.append(Skip(label(node), str(reason)))
        else:
            done.add(node)
    return done, tuple(skipped)
