"""The differentiable twin of a graph: an ``onnx_ir.Model`` as a ``torch.nn.Module``.

Float initializers are parameters; integers, shapes and the numbers of a formula (of rank 0,
which cleanup shares between nodes) are constants. Nodes run one after the other by the
operators of ``torch_ops``. QuantizeLinear and DequantizeLinear are
differentiated straight through (``torch_quantize``), under fixed scales or learned ones
(LSQ, Esser et al. 2020, arXiv:1902.08153). An integer weight behind DequantizeLinear is
trained as a float and rounded back into the same file. ``write_back`` makes new tensors; names
and signature stay.

Left out: control flow, sequences, ONNX Runtime's own operators; float16 initializers are
constants. The graph is to be standard ONNX, as it is before ``lower``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from edgec.passes.contract import PassError
from edgec.passes.torch_call import Call, tensor
from edgec.passes.torch_ops import OPERATORS
from edgec.passes.torch_quantize import dequantized, quantized
from edgec.passes.torch_scales import Scales, learnable_scales
from edgec.passes.torch_steps import dequantizer, last_uses, steps

_LEAST_OPSET = 13
_INTEGER_WEIGHTS = {
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT16: (-(2**15), 2**15 - 1),
    ir.DataType.UINT16: (0, 2**16 - 1),
    ir.DataType.INT32: (-(2**31) + 128, 2**31 - 129),  # what float32 holds of int32
}
# float inputs that say how a node works, and are no weights
_SETTINGS = {
    "BatchNormalization": (3, 4),
    "Clip": (1, 2),
    "Dropout": (1,),
    "OneHot": (2,),
    "Pad": (2,),
    "Pow": (1,),
    "Range": (0, 1, 2),
    "Resize": (1, 2),
}
_MASKS = 1e30  # numbers from here on stand for infinity
_LEAST_SHARE = 1 / 1024  # of a scale's first value: it stays positive whatever the optimizer does


class TorchGraph(torch.nn.Module):
    """The graph as a module; ``to_torch`` makes one."""

    def __init__(
        self, model: ir.Model, scales: Scales, bits_from: int, keep_integers: bool
    ) -> None:
        """scales: those to be learned. The others are those of ``to_torch``."""
        super().__init__()
        self._keep_integers = keep_integers
        self._steps = steps(model)
        self._inputs = tuple(str(value.name) for value in model.graph.inputs)
        self.outputs = tuple(str(value.name) for value in model.graph.outputs)
        self._constants: dict[str, Tensor] = {}
        self._keys: dict[str, str] = {}  # initializer -> parameter, whose name has no dots
        self._latents: dict[str, ir.Node] = {}  # integer weight -> its DequantizeLinear
        self._ranges: dict[str, tuple[int, int]] = {}  # of the integers of such a weight
        self._extra_bits: dict[str, int] = {}  # that such a weight may have above its own
        self._bits_from = bits_from
        self._scales = scales
        self._parameters_in_order = torch.nn.ParameterList()
        for name, value in model.graph.initializers.items():
            self._add(name, value)
        self._last_use = last_uses(self._steps)

    def forward(
        self,
        feeds: Mapping[str, Tensor],
        keep: Iterable[str] = (),
        segments: int = 1,
        wider: float = 0.0,
    ) -> dict[str, Tensor]:
        """The outputs by name, and the values named in ``keep``.

        wider: share of the bits that integer weights have to spare (``widened``) which they
        are rounded to above their own, in whole bits, rounded up.
        segments: parts of the graph whose inner values are computed again in the backward
        pass instead of kept (Chen et al. 2016, arXiv:1604.06174, section 3); 1 keeps all.
        """
        kept = frozenset((*keep, *self.outputs))
        values: dict[str, Any] = {name: feeds[name] for name in self._inputs}
        values |= self._constants
        for name, index in self._keys.items():
            values[name] = self._parameters_in_order[int(index)]
        if self._scales.leaders:
            values |= self._learned_scales()
        if segments == 1 or not torch.is_grad_enabled():
            values = self._run(values, range(len(self._steps)), kept, wider)
        else:
            bounds = [len(self._steps) * i // segments for i in range(segments + 1)]
            for start, stop in itertools.pairwise(bounds):
                values = checkpoint(
                    self._run,
                    values,
                    range(start, stop),
                    kept,
                    wider,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
        return {name: values[name] for name in kept}

    def _run(
        self, values: Mapping[str, Any], positions: range, kept: frozenset[str], wider: float
    ) -> dict[str, Any]:
        """What there is behind some steps, from what there is before them."""
        values = dict(values)
        for position in positions:
            step = self._steps[position]
            node = step.node
            arguments = [values[str(v.name)] if v is not None else None for v in step.inputs]
            weight = self._weight_of(node)
            call = Call(node, arguments, self._ranges.get(weight), self._finer(weight, wider))
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
        return values

    def initializer(self, name: str) -> torch.nn.Parameter:
        """The parameter that stands for an initializer of the graph.

        Of a learned scale it is the factor, of the scale's shape, that its first values get.
        """
        parameter: torch.nn.Parameter = self._parameters_in_order[int(self._keys[name])]
        return parameter

    def trained(self) -> tuple[str, ...]:
        """Names of the initializers that are parameters, in the order of the graph."""
        return tuple(self._keys)

    def scales(self) -> tuple[str, ...]:
        """Those of ``trained`` that are learned scales."""
        return tuple(name for name in self._keys if name in self._scales.leaders)

    def widened(self) -> dict[str, int]:
        """Integer weight -> bits above its own that its grid may have; without those of 0."""
        return dict(self._extra_bits)

    def quantization_step(self, name: str) -> float:
        """Mean scale of an integer weight, the distance of two of its values; 0 for floats."""
        if name not in self._latents:
            return 0.0
        return float(self._current(self._latents[name].inputs[1]).float().mean())

    def write_back(self, model: ir.Model) -> int:
        """Put the trained values into the model's initializers as new tensors.

        model: the graph that the twin was made from, or a clone of it. Returns the number
        of initializers whose bytes changed. Integer weights are rounded as they were in
        the forward pass.
        """
        changed = 0
        for name in {**self._keys, **self._scales.leaders, **self._scales.products}:
            value = model.graph.initializers[name]
            old = value.const_value
            assert old is not None
            array = self._array(name, old.numpy())
            if array.tobytes() != np.ascontiguousarray(old.numpy()).tobytes():
                value.const_value = ir.tensor(array, dtype=old.dtype, name=name)
                changed += 1
        return changed

    def _array(self, name: str, before: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """What is to be stored of a trained initializer."""
        node = self._latents.get(name)
        if node is None:
            held = self._scale(name) if name in self._constants else self.initializer(name)
            array: np.ndarray[Any, Any] = held.detach().cpu().numpy().astype(before.dtype)
            return array
        trained = self.initializer(name).detach()
        call = Call(
            node, [trained, *(self._current(v) for v in node.inputs[1:3])], self._ranges[name]
        )
        # float32 does not hold every int32: where nothing was trained, the integer stays
        same = dequantized(call, torch.from_numpy(before.astype(np.float32))) == trained
        rounded = quantized(call, trained).cpu().numpy().astype(before.dtype)
        return np.asarray(np.where(same.cpu().numpy(), before, rounded))

    def _current(self, value: ir.Value | None) -> Any:
        """What an initializer is now, no part of a gradient."""
        if value is None:
            return None
        name = str(value.name)
        return self._scale(name) if name in self._constants else self.initializer(name).detach()

    def _scale(self, name: str) -> Tensor:
        """A constant, or what a learned scale has become: its first value, if nothing moved it."""
        start = self._constants[name]
        factors = self._scales.products.get(name)
        if factors is not None:
            if all(torch.equal(self._scale(f), self._constants[f]) for f in factors):
                return start
            return _product([self._scale(f) for f in factors], start)
        leader = self._scales.leaders.get(name)
        if leader is None:
            return start
        return _multiplied(self._constants[leader], self.initializer(leader)).detach()

    def _learned_scales(self) -> dict[str, Tensor]:
        """All scales that are learned or follow one, for a forward pass."""
        found: dict[str, Tensor] = {}
        for name, leader in self._scales.leaders.items():
            if leader not in found:
                found[leader] = _multiplied(self._constants[leader], self.initializer(leader))
            found[name] = found[leader]
        for name, factors in self._scales.products.items():
            both = [found.get(f, self._constants[f]).detach() for f in factors]
            found[name] = _product(both, self._constants[name])
        return found

    def _weight_of(self, node: ir.Node) -> str:
        """The trained integer weight that a node dequantizes; "" if there is none."""
        if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
            return ""
        name = str(node.inputs[0].name)
        return name if name in self._latents else ""

    def _finer(self, weight: str, wider: float) -> int:
        """Points of a weight's grid for each integer."""
        return int(2 ** math.ceil(self._extra_bits.get(weight, 0) * wider))

    def _add(self, name: str, value: ir.Value) -> None:
        stored = value.const_value
        if stored is None:
            raise PassError(f"initializer '{name}' has no data")
        node = dequantizer(value)
        integral = stored.dtype in _INTEGER_WEIGHTS and node is not None
        if integral and self._keep_integers and len(stored.shape) > 1:
            self._constants[name] = tensor(stored.numpy())
        elif stored.dtype in _INTEGER_WEIGHTS and node is not None:
            integers = torch.from_numpy(stored.numpy().astype(np.float32))
            call = Call(node, [integers, *(_stored(v) for v in node.inputs[1:3])])
            floats = dequantized(call, integers)
            low, high = _INTEGER_WEIGHTS[stored.dtype]
            self._latents[name], self._ranges[name] = node, (low, high)
            if (extra := self._bits_from - int(high - low).bit_length()) > 0:
                self._extra_bits[name] = extra
            self._learn(name, floats)
        elif stored.dtype == ir.DataType.FLOAT and _is_weight(value):
            self._learn(name, torch.from_numpy(stored.numpy().copy()))
        else:
            self._constants[name] = tensor(stored.numpy())
            if self._scales.leaders.get(name) == name:  # small ones move as far as large ones
                self._learn(name, torch.ones_like(self._constants[name]))

    def _learn(self, name: str, start: Tensor) -> None:
        self._keys[name] = str(len(self._parameters_in_order))
        self._parameters_in_order.append(torch.nn.Parameter(start.clone().float()))


