"""An .onnx file -> the reference: read, checked, and put right where its writer was careless.

Third parties write files of any age. What is put right here changes no number: initializers
are no inputs, and a dimension of -1 or '?' is an open one.
"""

from __future__ import annotations

import pathlib

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from edgec.errors import SourceError
from edgec.lint import lint_model

_IR_VERSION = 4  # from here on initializers need not be inputs


def load_onnx(path: pathlib.Path) -> ir.Model:
    """The model of an .onnx file, its weights mapped. Raises SourceError if it is none."""
    import onnx

    if not path.is_file():
        raise SourceError(f"{path}: no such file; expected an .onnx file")

    try:
        model = ir.load(path)
    except Exception as error:
        reason = _foreign_type(path) or f"not an ONNX file: {' '.join(str(error).split())[:200]}"
        raise SourceError(f"{path}: {reason}") from error
    if not len(model.graph) or not model.graph.outputs:
        raise SourceError(f"{path}: not an ONNX file, or a graph without nodes")
    lint_model(model, str(path))
    _check_weights_files(model, path)
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SourceError(f"{path}: not a valid ONNX model: {reason}") from error
    # before IR version 4 every initializer had to be an input
    common_passes.RemoveInitializersFromInputsPass()(model)
    model.ir_version = max(model.ir_version or 0, _IR_VERSION)
    _open_dimensions(model)
    _detach(model)
    return model


def _check_weights_files(model: ir.Model, path: pathlib.Path) -> None:
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            file = pathlib.Path(value.const_value.path)
            if not file.is_file():
                raise SourceError(f"{path}: its weights file {file.name} is missing beside it")


def _detach(model: ir.Model) -> None:
    """Make weights of a second file the model's own: it is saved elsewhere later. No copy."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(
                    tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name
                )


def _open_dimensions(model: ir.Model) -> None:
    """Make open what writers mean by -1 and by '?': a dimension of any size, each its own."""
    for graph in model.graphs():
        for value in (*graph.inputs, *(v for node in graph for v in node.outputs)):
            if value.shape is not None:
                value.shape = ir.Shape(None if _is_any(dim) else dim for dim in value.shape)


def _is_any(dim: int | ir.SymbolicDim) -> bool:
    return dim < 0 if isinstance(dim, int) else dim.value == "?"


def _foreign_type(path: pathlib.Path) -> str:
    """What is wrong with a file whose inputs or outputs hold maps, which onnx_ir cannot read."""
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception:  # it is no protobuf either; the caller has the reason
        return ""
    for side, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            inner = value.type
            while inner.WhichOneof("value") in ("sequence_type", "optional_type"):
                inner = getattr(inner, inner.WhichOneof("value")).elem_type
            if inner.WhichOneof("value") not in ("tensor_type", None):
                kind = inner.WhichOneof("value").removesuffix("_type")
                return (
                    f"{side} '{value.name}' holds a {kind}; expected tensors only: convert the "
                    "model without it (skl2onnx: options={'zipmap': False})"
                )
    return ""
