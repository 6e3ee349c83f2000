"""Moves outliers of activations into the weights behind them, losslessly.

A few channels of a transformer's activations are many times larger than the others, and one
scale per tensor leaves the others few integers. Each channel is divided by s where it comes
from and the weights that read it are multiplied by s (SmoothQuant, Xiao et al. 2022,
arXiv:2211.10438, section 4):

    X W  =  (X / s) (s W)       s_j ~ max|X_j|^alpha / max|W_j|^(1 - alpha), at least 1

Where it comes from: scale and bias of a normalization, or the outputs of a linear layer,
through Relu and through one factor of a product (gated MLPs). All products of the same
activation share s. alpha is chosen for each activation by the error of its quantized products
on calibration rows; none at all is a choice too.

Where nothing can take up 1 / s (a normalization whose result the residual reads as well, as in
BERT; outputs of attention and of Gelu), a Mul in front of the products does, if it pays: it costs
some microseconds at every inference.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from edgec.passes.attention_mask import only_shown, shown_positions
from edgec.passes.contract import Context, PassError, Result, Samples, Skip, Stage
from edgec.passes.execution import run_values
from edgec.passes.linear import LINEAR_OPS, Linear, is_row, linear, scale_row
from edgec.passes.matching import is_op, rank
from edgec.passes.weights import Array, Editor, Refused, check_skip, constant, label
from edgec.targets.schema import Int8

_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_WORTH = 0.9  # share of the squared error below which smoothing is done
_WORTH_A_NODE = 0.7  # and below which it is worth a node that runs at every inference
_ROWS = 256  # of each activation, on which the error is taken
_NORMS = ("LayerNormalization", "RMSNormalization")
_LIMIT = 1e4  # of a scale


@dataclass(frozen=True)
class SmoothActivations:
    """Divide activation channels by what their largest values ask for. Needs calibration data.

    Cases: LayerNormalization, RMSNormalization, or a product with a constant row, or Gemm,
    MatMul (+ Add), then Relu or one side of Mul, then one or more MatMul or Gemm; anything else
    in front of them with a Mul of its own.
    """

    name: ClassVar[str] = "smooth-activations"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    lossless: ClassVar[bool] = True
    version: ClassVar[int] = 3

    # share of the difficulty that moves to the weights; none: the best for each activation
    alpha: float | None = None
    # multiply by 1 / s in a node of its own where nothing else can take it up
    insert: bool = True
    skip: tuple[str, ...] = ()  # names of products whose inputs stay as they are

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.alpha is not None and not 0.0 <= self.alpha <= 1.0:
            raise PassError(f"smooth-activations: alpha is {self.alpha}, expected 0 to 1")

    def run(self, model: ir.Model, context: Context) -> Result:
        """Smooth; ``changed`` counts the activations."""
        check_skip(self.name, self.skip, model.graph)
        sites, skipped = _sites(model.graph, self.skip, self.insert)
        if context.lock:
            scales = _replayed(context.lock, sites)
        elif not sites:
            scales = {}
        elif context.calibration is None or not len(context.calibration):
            raise PassError(
                "smooth-activations needs calibration data: give some dozen typical inputs"
            )
        else:
            scales = self._measured(model, sites, context)
        editor = Editor(model)
        for site in sites:
            scale = scales.get(site.name)
            if scale is None:
                reason = "its products lose less than a tenth of their error by smoothing"
                skipped.append(Skip(label(site.readers[0].node), reason))
                continue
            if site.source is None:
                _insert(editor, site, scale)
            else:
                site.source.divide(scale)
                for value in site.source.values:  # they no longer hold the reference's numbers
                    value.name = editor.fresh(f"{value.name}_smoothed")
            for reader in site.readers:
                reader.scale_inputs(scale)
        decisions = {"scales": {name: _text(scale) for name, scale in scales.items()}}
        return Result(model, len(scales), tuple(skipped), decisions=decisions)

    def _measured(
        self, model: ir.Model, sites: Sequence[_Site], context: Context
    ) -> dict[str, Array]:
        """s of each activation that gains by it, float32 [channels]."""
        assert context.calibration is not None
        found = {}
        rows, ranges = _activations(model, [s.name for s in sites], context.calibration, context)
        for site in sites:
            weights = [reader.blocks[0, :, :, 0] for reader in site.readers]  # [out, in]
            heavy = np.max([np.abs(w).max(axis=0) for w in weights], axis=0)
            alphas = _ALPHAS if self.alpha is None else (self.alpha,)
            exact = [rows[site.name] @ weight.T for weight in weights]
            given = rows[site.name], ranges[site.name], weights, exact, context.target.int8
            top = np.abs(ranges[site.name]).max(axis=0)
            scales = [_scale(top, heavy, alpha) for alpha in alphas]
            plain = _error(np.ones_like(heavy), *given)
            errors = [_error(scale, *given) for scale in scales]
            best = int(np.argmin(errors))
            worth = _WORTH if site.source is not None else _WORTH_A_NODE
            if errors[best] < worth * plain:
                found[site.name] = scales[best]
        return found


@dataclass(frozen=True)
class _Source:
    """What an activation's channels are scaled by: rows of constants, and a layer's outputs.

    values: those that hold other numbers afterwards.
    """

    rows: tuple[tuple[ir.Node, int], ...]
    layer: Linear | None
    values: tuple[ir.Value, ...]

    def divide(self, scale: Array) -> None:
        """Divide the activation by the scale of each channel."""
        for node, index in self.rows:
            scale_row(node, index, 1 / scale)
        if self.layer is not None:
            self.layer.scale_outputs(1 / scale)


@dataclass(frozen=True)
class _Site:
    """An activation, where it comes from and the products that read it.

    source: None where a node of its own has to divide it.
    """

    name: str
    source: _Source | None
    readers: tuple[Linear, ...]


def _sites(graph: ir.Graph, skip: Sequence[str], insert: bool) -> tuple[list[_Site], list[Skip]]:
    products = [n for n in graph if is_op(n, "MatMul", "Gemm") and n.inputs[0] is not None]
    layers: dict[ir.Node, Linear] = {}
    reasons: dict[ir.Node, str] = {}
    for node in products:
        try:
            if label(node) in skip:
                raise Refused("named in skip")
            layers[node] = linear(node)
        except Refused as reason:
            reasons[node] = str(reason)
    sites = []
    for value in dict.fromkeys(node.inputs[0] for node in products):
        assert value is not None
        readers = [node for node in products if node.inputs[0] is value]
        if insert:
            readers = [node for node in readers if node in layers]
        try:
            if any(node not in layers for node in readers) or not readers:
                raise Refused("another product of the same input cannot be scaled")
            if value.is_graph_output() or len(value.uses()) != len(readers):
                raise Refused("something else than products reads its input")
            inputs = layers[readers[0]].inputs
            found = tuple(layers[node] for node in readers)
            sites.append(_Site(str(value.name), _source(value, inputs), found))
        except Refused as reason:
            if insert and readers:
                found = tuple(layers[node] for node in readers)
                sites.append(_Site(str(value.name), None, found))
                continue
            for node in readers:
                reasons.setdefault(node, str(reason))
    return sites, [Skip(label(node), reason) for node, reason in reasons.items()]


def _insert(editor: Editor, site: _Site, scale: Array) -> None:
    """Divide the activation by the scale in a node of its own, for the products alone."""
    products = {reader.node for reader in site.readers}
    graph = site.readers[0].node.graph
    value = site.readers[0].node.inputs[0]
    assert value is not None and isinstance(graph, ir.Graph)
    first = next(node for node in graph if node in products)
    row = editor.constant(graph, f"{site.name}_smoothing", (1 / scale).astype(np.float32))
    wanted = f"{label(first)}_smooth"
    [made] = editor.before(first, "Mul", (value, row), wanted=wanted, shapes=(value.shape,))
    for node in products:
        node.replace_input_with(0, made)


def _source(value: ir.Value, channels: int) -> _Source:
    """Where the channels of a value can be scaled. Raises Refused with the reason."""
    node = value.producer()
    if node is None:
        raise Refused("its input is an input of the model")
    if is_op(node, *_NORMS):
        given = [(node, i) for i in range(1, len(node.inputs)) if node.inputs[i] is not None]
        axis = node.attributes.get_int("axis", -1)
        last = axis == -1 or axis + 1 == (rank(node.inputs[0]) or 0)
        whole = all(_is_whole_row(node.inputs[i], channels) for _, i in given)
        if not (last and whole and given) or len([o for o in node.outputs if o.uses()]) > 1:
            raise Refused(f"its {node.op_type} has no constant scale for each channel")
        return _Source(tuple(given), None, (value,))
    if is_op(node, "Relu"):
        return _behind(node, 0, value, channels)
    for index in (0, 1) if is_op(node, "Add", "Mul") else ():
        if not _is_whole_row(node.inputs[index], channels):
            continue
        if node.op_type == "Mul":
            return _Source(((node, index),), None, (value,))
        source = _behind(node, 1 - index, value, channels)
        if source.layer is not None and source.layer.bias == (node, index):
            return source
        return _Source((*source.rows, (node, index)), source.layer, source.values)
    if is_op(node, "Mul"):
        for index in (0, 1):
            try:
                return _behind(node, index, value, channels)
            except Refused:
                continue
    if is_op(node, *LINEAR_OPS) and node.op_type != "Conv":
        layer = linear(node)
        if layer.outputs != channels:
            raise Refused(f"its input repeats the {layer.outputs} channels of '{label(node)}'")
        values = (value,) if layer.output is value else (value, layer.output)
        return _Source((), layer, values)
    raise Refused(f"its input comes from {node.op_type}, which has no scale for each channel")


def _behind(node: ir.Node, index: int, value: ir.Value, channels: int) -> _Source:
    """The source of one of a node's inputs, which nothing else may read."""
    inner = node.inputs[index]
    if inner is None or inner.is_graph_output() or len(inner.uses()) != 1:
        raise Refused(f"something else reads what its {node.op_type} reads")
    source = _source(inner, channels)
    values = source.values if value in source.values else (*source.values, value)
    return _Source(source.rows, source.layer, values)


