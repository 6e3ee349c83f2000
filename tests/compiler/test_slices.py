"""The metric slice by slice: who is judged, who is only listed, and the error of a drop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgec.agreement import AgreementRule, Same
from edgec.answers import agreement_score, mean_score, metric_score, standard_error
from edgec.data import Sample
from edgec.errors import DataError
from edgec.evaluate import judge_outputs
from edgec.metrics import METRICS, TaskMetric
from edgec.promise import Limits, judge
from edgec.report import Metric, Slices
from edgec.slices import SliceColumn, by_slice, check_slices


def sample(**labels: Any) -> Sample:
    return Sample({}, {k: np.asarray(v) for k, v in labels.items()}, "evaluation data, sample 4")


def sliced(counts: dict[str, int], wrong: dict[str, int], least: int = 30) -> Slices:
    """Slices of given sizes in which the bundle disagrees on a given number of samples."""
    values = [value for value, count in counts.items() for _ in range(count)]
    agreements = [float(i >= wrong.get(v, 0)) for v, n in counts.items() for i in range(n)]
    return by_slice(SliceColumn("group", least), values, agreement_score(agreements))


@pytest.mark.parametrize(
    ("given", "value"),
    [(3, "3"), ("night", "night"), (b"night", "night"), ([2, 2], "2"), ([[True]], "True")],
)
def test_a_slice_is_named_by_its_value(given: Any, value: str) -> None:
    assert SliceColumn("group", 30).value(sample(group=given)) == value


def test_a_column_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(DataError, match="sample 4: no label column 'grop'.*did you mean 'group'"):
        SliceColumn("grop", 30).value(sample(group=1, label=2))
    with pytest.raises(DataError, match="besides the inputs: none"):
        SliceColumn("group", 30).value(sample())


def test_a_sample_of_several_slices_is_refused() -> None:
    with pytest.raises(DataError, match="sample 4: column 'group' holds 2 values"):
        SliceColumn("group", 30).value(sample(group=[1, 2]))


def test_one_slice_for_all_samples_is_refused() -> None:
    with pytest.raises(DataError, match="data: column 'group' is 'a' in every sample"):
        check_slices(SliceColumn("group", 1), [sample(group="a")] * 3, "data")


def test_slices_that_are_too_small_even_together_are_refused_before_anything_runs() -> None:
    samples = [sample(group=i % 4) for i in range(29)]
    with pytest.raises(DataError, match="4 slices of column 'group' have 29 samples together"):
        check_slices(SliceColumn("group", 30), samples, "data")
    check_slices(SliceColumn("group", 29), samples, "data")  # together they are enough
    check_slices(SliceColumn("group", 8), samples, "data")  # one is enough alone


def test_the_worst_slice_comes_first_and_small_ones_are_listed_last() -> None:
    found = sliced({"a": 40, "b": 60, "tiny": 5}, {"a": 4, "b": 3, "tiny": 5})
    assert [(row.value, row.samples, row.judged) for row in found.rows] == [
        ("a", 40, True),
        ("b", 60, True),
        ("tiny", 5, False),
    ]
    assert [row.drop for row in found.rows] == pytest.approx([0.1, 0.05, 1.0])
    assert found.worst is found.rows[0] and found.metric == "agreement"


def test_the_least_number_of_samples_is_enough() -> None:
    found = sliced({"big": 90, "enough": 30, "few": 29}, {"enough": 3, "few": 20})
    assert [(row.value, row.judged) for row in found.rows] == [
        ("enough", True),
        ("big", True),
        ("few", False),
    ]


def test_small_slices_are_judged_together_once_they_are_enough() -> None:
    found = sliced({"big": 100, "x": 20, "y": 10}, {"x": 5, "y": 1})
    pool, big, *small = found.rows
    assert (pool.pooled, pool.samples, pool.judged) == (2, 30, True)
    assert pool.drop == pytest.approx(6 / 30) and big.drop == 0.0
    assert [(row.value, row.judged) for row in small] == [("x", False), ("y", False)]
    assert found.title(pool) == "2 small slices of group together"


def test_no_judged_slice_is_no_worst_slice_and_no_kept_promise() -> None:
    found = sliced({"x": 3, "y": 2}, {})
    assert found.worst is None
    assert promise(found, 0.5) == (False, None)


def promise(slices: Slices | None, limit: float) -> tuple[bool, float | None]:
    (verdict,) = judge(
        Limits(max_slice_drop=limit),
        size_bytes=1,
        metric=Metric("top1", 0.9, 0.9, 0.0),
        agreement=1.0,
        speedup=None,
        measured_on=None,
        real_data=True,
        slices=slices,
    )
    return verdict.kept, verdict.value


def test_the_worst_slice_decides_whatever_the_mean_is() -> None:
    found = sliced({"big": 960, "rare": 40}, {"rare": 4})
    assert promise(found, 0.1)[0]
    assert promise(found, 0.099) == (False, pytest.approx(0.1))
    assert promise(None, 0.1) == (False, None)


def test_the_error_of_a_drop_is_that_of_paired_samples() -> None:
    rng = np.random.default_rng(0)
    agreements = (rng.uniform(size=2000) > 0.2).astype(float)
    error = standard_error(agreement_score(list(agreements)), range(2000))
    # 20 groups tell an error within 1 / sqrt(2 * 19) = 16 % of itself; two of those
    assert error == pytest.approx(agreements.std() / np.sqrt(2000), rel=0.33)
    assert standard_error(agreement_score([1.0]), [0]) is None


def test_the_error_does_not_follow_the_order_of_the_samples() -> None:
    # every 20th sample is wrong: groups of every 20th sample would see nothing but that
    agreements = [float(i % 20 != 0) for i in range(2000)]
    error = standard_error(agreement_score(agreements), range(2000))
    assert error == pytest.approx(np.sqrt(0.05 * 0.95 / 2000), rel=0.33)


def test_a_mean_of_scores_is_the_mean_of_their_figures() -> None:
    found = mean_score([agreement_score([1.0, 1.0]), agreement_score([0.0, 1.0])])([0, 1])
    assert (found.name, found.bundle, found.drop) == ("agreement", 0.75, 0.25)


def outputs(rows: list[int], classes: int = 3) -> Any:
    """A run that answers with the given class of each sample."""
    return lambda feeds: {"y": np.eye(classes, dtype=np.float32)[[rows[int(feeds["i"])]]]}


def judged(metric: TaskMetric | None, column: str = "group") -> Any:
    right, answers = [0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 0, 0]
    groups = ["a", "a", "a", "b", "b", "b"]
    samples = [
        Sample(
            {"i": np.array(i)},
            {"label": np.array([right[i]]), "group": np.array(groups[i])},
        )
        for i in range(6)
    ]
    return judge_outputs(
        outputs(right),
        outputs(answers),
        samples,
        rule=AgreementRule(Same.ARGMAX, "y"),
        metric=metric,
        slices=SliceColumn(column, 3),
    )


@pytest.mark.parametrize("metric", [None, METRICS["top1"]])
def test_slices_are_those_of_the_task_metric_or_of_the_agreement(metric: Any) -> None:
    found = judged(metric)
    assert found.slices.metric == ("top1" if metric else "agreement")
    figures = [(r.value, r.reference, r.bundle, r.drop) for r in found.slices.rows]
    assert figures == [
        ("b", 1.0, pytest.approx(1 / 3), pytest.approx(2 / 3)),
        ("a", 1.0, 1.0, 0.0),
    ]
    assert found.agreement == pytest.approx(4 / 6)


def test_classes_can_be_the_slices() -> None:
    found = judged(METRICS["top1"], "label").slices
    assert {r.value: (r.samples, r.bundle) for r in found.rows if not r.pooled} == {
        "0": (2, 1.0),
        "1": (2, 0.5),
        "2": (2, 0.5),
    }


def test_a_lower_metric_that_is_better_drops_upwards() -> None:
    score = metric_score(
        METRICS["mae"],
        [{"y": np.array([1.0])}, {"y": np.array([2.0])}],
        [{"y": np.array([1.5])}, {"y": np.array([2.0])}],
        [{"label": np.array([1.0])}, {"label": np.array([2.0])}],
    )
    assert score([0]).drop == 0.5 and score([1]).drop == 0.0 and score([0, 1]).drop == 0.25


def test_a_metric_that_fails_on_a_judged_slice_names_it() -> None:
    def fussy(outputs: Any, labels: Any) -> float:
        if len(outputs["y"]) < 4:
            raise ValueError("too few")
        return 1.0

    with pytest.raises(DataError, match="slice group = a, 3 samples: metric fussy"):
        judged(TaskMetric("fussy", fussy))


def test_a_metric_without_a_value_on_a_small_slice_is_listed_as_none() -> None:
    def fussy(outputs: Any, labels: Any) -> float:
        if len(outputs["y"]) < 2:
            raise ValueError("too few")
        return 1.0

    score = metric_score(
        TaskMetric("fussy", fussy), *[[{"y": np.ones((1, 1))}] * 4] * 2, [{"label": np.ones(1)}] * 4
    )
    found = by_slice(SliceColumn("group", 3), ["a", "a", "a", "b"], score)
    assert [(row.value, row.judged) for row in found.rows] == [("a", True), ("b", False)]
    assert np.isnan(found.rows[1].drop) and found.rows[1].error is None


def test_built_in_metrics_take_the_labels_among_several_columns() -> None:
    logits = {"y": np.eye(3)}
    columns = {"label": np.array([0, 1, 0]), "group": np.array(["a", "b", "b"])}
    assert METRICS["top1"](logits, columns) == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="top1 needs one array of labels, the data has group, kind"):
        METRICS["top1"](logits, {"group": np.ones(3), "kind": np.ones(3)})
