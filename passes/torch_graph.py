"""The differentiable twin of a graph: an ``onnx_ir.Model`` as a ``torch.nn.Module``.

Float initializers are parameters, integers and shapes are constants, nodes run one after
the other by the operators of ``torch_ops``. QuantizeLinear and DequantizeLinear are
differentiated straight through: rounding passes the gradient on, clamping stops it
(Bengio et al. 2013, arXiv:1308.3432; Jacob et al. 2018, arXiv:1712.05877, section 3). An
integer weight behind DequantizeLinear is trained as a float under its fixed scale and
rounded back into the same file. ``write_back`` makes new tensors; names and signature stay.

Left out: control flow, sequences, ONNX Runtime's own operators, learned scales. The graph
is to be standard ONNX, as it is before ``lower``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from edgec.passes.contract import PassError
from edgec.passes.torch_call import Call
from edgec.passes.torch_ops import OPERATORS, Operator, quantize_dequantize

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_OPSET = 13
_LEARNED = {ir.DataType.FLOAT}
_INTEGER_WEIGHTS = {
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT32: (-(2**31) + 128, 2**31 - 129),  # what float32 holds of int32
}


@dataclass(frozen=True)
class _Latent:
    """An integer initializer that is trained as a float: q = clamp(round(w / scale) + zero)."""

    low: int
    high: int


@dataclass(frozen=True)
class _Step:
    """What runs at once: a node, or two that make one operator."""

    node: ir.Node
    operator: Operator
    inputs: Sequence[ir.Value | None]
    outputs: Sequence[ir.Value]


class TorchGraph(torch.nn.Module):
    """The graph as a module; ``to_torch`` makes one."""

    def __init__(self, model: ir.Model, weights: Mapping[str, Tensor]) -> None:
        """weights: float values to start integer weights from, by initializer name."""
        super().__init__()
        self._nodes = tuple(_check(node) for node in model.graph)
        self._steps = _steps(self._nodes)
        self._inputs = tuple(str(value.name) for value in model.graph.inputs)
        self.outputs = tuple(str(value.name) for value in model.graph.outputs)
        self._constants: dict[str, Tensor] = {}
        self._keys: dict[str, str] = {}  # initializer -> parameter, whose name has no dots
        self._latents: dict[str, _Latent] = {}
        self._parameters_in_order = torch.nn.ParameterList()
        for name, value in model.graph.initializers.items():
            self._add(name, value, weights.get(name))
        self._last_use = _last_uses(self._steps)

    def forward(self, feeds: Mapping[str, Tensor], keep: Iterable[str] = ()) -> dict[str, Tensor]:
        """The outputs by name, and the values named in ``keep``."""
        kept = {*keep, *self.outputs}
        values: dict[str, Any] = {name: feeds[name] for name in self._inputs}
        values |= self._constants
        for name, index in self._keys.items():
            values[name] = self._parameters_in_order[int(index)]
        for position, step in enumerate(self._steps):
            node = step.node
            arguments = [values[str(v.name)] if v is not None else None for v in step.inputs]
            call = Call(node, arguments, self._latents_of(node))
            try:
                results = step.operator(call)
            except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
                raise PassError(
                    f"node '{node.name}' ({node.op_type}) cannot run in torch: {error}"
                ) from error
            results = results if isinstance(results, tuple) else (results,)
            if len(results) < len([v for v in step.outputs if v.name]):
                raise PassError(
                    f"node '{node.name}' ({node.op_type}) has {len(step.outputs)} outputs; "
                    f"the twin computes {len(results)}"
                )
            for value, result in zip(step.outputs, results, strict=False):
                values[str(value.name)] = result
            for name in self._last_use.get(position, ()):
                if name not in kept:
                    values.pop(name, None)
        return {name: values[name] for name in kept}

    def initializer(self, name: str) -> torch.nn.Parameter:
        """The parameter that stands for an initializer of the graph."""
        parameter: torch.nn.Parameter = self._parameters_in_order[int(self._keys[name])]
        return parameter

    def trained(self) -> tuple[str, ...]:
        """Names of the initializers that are parameters, in the order of the graph."""
        return tuple(self._keys)

    def quantization_step(self, name: str) -> float:
        """Mean scale of an integer weight, the distance of two of its values; 0 for floats."""
        if name not in self._latents:
            return 0.0
        node = next(n for n in self._nodes if n.inputs and _reads(n, name))
        return float(self._constant_of(node.inputs[1]).float().mean())

    def write_back(self, model: ir.Model) -> int:
        """Put the trained values into the model's initializers as new tensors.

        model: the graph that the twin was made from, or a clone of it. Returns the number
        of initializers whose bytes changed. Integer weights are rounded as they were in
        the forward pass.
        """
        changed = 0
        for name in self._keys:
            value = model.graph.initializers[name]
            tensor = value.const_value
            assert tensor is not None
            array = self._array(model, name)
            if array.tobytes() != np.ascontiguousarray(tensor.numpy()).tobytes():
                value.const_value = ir.tensor(array, dtype=tensor.dtype, name=name)
                changed += 1
        return changed

    def _array(self, model: ir.Model, name: str) -> np.ndarray[Any, Any]:
        latent = self._latents.get(name)
        trained = self.initializer(name).detach()
        old = model.graph.initializers[name].const_value
        assert old is not None
        if latent is None:
            array: np.ndarray[Any, Any] = trained.numpy().astype(old.numpy().dtype)
            return array
        node = _dequantizer(model.graph.initializers[name])
        assert node is not None
        scale, zero = (self._constant_of(v) for v in (node.inputs[1], _at(node, 2)))
        call = Call(node, [trained, scale, zero], (latent.low, latent.high))
        before = old.numpy()
        # float32 does not hold every int32: where nothing was trained, the integer stays
        same = call.dequantized(torch.from_numpy(before.astype(np.float32))) == trained
        rounded = call.quantized(trained).numpy().astype(before.dtype)
        return np.asarray(np.where(same.numpy(), before, rounded))

    def _constant_of(self, value: ir.Value | None) -> Any:
        if value is None:
            return None
        name = str(value.name)
        if name in self._keys:
            return self.initializer(name).detach()
        return self._constants[name]

    def _latents_of(self, node: ir.Node) -> tuple[int, int] | None:
        if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
            return None
        latent = self._latents.get(str(node.inputs[0].name))
        return None if latent is None else (latent.low, latent.high)

    def _add(self, name: str, value: ir.Value, start: Tensor | None) -> None:
        tensor = value.const_value
        if tensor is None:
            raise PassError(f"initializer '{name}' has no data")
        node = _dequantizer(value)
        if tensor.dtype in _INTEGER_WEIGHTS and node is not None:
            integers = torch.from_numpy(tensor.numpy().astype(np.float32))
            scale, zero = (_numpy(node.inputs[1]), _numpy(_at(node, 2)))
            call = Call(node, [integers, scale, zero])
            floats = call.dequantized(integers)
            self._latents[name] = _Latent(*_INTEGER_WEIGHTS[tensor.dtype])
            self._learn(name, floats if start is None else start.reshape(floats.shape))
        elif tensor.dtype in _LEARNED and not _is_scale(value):
            self._learn(name, torch.from_numpy(tensor.numpy().copy()))
        else:
            array = tensor.numpy()
            if array.dtype.kind not in "iufb":  # ml_dtypes
                array = array.astype(np.float32)
            self._constants[name] = torch.from_numpy(np.array(array))

    def _learn(self, name: str, start: Tensor) -> None:
        self._keys[name] = str(len(self._parameters_in_order))
        self._parameters_in_order.append(torch.nn.Parameter(start.clone().float()))


def to_torch(
    model: ir.Model, weights: Mapping[str, np.ndarray[Any, Any]] | None = None
) -> TorchGraph:
    """The twin of a graph.

    weights: float values from which integer weights start, by the name of the integer
    initializer; without one it starts from its dequantized value.
    Raises PassError naming the node that the twin cannot run, and below opset 13, where
    Softmax and others meant something else.
    """
    opset = model.opset_imports.get("", 0)
    if opset < _LEAST_OPSET:
        raise PassError(
            f"training needs opset {_LEAST_OPSET} or newer, the model has {opset}; "
            "export it with a newer opset"
        )
    starts = {
        name: torch.from_numpy(np.array(array, np.float32))
        for name, array in (weights or {}).items()
    }
    return TorchGraph(model, starts)


def claimed_operators() -> tuple[str, ...]:
    """Names of the ONNX operators that the twin runs, sorted."""
    return tuple(sorted(OPERATORS))


def _check(node: ir.Node) -> ir.Node:
    if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
        domain = f"{node.domain}::" if node.domain else ""
        raise PassError(
            f"node '{node.name}' ({domain}{node.op_type}) has no differentiable form; training "
            "works on standard ONNX without control flow"
        )
    return node


def _dequantizer(value: ir.Value) -> ir.Node | None:
    """The DequantizeLinear that reads an initializer as its data.

    None if something else reads it too, with another scale for example: then it is no weight
    that one float value stands for.
    """
    uses = value.uses()
    nodes = [u.node for u in uses if u.node.op_type == "DequantizeLinear" and u.idx == 0]
    if not nodes or len(nodes) != len(uses):
        return None
    ways = {(tuple(n.inputs[1:]), n.attributes.get_int("axis", 1)) for n in nodes}
    return nodes[0] if len(ways) == 1 else None


def _reads(node: ir.Node, name: str) -> bool:
    """True if the node dequantizes the value of that name."""
    data = node.inputs[0]
    return node.op_type == "DequantizeLinear" and data is not None and data.name == name


def _is_scale(value: ir.Value) -> bool:
    """True for the scale of a QuantizeLinear or DequantizeLinear: fixed while training."""
    quantizers = {"QuantizeLinear", "DequantizeLinear"}
    return any(u.node.op_type in quantizers and u.idx > 0 for u in value.uses())


def _numpy(value: ir.Value | None) -> Any:
    if value is None:
        return None
    tensor = value.const_value
    if tensor is None:
        raise PassError(f"scale '{value.name}' of a quantized weight is not constant")
    return torch.from_numpy(np.array(tensor.numpy()).astype(np.float32))


def _at(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _steps(nodes: Sequence[ir.Node]) -> tuple[_Step, ...]:
    """The nodes in order; a QuantizeLinear with the DequantizeLinear behind it is one step."""
    steps: list[_Step] = []
    for node in nodes:
        if node.op_type == "QuantizeLinear" and _pairs(node):
            continue
        quantizer = _quantizer(node)
        if quantizer is None:
            steps.append(_Step(node, OPERATORS[node.op_type], node.inputs, node.outputs))
            continue
        own = (*quantizer.inputs[:3], None)[:3]
        inputs = (*own, *node.inputs[1:3])
        steps.append(_Step(quantizer, quantize_dequantize, inputs, node.outputs))
    return tuple(steps)


def _quantizer(node: ir.Node) -> ir.Node | None:
    """The QuantizeLinear that makes one step with a DequantizeLinear."""
    if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return None
    source = node.inputs[0].producer()
    return source if source is not None and _pairs(source) else None


def _pairs(node: ir.Node) -> bool:
    """True for a QuantizeLinear per tensor that nothing but such DequantizeLinear reads."""
    if node.op_type != "QuantizeLinear" or node.outputs[0].is_graph_output():
        return False
    readers = [use.node for use in node.outputs[0].uses()]
    scales = [n.inputs[1] for n in (node, *readers) if len(n.inputs) > 1]
    return all(n.op_type == "DequantizeLinear" for n in readers) and all(
        v is not None and v.const_value is not None and v.const_value.size == 1 for v in scales
    )


def _last_uses(steps: Sequence[_Step]) -> dict[int, tuple[str, ...]]:
    """Position of a step -> the values that nothing behind it reads."""
    last: dict[str, int] = {}
    for position, step in enumerate(steps):
        for value in step.inputs:
            if value is not None and value.producer() is not None:
                last[str(value.name)] = position
    at: dict[int, list[str]] = {}
    for name, position in last.items():
        at.setdefault(position, []).append(name)
    return {position: tuple(names) for position, names in at.items()}
