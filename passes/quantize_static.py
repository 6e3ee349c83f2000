"""Static int8: activation ranges from calibration data, integer kernels on the device.

The float model runs once over the calibration data, sample after sample, into histograms;
from them come the ranges, and with them Q/DQ pairs where `edgec.passes.placement` says that
the target's ONNX Runtime executes integers. Then the biases are corrected, and ONNX
Runtime's own optimizer is asked whether each pair really became an integer kernel.

Left out: 16-bit activations, mixed precision, cross-layer equalization.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from edgec.passes import bias_correction, placement, ranges
from edgec.passes.contract import Context, PassError, Result, Stage
from edgec.passes.emission import emit, name_of, with_twins
from edgec.passes.execution import (
    open_session,
    optimized_graph,
    run_feeds,
    run_values,
    sqnr_db,
)
from edgec.passes.placement import Placement
from edgec.passes.ranges import Histogram, Range, RangeMethod
from edgec.passes.weights import check_skip, label
from edgec_runtime.errors import suggestion
from edgec_runtime.golden import SQNR_CAP_DB

Array = np.ndarray[Any, Any]

_LEAST_OPSET = 13  # DequantizeLinear with an axis
_METHODS: tuple[RangeMethod, ...] = ("percentile", "mse", "minmax")
_JUDGED = 32  # held-out samples on which the methods are compared


@dataclass(frozen=True)
class QuantizeStatic:
    """Quantize weights and activations to 8 bits with ranges measured beforehand.

    Cases: Conv (grouped, depthwise), Gemm and MatMul with a constant weight; a Relu or Clip
    behind them; residual Add, pooling, Concat and reshapes between them. Needs calibration
    data, or the decisions of an earlier run.
    """

    name: ClassVar[str] = "quantize-static"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    lossless: ClassVar[bool] = False
    version: ClassVar[int] = 1

    # how the range of an activation is chosen; auto: the one with the least output noise
    ranges: Literal["auto", "minmax", "percentile", "mse"] = "auto"
    percentile: float = 99.999  # share of values inside the range, for ranges = "percentile"
    skip: tuple[str, ...] = ()  # names of nodes that stay float
    bias_correction: bool = True  # give each channel the mean that it has in float

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.ranges not in ("auto", *_METHODS):
            near = suggestion(self.ranges, ("auto", *_METHODS))
            raise PassError(f"quantize-static: no ranges method '{self.ranges}'{near}")
        if not 50.0 < self.percentile <= 100.0:
            raise PassError(
                f"quantize-static: percentile is {self.percentile}, expected above 50 up to 100"
            )

    def run(self, model: ir.Model, context: Context) -> Result:
        """Insert Q/DQ pairs around everything that pays on the target in integers."""
        int8 = context.target.int8
        self._check(model)
        plan = placement.place(model.graph, int8, self.skip)
        if not plan.units:
            return Result(model, 0, skipped=plan.skipped)
        if context.lock:
            spans, corrections = _replayed(context.lock, plan, self.bias_correction)
        else:
            spans, corrections = self._measured(model, plan, context)
        decisions = {
            "ranges": {name: [s.low.hex(), s.high.hex()] for name, s in spans.items()},
            "bias": {
                name: shift.astype("<f4").tobytes().hex() for name, shift in corrections.items()
            },
        }
        touched = tuple(name_of(unit.output) for unit in plan.units)
        weights = emit(model, plan, spans, int8, corrections)
        findings = _unfused(model, plan, weights)
        return Result(model, len(plan.units), plan.skipped, touched, decisions, findings)

    def _check(self, model: ir.Model) -> None:
        opset = model.opset_imports.get("", 0)
        if opset < _LEAST_OPSET:
            raise PassError(
                f"the model has opset {opset}; quantization per channel needs {_LEAST_OPSET}: "
                "convert the model, or run cleanup first"
            )
        check_skip(self.name, self.skip, model.graph)

    def _measured(
        self, model: ir.Model, plan: Placement, context: Context
    ) -> tuple[dict[str, Range], dict[str, Array]]:
        samples = context.calibration
        if samples is None or len(samples) == 0:
            raise PassError(
                "quantize-static needs calibration data: give some dozen typical inputs, or "
                "use a pass without data (quantize-dynamic, quantize-weights)"
            )
        histograms: dict[str, Histogram] = {}
        names = [name_of(value) for value in plan.calibrated]
        for number, arrays in enumerate(run_values(model, names, samples)):
            for name in names:
                histogram = _histogram(arrays[name], name, number)
                known = histograms.get(name)
                histograms[name] = histogram if known is None else known.merge(histogram)
            context.progress("calibrate", number + 1, len(samples))
        if self.ranges != "auto":
            return self._decided(self.ranges, histograms, model, context)
        return self._best(histograms, model, context)

    def _decided(
        self,
        method: RangeMethod,
        histograms: Mapping[str, Histogram],
        model: ir.Model,
        context: Context,
    ) -> tuple[dict[str, Range], dict[str, Array]]:
        """Ranges by one method, and the bias corrections that belong to them."""
        spans = {name: self._span(method, histogram) for name, histogram in histograms.items()}
        if not self.bias_correction:
            return spans, {}
        assert context.calibration is not None
        beside, twins = with_twins(model, spans, context.target.int8, self.skip)
        report = functools.partial(context.progress, f"correct biases ({method})")
        samples = context.calibration
        return spans, bias_correction.bias_shifts(beside, twins, samples, progress=report)

    def _best(
        self, histograms: Mapping[str, Histogram], model: ir.Model, context: Context
    ) -> tuple[dict[str, Range], dict[str, Array]]:
        """The method whose quantized model is nearest to the float one on held-out samples.

        No method wins everywhere: least squares on a text recogniser (16.4 dB against 14.2
        and 12.9), a percentile on EfficientNet-Lite0 (24.9 dB against 24.5 and 24.6).
        """
        samples = context.validation or context.calibration
        assert samples is not None
        judged = list(itertools.islice(iter(samples), _JUDGED))
        session = open_session(model)
        expected = [run_feeds(session, feeds) for feeds in judged]
        best, best_db = None, -np.inf
        for method in _METHODS:
            spans, shifts = self._decided(method, histograms, model, context)
            trial = model.clone()
            plan = placement.place(trial.graph, context.target.int8, self.skip)
            emit(trial, plan, spans, context.target.int8, shifts)
            session = open_session(trial, settings=context.target.session)
            found = round(_sqnr_db(expected, [run_feeds(session, feeds) for feeds in judged]), 1)
            if best is None or found > best_db:
                best, best_db = (spans, shifts), found
        assert best is not None
        return best

    def _span(self, method: RangeMethod, histogram: Histogram) -> Range:
        if method == "percentile":
            return ranges.percentile(histogram, self.percentile)
        if method == "mse":
            return ranges.least_squares(histogram, 255)
        return ranges.minmax(histogram)


def _sqnr_db(expected: Sequence[Sequence[Array]], actual: Sequence[Sequence[Array]]) -> float:
    """The lowest SQNR of any output over all samples together, in dB."""
    worst = SQNR_CAP_DB
    for index in range(len(expected[0])):
        pairs = [(e[index], a[index]) for e, a in zip(expected, actual, strict=True)]
        if pairs[0][0].dtype.kind == "f":
            reference = np.concatenate([e.ravel() for e, _ in pairs])
            worst = min(worst, sqnr_db(reference, np.concatenate([a.ravel() for _, a in pairs])))
    return worst


def _replayed(
    lock: Mapping[str, Any], plan: Placement, bias_correction: bool
) -> tuple[dict[str, Range], dict[str, Array]]:
    """Ranges and bias corrections of an earlier run.

    Raises PassError if the run was made for another graph or with other parameters.
    """
    spans = {
        name: Range(float.fromhex(low), float.fromhex(high))
        for name, (low, high) in lock.get("ranges", {}).items()
    }
    corrections = {
        name: np.frombuffer(bytes.fromhex(text), "<f4").astype(np.float32)
        for name, text in lock.get("bias", {}).items()
    }
    needed = [name_of(value) for value in plan.calibrated]
    missing = [n for n in needed if n not in spans]
    if bias_correction:
        sites = {
            name_of(u.node.outputs[0]): placement.channels(u.node) for u in plan.units if u.bias
        }
        known = {name: shift.size for name, shift in corrections.items()}
        missing += [name for name, size in sites.items() if known.get(name) != size]
    elif corrections:
        raise PassError("the lock holds bias corrections, but bias_correction is off: rebuild it")
    if missing:
        raise PassError(
            f"the lock knows nothing about value '{missing[0]}': it was made for another model "
            "or target; build without it"
        )
    return spans, corrections


def _histogram(values: Array, name: str, number: int) -> Histogram:
    try:
        return Histogram.of(values)
    except ValueError as error:
        raise PassError(
            f"calibration sample {number}: value '{name}' holds {error}; expected finite "
            "numbers: check the sample, or the model's weights"
        ) from error


def _unfused(model: ir.Model, plan: Placement, weights: Mapping[ir.Node, str]) -> tuple[str, ...]:
    """One sentence for each quantized node that ONNX Runtime does not run in integers.

    weights: name of each computing node's dequantized weight; an integer kernel reads the
    integers behind it.
    """
    optimized = optimized_graph(model).graph
    producers = {value.name: node for node in optimized for value in node.outputs}
    read = {value.name for node in optimized for value in node.inputs if value is not None}
    findings = []
    for unit in plan.units:
        quantizers = [n for n, _ in unit.output.uses() if n.op_type == "QuantizeLinear"]
        producer = producers.get(quantizers[0].outputs[0].name) if quantizers else None
        apart = producer is not None and producer.op_type == "QuantizeLinear"
        if apart or weights.get(unit.node) in read:
            findings.append(
                f"node '{label(unit.node)}' ({unit.node.op_type}) is quantized, but ONNX Runtime "
                "runs it in float: name it in skip"
            )
    return tuple(findings)
