"""What ``edgec adapt`` takes for labels to judge by, and what it refuses before it trains."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
from adaptation_samples import fill, teach
from labelled_samples import separable

from edgec.errors import DataError, PassError


@pytest.fixture(scope="module")
def work(tmp_path_factory: Any) -> pathlib.Path:
    return fill(tmp_path_factory.mktemp("adapt"))


def test_refuses_an_evaluation_without_labels(work, tmp_path):
    def trained(what: str, done: int, total: int) -> None:
        raise AssertionError("refused too late")

    feeds, _ = separable(4, 4, 3)
    bare = tmp_path / "bare.npz"
    np.savez(bare, x=np.stack([f["x"] for f in feeds]))
    for side in ("evaluation", "old_evaluation"):
        reason = f"{side.replace('_', ' ')} data .*, sample 0: no labels; add an array named"
        with pytest.raises(DataError, match=reason):
            teach(work, "cnn.onnx", tmp_path / "a.onnx", **{side: bare}, progress=trained)
    assert not list(tmp_path.glob("*.onnx"))


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (np.array(["a", "b", "c", "d"]), "sample 0: labels are .*U1, expected integers"),
        (np.array([0.5, 1.5, 0.5, 1.5]), "sample 0: labels are float64, expected integers"),
        (np.array([0, 1, 2, 17]), "sample 3: label 17 is no class: .* 10 apart, 0 to 9"),
        (np.array([0, -1, 2, 3]), "sample 1: label -1 is no class"),
        (np.zeros((4, 2), int), "sample 0: 2 labels for 1 rows"),
    ],
)
@pytest.mark.parametrize("side", ["evaluation", "old_evaluation"])
@pytest.mark.parametrize(
    ("base", "name"), [("cnn.onnx", "a.onnx"), ("slots.edgec", "a.onnx_adapter")]
)
def test_refuses_to_judge_by_labels_that_are_no_classes(
    work, tmp_path, base, name, side, labels, reason
):
    def trained(what: str, done: int, total: int) -> None:
        raise AssertionError("refused too late")

    feeds, _ = separable(4, 4, 3)
    np.savez(tmp_path / "odd.npz", x=np.stack([f["x"] for f in feeds]), label=labels)
    with pytest.raises(DataError, match=reason):
        teach(work, base, tmp_path / name, **{side: tmp_path / "odd.npz"}, progress=trained)
    assert [p.name for p in tmp_path.iterdir()] == ["odd.npz"]


def test_classes_of_a_new_head_are_labels_to_judge_by(work, tmp_path):
    feeds, _ = separable(4, 4, 3)
    np.savez(tmp_path / "t.npz", x=np.stack([f["x"] for f in feeds]), label=np.full(4, 11))
    made = teach(
        work, "cnn.onnx", tmp_path / "a.onnx", evaluation=tmp_path / "t.npz", classes=12, steps=1
    )
    assert made.new.samples == 4


@pytest.mark.parametrize(("count", "told"), [(3, True), (8, False)])
def test_a_cross_entropy_of_samples_that_were_learned_from_is_told(work, tmp_path, count, told):
    feeds, labels = separable(count, 4, 3)
    np.savez(
        tmp_path / "few.npz",
        x=np.stack([f["x"] for f in feeds]),
        label=np.stack([one["label"] for one in labels]),
    )
    made = teach(work, "cnn.onnx", tmp_path / "a.onnx", data=tmp_path / "few.npz", steps=2)
    assert any("too few samples to hold some out" in f for f in made.findings) is told


@pytest.mark.parametrize("label", [0.0, "a", -1])
def test_labels_to_learn_from_are_refused_with_the_advice_of_the_pass(work, tmp_path, label):
    feeds, _ = separable(8, 4, 3)
    np.savez(tmp_path / "d.npz", x=np.stack([f["x"] for f in feeds]), label=np.array([label] * 8))
    with pytest.raises(PassError, match="convert them to integers|label -1 is no class"):
        teach(work, "cnn.onnx", tmp_path / "a.onnx", data=tmp_path / "d.npz", evaluation=None)