def to_torch(
    model: ir.Model,
    *,
    learn_scales: bool = False,
    bits_from: int = 0,
    keep_integers: bool = False,
) -> TorchGraph:
    """The twin of a graph.

    Integer weights start from their dequantized values.
    keep_integers: those of two and more dimensions stay as they are, whatever their scales become.
    learn_scales: scales of QuantizeLinear and DequantizeLinear are parameters too.
    bits_from: width of the finest grid of integer weights, where they have fewer bits.
    Raises PassError naming the node that the twin cannot run, and below opset 13, where
    Softmax and others meant something else.
    """
    opset = model.opset_imports.get("", 0)
    if opset < _LEAST_OPSET:
        raise PassError(
            f"training needs opset {_LEAST_OPSET} or newer, the model has {opset}; "
            "export it with a newer opset"
        )
    scales = learnable_scales(model) if learn_scales else Scales({}, {})
    return TorchGraph(model, scales, bits_from, keep_integers)


def claimed_operators() -> tuple[str, ...]:
    """Names of the ONNX operators that the twin runs, sorted."""
    return tuple(sorted(OPERATORS))


def _is_weight(value: ir.Value) -> bool:
    """False for scales, for numbers that say how a node works, and for what masks."""
    assert value.const_value is not None
    array = value.const_value.numpy()
    if not array.ndim:
        return False
    quantizers = {"QuantizeLinear", "DequantizeLinear"}
    for use in value.uses():
        if use.idx in _SETTINGS.get(use.node.op_type, ()):
            return False
        if use.node.op_type in quantizers and use.idx > 0:
            return False
    return bool(np.abs(array).max(initial=0) < _MASKS)


def _stored(value: ir.Value | None) -> Tensor | None:
    if value is None:
        return None
    assert value.const_value is not None  # ``dequantizer`` looked
    return tensor(value.const_value.numpy())


def _multiplied(start: Tensor, factor: Tensor) -> Tensor:
    """A scale with its learned factor, which is held above a least one; the gradient passes on."""
    fixed = factor.detach()
    return start * (fixed.clamp_min(_LEAST_SHARE) + (factor - fixed))


def _product(factors: Sequence[Tensor], start: Tensor) -> Tensor:
    """The scale of a bias, in the shape that it has in the graph."""
    first, second = (factor.reshape(-1) for factor in factors)
    return (first * second).expand(start.numel()).reshape(start.shape)
