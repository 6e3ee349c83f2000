"""Brings a graph of any origin into the form that all other passes expect.

Functions are inlined, constants become initializers, constant subgraphs are computed,
duplicates and dead nodes go, names are unique, nodes are sorted, metadata is stripped,
shapes are inferred anew (exporters leave wrong ones, which ONNX Runtime's tools then trip
over), and the opset is raised to the target's. The work is done by onnx_ir's and
onnxscript's passes, repeated until nothing changes; so a second run finds nothing to do.

Left out: initializers of equal contents are merged only where no pass will ever give them
different contents (integers but quantized ones, scalars, large weights): merging two zero
biases would tie two layers together in training.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from edgec.passes.cleanup_opset import raise_opset
from edgec.passes.cleanup_shapes import Signature, refresh_shapes
from edgec.passes.contract import Context, PassError, Result, Skip, Stage
from edgec.passes.matching import bypass_identities, is_op
from edgec.passes.weights import constant

_MAX_ROUNDS = 10
_MAX_FOLD_INPUT = 1 << 24  # elements; larger constants are not computed with
_MAX_FILL = 1 << 12  # elements of a ConstantOfShape that is worth storing
_MAX_FOLD_OUTPUT = 1 << 18  # elements; a larger result must not be larger than its inputs


@dataclass(frozen=True)
class Cleanup:
    """Normalise the graph; its inputs, outputs and numbers stay the same."""

    name: ClassVar[str] = "cleanup"
    stage: ClassVar[Stage] = Stage.CLEAN
    lossless: ClassVar[bool] = True
    version: ClassVar[int] = 1

    def run(self, model: ir.Model, context: Context) -> Result:
        """Return the clean model; ``changed`` counts nodes, values and tensors that differ.

        Raises PassError if a weight has a NaN.
        """
        before = _Snapshot.of(model)
        work = model.clone()
        signature = Signature.of(work)
        _normalise(work)
        _refuse_nan(work)
        skipped: tuple[Skip, ...] = ()
        work, skip = raise_opset(work, context)
        if skip is not None:
            skipped = (skip,)
        work = _until_stable(work)
        signature.restore(work)
        changed = before.differences(_Snapshot.of(work))
        return Result(work if changed else model, changed, skipped)


def _normalise(model: ir.Model) -> None:
    """What every later step relies on: one level of functions, constants as initializers."""
    common.InlinePass()(model)
    common.RemoveInitializersFromInputsPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    _strip_metadata(model)
    model.doc_string = None  # the model's own metadata stays: vocabularies are kept there
    # below IR version 4 every initializer must be an input
    model.ir_version = max(model.ir_version or 0, 8)


def _until_stable(model: ir.Model) -> ir.Model:
    from onnxscript.optimizer import fold_constants_ir

    last = _Snapshot.of(model)
    for _ in range(_MAX_ROUNDS):
        # branches taken out of an If leave uses by nodes of no graph: a clone forgets them
        model = model.clone()
        refresh_shapes(model)
        fold_constants_ir(
            model,
            input_size_limit=_MAX_FOLD_INPUT,
            output_size_limit=_MAX_FOLD_OUTPUT,
            should_fold=_should_fold,
        )
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.LiftSubgraphInitializersToMainGraphPass()(model)
        bypass_identities(model)
        common.CommonSubexpressionEliminationPass()(model)
        _merge_equal_initializers(model)
        common.RemoveUnusedNodesPass()(model)
        common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass()(model)
        common.NameFixPass()(model)
        common.TopologicalSortPass()(model)
        _strip_metadata(model)
        now = _Snapshot.of(model)
        if not last.differences(now):
            break
        last = now
    return model


def _strip_metadata(model: ir.Model) -> None:
    common.ClearMetadataAndDocStringPass()(model)
    for graph in model.graphs():
        outputs = (value for node in graph for value in node.outputs)
        for value in (*graph.inputs, *graph.initializers.values(), *outputs):
            value.metadata_props.clear()
            value.doc_string = None


def _should_fold(node: ir.Node) -> bool | None:
    """Whether a constant is computed now; None leaves it to the limits of size."""
    if is_op(node, "Transpose") and _is_table(node.inputs[0]):
        return False  # the output layer of a language model shares its embedding table
    return True if _is_useful_fill(node) else None


def _is_table(value: ir.Value | None) -> bool:
    """True for a constant whose rows are looked up."""
    if value is None or constant(value) is None:
        return False
    return any(is_op(user, "Gather") and index == 0 for user, index in value.uses())


def _is_useful_fill(node: ir.Node) -> bool:
    """True for a ConstantOfShape of a few numbers: folding it frees the chain behind it.

    A layer's weight may be larger: what folds into a layer (BatchNormalization) needs its numbers.
    """
    shape = constant(node.inputs[0]) if is_op(node, "ConstantOfShape") else None
    if shape is None:
        return False
    uses = node.outputs[0].uses()
    weight = any(i > 0 and is_op(user, "Conv", "ConvTranspose", "Gemm") for user, i in uses)
    return int(np.prod(shape)) <= (_MAX_FOLD_INPUT if weight else _MAX_FILL)


def _refuse_nan(model: ir.Model) -> None:
    """Raise PassError for a NaN in a weight; infinities are legitimate in masks."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point():
                continue
            if np.isnan(tensor.numpy()).any():
                raise PassError(
                    f"initializer '{value.name}' has a NaN: the model was broken before it was "
                    "given to edgec; check the training run or the conversion that wrote it"
                )


