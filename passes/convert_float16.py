"""Stores or computes in half precision.

Where the target computes in float16 the whole graph is converted (by
onnxruntime.transformers.float16), inputs and outputs staying float32. Elsewhere only the
weights are stored as float16 with a Cast to float32 in front of their first use; ONNX
Runtime folds the Cast once at load, so the file halves and nothing else changes.

Weights beyond float16's range (65,504) stay float32: clamping them would be silent damage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgec.passes.cleanup_shapes import Signature
from edgec.passes.contract import Context, PassError, Result, Skip, Stage
from edgec.passes.execution import weights_size_bytes
from edgec.passes.weights import Array, Editor, home, label

_PROTOBUF_LIMIT = 1_500_000_000  # bytes that the converter can be handed
_QUANTIZATION_OPS = ("DequantizeLinear", "QuantizeLinear")  # kernels want their scales constant


@dataclass(frozen=True)
class ConvertFloat16:
    """float32 weights to float16, and the computation where the target can."""

    name: ClassVar[str] = "convert-float16"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    lossless: ClassVar[bool] = False
    version: ClassVar[int] = 1

    min_weights: int = 1024  # smaller weights stay float32
    skip: tuple[str, ...] = ()  # names of weights to leave float32

    def __post_init__(self) -> None:
        """Raise PassError for parameters out of range."""
        if self.min_weights < 0:
            raise PassError(f"convert-float16: min_weights is {self.min_weights}, expected >= 0")

    def run(self, model: ir.Model, context: Context) -> Result:
        """Convert; ``changed`` counts the weights stored in float16."""
        chosen: list[ir.Value] = []
        skipped: list[Skip] = []
        weights = [v for g in model.graphs() for v in g.initializers.values()]
        known = {value.name for value in weights}
        for name in self.skip:
            if name not in known:
                raise PassError(f"convert-float16: skip names '{name}', no weight of the model")
        for value in weights:
            if not self._is_weight(value):
                continue
            reason = self._refusal(value)
            if reason:
                skipped.append(Skip(value.name or "", reason))
            else:
                chosen.append(value)
        if not chosen:
            return Result(model, 0, tuple(skipped))
        size = sum(_array(value).nbytes for value in chosen)
        touched = tuple(dict.fromkeys(_outputs(chosen)))
        if context.target.float16.compute:
            model = _compute(model, {skip.node for skip in skipped})
            touched = tuple(value.name or "" for value in model.graph.outputs)
            finding = f"computes in float16; {size / 1e6:.1f} MB of weights take half of that"
        else:
            _store(model, chosen)
            finding = (
                f"{size / 1e6:.1f} MB of weights are stored as float16 and expanded once at load: "
                f"half the file at float32's speed and memory, since {context.target.name} does "
                "not compute in float16"
            )
        return Result(model, len(chosen), tuple(skipped), touched, findings=(finding,))

    def _is_weight(self, value: ir.Value) -> bool:
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or value.is_graph_input():
            return False
        users = [user.op_type for user, _ in value.uses()]
        quantization = any(user in _QUANTIZATION_OPS for user in users)
        return tensor.size >= max(self.min_weights, 1) and bool(users) and not quantization

    def _refusal(self, value: ir.Value) -> str:
        """Why a weight must stay float32, or an empty string."""
        array = _array(value)
        if value.name in self.skip:
            return "named in skip"
        if value.is_graph_output():
            return "it is an output of the model"
        if not np.isfinite(array).all():
            return "it contains NaN or infinity"
        largest = float(np.abs(array).max())
        if largest > float(np.finfo(np.float16).max):
            return f"its largest magnitude {largest:.4g} is beyond float16's range, 65504"
        return ""


def _store(model: ir.Model, weights: list[ir.Value]) -> None:
    """Each weight in float16, with one Cast at the start of the graph that holds it."""
    editor = Editor(model)
    for value in weights:
        graph, name = home(value), value.name or ""
        half = editor.constant(graph, f"{name}_float16", _array(value).astype(np.float16))
        (single,) = editor.before(
            graph[0],
            "Cast",
            [half],
            {"to": ir.DataType.FLOAT.value},
            wanted=f"{name}_cast",
            shapes=[value.shape],
        )
        for user, index in tuple(value.uses()):
            editor.rewire(user, index, single)


def _compute(model: ir.Model, kept: set[str]) -> ir.Model:
    """The model computing in float16, with the nodes that read ``kept`` weights in float32."""
    import onnx
    from onnxruntime.transformers import float16

    if weights_size_bytes(model) > _PROTOBUF_LIMIT:
        raise PassError("convert-float16: the model is larger than the converter can take (2 GB)")
    editor = Editor(model)
    blocked = []
    for node in model.graph.all_nodes():
        if not node.name:
            node.name = editor.fresh(label(node))
        if any(value is not None and value.name in kept for value in node.inputs):
            blocked.append(node.name)
    proto: onnx.ModelProto = float16.convert_float_to_float16(
        ir.to_proto(model),
        keep_io_types=True,
        op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, *_QUANTIZATION_OPS],
        node_block_list=blocked,
    )
    converted = ir.from_proto(proto)
    Signature.of(model).restore(converted)  # the converter infers shapes of its own
    converted.graph.sort()  # the converter appends its Casts at the end
    for graph in converted.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:  # kept weights are declared float16 there
                value.type = ir.TensorType(value.const_value.dtype)
    return converted


def _outputs(weights: list[ir.Value]) -> list[str]:
    return [user.outputs[0].name or "" for value in weights for user, _ in value.uses()]


def _array(value: ir.Value) -> Array:
    if value.const_value is None:
        raise PassError(f"convert-float16: '{value.name}' has no data")
    return value.const_value.numpy()
