"""Leaves room beside layers for adapters, which a device swaps without loading the model anew.

A slot is a low-rank branch (`edgec.passes.lora`) of zeros: the outputs stay. Its two
matrices have names that begin with SLOT and the digest of the reference; the bundle makes them
inputs with defaults, which is what ONNX Runtime's adapters feed (RunOptions.add_active_adapter).
So an adapter of another reference finds no input of its name, in any host language.

The branch stays in float32 whatever the layer became: it is put in after all other passes.
In a static int8 graph a layer with a slot computes in float, since its output must not be
rounded before the branch is added; name the ``layers`` that shall have one. Layers are looked
for in the reference as `edgec adapt` trains it: cleaned and fused.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgec.passes.cleanup import Cleanup
from edgec.passes.contract import Context, PassError, Result, Stage
from edgec.passes.fuse import Fuse
from edgec.passes.lora import add_branches, branches
from edgec_runtime.adapters import SLOT, slot_names


@dataclass(frozen=True)
class AdapterSlots:
    """Add branches of zeros that adapters fill; the last pass of a recipe."""

    name: ClassVar[str] = "adapter-slots"
    stage: ClassVar[Stage] = Stage.LOWER
    lossless: ClassVar[bool] = True
    version: ClassVar[int] = 1

    rank: int = 4  # of every branch, and so of every adapter
    layers: tuple[str, ...] = ()  # nodes of the cleaned reference; all by default

    def __post_init__(self) -> None:
        """Check the parameters."""
        if not self.rank > 0:
            raise PassError(f"adapter-slots: rank is {self.rank}, expected above 0")

    def run(self, model: ir.Model, context: Context) -> Result:
        """Add the slots; ``changed`` counts them."""
        if any(name.startswith(SLOT) for name in model.graph.initializers):
            return Result(model, 0)
        digest = base_digest(context.reference)
        try:
            form = trainable_form(context)
            found, skipped = branches(form, self.rank, self.layers, of=self.name)
        except PassError as reason:
            if self.layers:
                raise
            return Result(model, 0, findings=(str(reason),))
        names = {b.layer: slot_names(digest, b.result) for b in found}
        zeros = {b.layer: (np.zeros(b.down, np.float32), np.zeros(b.up, np.float32)) for b in found}
        gone = add_branches(model, found, names, zeros)
        return Result(model, len(found) - len(gone), (*skipped, *gone))


def trainable_form(context: Context) -> ir.Model:
    """The reference as it is trained: cleaned and fused, its values named as in the bundle."""
    model = context.reference.clone()
    for pass_ in (Cleanup(), Fuse(), Cleanup()):
        model = pass_.run(model, replace(context, lock={})).model
    return model


def base_digest(reference: ir.Model) -> str:
    """What an adapter belongs to: 16 hexadecimal digits over nodes and weights of a reference."""
    digest = hashlib.sha256()
    for node in reference.graph:
        names = [v.name if v is not None else None for v in node.inputs]
        digest.update(f"{node.op_type} {names} {[v.name for v in node.outputs]}\0".encode())
    for name, value in sorted(reference.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
            digest.update(tensor.tobytes())
    return digest.hexdigest()[:16]
