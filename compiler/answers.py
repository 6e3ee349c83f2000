"""What both sides answered to the judged samples, and scores of any part of them.

A ``Score`` takes positions of samples and gives the metric of reference and bundle there;
slices and disturbed inputs are judged through it. Its error is that of the *drop*: both sides
see the same samples, so their errors do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgec.data import LABEL
from edgec.errors import DataError
from edgec.metrics import TaskMetric
from edgec.report import Metric

Array = np.ndarray[Any, Any]
Outputs = Mapping[str, Array]
Score = Callable[[Sequence[int]], Metric]

_GROUPS = 20  # of the jackknife: the error's own relative error is about 1 / sqrt(2 * 19)


def metric_score(
    metric: TaskMetric,
    reference: Sequence[Outputs],
    bundle: Sequence[Outputs],
    labels: Sequence[Mapping[str, Array]],
) -> Score:
    """The task metric on the samples at given positions; a DataError where it has no value."""

    def score(positions: Sequence[int]) -> Metric:
        truth = stack_labels([labels[i] for i in positions])
        before, after = (
            metric(stack_outputs([side[i] for i in positions]), truth)
            for side in (reference, bundle)
        )
        return Metric(metric.name, before, after, metric.drop(before, after))

    return score


def agreement_score(agreements: Sequence[float]) -> Score:
    """The share of samples on which the bundle answers as the reference, which has 1."""

    def score(positions: Sequence[int]) -> Metric:
        share = math.fsum(agreements[i] for i in positions) / len(positions)
        return Metric("agreement", 1.0, share, 1.0 - share)

    return score


def mean_score(scores: Sequence[Score]) -> Score:
    """The mean of several scores, under the first one's name."""

    def score(positions: Sequence[int]) -> Metric:
        found = [one(positions) for one in scores]
        before, after, drop = (
            math.fsum(values) / len(found)
            for values in zip(*((m.reference, m.bundle, m.drop) for m in found), strict=True)
        )
        return Metric(found[0].name, before, after, drop)

    return score


def standard_error(score: Score, positions: Sequence[int]) -> float | None:
    """Standard error of the drop; None for one sample, or where parts have no metric.

    Delete-a-group jackknife (Efron & Tibshirani 1993, An Introduction to the Bootstrap,
    chapter 11), which asks nothing of the metric: the samples fall into 20 groups by a fixed
    draw, and the drop is taken without each of them.
    """
    groups = min(_GROUPS, len(positions))
    if groups < 2:
        return None
    order = np.random.default_rng(0).permutation(len(positions))
    drops = []
    for group in range(groups):
        rest = np.sort(np.delete(order, np.s_[group::groups]))
        try:
            drops.append(score([positions[i] for i in rest]).drop)
        except DataError:  # a ranking metric without one class, for example
            return None
    return math.sqrt((groups - 1) * float(np.var(drops)))


def class_labels(
    labels: Mapping[str, Array], *, sole: bool, besides: str | None = None
) -> Array | None:
    """The classes of one sample, int64 [rows]; None if nothing says them.

    They stand under ``label``. sole: otherwise the only array is taken for them, if it is
    not the one named ``besides``.
    """
    array = labels.get(LABEL)
    if array is None and sole and len(labels) == 1 and besides not in labels:
        array = next(iter(labels.values()))
    if array is None or array.dtype.kind not in "iubf":
        return None
    flat = np.asarray(array).reshape(-1)
    if flat.dtype.kind == "f" and not (np.isfinite(flat).all() and (flat == np.rint(flat)).all()):
        return None
    return flat.astype(np.int64)


def class_rows(output: Array) -> Array:
    """Class scores as float64 [rows, classes]."""
    rows: Array = output.reshape(-1, output.shape[-1]).astype(np.float64)
    return rows


def stack_outputs(outputs: Sequence[Outputs]) -> dict[str, Any]:
    """Outputs of all samples by name: rows joined along the first axis where shapes allow."""
    stacked: dict[str, Any] = {}
    for name in outputs[0]:
        arrays = [o[name] for o in outputs]
        if arrays[0].ndim and len({a.shape[1:] for a in arrays}) == 1:
            stacked[name] = np.concatenate(arrays)
        elif len({a.shape for a in arrays}) == 1:
            stacked[name] = np.stack(arrays)
        else:
            stacked[name] = arrays
    return stacked


def stack_labels(labels: Sequence[Mapping[str, Array]]) -> Any:
    """One array of labels, or a dict of arrays where there are several keys."""
    columns: dict[str, Any] = {}
    for key in labels[0]:
        arrays = [np.atleast_1d(item[key]) for item in labels]
        same = len({a.shape[1:] for a in arrays}) == 1
        columns[key] = np.concatenate(arrays) if same else arrays
    return columns if len(columns) > 1 else next(iter(columns.values()))
