"""Decides anew which way each quantized weight is rounded, layer after layer, on a few samples.

The nearest integers are not the best ones: what counts is the layer's output. For each layer
the output of the float layer is the goal and the input is what the quantized network really
delivers there, so that a layer also makes up for those before it, and its activation function
counts (asymmetric reconstruction: AdaRound, Nagel et al. 2020, arXiv:2004.10568, section
3.5; how the integers are found: edgec.passes.rounding). The error on held-out samples decides
which integers a layer keeps, and the model's outputs there decide about them all.

The networks run in ONNX Runtime, whose integers are the ones that ship, from layer to layer:
what is alive in between lies on disk (`edgec.passes.spill`), so each node runs once and memory
holds one sample, the weights between two layers and the rows of one. The layer itself is one
product of sampled input patches with its weight; the differentiable twin is not needed.

Left out: learned scales, blocks of several layers, ConvTranspose, weights in blocks.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, Feeds, PassError, Result, Skip, Stage
from edgec.passes.differences import apply_differences, differences
from edgec.passes.linear import LINEAR_OPS, Layout, layout_of
from edgec.passes.matching import is_op, producer, scalar, sole_user
from edgec.passes.patches import Rows, sampled_rows
from edgec.passes.rounding import Problem, better_integers, bias_step
from edgec.passes.spill import Chain, Spill
from edgec.passes.weights import Array, Refused, check_skip, constant, label

_SAME = 0.5  # relative error up to which integers count as a rounding of the float weight
_EQUAL_DB = 200.0  # SQNR of equal outputs
_HELD_OUT = 4  # without validation data every fourth sample is held out


@dataclass(frozen=True)
class Reconstruct:
    """Choose the rounding of integer weights by their layer's output. Needs calibration data.

    Cases: Conv, Gemm and MatMul with int8 weights per tensor or per channel, as
    quantize-static leaves them.
    """

    name: ClassVar[str] = "reconstruct"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    lossless: ClassVar[bool] = False
    version: ClassVar[int] = 1

    sweeps: int = 10  # times over a layer's weights, at most
    rows: int = 4096  # output positions that a layer is fitted on, of all samples together
    biases: bool = True  # let each channel's bias make up for the mean error that is left
    skip: tuple[str, ...] = ()  # names of layers whose integers stay

    def __post_init__(self) -> None:
        """Check the parameters."""
        for name in ("sweeps", "rows"):
            if not getattr(self, name) > 0:
                raise PassError(f"reconstruct: {name} is {getattr(self, name)}, expected above 0")

    def run(self, model: ir.Model, context: Context) -> Result:
        """Fit layer after layer; ``changed`` counts the initializers with new integers."""
        check_skip(self.name, self.skip, model.graph)
        if context.lock:
            changed = apply_differences(model, context.lock.get("changes", {}))
            return Result(model, changed, decisions=dict(context.lock))
        layers, skipped = self._layers(model, context)
        if not layers:
            return Result(model, 0, tuple(skipped), decisions={"changes": {}})
        if context.calibration is None or not len(context.calibration):
            raise PassError(
                "reconstruct needs calibration data to learn from: give some dozen typical inputs"
            )
        with _Course(model, context, self) as course:
            return course.run(layers, skipped)

    def _layers(self, model: ir.Model, context: Context) -> tuple[list[_Layer], list[Skip]]:
        layers: list[_Layer] = []
        skipped: list[Skip] = []
        goals = {str(v.name): n for n in _float_model(context).graph for v in n.outputs}
        for node in model.graph:
            if not is_op(node, *LINEAR_OPS) or producer(node.inputs[1], "DequantizeLinear") is None:
                continue
            try:
                if label(node) in self.skip:
                    raise Refused("named in skip")
                layers.append(_layer(node, goals))
            except Refused as reason:
                skipped.append(Skip(label(node), str(reason)))
        return layers, skipped


@dataclass(frozen=True)
class _Layer:
    """A quantized layer and the float layer whose output is its goal.

    weight: integers. scale, zero_point: [outputs] or [1]. bias: int32 integers at
    bias_scale, if any. bounds: of the activation function behind it.
    """

    node: ir.Node
    goal: ir.Node
    layout: Layout
    weight: ir.Value
    scale: Array
    zero_point: Array
    bias: ir.Value | None
    bias_scale: Array
    bounds: tuple[float, float]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Spatial shape of a Conv's weight."""
        return self.layout.shape[2:]

    def problem(self) -> Problem:
        """The layer in numbers."""
        shape = self._rows(_array(self.weight)).shape
        scale, zero = (
            np.broadcast_to(a, shape[0] * shape[1]).reshape(*shape[:2], 1).astype(np.float64)
            for a in (self.scale, self.zero_point)
        )
        exact = constant(self.goal.inputs[1])
        assert exact is not None  # checked by ``_layer``
        integers = self._rows(_array(self.weight)).astype(np.float64) - zero
        bias = np.zeros(shape[0] * shape[1], np.float32)
        if self.bias is not None:
            bias = (_array(self.bias) * self.bias_scale).astype(np.float32)
        return Problem(
            exact=self._rows(exact) / scale,
            integers=integers,
            scale=scale,
            limit=int(np.abs(integers).max()),
            bias=bias.reshape(shape[0], 1, shape[1]),
            bounds=self.bounds,
        )

    def set_integers(self, integers: Array) -> None:
        """Put new integers, [groups, outputs, inputs] less the zero point, into the model."""
        old = _array(self.weight)
        zero = np.broadcast_to(self.zero_point, integers.shape[0] * integers.shape[1])
        moved = integers + zero.reshape(*integers.shape[:2], 1).astype(np.float64)
        _set_array(self.weight, self.layout.stored(moved).astype(old.dtype))

    def set_bias(self, bias: Array) -> None:
        """Put a new bias, float32 [outputs], into the model."""
        assert self.bias is not None
        _set_array(self.bias, np.rint(bias.ravel() / self.bias_scale).astype(np.int32))

    def _rows(self, weight: Array) -> Array:
        blocks = self.layout.blocks(weight)
        return blocks.reshape(*blocks.shape[:2], -1)


