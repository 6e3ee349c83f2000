"""FGSM and PGD: they follow the gradient, raise the loss, and stay in the ball and the range."""

from __future__ import annotations

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from digits_cnn import digits

from edgec.attacks import Attacker, Ball
from edgec.errors import DataError, PassError

LINEAR = "g (float[batch, 4] x) => (float[batch, 3] y) { y = Gemm (x, w, b) }"
HEAD = {"w": graphs.weight(4, 3), "b": graphs.feed(3)}


def ball(radius: float, low: float = 0.0, high: float = 1.0, name: str = "x") -> Ball:
    return Ball(name, *(np.float32([[v]]) for v in (radius, low, high)))


def image_ball(radius: float) -> Ball:
    return Ball("x", *(np.full((1, 1, 1, 1), v, np.float32) for v in (radius, 0.0, 1.0)))


def one_by_one(images: np.ndarray, labels: np.ndarray) -> tuple[list, list]:
    feeds = [{"x": images[i : i + 1]} for i in range(len(images))]
    return feeds, [np.int64(labels[i : i + 1]) for i in range(len(labels))]


def losses(model: ir.Model, feeds: list, classes: list) -> np.ndarray:
    """Cross entropy of each sample, by ONNX Runtime."""
    found = []
    for given, truth in zip(feeds, classes, strict=True):
        rows = graphs.run(model, **given)[0].astype(np.float64)
        shares = np.exp(rows - rows.max()) / np.exp(rows - rows.max()).sum()
        found.append(-np.log(max(shares[0, truth[0]], 1e-300)))
    return np.array(found)


def test_fgsm_is_a_step_along_the_sign_of_the_gradient() -> None:
    model = graphs.graph(LINEAR, HEAD)
    x = np.float32([[0.5, 0.4, 0.6, 0.5], [0.02, 0.99, 0.5, 0.3]])
    feeds, classes = one_by_one(x, np.array([2, 0]))
    made = Attacker(model, "y", ball(0.1)).disturb("fgsm", feeds, classes, seed=0)
    logits = x @ HEAD["w"] + HEAD["b"]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    shares[[0, 1], [2, 0]] -= 1.0
    expected = np.clip(x + 0.1 * np.sign(shares @ HEAD["w"].T), 0.0, 1.0)
    np.testing.assert_allclose(np.concatenate(made), expected, atol=1e-6)  # float32 sums


@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
def test_an_attack_stays_in_the_ball_and_in_the_range_and_raises_the_loss(kind) -> None:
    data = digits()
    feeds, classes = one_by_one(data.test[:24], data.labels[:24])
    made = Attacker(data.model, "y", image_ball(0.1)).disturb(kind, feeds, classes, seed=0)
    for given, array in zip(feeds, made, strict=True):
        assert array.dtype == np.float32 and array.shape == given["x"].shape
        assert array.min() >= 0.0 and array.max() <= 1.0
        assert np.abs(array - given["x"]).max() <= 0.1 + 1e-6
    attacked = losses(data.model, [{"x": array} for array in made], classes)
    assert (attacked > losses(data.model, feeds, classes)).mean() > 0.9


def test_pgd_finds_what_fgsm_misses() -> None:
    data = digits()
    feeds, classes = one_by_one(data.test[:48], data.labels[:48])
    attacker = Attacker(data.model, "y", image_ball(0.1))
    found = {
        kind: losses(
            data.model,
            [{"x": a} for a in attacker.disturb(kind, feeds, classes, seed=0)],
            classes,
        ).mean()
        for kind in ("fgsm", "pgd")
    }
    assert found["pgd"] > found["fgsm"]


def test_pgd_gives_the_worst_point_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    data = digits()
    feeds, classes = one_by_one(data.test[:8], data.labels[:8])
    attacker = Attacker(data.model, "y", image_ball(0.1))
    margins, measure = [], attacker._gradient

    def watched(*arguments):
        margins.append(measure(*arguments)[0].numpy())
        return measure(*arguments)

    monkeypatch.setattr(attacker, "_gradient", watched)
    made = attacker.disturb("pgd", feeds, classes, seed=0)
    rows = np.concatenate([graphs.run(data.model, x=array)[0] for array in made])
    true = np.array([row[truth[0]] for row, truth in zip(rows, classes, strict=True)])
    wrong = [np.delete(row, truth[0]).max() for row, truth in zip(rows, classes, strict=True)]
    np.testing.assert_allclose(wrong - true, np.max(margins, axis=0), atol=1e-3)  # float32 sums