def _is_whole_row(value: ir.Value | None, channels: int) -> bool:
    array = constant(value)
    return is_row(value, channels) and array is not None and array.size == channels


def _activations(
    model: ir.Model, names: Sequence[str], samples: Samples, context: Context
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Some rows of each value that count, float32 [rows, channels], and the ranges of all.

    rows: ``_ROWS`` at most, however many samples there are. ranges: float32 [2, channels], lowest
    and highest; padding is in them, since ranges taken at run time see it, too.
    """
    share = max(_ROWS // len(samples), 1)
    every_so_many = -(-len(samples) // _ROWS)  # samples of which one gives rows
    parts: dict[str, list[Array]] = {name: [] for name in names}
    ranges: dict[str, Array] = {}
    runs = run_values(model, names, samples)
    for number, (feeds, arrays) in enumerate(zip(samples, runs, strict=True)):
        shown = shown_positions(feeds)
        for name in names:
            array = arrays[name]
            if not array.size:
                raise PassError(f"calibration sample {number}: value '{name}' is empty")
            every = array.reshape(-1, array.shape[-1])
            found = np.stack([every.min(axis=0), every.max(axis=0)])
            if not np.isfinite(found).all():
                raise PassError(f"calibration sample {number}: value '{name}' is not finite")
            low, high = ranges.get(name, found)
            ranges[name] = np.stack([np.minimum(low, found[0]), np.maximum(high, found[1])])
            if number % every_so_many:
                continue
            rows = only_shown(array, shown).reshape(-1, array.shape[-1])
            # a copy: a view would keep the whole activation of every sample in memory
            parts[name].append(rows[:: max(len(rows) // share, 1)][:share].copy())
        context.progress("smooth activations", number + 1, len(samples))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}, ranges


def _scale(top: Array, heavy: Array, alpha: float) -> Array:
    """s of each channel, float32, 1 or more: the half of the channels that asks for least keeps 1.

    None is multiplied where it comes from. Behind Gelu a channel may give thousandths in 18
    recordings and 7.6 in the next: multiplied, it would then stretch the range of all the others.
    """
    alive = (top > 0) & (heavy > 0)
    ratio = np.where(alive, top, 1.0) ** alpha / np.where(alive, heavy, 1.0) ** (1 - alpha)
    middle = np.median(ratio[alive]) if alive.any() else 1.0
    return np.where(alive, np.clip(ratio / middle, 1.0, _LIMIT), 1.0).astype(np.float32)


def _error(
    scale: Array,
    rows: Array,
    ranges: Array,
    weights: Sequence[Array],
    exact: Sequence[Array],
    int8: Int8,
) -> float:
    """Squared error of the products in int8: activations per tensor, weights as on the target.

    rows: [n, in]. ranges: [2, in], of all rows. weights: [out, in] each. exact: [n, out] each,
    the products in float32.
    """
    x = rows / scale
    low, high = min(float((ranges / scale).min()), 0.0), max(float((ranges / scale).max()), 0.0)
    step = max((high - low) / 255, 1e-30)
    noisy = np.rint(x / step) * step
    total = 0.0
    for weight, wanted in zip(weights, exact, strict=True):
        w = weight * scale
        top = np.abs(w).max(axis=1 if int8.per_channel else None, keepdims=True)
        step_w = np.maximum(top / (64 if int8.reduce_range else 127), 1e-30)
        w /= step_w
        np.rint(w, out=w)
        made = noisy @ w.T
        made *= step_w.T
        made -= wanted
        total += float(np.square(made, out=made).sum(dtype=np.float64))
    return total


def _text(scale: Array) -> str:
    return base64.b64encode(scale.astype("<f4").tobytes()).decode("ascii")


def _replayed(lock: Mapping[str, Any], sites: Sequence[_Site]) -> dict[str, Array]:
    """The scales of an earlier run. Raises PassError if it was made for another graph."""
    known = {site.name: site.readers[0].inputs for site in sites}
    scales = {}
    for name, text in lock.get("scales", {}).items():
        try:
            scale = np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)
        except ValueError as error:
            raise PassError(
                f"the lock's scales of '{name}' are damaged: {error}; build without it"
            ) from error
        if known.get(name) != scale.size:
            raise PassError(
                f"the lock smooths '{name}', which this model does not have in that size: it was "
                "made for another model; build without it"
            )
        scales[name] = scale
    return scales
