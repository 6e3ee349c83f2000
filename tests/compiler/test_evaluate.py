"""What a judgement says: agreement, SQNR and the metric of all samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgec.agreement import AgreementRule, Same
from edgec.data import Sample
from edgec.errors import DataError
from edgec.evaluate import judge_outputs
from edgec.metrics import METRICS

CLOSE = AgreementRule()
ARGMAX = AgreementRule(Same.ARGMAX, "y")


def judged(expected: Any, actual: Any, rule: AgreementRule = CLOSE, **rest: Any) -> Any:
    """Judge outputs that are given sample by sample."""
    samples = [Sample({"i": np.array(i)}, rest.get("labels", {})) for i in range(len(expected))]

    def runs(outputs: Any) -> Any:
        return lambda feeds: {"y": np.asarray(outputs[int(feeds["i"])], np.float32)}

    return judge_outputs(
        runs(expected),
        runs(actual),
        samples,
        rule=rule,
        metric=rest.get("metric"),
    )


def test_a_classifier_agrees_where_the_argmax_is_the_same() -> None:
    expected = [[[1, 2, 3]], [[3, 2, 1]], [[0, 1, 0]], [[0, 0, 1]]]
    actual = [[[0, 0, 9]], [[3, 4, 1]], [[0, 0.1, 0]], [[0, 0, 1]]]
    result = judged(expected, actual, ARGMAX)
    assert result.agreement == 0.75 and result.rule == "same argmax" and result.samples == 4


def test_a_bundle_that_gives_nan_agrees_with_nothing() -> None:
    nan = [[[float("nan")] * 3]]
    for rule in (ARGMAX, CLOSE):
        result = judged([[[3, 2, 1]]], nan, rule)
        assert result.agreement == 0.0 and result.sqnr_db == -200.0


def test_other_outputs_agree_within_five_percent() -> None:
    expected = [[[3.0, 4.0]]] * 3
    actual = [[[3.0, 4.0]], [[3.0, 4.24]], [[3.0, 4.26]]]  # errors of 0, 4.8 and 5.2 %
    assert judged(expected, actual).agreement == pytest.approx(2 / 3)


def test_sqnr_is_taken_over_all_samples_together() -> None:
    result = judged([[[3.0]], [[4.0]]], [[[3.0]], [[4.5]]])
    assert result.sqnr_db == pytest.approx(10 * np.log10(25 / 0.25))
    assert judged([[[1.0]]], [[[1.0]]]).sqnr_db == 200.0


def test_equal_infinities_are_no_noise() -> None:
    masked = [[[1.0, -np.inf]]]
    assert judged(masked, masked).sqnr_db == 200.0
    assert judged(masked, [[[1.0, 0.0]]]).agreement == 0.0


def test_a_metric_needs_labels() -> None:
    with pytest.raises(DataError, match="needs labels"):
        judged([[[1.0, 2.0]]], [[[1.0, 2.0]]], ARGMAX, metric=METRICS["top1"])
    labelled = judged(
        [[[1.0, 2.0]]] * 2,
        [[[1.0, 2.0]], [[2.0, 1.0]]],
        ARGMAX,
        metric=METRICS["top1"],
        labels={"label": np.array([1])},
    )
    assert (labelled.metric.reference, labelled.metric.bundle) == (1.0, 0.5)


def test_nothing_to_judge_on_is_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        judged([], [])


def test_positions_that_a_mask_hides_count_for_nothing() -> None:
    expected = np.ones((2, 3, 4), np.float32)
    actual = expected.copy()
    actual[0, 2] = 100.0
    shown = {"attention_mask": np.array([[1, 1, 0], [1, 1, 1]])}
    for feeds, agreement in ((shown, 1.0), ({}, 0.0)):
        judged = judge_outputs(
            lambda feeds: {"y": expected},
            lambda feeds: {"y": actual},
            [Sample(feeds, {})],
            rule=CLOSE,
        )
        assert judged.agreement == agreement
        assert (judged.sqnr_db == 200.0) == (agreement == 1.0)
