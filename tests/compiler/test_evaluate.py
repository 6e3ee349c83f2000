"""Who is a classifier, and what agreement and SQNR are."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from edgec.data import Sample
from edgec.errors import DataError
from edgec.evaluate import find_classifier, judge_outputs
from edgec.metrics import METRICS

HEAD = {"w": graphs.weight(8, 5), "b": graphs.feed(5)}


def ends_in(nodes: str, shape: str = "batch, 5") -> ir.Model:
    return graphs.graph(f"g (float[batch, 8] x) => (float[{shape}] y) {{ {nodes} }}", HEAD)


@pytest.mark.parametrize(
    ("nodes", "recognised"),
    [
        ("y = Gemm (x, w, b)", True),
        ("m = MatMul (x, w) y = Add (m, b)", True),
        ("m = MatMul (x, w) y = Softmax (m)", True),
        ("m = MatMul (x, w) s = Softmax (m) y = Identity (s)", True),
        ("m = MatMul (x, w) y = Relu (m)", False),
        ("m = MatMul (x, w) y = Tanh (m)", False),
        ("m = MatMul (x, w) y = LpNormalization (m)", False),  # an embedding
    ],
)
def test_logits_are_recognised_by_their_last_node(nodes: str, recognised: bool) -> None:
    model = ends_in(nodes)
    assert find_classifier(model, declared=False) == ("y" if recognised else None)
    assert find_classifier(model, declared=True) == "y"


def test_one_number_or_two_outputs_are_no_classifier() -> None:
    narrow = graphs.graph(
        "g (float[batch, 8] x) => (float[batch, 1] y) { y = MatMul (x, w) }",
        {"w": graphs.weight(8, 1)},
    )
    assert find_classifier(narrow, declared=True) is None
    model, _ = graphs.lstm()
    assert find_classifier(model, declared=True) is None


def judged(expected: Any, actual: Any, classifier: str | None = None, **rest: Any) -> Any:
    """Judge outputs that are given sample by sample."""
    samples = [Sample({"i": np.array(i)}, rest.get("labels", {})) for i in range(len(expected))]

    def runs(outputs: Any) -> Any:
        return lambda feeds: {"y": np.asarray(outputs[int(feeds["i"])], np.float32)}

    return judge_outputs(
        runs(expected),
        runs(actual),
        samples,
        classifier=classifier,
        metric=rest.get("metric"),
    )


def test_a_classifier_agrees_where_the_argmax_is_the_same() -> None:
    expected = [[[1, 2, 3]], [[3, 2, 1]], [[0, 1, 0]], [[0, 0, 1]]]
    actual = [[[0, 0, 9]], [[3, 4, 1]], [[0, 0.1, 0]], [[0, 0, 1]]]
    result = judged(expected, actual, "y")
    assert result.agreement == 0.75 and result.rule == "same argmax" and result.samples == 4


def test_a_bundle_that_gives_nan_agrees_with_nothing() -> None:
    nan = [[[float("nan")] * 3]]
    for classifier in ("y", None):
        result = judged([[[3, 2, 1]]], nan, classifier)
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
        judged([[[1.0, 2.0]]], [[[1.0, 2.0]]], "y", metric=METRICS["top1"])
    labelled = judged(
        [[[1.0, 2.0]]] * 2,
        [[[1.0, 2.0]], [[2.0, 1.0]]],
        "y",
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
            classifier=None,
        )
        assert judged.agreement == agreement
        assert (judged.sqnr_db == 200.0) == (agreement == 1.0)
