"""The emitted bundle against the reference, on real data, through the shipped runtime.

Agreement is the mean over the samples of how far both give the same answer
(``edgec.agreement``).
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

from edgec.agreement import AgreementRule, power
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
    rule: AgreementRule,
    metric: TaskMetric | None = None,
    slices: SliceColumn | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Judgement:
    """Compare two runs of the same model sample by sample.

    rule: what "the same answer" means. With a metric, every sample must have a label, with
    slices also their column. Raises DataError if there are no samples or no labels.
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
        if rule.class_scores is not None:
            besides = slices.name if slices is not None else None
            truth = class_labels(sample.labels, sole=metric is not None, besides=besides)
            tally.add(expected[rule.class_scores], actual[rule.class_scores], truth)
        if slices is not None:
            values.append(slices.value(sample))
        shown = shown_positions(sample.feeds)
        expected, actual = (_shown(outputs, shown) for outputs in whole)
        agreements.append(rule.agreement(expected, actual))
        for name, value in expected.items():
            if value.dtype.kind == "f":
                s, n = power(value, actual[name])
                signal, noise = signal + s, noise + n
        if metric is not None:
            if not sample.labels:
                raise DataError(
                    f"metric {metric.name} needs labels, but the evaluation data has no array "
                    "besides the inputs; add one named 'label'"
                )
            for side, outputs in zip(kept, whole, strict=True):
                side.append(metric.kept(outputs, sample.labels))
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
        rule=rule.same.value,
        sqnr_db=as_db(signal, noise),
        metric=found,
        slices=None if slices is None else by_slice(slices, values, score),
        confidence=tally.result(),
    )


def _shown(outputs: Mapping[str, Array], shown: Array | None) -> Mapping[str, Array]:
    return {name: only_shown(value, shown) for name, value in outputs.items()}


def as_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise), within -200 and 200; 200 where both sides were equal."""
    if noise == 0.0:
        return 200.0
    if not np.isfinite(noise) or not np.isfinite(signal) or signal == 0.0:
        return -200.0
    return float(np.clip(10.0 * np.log10(signal / noise), -200.0, 200.0))
