"""Infers the shapes of all values anew and keeps what was declared where inference is mute.

Declared shapes are wrong as soon as somebody edits a graph or opens a dimension, and wrong
shapes lead rewrites and quantizers astray. ONNX's inference in turn loses dimensions
behind a computed Reshape that the exporter knew. So: infer; if any declared dimension
contradicts, distrust all of them; else let the declared ones fill the gaps.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as common

_Dims = tuple[int | str | None, ...]


@dataclass(frozen=True)
class Signature:
    """The declared types and shapes of a model's inputs and outputs, by name."""

    declared: dict[str | None, tuple[ir.TypeProtocol | None, ir.Shape | None]]

    @classmethod
    def of(cls, model: ir.Model) -> Signature:
        """What the model declares."""
        values = (*model.graph.inputs, *model.graph.outputs)
        return cls({value.name: (value.type, value.shape) for value in values})

    def restore(self, model: ir.Model) -> None:
        """Give inputs and outputs the declared type and shape back, whatever was inferred."""
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.name in self.declared:
                value.type, value.shape = self.declared[value.name]


def refresh_shapes(model: ir.Model) -> None:
    """Replace the shapes of all intermediate values of standard operators."""
    values = [
        value
        for graph in model.graphs()
        for node in graph
        if node.domain in ("", "ai.onnx")
        for value in node.outputs
        if not (graph is model.graph and value.is_graph_output())
    ]
    declared = [(value, value.shape, value.type) for value in values]
    for value in values:
        value.shape = None
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    symbols = {
        dim.value
        for value in model.graph.inputs
        if value.shape is not None
        for dim in value.shape
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None
    }
    trusted = not any(
        _contradict(_dims(shape), _dims(value.shape), symbols) for value, shape, _ in declared
    )
    for value, shape, type_ in declared:
        value.shape = _merged(_dims(shape) if trusted else None, _dims(value.shape), symbols)
        if value.type is None:
            value.type = type_


def _dims(shape: ir.Shape | None) -> _Dims | None:
    if shape is None:
        return None
    return tuple(d if isinstance(d, int) else d.value for d in shape)


def _contradict(declared: _Dims | None, inferred: _Dims | None, symbols: set[str]) -> bool:
    if declared is None or inferred is None:
        return False
    if len(declared) != len(inferred):
        return True
    # an input's open dimension was inferred where a number is declared: opened after export
    return any(
        isinstance(d, int) and d != i and (isinstance(i, int) or i in symbols)
        for d, i in zip(declared, inferred, strict=True)
    )


def _merged(declared: _Dims | None, inferred: _Dims | None, symbols: set[str]) -> ir.Shape | None:
    if inferred is None:
        return None if declared is None else ir.Shape(declared)
    known = declared or (None,) * len(inferred)
    # names that inference makes up (unk__0) change from run to run
    return ir.Shape(
        i if isinstance(i, int) or i in symbols else d for d, i in zip(known, inferred, strict=True)
    )
