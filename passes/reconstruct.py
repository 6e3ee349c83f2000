"""Decides anew which way each quantized weight is rounded, layer after layer, on a few samples.

The nearest integers are not the best ones: what counts is the layer's output. For each layer
the output of the float layer is the goal and the input is what the quantized network really
delivers there, so that a layer also makes up for those before it, and its activation function
counts (asymmetric reconstruction: AdaRound, Nagel et al. 2020, arXiv:2004.10568, section
3.5; how the integers are found: edgec.passes.rounding). The error on held-out samples decides
which integers a layer keeps, and the model's outputs there decide about them all.

The networks run in ONNX Runtime, whose integers are the ones that ship. The layer itself is
one product of sampled input patches with its weight, so the differentiable twin of the whole
graph is not needed, and memory holds the samples and the rows of one layer.

Left out: learned scales, blocks of several layers, ConvTranspose, weights in blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, Feeds, PassError, Result, Skip, Stage
from edgec.passes.differences import apply_differences, differences
from edgec.passes.execution import open_session, run_feeds, sqnr_db
from edgec.passes.linear import LINEAR_OPS, Layout, layout_of
from edgec.passes.matching import is_op, producer, scalar, sole_user
from edgec.passes.patches import Rows, sampled_rows
from edgec.passes.rounding import Problem, better_integers, bias_step
from edgec.passes.weights import Array, Refused, check_skip, constant, label

_SAME = 0.5  # relative error up to which integers count as a rounding of the float weight
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
        before = model.clone()
        touched = _Course(model, context, self).fit(layers)
        return _judged(before, model, context, touched, skipped)

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


class _Course:
    """One run: two networks, data and settings."""

    def __init__(self, model: ir.Model, context: Context, settings: Reconstruct) -> None:
        self._model, self._context, self._settings = model, context, settings
        self._float = _float_model(context)
        self._fit, self._held_out = _parts(context)

    def fit(self, layers: Sequence[_Layer]) -> list[str]:
        """Fit the layers in order; the outputs of those that changed."""
        touched = []
        for number, layer in enumerate(layers):
            if self._fit_one(layer, self._context.seed + number):
                touched.append(str(layer.node.outputs[0].name))
            self._context.progress("reconstruct", number + 1, len(layers))
        return touched

    def _fit_one(self, layer: _Layer, seed: int) -> bool:
        settings, random = self._settings, np.random.RandomState(seed)
        given = open_session(self._model, outputs=[str(_input(layer.node).name)])
        wanted = open_session(self._float, outputs=[str(layer.goal.outputs[0].name)])

        def rows(samples: Sequence[Feeds], count: int) -> Rows:
            parts = []
            for feeds in samples:
                pair = run_feeds(given, feeds)[0], run_feeds(wanted, feeds)[0]
                share = -(-count // len(samples))
                parts.append(
                    sampled_rows(
                        layer.node,
                        layer.kernel,
                        layer.layout.groups,
                        pair,
                        count=share,
                        random=random,
                    )
                )
            return Rows.joined(parts)

        fit, judged = rows(self._fit, settings.rows), rows(self._held_out, settings.rows // 2)
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


def _judged(
    before: ir.Model, model: ir.Model, context: Context, touched: list[str], skipped: list[Skip]
) -> Result:
    """The new model if its outputs on held-out samples are nearer to the float model's."""
    _, samples = _parts(context)
    goal, old, new = (_outputs(m, samples) for m in (_float_model(context), before, model))
    old_db, new_db = sqnr_db(goal, old), sqnr_db(goal, new)
    account = f"SQNR of the outputs on held-out samples: {old_db:.1f} dB, {new_db:.1f} dB"
    if not touched or new_db <= old_db:
        finding = f"no other rounding was better on the whole; the model is unchanged ({account})"
        return Result(before, 0, tuple(skipped), decisions={"changes": {}}, findings=(finding,))
    changes = differences(before, model)
    return Result(
        model,
        len(changes),
        tuple(skipped),
        tuple(touched),
        {"changes": changes},
        (f"{account} after {len(touched)} layers were reconstructed",),
    )


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


def _parts(context: Context) -> tuple[list[Feeds], list[Feeds]]:
    """Samples to fit on, and samples to judge by."""
    assert context.calibration is not None
    samples = list(context.calibration)
    if context.validation is not None and len(context.validation):
        return samples, list(context.validation)
    judged = list(itertools.islice(samples, 0, None, _HELD_OUT))
    fit = [feeds for i, feeds in enumerate(samples) if i % _HELD_OUT]
    return fit or samples, judged


def _float_model(context: Context) -> ir.Model:
    return context.unquantized or context.reference


def _outputs(model: ir.Model, samples: Iterable[Feeds]) -> Array:
    """All floating-point outputs of all samples in one row, each output over its size."""
    session = open_session(model)
    arrays = [a for feeds in samples for a in run_feeds(session, feeds) if a.dtype.kind == "f"]
    return np.concatenate([a.ravel() for a in arrays]) if arrays else np.zeros(0)


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