def test_a_seed_gives_the_same_bytes_however_samples_are_stacked() -> None:
    data = digits()
    feeds, classes = one_by_one(data.test[:6], data.labels[:6])
    attacker = Attacker(data.model, "y", image_ball(0.1))
    first, again, other = (attacker.disturb("pgd", feeds, classes, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    alone = attacker.disturb("pgd", feeds[:1], classes[:1], seed=1)
    # the same start; sums in another order may turn the sign of a gradient near 0
    assert np.isclose(alone[0], first[0], atol=1e-6).mean() > 0.9


@pytest.mark.parametrize("end", ["y = Gemm (x, w, b)", "z = Gemm (x, w, b) y = Softmax (z)"])
def test_scores_that_are_far_apart_do_not_hide_the_gradient(end: str) -> None:
    sure = {"w": HEAD["w"] * 1e4, "b": HEAD["b"]}  # probabilities are 0 and 1 in float32
    model = graphs.graph(LINEAR.replace("y = Gemm (x, w, b)", end), sure)
    feeds, _ = one_by_one(np.full((1, 4), 0.5, np.float32), np.zeros(1))
    truth = [graphs.run(model, **feeds[0])[0].argmax(1)]
    (made,) = Attacker(model, "y", ball(0.1)).disturb("fgsm", feeds, truth, seed=0)
    assert (np.abs(made - 0.5) > 0.09).any()


def test_a_graph_that_counts_on_its_batch_is_attacked_one_by_one() -> None:
    text = """g (float[batch, 4] x) => (float[1, 3] y) {
        m = ReduceMean <keepdims = 1> (x, zero) y = Gemm (m, w, b)
    }"""
    model = graphs.graph(text, {**HEAD, "zero": np.int64([0])})
    feeds, classes = one_by_one(graphs.feed(3, 4) * 0.1 + 0.5, np.array([0, 1, 2]))
    made = Attacker(model, "y", ball(0.05)).disturb("fgsm", feeds, classes, seed=0)
    assert [array.shape for array in made] == [(1, 4)] * 3
    assert (losses(model, [{"x": a} for a in made], classes) > losses(model, feeds, classes)).all()


def test_samples_of_different_shapes_are_attacked_apart() -> None:
    text = """g (float[1, length] x) => (float[1, 3] y) {
        m = ReduceMean <keepdims = 1> (x, one) y = Gemm (m, w, b)
    }"""
    head = {"w": HEAD["w"][:1], "b": HEAD["b"], "one": np.int64([1])}
    feeds = [{"x": np.full((1, n), 0.5, np.float32)} for n in (3, 3, 5)]
    attacker = Attacker(graphs.graph(text, head), "y", ball(0.1))
    made = attacker.disturb("pgd", feeds, [np.int64([0])] * 3, seed=0)
    assert [array.shape for array in made] == [(1, 3), (1, 3), (1, 5)]


def test_an_input_without_a_gradient_is_refused() -> None:
    text = """g (float[batch, 4] x) => (float[batch, 3] y) {
        i = Cast <to = 7> (x) f = Cast <to = 1> (i) y = Gemm (f, w, b)
    }"""
    attacker = Attacker(graphs.graph(text, HEAD), "y", ball(0.1))
    feeds, classes = one_by_one(np.ones((1, 4), np.float32), np.array([0]))
    with pytest.raises(DataError, match="no gradient reaches input 'x'"):
        attacker.disturb("fgsm", feeds, classes, seed=0)


def test_a_node_that_torch_cannot_run_is_named() -> None:
    text = """g (float[batch, 4] x, bool c) => (float[batch, 3] y) {
        [branch] h = If (c) <
            then_branch = a () => (float[batch, 4] p) { p = Relu (x) },
            else_branch = b () => (float[batch, 4] q) { q = Neg (x) }
        >
        y = Gemm (h, w, b)
    }"""
    with pytest.raises(PassError, match="'branch'"):
        Attacker(graphs.graph(text, HEAD), "y", ball(0.1))
