"""Constant weights of a graph: finding, quantizing and replacing them.

What the passes over weights share: read a constant behind an input, turn it into integers
with scales, put new initializers and nodes into the graph under fresh names. Names derive
from the names that are there, so that the same model gives the same bytes.

Left out on purpose: activations (see ranges.py) and anything that measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import PassError
from edgec_runtime.errors import suggestion

Array = np.ndarray[Any, Any]

BLOCK_OPSET = 21  # first opset with DequantizeLinear.block_size and int4


class Refused(Exception):
    """A node cannot be converted; the text is the reason that goes into its Skip."""


def label(node: ir.Node) -> str:
    """The node's name, or its operator and first output where it has none."""
    return node.name or f"{node.op_type} -> {node.outputs[0].name}"


def check_skip(pass_name: str, skip: Sequence[str], nodes: Iterable[ir.Node]) -> None:
    """Raises PassError if ``skip`` names a node that the graph does not have."""
    known = {label(node) for node in nodes}
    for name in skip:
        if name not in known:
            near = suggestion(name, known)
            raise PassError(f"{pass_name}: skip names '{name}', no node of the model{near}")


def constant(value: ir.Value | None) -> Array | None:
    """The array behind a value that no run can change, else None.

    Initializers, Constant nodes and transposes of them are constants; an initializer that
    is also a graph input is not. The array may share memory with the model: never write.
    """
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None or node.domain:
        return None
    if node.op_type == "Constant" and "value" in node.attributes:
        # not ir.convenience.get_const_tensor: it renames the tensor, which clones share
        return node.attributes["value"].as_tensor().numpy()
    if node.op_type != "Transpose":
        return None
    inner = constant(node.inputs[0])
    if inner is None:
        return None
    permutation = node.attributes.get("perm")
    return np.transpose(inner, None if permutation is None else permutation.as_ints())


def float_weight(value: ir.Value | None, *, rank: int | None = None) -> Array:
    """The float32 weight behind a value. Raises Refused where it cannot be quantized."""
    array = constant(value)
    if array is None:
        raise Refused("its weight is computed at run time")
    if array.dtype != np.float32:
        raise Refused(f"its weight is {array.dtype}, not float32")
    if rank is not None and array.ndim != rank:
        raise Refused(f"its weight has {array.ndim} dimensions, {rank} are needed")
    if not np.isfinite(array).all():
        raise Refused("its weight contains NaN or infinity")
    return array


