"""The emitted bundle against the reference, on real data, through the shipped runtime.

Agreement is the share of samples on which both give the same answer: the same argmax for
a classifier (per position, where there are several), a relative error under 5 % otherwise.
SQNR is taken over all floating-point outputs of all samples together. Positions of a sequence
that an input ``attention_mask`` hides count for neither (``edgec.passes.attention_mask``).
The calibration error needs a classifier and classes in the labels; slices need their column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.answers import agreement_score, class_labels, metric_score
from edgec.calibration_error import ConfidenceTally
from edgec.data import Sample
from edgec.errors import DataError
from edgec.metrics import TaskMetric
from edgec.passes.attention_mask import only_shown, shown_positions
from edgec.report import Confidence, Metric, Slices
from edgec.slices import SliceColumn, by_slice

Array = np.ndarray[Any, Any]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]

_CLOSE = 0.05  # relative error (L2) up to which two outputs that are no logits agree


@dataclass(frozen=True)
class Judgement:
    """What the comparison found. metric is None without labels or without a metric.

    slices: of the metric, or of the agreement. confidence: None without a class for every row.
    """

    samples: int
    agreement: float
    rule: str
    sqnr_db: float
    metric: Metric | None
    slices: Slices | None = None
    confidence: Confidence | None = None


def judge_outputs(
    reference: Run,
    bundle: Run,
    samples: Iterable[Sample],
    *,
    classifier: str | None,
    metric: TaskMetric | None = None,
    slices: SliceColumn | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Judgement:
    """Compare two runs of the same model sample by sample.

    classifier: the output whose argmax is the answer, or None. With a metric, every sample
    must have a label, with slices also their column. Raises DataError if there are no samples
    or no labels.
    """
    agreements: list[float] = []
    values: list[str] = []
    tally = ConfidenceTally()
    signal = noise = 0.0
    kept: tuple[list[Mapping[str, Array]], list[Mapping[str, Array]]] = ([], [])
    labels: list[Mapping[str, Array]] = []
    for sample in samples:
        expected, actual = reference(sample.feeds), bundle(sample.feeds)
        whole = expected, actual
        if classifier is not None:
            besides = slices.name if slices is not None else None
            truth = class_labels(sample.labels, sole=metric is not None, besides=besides)
            tally.add(expected[classifier], actual[classifier], truth)
        if slices is not None:
            values.append(slices.value(sample))
        shown = shown_positions(sample.feeds)
        expected, actual = (_shown(outputs, shown) for outputs in whole)
        agreements.append(_agreement(expected, actual, classifier))
        for name, value in expected.items():
            if value.dtype.kind == "f":
                s, n = _power(value, actual[name])
                signal, noise = signal + s, noise + n
        if metric is not None:
            if not sample.labels:
                raise DataError(
                    f"metric {metric.name} needs labels, but the evaluation data has no array "
                    "besides the inputs; add one named 'label'"
                )
            kept[0].append(whole[0])
            kept[1].append(whole[1])
            labels.append(sample.labels)
        progress(len(agreements))
    if not agreements:
        raise DataError("no samples to judge the bundle on")
    total = len(agreements)
    score = agreement_score(agreements)
    found = None
    if metric is not None:
        score = metric_score(metric, *kept, labels)
        found = score(range(total))
    return Judgement(
        samples=total,
        agreement=math.fsum(agreements) / total,
        rule="same argmax" if classifier else "relative error under 5 %",
        sqnr_db=_db(signal, noise),
        metric=found,
        slices=None if slices is None else by_slice(slices, values, score),
        confidence=tally.result(),
    )


def find_classifier(model: ir.Model, declared: bool) -> str | None:
    """The output that holds class scores, or None.

    declared: the user gave class names or a top-k metric. Otherwise a single float output
    is recognised as logits if it ends in a softmax, or if it is a linear layer's [N, C] that
    nothing normalises.
    """
    floats = [v for v in model.graph.outputs if v.dtype in _FLOATS]
    if len(floats) != 1 or floats[0].shape is None or not len(floats[0].shape):
        return None
    value = floats[0]
    classes = value.shape[-1]  # type: ignore[index]
    if isinstance(classes, int) and classes < 2:
        return None
    if declared:
        return value.name
    node = value.producer()
    while node is not None and node.op_type in {"Reshape", "Squeeze", "Identity", "Cast"}:
        first = node.inputs[0]
        node = first.producer() if first is not None else None
    if node is None:
        return None
    if node.op_type in {"Softmax", "LogSoftmax"}:
        return value.name
    rank = len(value.shape)  # type: ignore[arg-type]
    if node.op_type == "Add" and any(
        i is not None and (p := i.producer()) is not None and p.op_type == "MatMul"
        for i in node.inputs
    ):
        return value.name if rank == 2 else None
    return value.name if node.op_type in {"Gemm", "MatMul"} and rank == 2 else None


_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


def _agreement(
    expected: Mapping[str, Array], actual: Mapping[str, Array], classifier: str | None
) -> float:
    if classifier is not None:
        e, a = expected[classifier], actual[classifier]
        if e.shape != a.shape or np.isnan(a).any() > np.isnan(e).any():
            return 0.0
        return float((e.argmax(-1) == a.argmax(-1)).mean())
    signal = noise = 0.0
    for name, value in expected.items():
        if value.dtype.kind != "f":
            if not np.array_equal(value, actual[name]):
                return 0.0
            continue
        s, n = _power(value, actual[name])
        signal, noise = signal + s, noise + n
    return float(np.isfinite(noise) and noise <= _CLOSE**2 * signal)


def _shown(outputs: Mapping[str, Array], shown: Array | None) -> Mapping[str, Array]:
    return {name: only_shown(value, shown) for name, value in outputs.items()}


def _power(reference: Array, actual: Array) -> tuple[float, float]:
    """Energy of the reference and of the difference; equal infinities do not count."""
    if reference.shape != actual.shape:
        return float(np.square(reference.astype(np.float64)).sum()), float("inf")
    r, a = reference.astype(np.float64), actual.astype(np.float64)
    same = (r == a) | (np.isnan(r) & np.isnan(a))
    r, a = np.where(same & ~np.isfinite(r), 0.0, r), np.where(same & ~np.isfinite(r), 0.0, a)
    return float((r * r).sum()), float(np.square(r - a).sum())


def _db(signal: float, noise: float) -> float:
    if noise == 0.0:
        return 200.0
    if not np.isfinite(noise) or not np.isfinite(signal) or signal == 0.0:
        return -200.0
    return float(np.clip(10.0 * np.log10(signal / noise), -200.0, 200.0))
