"""How far a classifier's confidence is from its accuracy: the expected calibration error.

Rows are sorted into 15 equal bins by the largest probability; the error is the mean distance
of accuracy and confidence in a bin, weighted by its rows (Guo et al. 2017, arXiv:1706.04599,
equation 3). Quantization can change it while the accuracy stays: an app that asks "sure
enough?" notices. Binning makes it a little too large on few samples, on both sides alike.

Left out on purpose: temperature scaling; it is for the model's author to train.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgec.answers import class_rows
from edgec.report import Confidence

Array = np.ndarray[Any, Any]

BINS = 15
_SUM = 1e-3  # how far the sum of a float32 or float16 softmax is from 1, at most


class ConfidenceTally:
    """Collects confidence and correctness of both sides, sample by sample."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._probabilities: bool | None = None  # else logits; the first sample tells
        self._usable = True
        self._seen: tuple[list[Array], list[Array]] = ([], [])  # [rows, 2]: confidence, correct

    def add(self, reference: Array, bundle: Array, truth: Array | None) -> None:
        """One sample: class scores [..., classes] of both sides, and the classes [rows]."""
        sides = [class_rows(side) for side in (reference, bundle)]
        fits = truth is not None and all(
            len(rows) == len(truth) and np.isfinite(rows).all() for rows in sides
        )
        classes = reference.shape[-1]
        if truth is None or not fits or truth.min(initial=0) < 0 or truth.max(initial=0) >= classes:
            self._usable = False
            return
        if self._probabilities is None:
            first = sides[0]
            sums = np.abs(first.sum(1) - 1.0)
            self._probabilities = bool((first >= 0).all() and (sums <= _SUM).all())
        for rows, seen in zip(sides, self._seen, strict=True):
            chosen = rows.argmax(1)
            shares = rows if self._probabilities else _softmax(rows)
            confidence = np.clip(shares.max(1), 0.0, 1.0)
            seen.append(np.stack([confidence, chosen == truth], axis=1))

    def result(self) -> Confidence | None:
        """The errors of both sides; None without a class for every row of scores."""
        if not self._usable or not self._seen[0]:
            return None
        reference, bundle = (np.concatenate(seen) for seen in self._seen)
        return Confidence(
            bins=BINS,
            rows=len(reference),
            reference_error=calibration_error(reference[:, 0], reference[:, 1]),
            bundle_error=calibration_error(bundle[:, 0], bundle[:, 1]),
            reference_confidence=float(reference[:, 0].mean()),
            bundle_confidence=float(bundle[:, 0].mean()),
            reference_accuracy=float(reference[:, 1].mean()),
            bundle_accuracy=float(bundle[:, 1].mean()),
        )


def calibration_error(confidence: Array, correct: Array, bins: int = BINS) -> float:
    """Expected calibration error, 0..1, of confidences 0..1 [rows] and correctness 0/1 [rows]."""
    index = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(index, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def _softmax(rows: Array) -> Array:
    exponents = np.exp(rows - rows.max(1, keepdims=True))
    shares: Array = exponents / exponents.sum(1, keepdims=True)
    return shares
