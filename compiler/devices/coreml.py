"""Converts a graph to Core ML: python -m edgec.devices.coreml MODEL.onnx OUTCOME.json

Apple's converter reads PyTorch and no ONNX, so it gets the graph's torch twin, traced. Core
ML computes in half precision by itself, and its converter wants float32: a half-precision
graph is widened first. OUTCOME.json tells the version and how many operations came out, or
the converter's error.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import numpy as np
import onnx_ir as ir


def main(source: pathlib.Path, outcome: pathlib.Path) -> int:
    """Convert and write the outcome; 0 also where the converter refuses."""
    import coremltools

    table: dict[str, Any] = {"version": coremltools.__version__}
    try:
        table["operations"] = _convert(widened(ir.load(source)))
    except Exception as error:  # whatever a converter raises is its answer
        table["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    outcome.write_text(json.dumps(table), encoding="utf-8")
    return 0


def widened(model: ir.Model) -> ir.Model:
    """The model with float32 in place of float16, changed in place."""
    half = ir.DataType.FLOAT16
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype == half:
            wide = value.const_value.numpy().astype("float32")
            value.const_value = ir.tensor(wide, name=value.name)
            value.dtype = ir.DataType.FLOAT
    for node in model.graph:
        for value in node.outputs:
            if value.dtype == half:
                value.dtype = ir.DataType.FLOAT
        if node.op_type == "Cast" and node.attributes["to"].as_int() == half:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    return model


def zeros(model: ir.Model) -> list[Any]:
    """An array for each input. Raises ValueError for one without a fixed shape."""
    arrays = []
    for value in model.graph.inputs:
        if value.shape is None or value.dtype is None or not value.shape.is_static():
            raise ValueError(
                f"input '{value.name}' has no fixed shape, which Core ML's converter needs; build "
                "for a target with static_shapes"
            )
        arrays.append(np.zeros(value.shape.numpy(), value.dtype.numpy()))
    return arrays


def _convert(model: ir.Model) -> int:
    """The number of operations, constants left out, of the converted model."""
    import coremltools
    import torch

    from edgec.passes.torch_graph import to_torch

    _teach_movedim()
    twin = to_torch(model)
    names = [str(value.name) for value in model.graph.inputs]
    arrays = zeros(model)

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twin = twin

        def forward(self, *inputs: Any) -> Any:
            outputs = self.twin(dict(zip(names, inputs, strict=True)))
            return tuple(outputs[name] for name in twin.outputs)

    examples = tuple(torch.from_numpy(array) for array in arrays)
    with torch.no_grad():
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            Positional().eval(), examples, check_trace=False
        )
    described = [
        coremltools.TensorType(  # Core ML has no integers of 64 bits
            name=name, shape=a.shape, dtype=np.int32 if a.dtype.kind in "iu" else np.float32
        )
        for name, a in zip(names, arrays, strict=True)
    ]
    made = coremltools.convert(
        traced,
        inputs=described,
        convert_to="mlprogram",
        minimum_deployment_target=coremltools.target.iOS16,
        skip_model_load=True,
    )
    operations = made._mil_program.functions["main"].operations
    return sum(operation.op_type != "const" for operation in operations)


def _teach_movedim() -> None:
    """Convert torch.movedim of one dimension, which the twin uses and the converter lacks."""
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op

    def movedim(context: Any, node: Any) -> None:
        x, source, target = (context[name] for name in node.inputs)
        order = list(range(x.rank))
        order.insert(target.val % x.rank, order.pop(source.val % x.rank))
        context.add(Builder.transpose(x=x, perm=order, name=node.name))

    register_torch_op(movedim)


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])))