def _merge_equal_initializers(model: ir.Model) -> None:
    graph = model.graph
    kept: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or not _mergeable(value, tensor) or value.is_graph_output():
            continue
        digest = hashlib.sha256(tensor.tobytes()).digest()
        key = (tensor.dtype, tuple(tensor.shape.numpy()), digest)
        first = kept.setdefault(key, value)
        if first is not value:
            value.replace_all_uses_with(first)
            graph.initializers.pop(str(value.name))


def _mergeable(value: ir.Value, tensor: ir.TensorProtocol) -> bool:
    if tensor.dtype.is_string():
        return False
    # integers behind DequantizeLinear are weights and biases, trained like floats
    weight = any(user.op_type == "DequantizeLinear" and i == 0 for user, i in value.uses())
    if tensor.size == 1 or not (weight or tensor.dtype.is_floating_point()):
        return True
    return len(tensor.shape) >= 2 and tensor.size >= 1024


@dataclass(frozen=True)
class _Snapshot:
    """A model as comparable parts; weights by reference, since passes never write into them."""

    parts: tuple[bytes, ...]  # nodes, value infos, inputs, outputs, in order
    rest: bytes  # versions, names, opset imports
    tensors: dict[tuple[int, str], ir.TensorProtocol]

    @classmethod
    def of(cls, model: ir.Model) -> _Snapshot:
        clone = model.clone()
        tensors: dict[tuple[int, str], ir.TensorProtocol] = {}
        empty = ir.tensor(np.zeros(0, np.uint8))
        for index, graph in enumerate(clone.graphs()):
            for name, value in graph.initializers.items():
                if value.const_value is not None:
                    tensors[index, name] = value.const_value
                    value.const_value = empty
        proto = ir.to_proto(clone)
        fields = (proto.graph.node, proto.graph.value_info, proto.graph.input, proto.graph.output)
        parts = tuple(p.SerializeToString(deterministic=True) for f in fields for p in f)
        for name in ("node", "value_info", "input", "output", "initializer"):
            proto.graph.ClearField(name)
        return cls(parts, proto.SerializeToString(deterministic=True), tensors)

    def differences(self, other: _Snapshot) -> int:
        """Number of nodes, values and tensors removed, added or altered, whichever is more.

        A node with branches counts as one, whatever changed inside them.
        """
        mine, theirs = Counter(self.parts), Counter(other.parts)
        count = max((mine - theirs).total(), (theirs - mine).total())
        names = self.tensors.keys() | other.tensors.keys()
        count += sum(not _equal(self.tensors.get(n), other.tensors.get(n)) for n in names)
        count += self.rest != other.rest
        moved = self.parts != other.parts or list(self.tensors) != list(other.tensors)
        return count or int(moved)


def _equal(a: ir.TensorProtocol | None, b: ir.TensorProtocol | None) -> bool:
    if a is b:
        return True
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.tobytes() == b.tobytes()
