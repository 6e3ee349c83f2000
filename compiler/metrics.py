"""Task metrics: outputs and labels of a whole evaluation set -> one number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.data import LABEL
from edgec.decoder import LOGITS, NO_LABEL
from edgec.entrypoint import describe_failure, load_function
from edgec.errors import DataError, suggestion

Array = np.ndarray[Any, Any]
Outputs = Mapping[str, Any]  # output name -> array [samples, ...] (a list where shapes differ)

_LOSS = "loss"  # what perplexity keeps of a sample


@dataclass(frozen=True)
class TaskMetric:
    """A metric by name. higher_is_better decides the sign of a drop.

    reduce: (outputs, labels) of one sample -> what the metric needs of its outputs, where these
    are too large to be kept for all samples; the function then gets that.
    """

    name: str
    function: Callable[[Outputs, Any], float]
    higher_is_better: bool = True
    reduce: Callable[[Outputs, Mapping[str, Array]], Outputs] | None = None

    def kept(self, outputs: Outputs, labels: Mapping[str, Array]) -> Outputs:
        """What is kept of the outputs for one sample until the metric is taken."""
        return outputs if self.reduce is None else self.reduce(outputs, labels)

    def __call__(self, outputs: Outputs, labels: Any) -> float:
        """The metric's value. Raises DataError if the function fails or returns no number."""
        try:
            value = float(self.function(outputs, labels))
        except DataError:
            raise
        except (Exception, SystemExit) as error:
            raise DataError(
                f"metric {self.name}: {describe_failure(self.function, error)}; it is called with "
                "outputs (dict of arrays by output name, samples first) and labels (array)"
            ) from error
        if not math.isfinite(value):
            raise DataError(f"metric {self.name} is {value}; expected a finite number")
        return value

    def drop(self, reference: float, bundle: float) -> float:
        """How much worse the bundle is, in the metric's own unit."""
        return reference - bundle if self.higher_is_better else bundle - reference


def load_metric(given: str | Callable[..., float]) -> TaskMetric:
    """A built-in metric, the function ``file.py:fn(outputs, labels)`` or a callable."""
    if callable(given):
        return TaskMetric(getattr(given, "__name__", "metric"), given)
    if given in METRICS:
        return METRICS[given]
    if ":" in given:
        return TaskMetric(given.rpartition(":")[2], load_function(given, DataError))
    raise DataError(
        f"unknown metric '{given}'{suggestion(given, METRICS)}; the metrics are "
        f"{', '.join(METRICS)}, or file.py:fn(outputs, labels) -> float"
    )


def spearman(a: Array, b: Array) -> float:
    """Rank correlation of two vectors, ties with their mean rank (Spearman 1904)."""
    return _pearson(_ranks(a), _ranks(b))


def _top(k: int) -> Callable[[Outputs, Any], float]:
    """Share of samples whose label is among the k largest logits (last axis)."""

    def metric(outputs: Outputs, labels: Any) -> float:
        logits = _single(outputs, f"top{k}")
        truth = _truth(labels, f"top{k}").reshape(-1)
        scores = logits.reshape(-1, logits.shape[-1])
        if truth.dtype.kind not in "iub" and not np.array_equal(truth, truth.astype(np.int64)):
            raise DataError(f"metric top{k} needs integer labels, got {truth.dtype}")
        _same_length(scores, truth, f"top{k}")
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return float((best == truth.astype(np.int64)[:, None]).any(axis=1).mean())

    return metric


def _correlation(name: str, of: Callable[[Array, Array], float]) -> Callable[[Outputs, Any], float]:
    def metric(outputs: Outputs, labels: Any) -> float:
        values, truth = _single(outputs, name).reshape(-1), _truth(labels, name).reshape(-1)
        _same_length(values, truth, name)
        return of(values.astype(np.float64), truth.astype(np.float64))

    return metric


def _cosine(outputs: Outputs, labels: Any) -> float:
    """Mean cosine between each sample's output and its label vector."""
    values, truth = _single(outputs, "cosine"), _truth(labels, "cosine")
    values, truth = values.reshape(len(values), -1), truth.reshape(len(truth), -1)
    if values.shape != truth.shape:
        raise DataError(
            f"metric cosine: outputs {list(values.shape)} and labels {list(truth.shape)} differ"
        )
    norms = np.linalg.norm(values, axis=1) * np.linalg.norm(truth, axis=1)
    return float(((values * truth).sum(1) / np.maximum(norms, 1e-30)).mean())


