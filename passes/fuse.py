"""Fuses chains of standard operators into fewer standard operators, losing nothing.

The rules stand in ``fuse_conv``, ``fuse_clip``, ``fuse_activation``, ``fuse_norm`` and
``fuse_layout``; here they are swept over all graphs until none applies. Rewrites that are pure
bookkeeping (double transposes and reshapes, casts to the same type) come from onnxscript's
rules. MatMul + Add stays: ONNX Runtime fuses it itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from edgec.passes.contract import Context, Result, Skip, Stage
from edgec.passes.fuse_activation import fuse_gelu, fuse_hard_swish
from edgec.passes.fuse_clip import fuse_clip
from edgec.passes.fuse_conv import fold_affine, fold_affine_before, fold_pad
from edgec.passes.fuse_layout import fix_reshape, fuse_flat_softmax, fuse_global_pool
from edgec.passes.fuse_norm import fuse_layer_norm
from edgec.passes.matching import Rule, bypass_identities

_RULES: tuple[Rule, ...] = (
    fold_affine,
    fold_affine_before,
    fold_pad,
    fuse_clip,
    fuse_layer_norm,
    fuse_gelu,
    fuse_hard_swish,
    fuse_global_pool,
    fuse_flat_softmax,
    fix_reshape,
)


@dataclass(frozen=True)
class Fuse:
    """Fold and fuse what ONNX Runtime, or a later pass, handles better as one node."""

    name: ClassVar[str] = "fuse"
    stage: ClassVar[Stage] = Stage.CLEAN
    lossless: ClassVar[bool] = True
    version: ClassVar[int] = 2

    def run(self, model: ir.Model, context: Context) -> Result:
        """Return the fused model; ``changed`` counts the rewrites."""
        work = model.clone()
        changed = 0
        while True:
            applied, skipped = _sweep(work)
            applied += _bookkeeping(work)
            changed += applied
            if not applied:
                break
            _tidy(work)
        return Result(work if changed else model, changed, skipped)


def _sweep(model: ir.Model) -> tuple[int, tuple[Skip, ...]]:
    """Try every rule at every node once; the count of rewrites and the refusals."""
    opset = model.opset_imports.get("", 0)
    changed = 0
    skipped: dict[Skip, None] = {}
    for graph in list(model.graphs()):
        for node in list(graph):
            for rule in _RULES:
                if node.graph is None:
                    break  # removed by an earlier rewrite of this sweep
                outcome = rule(node, opset)
                if isinstance(outcome, Skip):
                    skipped[outcome] = None
                elif outcome:
                    changed += 1
    return changed, tuple(skipped)


def _bookkeeping(model: ir.Model) -> int:
    """Apply onnxscript's exact rewrites once; the count of rewrites."""
    from onnxscript.rewriter import RewriteRuleSet
    from onnxscript.rewriter.rules import common as rules

    return int(
        RewriteRuleSet(
            [
                rules.no_op_cast_rule,
                rules.no_op_expand_rule,
                rules.no_op_transpose_rule,
                rules.transpose_transpose_rule,
                rules.reshape_reshape_rule,
                rules.unsqueeze_unsqueeze_rule,
            ]
        ).apply_to_model(model)
    )


def _tidy(model: ir.Model) -> None:
    """Drop what the rewrites left behind."""
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    bypass_identities(model)
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    common.NameFixPass()(model)
