"""Refuses graphs that run on a device and compute something else there, with no error.

ONNX Runtime's CPU provider rewrites convolutions to ``com.microsoft.nchwc`` nodes, whose
weights are blocked for the vectors of the CPU at hand: 16 channels with AVX-512, 8 with AVX2
or NEON. A graph that was saved after that gives wrong numbers on any other CPU.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from edgec.emit import operators
from edgec.errors import BundleError, SourceError
from edgec_runtime.bundle import Bundle

_BLOCKED = "com.microsoft.nchwc"


def lint_bundle(bundle: Bundle) -> None:
    """Raise BundleError if a graph holds blocked nodes, or operators that the manifest hides."""
    import onnx

    for role in bundle.manifest.graphs:
        ops = set(operators(ir.from_proto(onnx.load_from_string(bundle.graph(role)))))
        blocked = _blocked(ops)
        if blocked:
            raise BundleError(
                f"bundle {bundle.path}: {blocked}, whose weights are laid out for one kind of CPU "
                "and give wrong numbers on others; build it again from the original model"
            )
        hidden = sorted(ops - set(bundle.manifest.ops))
        if hidden:
            raise BundleError(
                f"bundle {bundle.path}: its graph uses {hidden[0]}, which its manifest does not "
                "list; build it again"
            )


def lint_model(model: ir.Model, where: str) -> None:
    """Raise SourceError if a model holds blocked nodes."""
    blocked = _blocked(operators(model))
    if blocked:
        raise SourceError(
            f"{where}: {blocked}, which ONNX Runtime wrote for the CPU that it ran on and which "
            "give wrong numbers on others; give the model from before it was optimized, or save "
            "it with ORT_ENABLE_EXTENDED at most"
        )


def _blocked(ops: Iterable[str]) -> str:
    """The blocked operators in words, or nothing."""
    names = sorted(op for op in ops if op.startswith(f"{_BLOCKED}::"))
    return f"it holds {', '.join(names)}" if names else ""