def required(node: ir.Node, index: int) -> ir.Value:
    """An input that the node must have. Raises Refused where it is left out."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise Refused(f"its input {index} is missing")
    return value


def is_float_constant(value: ir.Value | None) -> bool:
    """True for a floating-point constant of any width."""
    array = constant(value)
    return array is not None and array.dtype.kind in "fV" and array.size > 0


@dataclass(frozen=True)
class Quantized:
    """Integers and their meaning: weight = (values - zero_point) * scale.

    values: signed or unsigned integers in int8 or uint8, shaped like the weight.
    scale: float32, all > 0; shaped by the scheme. zero_point: like scale, None means 0.
    """

    values: Array
    scale: Array
    zero_point: Array | None = None


def quantize_channels(weight: Array, kept: tuple[int, ...], *, bits: int = 8) -> Quantized:
    """Symmetric integers with one scale for each index along the kept axes.

    weight: float32. Returns int8 values in +-(2^(bits-1) - 1) and scale float32 of the kept
    axes' shape; a channel of zeros gets 1.0.
    Symmetric per-channel scheme: Jacob et al. 2018 (arXiv:1712.05877), section 2.
    """
    reduced = tuple(axis for axis in range(weight.ndim) if axis not in kept)
    top = float(2 ** (bits - 1) - 1)
    scale = positive(np.abs(weight).max(axis=reduced, keepdims=True) / np.float32(top))
    values = np.clip(np.rint(weight / scale), -top, top).astype(np.int8)
    return Quantized(values, scale.reshape([weight.shape[axis] for axis in kept]))


def positive(scale: Array) -> Array:
    """Scales with 1 in the place of 0: float32."""
    # zeros and subnormals: dividing by them would give NaN or infinity
    tiny = np.finfo(np.float32).tiny
    return np.where(scale < tiny, np.float32(1), scale).astype(np.float32)


class Editor:
    """Adds nodes and initializers to one model under fresh, reproducible names."""

    def __init__(self, model: ir.Model) -> None:
        """Collect the names that the model uses."""
        self._model = model
        self._taken: set[str] = set()
        for graph in model.graphs():
            values = [*graph.inputs, *graph.initializers.values()]
            for node in graph:
                self._taken.add(node.name or "")
                values.extend(node.outputs)
            self._taken.update(value.name or "" for value in values)

    def fresh(self, wanted: str) -> str:
        """``wanted``, or ``wanted_1``, ``wanted_2``, ... if it is taken."""
        name, count = wanted, 0
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name

    def constant(
        self, graph: ir.Graph, wanted: str, array: Array, *, dtype: ir.DataType | None = None
    ) -> ir.Value:
        """A new initializer. ``dtype`` INT4 or UINT4 packs small integers in two a byte."""
        if dtype is not None:
            array = array.astype(dtype.numpy())
        name = self.fresh(wanted)
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
            const_value=tensor,
        )
        graph.register_initializer(value)
        return value

    def before(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        wanted: str,
        dtypes: Sequence[ir.DataType] = (ir.DataType.FLOAT,),
        shapes: Sequence[ir.Shape | None] = (),
        domain: str = "",
    ) -> Sequence[ir.Value]:
        """Insert a node before another one; its outputs, one for each of ``dtypes``.

        wanted: name of the node and stem of its outputs' names.
        """
        name = self.fresh(wanted)
        new = ir.node(
            op_type, inputs, attributes, domain=domain, num_outputs=len(dtypes), name=name
        )
        for index, (value, dtype) in enumerate(zip(new.outputs, dtypes, strict=True)):
            value.name = self.fresh(f"{name}_output" if index == 0 else f"{name}_output_{index}")
            value.type = ir.TensorType(dtype)
            if index < len(shapes) and shapes[index] is not None:
                value.shape = shapes[index]
        graph_of(node).insert_before(node, new)
        if domain:
            self._model.opset_imports.setdefault(domain, 1)
        return new.outputs

    def replace(self, node: ir.Node, values: Sequence[ir.Value]) -> None:
        """Let ``values`` take the place and the names of the node's outputs; remove it."""
        inputs = [value for value in node.inputs if value is not None]
        ir.convenience.replace_nodes_and_values(
            graph_of(node), node, [node], [], node.outputs, values
        )
        for value in inputs:
            self.drop(value)

    def rewire(self, node: ir.Node, index: int, value: ir.Value) -> None:
        """Feed one input of a node from another value."""
        old = node.inputs[index]
        node.replace_input_with(index, value)
        if old is not None:
            self.drop(old)

    def drop(self, value: ir.Value) -> None:
        """Remove an initializer, or what computes a constant, if nothing uses it any more."""
        if value.uses() or value.is_graph_output() or value.is_graph_input():
            return
        node = value.producer()
        if node is None:
            if value.is_initializer():
                del home(value).initializers[value.name or ""]
        elif node.op_type in {"Constant", "Transpose", "DequantizeLinear"} and not node.domain:
            inputs = [i for i in node.inputs if i is not None]
            graph_of(node).remove(node, safe=True)
            for inner in inputs:
                self.drop(inner)


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph or subgraph that holds the node."""
    if not isinstance(node.graph, ir.Graph):
        raise PassError(f"node '{label(node)}' is in no graph; inline the model's functions")
    return node.graph


def home(value: ir.Value) -> ir.Graph:
    """The graph in which a value is defined."""
    if not isinstance(value.graph, ir.Graph):
        raise PassError(f"value '{value.name}' is in no graph; inline the model's functions")
    return value.graph
