"""How long ONNX Runtime takes for one operator of given attributes and sizes.

An operator is a graph of a single node with made-up numbers: weights are initializers, so they
are repacked as in a whole model; quantized ones stand between Q/DQ pairs, which ONNX Runtime
turns into its integer kernel. Convolutions compute in a layout of their own. What brings
numbers into it and back is taken off, since a whole model does that once: for a pointwise
convolution it takes longer than the kernel.

Operators take turns, and what a call costs without any work is subtracted.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Feeds, PassError
from edgec.passes.execution import compiled_graph, open_session, run_feeds
from edgec.passes.timing import interleave
from edgec.targets import Session
from edgec.targets.schema import Int8

Array = np.ndarray[Any, Any]

_CPU = "CPUExecutionProvider"
_LAYOUTS = ("ReorderInput", "ReorderOutput", "Transpose")
_TOGETHER = 16  # operators that take turns
_LEAST_RUNS, _MOST_RUNS = 11, 60
_SECONDS = 0.02  # for each operator
_STEP = np.float32(0.01)  # scale of everything quantized
_FEW = 64  # integers that are spelled out in a key
_IR_VERSION = 10
_PLAIN = {
    ir.AttributeType.FLOAT,
    ir.AttributeType.INT,
    ir.AttributeType.STRING,
    ir.AttributeType.FLOATS,
    ir.AttributeType.INTS,
    ir.AttributeType.STRINGS,
}


@dataclass(frozen=True, eq=False)
class Operand:
    """An input of an operator: a weight if it is constant.

    values: of integers, which may be sizes or indices; None where any numbers will do.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    constant: bool
    values: Array | None = None

    def key(self) -> str:
        """What tells it from another one."""
        text = f"{self.dtype}{list(self.shape)}{'=' if self.constant else ''}"
        if self.values is None:
            return text
        if self.values.size <= _FEW:
            return f"{text}{self.values.tolist()}"
        return f"{text}{hashlib.sha256(self.values.tobytes()).hexdigest()[:16]}"

    def array(self) -> Array:
        """Numbers for it; those made up can be divided by, and have a root and a logarithm."""
        if self.values is not None:
            return self.values
        if self.dtype.kind not in "f":
            return np.zeros(self.shape, self.dtype)
        return np.random.default_rng(0).uniform(0.5, 1.5, self.shape).astype(self.dtype)


@dataclass(frozen=True, eq=False)
class Operator:
    """A node without its surroundings.

    integers: the scheme in which it computes in 8 bits; None for what it is written in.
    """

    domain: str
    op_type: str
    opset: int
    attributes: Mapping[str, ir.Attr]
    operands: tuple[Operand | None, ...]
    outputs: int
    integers: Int8 | None = None

    def is_plain(self) -> bool:
        """False for one with attributes that are graphs or tensors: it cannot be measured."""
        return all(attribute.type in _PLAIN for attribute in self.attributes.values())

    def key(self) -> str:
        """Text that tells operators apart whose latency may differ; for plain ones only."""
        scheme = self.integers
        form = None
        if scheme is not None:
            form = [scheme.activation, scheme.weight, scheme.per_channel]
        named = {name: a.value for name, a in sorted(self.attributes.items())}
        operands = [None if o is None else o.key() for o in self.operands]
        parts = [self.domain, self.op_type, self.opset, named, operands, self.outputs, form]
        return json.dumps(parts, separators=(",", ":"))


def latencies_ms(operators: Sequence[Operator], settings: Session) -> list[float | None]:
    """Medians of each operator by itself, in milliseconds; None for one that does not run alone.

    settings: of the target's sessions. On one thread it is CPU time, which other programs on
    the machine disturb less.
    """
    alone = settings.threads == 1 and set(settings.providers) == {_CPU}
    clock = time.thread_time if alone else time.perf_counter
    found: list[float | None] = []
    for start in range(0, len(operators), _TOGETHER):
        calls = [_callable(o, settings) for o in operators[start : start + _TOGETHER]]
        candidates = [("", call) for call in (_idle(settings), *calls) if call is not None]
        timings = interleave(
            candidates,
            seconds=_SECONDS * len(candidates),
            min_runs=_LEAST_RUNS,
            max_runs=_MOST_RUNS,
            clock=clock,
        )
        idle, *medians = (timing.median_ms for timing in timings)
        left = iter(medians)
        found += [None if call is None else max(next(left) - idle, 0.0) for call in calls]
    return found


def _idle(settings: Session) -> Callable[[], object]:
    """A call that computes next to nothing."""
    number = Operand(np.dtype(np.float32), (1,), constant=False)
    call = _callable(Operator("", "Neg", 13, {}, (number,), 1), settings)
    assert call is not None  # every ONNX Runtime has it
    return call


def _callable(operator: Operator, settings: Session) -> Callable[[], object] | None:
    """Runs the operator's kernel, in memory that is there already; None if it cannot be run."""
    import onnxruntime

    try:
        model, feeds = _single(operator)
        compiled = compiled_graph(model, settings=settings, threads=settings.threads)
        if operator.op_type not in _LAYOUTS:
            compiled, feeds = _without_layouts(compiled, feeds)
        session = open_session(
            compiled, settings=settings, threads=settings.threads, optimized=False
        )
        outputs = run_feeds(session, feeds)
        binding = session.io_binding()
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        for output, array in zip(session.get_outputs(), outputs, strict=True):
            binding.bind_ortvalue_output(
                output.name, onnxruntime.OrtValue.ortvalue_from_numpy(array)
            )
    except (PassError, RuntimeError, TypeError, AttributeError):
        return None
    return lambda: session.run_with_iobinding(binding)