class _Course(contextlib.ExitStack):
    """One run: both networks on their way from layer to layer, with all samples."""

    def __init__(self, model: ir.Model, context: Context, settings: Reconstruct) -> None:
        super().__init__()
        self._model, self._context, self._settings = model, context, settings
        self._before = model.clone()
        self._fitted, self._judged = _parts(context)

    def run(self, layers: Sequence[_Layer], skipped: Sequence[Skip]) -> Result:
        """Fit the layers in order; the new model if its held-out outputs are nearer to float."""
        given = self._chain(self._model)
        goals = [str(layer.goal.outputs[0].name) for layer in layers]
        wanted = self._chain(_float_model(self._context), keep=goals)
        before = self._chain(self._before)
        touched = []
        for number, (layer, goal) in enumerate(zip(layers, goals, strict=True)):
            given.advance(given.position(layer.node))
            before.advance(given.position(layer.node))
            wanted.advance(wanted.position(layer.goal) + 1)
            if self._fit_one(layer, given, wanted, self._context.seed + number):
                touched.append(str(layer.node.outputs[0].name))
            wanted.release(goal)
            self._context.progress("reconstruct", number + 1, len(layers))
        old_db, new_db = (_sqnr_db(wanted, made, self._judged) for made in (before, given))
        account = f"SQNR of the outputs on held-out samples: {old_db:.1f} dB, {new_db:.1f} dB"
        if not touched or new_db <= old_db:
            finding = (
                f"no other rounding was better on the whole; the model is unchanged ({account})"
            )
            return Result(
                self._before, 0, tuple(skipped), decisions={"changes": {}}, findings=(finding,)
            )
        changes = differences(self._before, self._model)
        return Result(
            self._model,
            len(changes),
            tuple(skipped),
            tuple(touched),
            {"changes": changes},
            (f"{account} after {len(touched)} layers were reconstructed",),
        )

    def _chain(self, model: ir.Model, keep: Sequence[str] = ()) -> Chain:
        """A network at the start of its way, with files of its own."""
        work = self._context.work
        if work is not None:
            work.mkdir(parents=True, exist_ok=True)
        folder = self.enter_context(tempfile.TemporaryDirectory(prefix="spill-", dir=work))
        return Chain(model, _samples(self._context), Spill(pathlib.Path(folder)), keep)

    def _fit_one(self, layer: _Layer, given: Chain, wanted: Chain, seed: int) -> bool:
        settings, random = self._settings, np.random.RandomState(seed)
        source, goal = str(_input(layer.node).name), str(layer.goal.outputs[0].name)

        def rows(samples: Sequence[int], count: int) -> Rows:
            samples = samples[:: -(-len(samples) // count)]  # a row of each at least
            share = -(-count // len(samples))
            parts = [
                sampled_rows(
                    layer.node,
                    layer.kernel,
                    layer.layout.groups,
                    (given.value(source, sample), wanted.value(goal, sample)),
                    count=share,
                    random=random,
                )
                for sample in samples
            ]
            return Rows.joined(parts)

        fit, judged = rows(self._fitted, settings.rows), rows(self._judged, settings.rows // 2 or 1)
        problem = layer.problem()
        integers = better_integers(problem, fit, judged, settings.sweeps)
        changed = not np.array_equal(integers, problem.integers)
        if changed:
            layer.set_integers(integers)
        if settings.biases and layer.bias is not None:
            bias = problem.bias + bias_step(problem, integers, fit)
            errors = [problem.error(integers, b, judged) for b in (bias, problem.bias)]
            if errors[0] < errors[1]:
                layer.set_bias(bias)
                changed = True
        return changed


def _layer(node: ir.Node, goals: dict[str, ir.Node]) -> _Layer:
    """The layer at a node of the quantized graph. Raises Refused with the reason."""
    dequantize = producer(node.inputs[1], "DequantizeLinear")
    assert dequantize is not None
    weight, zero_point = dequantize.inputs[0], _optional(dequantize, 2)
    integers, scale = constant(weight), constant(dequantize.inputs[1])
    if weight is None or integers is None or scale is None or not weight.is_initializer():
        raise Refused("its integers are computed at run time")
    if len(weight.uses()) != 1 or len(dequantize.outputs[0].uses()) != 1:
        raise Refused("its weight is shared with another node")
    layout = layout_of(node, integers.shape)
    axis = dequantize.attributes.get_int("axis", 1) % integers.ndim
    if dequantize.attributes.get_int("block_size", 0):
        raise Refused("its weight has a scale for each block")
    if scale.size > 1 and axis != (1 if layout.inputs_first else 0):
        raise Refused("its scales do not belong to its output channels")
    zero = np.zeros(1) if zero_point is None else constant(zero_point)
    assert zero is not None
    scale = scale.astype(np.float64).ravel()
    goal = goals.get(str(node.outputs[0].name)) or goals.get(_quantized_name(node.outputs[0]))
    exact = None if goal is None or goal.op_type != node.op_type else constant(goal.inputs[1])
    if goal is None or exact is None or exact.shape != integers.shape:
        raise Refused("the float model has no such layer")
    bias, bias_scale = _bias(node)
    layer = _Layer(node, goal, layout, weight, scale, zero.ravel(), bias, bias_scale, _bounds(node))
    problem = layer.problem()
    if np.linalg.norm(problem.integers - problem.exact) > _SAME * np.linalg.norm(problem.exact):
        raise Refused("its integers are no rounding of the float model's weight")
    return layer


def _quantized_name(value: ir.Value) -> str:
    """The name behind a value's Q/DQ pair: a model's output keeps its own there."""
    quantize = sole_user(value)
    pair = (
        sole_user(quantize.outputs[0]) if is_op(quantize, "QuantizeLinear") and quantize else None
    )
    return str(pair.outputs[0].name) if is_op(pair, "DequantizeLinear") and pair else ""


def _bias(node: ir.Node) -> tuple[ir.Value | None, Array]:
    """The int32 integers of a Conv's or Gemm's bias and their scales; (None, []) without."""
    dequantize = producer(_optional(node, 2), "DequantizeLinear") if len(node.inputs) > 2 else None
    value = None if dequantize is None else dequantize.inputs[0]
    scale = None if dequantize is None else constant(dequantize.inputs[1])
    if value is None or scale is None or not value.is_initializer() or len(value.uses()) != 1:
        return None, np.zeros(0)
    return value, scale.astype(np.float64).ravel()


def _bounds(node: ir.Node) -> tuple[float, float]:
    """What a Relu or Clip that alone reads the layer limits it to."""
    reader = sole_user(node.outputs[0])
    if is_op(reader, "Relu"):
        return 0.0, np.inf
    if reader is None or not is_op(reader, "Clip"):
        return -np.inf, np.inf
    low, high = (scalar(_optional(reader, i)) for i in (1, 2))
    return (-np.inf if low is None else low), (np.inf if high is None else high)


def _samples(context: Context) -> Iterator[Feeds]:
    """The samples to fit on and to judge by, one at a time."""
    assert context.calibration is not None
    return itertools.chain(context.calibration, context.validation or ())


def _parts(context: Context) -> tuple[Sequence[int], Sequence[int]]:
    """Which of ``_samples`` to fit on, and which to judge by."""
    assert context.calibration is not None
    count = len(context.calibration)
    if context.validation is not None and len(context.validation):
        return range(count), range(count, count + len(context.validation))
    fit = [i for i in range(count) if i % _HELD_OUT]
    return fit or range(count), range(0, count, _HELD_OUT)


def _float_model(context: Context) -> ir.Model:
    return context.unquantized or context.reference


def _sqnr_db(goal: Chain, made: Chain, samples: Sequence[int]) -> float:
    """SQNR of all floating-point outputs of the samples together."""
    signal = noise = 0.0
    for sample in samples:
        for wanted, output in zip(goal.outputs(sample), made.outputs(sample), strict=True):
            if wanted.dtype.kind == "f":
                signal += float(np.square(wanted, dtype=np.float64).sum())
                noise += float(np.square(np.subtract(wanted, output, dtype=np.float64)).sum())
    if not (noise > 0.0 and signal > 0.0):  # also where one is NaN
        return _EQUAL_DB if noise == 0.0 else -_EQUAL_DB
    return 10.0 * math.log10(signal / noise)


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _optional(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()


def _set_array(value: ir.Value, array: Array) -> None:
    assert value.const_value is not None
    dtype = value.const_value.dtype
    value.const_value = ir.tensor(np.ascontiguousarray(array), dtype=dtype, name=value.name)
