"""Confidence against accuracy: the expected calibration error of both sides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgec.agreement import AgreementRule, Same
from edgec.calibration_error import BINS, ConfidenceTally, calibration_error
from edgec.data import Sample
from edgec.evaluate import judge_outputs
from edgec.report import Confidence


def by_definition(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Guo et al. 2017, equations 1 to 3, bin by bin."""
    total = 0.0
    for m in range(1, BINS + 1):
        low, high = (m - 1) / BINS, m / BINS
        inside = [i for i, c in enumerate(confidence) if low < c <= high]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            mean = sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - mean)
    return total


def test_the_error_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.1, 1.0, 500)
    correct = (rng.uniform(size=500) < confidence**2).astype(float)
    error = calibration_error(confidence, correct)
    assert error == pytest.approx(by_definition(confidence, correct), abs=1e-12)
    assert error > 0.1


def test_a_confidence_on_the_edge_of_a_bin_falls_into_the_lower_one() -> None:
    # 0.4 is 6 / 15: with 0.41 in one bin the gaps of the two would cancel
    edge = np.array([0.4, 0.41])
    assert calibration_error(edge, np.array([1.0, 0.0])) == pytest.approx((0.6 + 0.41) / 2)


def tallied(reference: Any, bundle: Any, truth: Any) -> Confidence | None:
    tally = ConfidenceTally()
    for r, b, t in zip(reference, bundle, truth, strict=True):
        tally.add(np.asarray(r), np.asarray(b), None if t is None else np.asarray(t))
    return tally.result()


def test_logits_and_probabilities_give_the_same() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (40, 1, 5))
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    truth = rng.integers(0, 5, (40, 1))
    first, second = tallied(logits, logits, truth), tallied(shares, shares, truth)
    assert first is not None and second is not None
    assert first.reference_error == pytest.approx(second.reference_error, abs=1e-9)
    assert first.rows == 40 and first.bins == 15


def test_sharper_logits_are_overconfident_at_the_same_accuracy() -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 1, (400, 1, 4))
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    truth = np.array([[rng.choice(4, p=row[0])] for row in shares])  # calibrated by making
    found = tallied(logits, 4 * logits, truth)
    assert found is not None
    assert found.reference_accuracy == found.bundle_accuracy
    assert found.bundle_confidence > found.reference_confidence + 0.2
    assert found.reference_error < 0.1 < found.bundle_error


@pytest.mark.parametrize("truth", [None, [0, 1], [7], [-1]])
def test_without_a_class_for_every_row_there_is_no_figure(truth: Any) -> None:
    logits = [[[1.0, 2.0, 3.0]]] * 2
    assert tallied(logits, logits, [[0], truth]) is None


def test_a_bundle_that_gives_nan_has_no_figure() -> None:
    assert tallied([[[1.0, 2.0]]], [[[np.nan, 2.0]]], [[0]]) is None


@pytest.mark.parametrize(
    ("labels", "measured"),
    [
        ({"label": np.array([1])}, True),
        ({"label": np.array([1]), "group": np.array([0])}, True),
        ({"label": np.array([1.0])}, True),
        ({"label": np.array([0.5])}, False),
        ({"group": np.array([1])}, False),  # nothing says that these are classes
        ({}, False),
    ],
)
def test_the_judgement_has_it_where_classes_are_labelled(labels: Any, measured: bool) -> None:
    def run(feeds: Any) -> Any:
        return {"y": np.array([[0.0, 2.0, 1.0]], np.float32)}

    samples = [Sample({}, labels)] * 3
    found = judge_outputs(run, run, samples, rule=AgreementRule(Same.ARGMAX, "y"))
    assert (found.confidence is not None) == measured
    for rule in (AgreementRule(), AgreementRule(Same.DECISIONS, "y")):
        assert judge_outputs(run, run, samples, rule=rule).confidence is None
