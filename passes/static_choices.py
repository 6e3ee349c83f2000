"""Decides ranges, roundings and bias corrections of static int8 from one calibration run.

Everything is judged by what it does to the outputs of the layers concerned, on rows of real
inputs that were kept while the float model ran: no quantized model is ever run for it. On a
thousand rows the mean and the power of an error are known to a few percent, which is closer
than any of the choices.

Mean shifts go into the biases (empirical bias correction: Nagel et al. 2019,
arXiv:1906.04721, section 4.2). Left out on purpose: measuring a layer behind quantized ones;
on EfficientNet-Lite0 that was slower and worse, since a layer's bias then also answers for
clipping and noise of the layers before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.passes import qdq, ranges, weight_rounding
from edgec.passes.calibration import Calibration
from edgec.passes.emission import Scheme, name_of, quantized_weights, scheme_of, weight_layers
from edgec.passes.layer_inputs import LayerInputs, from_rows, weight_of, weight_rows
from edgec.passes.placement import Placement, Unit, channel_axis
from edgec.passes.ranges import Histogram, Range, RangeMethod
from edgec.passes.static_decisions import Decisions, WeightChoice, weight_key
from edgec.passes.weights import label
from edgec.targets.schema import Int8
from edgec_runtime.golden import SQNR_CAP_DB

Array = np.ndarray[Any, Any]

_JUDGED = 256  # rows on which ranges are compared
METHODS: tuple[RangeMethod, ...] = ("percentile", "mse", "minmax", "entropy")
_MUST_PAY = 0.75  # of the percentile's noise, below which another method is taken


def chosen_ranges(
    plan: Placement,
    calibration: Calibration,
    int8: Int8,
    *,
    method: RangeMethod | None,
    share: float,
) -> dict[str, Range]:
    """The range of every value of the plan, by name.

    method: None takes for each value the percentile, or the method with which the layers that
    read it, or a value of its scale, err least, if they err clearly less: what is clipped errs
    together, in all positions and layers behind, and costs more than equal noise of rounding.
    (EfficientNet-Lite0: a fifth less noise at most layers by the least squared error, but
    26.4 dB at the output instead of 27.0.) Factors of products of two activations keep their
    whole range: the largest share of an attention is what it attends to. share: inside the
    range, in percent, for the percentile.
    """
    readers: dict[ir.Value, list[LayerInputs]] = {}
    for unit in plan.units:
        if unit.computing:
            source = unit.data[0][1]
            source = plan.scale_of.get(source, source)
            readers.setdefault(source, []).append(calibration.layers[unit.node])
    bounds = {unit.output: unit.bounds for unit in plan.units}
    factors = plan.multiplied
    found: dict[ir.Value, Range] = {}
    for value, histogram in calibration.histograms.items():
        fixed = "minmax" if method is None and value in factors else method
        if fixed is not None:
            found[value] = _range(fixed, histogram, share, int8)
            continue
        candidates = [_range(m, histogram, share, int8) for m in METHODS]
        layers = readers.get(value, [])
        errors = _noises(candidates, layers, int8, bounds.get(value))
        best = int(np.argmin(errors))
        found[value] = candidates[best if errors[best] < _MUST_PAY * errors[0] else 0]
    for value, source in plan.scale_of.items():
        found[value] = found[source]
    return {name_of(value): span for value, span in found.items()}


def _range(method: RangeMethod, histogram: Histogram, share: float, int8: Int8) -> Range:
    least, greatest = qdq.limits(int8.activation)
    levels = greatest - least
    if method == "percentile":
        return ranges.percentile(histogram, share)
    if method == "mse":
        return ranges.least_squares(histogram, levels)
    if method == "entropy":
        return ranges.least_divergence(histogram, levels)
    return ranges.minmax(histogram)


def _noises(
    spans: Sequence[Range], layers: Sequence[LayerInputs], int8: Int8, bounds: Range | None
) -> Array:
    """For each range, noise over signal at the outputs of the layers, if it is their input's."""
    grids = [qdq.activation_parameters(span, int8.activation, inside=bounds) for span in spans]
    totals = np.zeros(len(spans))
    for layer in layers:
        rows = layer.rows[:, :: max(1, layer.rows.shape[1] // _JUDGED)]
        weight = weight_rows(layer.node, weight_of(layer.node)).transpose(0, 2, 1)
        signal = _power(np.matmul(rows, weight))
        if signal:
            errors = (qdq.fake_quantized(rows, grid) - rows for grid in grids)
            totals += [_power(np.matmul(error, weight)) / signal for error in errors]
    return totals


def decided(
    plan: Placement,
    calibration: Calibration,
    spans: Mapping[str, Range],
    int8: Int8,
    *,
    method: weight_rounding.Rounding,
    clip: bool,
    bias_correction: bool,
) -> Decisions:
    """Roundings of all weights under the given ranges, then the errors that are left."""
    scheme = scheme_of(plan, spans, int8)
    choices = {}
    for (value, axis), units in weight_layers(plan).items():
        layers = [calibration.layers[unit.node] for unit in units]
        least = scheme.least_weight_scale(units)
        choice = _weight_choice(layers, int8, least, method=method, clip=clip)
        choices[weight_key(value, axis)] = choice
    weights = quantized_weights(plan, scheme, choices, int8)
    shifts, sensitivity = {}, {}
    for unit in plan.units:
        if not unit.computing:
            continue
        quantized = weights[unit.node]
        corrected = bias_correction and unit.bias is not None
        shift, noise, signal = _errors(unit, calibration.layers[unit.node], scheme, quantized)
        if corrected:
            shifts[name_of(unit.node.outputs[0])] = shift.astype(np.float32)
            noise = max(noise - float(np.square(shift).sum()), 0.0)
        sensitivity[label(unit.node)] = _db(signal, noise)
    return Decisions(spans, shifts, choices, sensitivity)


def _weight_choice(
    layers: Sequence[LayerInputs],
    int8: Int8,
    least_scale: Array | None,
    *,
    method: weight_rounding.Rounding,
    clip: bool,
) -> WeightChoice:
    """Clipping and rounding of a weight that the layers share."""
    node = layers[0].node
    weight, axis = weight_of(node), channel_axis(node)
    rows = weight_rows(node, weight)
    shares = None
    if clip:
        scale = qdq.weight_scale(weight, int8, axis=axis, least_scale=least_scale)
        by_group = scale.reshape(rows.shape[:2]) if scale.ndim else scale
        power = np.mean([np.square(x.rows).mean(axis=1) for x in layers], axis=0)
        best = weight_rounding.least_clip_error(rows, by_group, power, qdq.greatest(int8))
        shares = best.reshape(-1)
    scale = qdq.weight_scale(weight, int8, axis=axis, least_scale=least_scale, shares=shares)
    if method == "nearest":
        return WeightChoice(shares, None)
    exact = rows / (scale.reshape(rows.shape[:2])[..., None] if scale.ndim else scale)
    top = qdq.greatest(int8)
    nearest = np.clip(np.rint(exact), -top, top)
    if method == "sums":
        integers = weight_rounding.sums_kept(exact.reshape(-1, exact.shape[-1]).astype(np.float64))
        integers = np.clip(integers.reshape(exact.shape), -top, top)
    else:
        integers = weight_rounding.errors_carried(exact, [x.rows for x in layers], top)
    steps = np.clip(integers - nearest, -127, 127).astype(np.int8)
    return WeightChoice(shares, from_rows(node, steps, weight.shape))


def _errors(
    unit: Unit, layer: LayerInputs, scheme: Scheme, quantized: qdq.QuantizedWeight
) -> tuple[Array, float, float]:
    """Mean shift of each output channel, noise and signal per row."""
    rows = layer.rows
    exact = weight_rows(unit.node, weight_of(unit.node))
    rounded = weight_rows(unit.node, quantized.real())
    reference = np.matmul(rows, exact.transpose(0, 2, 1))
    actual = np.matmul(scheme.read(unit.data[0][1], rows), rounded.transpose(0, 2, 1))
    difference = reference - actual
    count = rows.shape[1]
    shift = difference.mean(axis=1, dtype=np.float64).reshape(-1)
    return shift, _power(difference) / count, _power(reference) / count


def _power(values: Array) -> float:
    flat = values.ravel()
    return float(np.dot(flat, flat))


def _db(signal: float, noise: float) -> float:
    if noise == 0.0 or signal == 0.0:
        return SQNR_CAP_DB if noise == 0.0 else -SQNR_CAP_DB
    return round(float(np.clip(10 * np.log10(signal / noise), -SQNR_CAP_DB, SQNR_CAP_DB)), 2)