def _single(operator: Operator) -> tuple[ir.Model, dict[str, Array]]:
    """The model of one operator, and its feeds."""
    build = _Build(operator)
    inputs = [build.operand(index) for index in range(len(operator.operands))]
    node = ir.node(
        operator.op_type,
        inputs,
        attributes=dict(operator.attributes),
        domain=operator.domain,
        num_outputs=operator.outputs,
    )
    build.nodes.append(node)
    for index, value in enumerate(node.outputs):
        value.name = f"made{index}"
    outputs = list(node.outputs)
    if operator.integers is not None:
        outputs = [build.quantized(node.outputs[0])]
    opsets = {"": operator.opset} if not operator.domain else {"": 21, operator.domain: 1}
    graph = ir.Graph(
        build.inputs,
        outputs,
        nodes=build.nodes,
        initializers=build.initializers,
        opset_imports=opsets,
        name="operator",
    )
    return ir.Model(graph, ir_version=_IR_VERSION), build.feeds


class _Build:
    """Collects the parts of a single operator's graph."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.initializers: list[ir.Value] = []
        self.feeds: dict[str, Array] = {}

    def operand(self, index: int) -> ir.Value | None:
        """The value that the node reads."""
        given, scheme = self._operator.operands[index], self._operator.integers
        if given is None:
            return None
        if scheme is None or given.dtype != np.float32:
            return self._value(f"in{index}", given.array(), given.constant)
        if not given.constant or index == 0:
            integers = np.full(given.shape, 7, scheme.activation)
            value = self._value(f"in{index}", integers, given.constant)
            return self._scaled(value, "DequantizeLinear", scheme.activation, given.shape)
        axis = self._channels(len(given.shape)) if scheme.per_channel and given.shape else None
        if index == 1:
            values = np.random.default_rng(0).integers(-100, 100, given.shape)
            kept = values.astype(scheme.weight) if scheme.weight == "int8" else values + 128
            value = self._value("weight", kept.astype(scheme.weight), True)
            return self._scaled(value, "DequantizeLinear", scheme.weight, given.shape, axis)
        value = self._value(f"bias{index}", np.ones(given.shape, np.int32), True)
        return self._scaled(
            value, "DequantizeLinear", "int32", given.shape, None if axis is None else 0
        )

    def quantized(self, value: ir.Value) -> ir.Value:
        """The 8 bits of an output."""
        scheme = self._operator.integers
        assert scheme is not None  # asked for by who knows
        return self._scaled(value, "QuantizeLinear", scheme.activation, ())

    def _channels(self, rank: int) -> int:
        """The axis of a weight's output channels."""
        if self._operator.op_type == "Conv":
            return 0
        transposed = self._operator.attributes.get("transB")
        return 0 if transposed is not None and transposed.as_int() else rank - 1

    def _scaled(
        self,
        value: ir.Value,
        op_type: str,
        dtype: str,
        shape: Sequence[int],
        axis: int | None = None,
    ) -> ir.Value:
        size = () if axis is None else (shape[axis],)
        zero = 128 if dtype == "uint8" else 0
        name = f"{value.name}_{op_type}"
        # ONNX Runtime fuses a bias only at the scale of the products
        step = _STEP * _STEP if dtype == "int32" else _STEP
        scale = self._value(f"{name}_scale", np.full(size, step, np.float32), True)
        point = self._value(f"{name}_zero", np.full(size, zero, dtype), True)
        attributes = {} if axis is None else {"axis": axis}
        node = ir.node(op_type, [value, scale, point], attributes=attributes)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def _value(self, name: str, array: Array, constant: bool) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        if constant:
            value.const_value = tensor
            self.initializers.append(value)
        else:
            self.inputs.append(value)
            self.feeds[name] = array
        return value


def _without_layouts(model: ir.Model, feeds: Feeds) -> tuple[ir.Model, dict[str, Array]]:
    """The graph from behind what only moves its inputs, to before what moves its outputs."""
    graph = model.graph
    moved = [
        node
        for node in graph
        if node.op_type in _LAYOUTS
        and node.inputs[0] is not None
        and node.inputs[0] in graph.inputs
    ]
    names = [str(node.outputs[0].name) for node in moved]
    for node in moved:
        _type_as(node.outputs[0], node.inputs[0])
    found = {}
    if moved:
        arrays = run_feeds(open_session(model, outputs=names, optimized=False), feeds)
        found = dict(zip(names, arrays, strict=True))
    for node in moved:
        value, source = node.outputs[0], node.inputs[0]
        assert source is not None  # looked at above
        shape = ir.Shape(found[str(value.name)].shape)
        inside = ir.Value(name=value.name, type=value.type, shape=shape)
        value.replace_all_uses_with(inside)
        graph.remove(node, safe=True)
        graph.inputs.append(inside)
        if not source.uses():
            graph.inputs.remove(source)
    for index, value in enumerate(graph.outputs):
        last = value.producer()
        if last is not None and last.op_type in _LAYOUTS:
            source = last.inputs[0]
            assert source is not None  # layouts have an input
            _type_as(source, value)
            graph.outputs[index] = source
            graph.remove(last, safe=True)
    read = {value.name for value in graph.inputs}
    return model, {name: array for name, array in {**feeds, **found}.items() if name in read}


def _type_as(value: ir.Value, like: ir.Value | None) -> None:
    if like is not None:
        value.type = like.type


__all__ = ["Operand", "Operator", "latencies_ms"]