def _mean_error(name: str, power: int) -> Callable[[Outputs, Any], float]:
    def metric(outputs: Outputs, labels: Any) -> float:
        values, truth = _single(outputs, name), _truth(labels, name)
        _same_length(values.reshape(-1), truth.reshape(-1), name)
        difference = values.reshape(-1).astype(np.float64) - truth.reshape(-1)
        return float((np.abs(difference) ** power).mean())

    return metric


def _token_losses(outputs: Outputs, labels: Mapping[str, Array]) -> Outputs:
    """Negative log likelihood float64 [tokens] of each labelled token, given those before it."""
    if LOGITS not in outputs or outputs[LOGITS].ndim != 3:
        raise DataError(
            f"metric perplexity needs a language model with an output '{LOGITS}' [batch, tokens, "
            f"vocabulary], this one has {', '.join(outputs)}"
        )
    truth = _truth(labels, "perplexity")
    logits = outputs[LOGITS]
    if truth.shape != logits.shape[:2] or truth.dtype.kind not in "iu":
        raise DataError(
            f"metric perplexity: the labels are {truth.dtype} {list(truth.shape)}, expected token "
            f"ids {list(logits.shape[:2])}, {NO_LABEL} where nothing is asked"
        )
    following = truth[:, 1:]
    scores, wanted = logits[:, :-1][following >= 0], following[following >= 0]
    if wanted.size and wanted.max() >= scores.shape[1]:
        raise DataError(f"metric perplexity: label {wanted.max()} is no token of {scores.shape[1]}")
    highest = scores.max(axis=1, keepdims=True)
    total = np.log(np.exp(scores - highest).sum(axis=1, dtype=np.float64)) + highest[:, 0]
    return {_LOSS: total - scores[np.arange(len(wanted)), wanted]}


def _perplexity(outputs: Outputs, labels: Any) -> float:
    """exp of the mean loss of all tokens; each weighs the same, whatever its sample."""
    losses = np.asarray(outputs[_LOSS])  # [tokens of all samples]
    if not losses.size:
        raise DataError("metric perplexity: no sample has two tokens in a row to judge")
    return float(np.exp(losses.mean()))


def _pearson(a: Array, b: Array) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / max(math.sqrt(float((a * a).sum() * (b * b).sum())), 1e-30))


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Array = (last - (counts - 1) / 2.0)[inverse]
    return ranks


def _single(outputs: Outputs, name: str) -> Array:
    if len(outputs) != 1:
        raise DataError(
            f"metric {name} needs a model with one output, this one has {', '.join(outputs)}; "
            "write a metric as file.py:fn(outputs, labels)"
        )
    return np.asarray(next(iter(outputs.values())))


def _truth(labels: Any, name: str) -> Array:
    """The labels; of several columns, as slices need them, the one named ``label``."""
    if isinstance(labels, Mapping):
        if LABEL not in labels:
            raise DataError(
                f"metric {name} needs one array of labels, the data has {', '.join(labels)}; "
                f"name it '{LABEL}'"
            )
        labels = labels[LABEL]
    return np.asarray(labels)


def _same_length(values: Array, truth: Array, name: str) -> None:
    if len(values) != len(truth):
        raise DataError(
            f"metric {name}: {len(values)} outputs for {len(truth)} labels; where they do not "
            "pair off, write a metric as file.py:fn(outputs, labels)"
        )


METRICS: Mapping[str, TaskMetric] = {
    metric.name: metric
    for metric in (
        TaskMetric("top1", _top(1)),
        TaskMetric("top5", _top(5)),
        TaskMetric("spearman", _correlation("spearman", spearman)),
        TaskMetric("pearson", _correlation("pearson", _pearson)),
        TaskMetric("cosine", _cosine),
        TaskMetric("mae", _mean_error("mae", 1), higher_is_better=False),
        TaskMetric("mse", _mean_error("mse", 2), higher_is_better=False),
        TaskMetric("perplexity", _perplexity, higher_is_better=False, reduce=_token_losses),
    )
}
