"""The built-in metrics against scipy and scikit-learn, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from edgec.errors import DataError
from edgec.metrics import METRICS, load_metric, spearman

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((60, 7))
CLASSES = RNG.integers(0, 7, 60)


@pytest.mark.parametrize(("name", "k"), [("top1", 1), ("top5", 5)])
def test_top_k_equals_sklearn(name: str, k: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    expected = metrics.top_k_accuracy_score(CLASSES, LOGITS, k=k, labels=range(7))
    assert METRICS[name]({"y": LOGITS}, CLASSES) == pytest.approx(expected)


def test_top1_counts_positions_of_a_sequence() -> None:
    logits = np.eye(4)[None, [0, 1, 2, 3]]  # [1, 4 positions, 4 classes]
    assert METRICS["top1"]({"y": logits}, np.array([[0, 1, 0, 0]])) == 0.5


def test_correlations_equal_scipy_with_ties() -> None:
    stats = pytest.importorskip("scipy.stats")
    a = RNG.integers(0, 9, 50).astype(float)
    b = a + RNG.integers(0, 9, 50)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert METRICS["pearson"]({"y": a[:, None]}, b) == pytest.approx(stats.pearsonr(a, b).statistic)
    assert spearman(a, np.ones(50)) == 0.0  # a constant ranks nothing


def test_errors_and_cosine_by_hand() -> None:
    y, truth = np.array([[1.0], [3.0]]), np.array([2.0, 5.0])
    assert METRICS["mae"]({"y": y}, truth) == 1.5 and METRICS["mse"]({"y": y}, truth) == 2.5
    vectors = np.array([[1.0, 0.0], [1.0, 1.0]])
    expected = (1.0 + 0.0) / 2
    assert METRICS["cosine"]({"y": vectors}, np.array([[2, 0], [1, -1]])) == pytest.approx(expected)


def test_a_drop_is_positive_where_the_bundle_is_worse() -> None:
    assert METRICS["top1"].drop(0.9, 0.8) == pytest.approx(0.1)
    assert METRICS["mae"].drop(0.8, 0.9) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("name", "outputs", "labels", "message"),
    [
        ("top1", {"a": LOGITS, "b": LOGITS}, CLASSES, "one output, this one has a, b"),
        ("top1", {"y": LOGITS}, CLASSES[:9], "60 outputs for 9 labels"),
        ("top1", {"y": LOGITS}, CLASSES + 0.5, "integer labels"),
        ("mae", {"y": LOGITS}, CLASSES, "metric mae: 420 outputs for 60 labels"),
        ("cosine", {"y": LOGITS}, LOGITS[:, :3], "differ"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, outputs, labels, message: str) -> None:
    with pytest.raises(DataError, match=message):
        METRICS[name](outputs, labels)


def test_a_users_metric_must_return_a_finite_number() -> None:
    assert load_metric(lambda outputs, labels: 0.25)({}, None) == 0.25
    with pytest.raises(DataError, match="finite"):
        load_metric(lambda outputs, labels: float("inf"))({}, None)
    with pytest.raises(DataError, match="raised TypeError"):
        load_metric(lambda outputs: 1.0)({}, None)
    with pytest.raises(DataError, match="unknown metric 'topp1', did you mean 'top1'"):
        load_metric("topp1")
