"""A second round that keeps what the first one learned: memory, answers, weights."""

import dataclasses
import pathlib

import graphs
import labelled_samples
import numpy as np
import pytest
import torch
from labelled_samples import separable

from edgec.passes import PassError
from edgec.passes.adapt import Adapt
from edgec.passes.continual import (
    Memory,
    choose,
    fisher,
    herd,
    read_memory,
    remembered,
    write_memory,
)
from edgec.passes.course import train
from edgec.passes.curriculum import Example
from edgec.passes.head import find_head
from edgec.passes.torch_graph import to_torch


def of_classes(wanted: set[int], count: int, seed: int = 0) -> tuple[list, list]:
    """Samples of ``graphs.cnn`` of some of the four classes."""
    feeds, labels = separable(count, seed=seed)
    kept = [i for i, label in enumerate(labels) if int(label["label"][0]) in wanted]
    return [feeds[i] for i in kept], [labels[i] for i in kept]


def classes_of(samples) -> list[int]:
    return [int(s.labels["label"][0]) for s in samples]


def seen(samples) -> set[bytes]:
    return {s.feeds["x"].tobytes() for s in samples}


def task(model, wanted, **rest):
    feeds, labels = of_classes(wanted, 128)
    return graphs.context(model, calibration=feeds, calibration_labels=labels, **rest)


def accuracy(model, wanted) -> float:
    feeds, labels = of_classes(wanted, 128, seed=5)
    found = [graphs.run(model, **f)[0].argmax() for f in feeds]
    return float(np.mean([a == b["label"][0] for a, b in zip(found, labels, strict=True)]))


@pytest.fixture(scope="module")
def first_round(tmp_path_factory):
    """A model that knows classes 0 and 1, and the memory of them."""
    model, _ = graphs.cnn()
    chosen = Adapt(classes=4, steps=60, rate=0.01, remember=6)
    adapted = chosen.train(model, task(model, {0, 1}))
    path = tmp_path_factory.mktemp("memory") / "first.memory.npz"
    write_memory(path, adapted.memory)
    assert accuracy(adapted.model, {0, 1}) > 0.95
    return adapted.model, path


@pytest.mark.parametrize(
    "settings",
    [{"replay": 0.5}, {"replay": 0.5, "keep_weight": 1.0}, {"replay": 0.5, "ewc_weight": 10.0}],
    ids=["replay", "answers", "weights"],
)
def test_a_second_round_forgets_the_first_unless_it_is_held(first_round, settings):
    model, memory = first_round
    data = task(model, {2, 3})
    plain = Adapt(steps=60, rate=0.03).run(model.clone(), data).model
    assert accuracy(plain, {2, 3}) > 0.95 and accuracy(plain, {0, 1}) < 0.6
    held = Adapt(steps=60, rate=0.03, memory=str(memory), **settings).run(model.clone(), data).model
    assert accuracy(held, {2, 3}) > 0.9 and accuracy(held, {0, 1}) > 0.9


def test_answers_from_before_keep_the_first_round_without_any_memory(first_round):
    model, _ = first_round
    data = task(model, {2, 3})
    common = {"steps": 60, "rate": 0.03}
    free = Adapt(**common).run(model.clone(), data).model
    kept = Adapt(**common, keep_weight=1.0).run(model.clone(), data).model
    assert accuracy(free, {2, 3}) > 0.9 and accuracy(free, {0, 1}) < 0.1
    assert accuracy(kept, {2, 3}) > 0.9 and accuracy(kept, {0, 1}) > 0.9


def test_weights_that_matter_to_the_memory_keep_the_first_round(first_round, tmp_path):
    model, memory = first_round
    data = task(model, {2, 3})
    samples = read_memory(memory, model).learned
    few = tmp_path / "few.npz"  # none is held out, so none stops the training
    write_memory(few, Memory((samples[0], samples[1], samples[6])))
    common = {"steps": 60, "rate": 0.01, "memory": str(few), "replay": 0.0}
    free = Adapt(**common).run(model.clone(), data).model
    kept = Adapt(**common, ewc_weight=3e6).run(model.clone(), data).model
    assert accuracy(free, {2, 3}) > 0.9 and accuracy(free, {0, 1}) < 0.1
    assert accuracy(kept, {2, 3}) > 0.9 and accuracy(kept, {0, 1}) > 0.9


@pytest.mark.parametrize("what", ["_kept", "_pull"])
def test_a_loss_that_is_no_number_ends_the_training_and_is_told(first_round, monkeypatch, what):
    model, memory = first_round

    def broken(self, *_):
        return torch.tensor(float("nan"))

    monkeypatch.setattr(f"edgec.passes.course.Labels.{what}", broken)
    chosen = Adapt(steps=60, keep_weight=1.0, ewc_weight=1.0, memory=str(memory))
    outcome = chosen.train(model.clone(), task(model, {2, 3})).outcome
    assert (outcome.steps, outcome.step) == (1, 0)
    assert any("ended with step 1, whose loss is nan" in told for told in outcome.findings)


def test_a_head_grows_and_the_classes_there_were_are_kept():
    model, _ = graphs.cnn()
    small = Adapt(classes=2, steps=60, rate=0.01).run(model, task(model, {0, 1})).model
    feeds, labels = of_classes({2, 3}, 128)
    data = graphs.context(small, calibration=feeds, calibration_labels=labels)
    chosen = Adapt(classes=4, head="grow", steps=60, rate=0.01, keep_weight=2.0)
    grown = chosen.run(small.clone(), data).model
    assert accuracy(grown, {2, 3}) > 0.9
    both = [graphs.run(m, **feeds[0])[0] for m in (small, grown)]
    assert [b.shape for b in both] == [(1, 2), (1, 4)]


def test_old_samples_go_to_the_new_classes_of_a_grown_head_unless_some_are_replayed(tmp_path):
    model, _ = graphs.cnn()
    first = Adapt(classes=2, steps=60, rate=0.01, remember=6).train(model, task(model, {0, 1}))
    memory = tmp_path / "m.npz"
    write_memory(memory, Memory(first.memory.all()))  # none is held out: none stops the training
    assert accuracy(first.model, {0, 1}) > 0.95
    data = task(first.model, {2, 3})
    common = {"classes": 4, "head": "grow", "steps": 60, "rate": 0.03, "memory": str(memory)}
    held = Adapt(**common, replay=0.0, ewc_weight=1e6, keep_weight=50.0)
    assert accuracy(held.run(first.model.clone(), data).model, {0, 1}) < 0.1
    replayed = Adapt(**common, replay=0.5).run(first.model.clone(), data).model
    assert accuracy(replayed, {0, 1}) > 0.9 and accuracy(replayed, {2, 3}) > 0.9


def test_fisher_is_the_mean_squared_gradient_of_drawn_classes():
    text = "g (float[n, 3] x) => (float[n, 2] y) { [fc] y = MatMul (x, w) }"
    weight = np.array([[8.0, -8.0], [8.0, -8.0], [8.0, -8.0]], np.float32)
    model = graphs.graph(text, {"w": weight})
    x = np.array([[0.05, 0.02, 0.01]], np.float32)
    memory = [Example({"x": x}, {"label": np.array([0])})] * 200
    found = fisher(to_torch(model), ["w"], lambda v: v["y"], memory, seed=0)["w"].numpy()
    p = torch.tensor(x @ weight).softmax(-1).numpy()[0]
    exact = (x.T**2) * p[0] * p[1]  # variance of the one gradient that there is
    # 200 draws: a relative standard error of about 10 %
    np.testing.assert_allclose(found, np.repeat(exact, 2, axis=1), rtol=0.3)


def test_herding_takes_the_rows_whose_mean_is_nearest_to_the_mean_of_all():
    rows = np.array([[0.0, 4.0], [1.0, 0.1], [2.0, 0.0], [1.0, 0.0], [9.0, 1.0]])
    assert herd(rows, 1) == [2]  # nearest to (2.6, 1.02)
    for count in (2, 3):
        chosen = herd(rows, count)
        assert len(set(chosen)) == count
    assert sorted(herd(rows, 99)) == [0, 1, 2, 3, 4]


def test_a_memory_holds_the_asked_number_of_each_class_and_survives_its_file(tmp_path):
    model, _ = graphs.cnn()
    feeds, labels = of_classes({0, 1, 2}, 40)
    samples = [Example(f, v) for f, v in zip(feeds, labels, strict=True)]
    memory = remembered(model, find_head(model), samples, (), 4)
    assert classes_of(memory.learned) == [0] * 4 + [1] * 4 + [2] * 4
    for name in ("one.npz", "two.npz"):
        write_memory(tmp_path / name, memory)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    again = read_memory(tmp_path / "one.npz", model)
    assert not again.held_out
    for before, after in zip(memory.learned, again.learned, strict=True):
        np.testing.assert_array_equal(before.feeds["x"], after.feeds["x"])
        np.testing.assert_array_equal(before.labels["label"], after.labels["label"])


def test_a_quarter_of_a_memory_is_of_samples_that_were_held_out_and_stays_so(tmp_path):
    model, _ = graphs.cnn()
    sides = []
    for wanted, seed in (({0, 1, 2}, 0), ({0, 1}, 1)):  # nothing of class 2 was held out
        feeds, labels = of_classes(wanted, 40, seed)
        sides.append([Example(f, v) for f, v in zip(feeds, labels, strict=True)])
    for each, learned, held in ((1, [1, 1, 1], []), (2, [1, 1, 2], [1, 1]), (8, [6, 6, 8], [2, 2])):
        memory = remembered(model, find_head(model), *sides, each)
        assert np.bincount(classes_of(memory.learned)).tolist() == learned
        assert np.bincount(classes_of(memory.held_out)).tolist() == held
    assert seen(memory.learned) <= seen(sides[0]) and seen(memory.held_out) <= seen(sides[1])
    write_memory(tmp_path / "m.npz", memory)
    again = read_memory(tmp_path / "m.npz", model)
    assert seen(again.learned) == seen(memory.learned)
    assert seen(again.held_out) == seen(memory.held_out)


def test_no_round_learns_what_a_later_one_is_judged_by(tmp_path, monkeypatch):
    learned, judged = [], []
    model, _ = graphs.cnn()

    def noted(twin, work, head, lore, *rest):
        learned.append(seen((*lore.samples, *lore.memory)))
        judged.append(seen((*lore.held_out, *lore.held_memory)))
        return train(twin, work, head, lore, *rest)

    monkeypatch.setattr("edgec.passes.adapt.train", noted)
    memory = ""
    for number in range(4):
        chosen = Adapt(steps=1, remember=5, memory=memory)
        context = labelled_samples.context(model, seed=10 * number)
        memory = str(tmp_path / f"{number}.npz")
        write_memory(pathlib.Path(memory), chosen.train(model.clone(), context).memory)
    assert len(judged[3]) == 16 + 3 * 4  # one of five of each of four classes, in each round
    for later in range(4):
        for earlier in range(later + 1):
            assert not learned[earlier] & judged[later]


def test_a_labelled_file_of_ones_own_has_every_fourth_sample_held_out(tmp_path):
    model, _ = graphs.cnn()
    x = graphs.feed(10, 1, 4, 12, 12)
    path = pathlib.Path(write(tmp_path / "own.npz", x=x, label=np.arange(10) % 4))
    memory = read_memory(path, model)
    assert classes_of(memory.held_out) == [3, 3] and len(memory.learned) == 8
    write_memory(tmp_path / "again.npz", memory)  # as the next round does
    assert seen(read_memory(tmp_path / "again.npz", model).held_out) == seen(memory.held_out)


def test_a_memory_is_data_that_a_build_reads(tmp_path):
    from edgec.data import open_data
    from edgec.shapes import input_specs

    model, _ = graphs.cnn()
    feeds, labels = of_classes({0, 1}, 8)
    samples = tuple(Example(f, v) for f, v in zip(feeds, labels, strict=True))
    write_memory(tmp_path / "m.npz", Memory(samples[:6], samples[6:]))
    read = list(open_data(str(tmp_path / "m.npz"), input_specs(model), "evaluation").samples())
    assert [int(s.labels["label"].item()) for s in read] == [int(v["label"][0]) for v in labels]


def test_a_memory_is_chosen_by_what_low_rank_branches_make_of_the_samples(monkeypatch):
    model, _ = graphs.cnn()
    graph = []

    def chosen(work, *rest):
        graph.extend(n.op_type for n in work.graph)
        return remembered(work, *rest)

    monkeypatch.setattr("edgec.passes.adapt.remembered", chosen)
    taught = Adapt(method="lora", rank=2, steps=2, remember=2).train(model, task(model, {0, 1}))
    assert len(taught.memory.all()) == 4 and graph.count("Add") == 2


def test_later_rounds_add_to_the_memory(first_round):
    model, memory = first_round
    chosen = Adapt(steps=2, memory=str(memory), remember=3)
    adapted = chosen.train(model.clone(), task(model, {2, 3}))
    assert np.bincount(classes_of(adapted.memory.all())).tolist() == [6, 6, 3, 3]


def write(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def test_refuses_a_memory_that_is_none_or_of_another_model(tmp_path, first_round):
    model, _ = graphs.cnn()
    x, label = np.zeros((3, 1, 4, 12, 12), np.float32), np.arange(3)
    cases = {
        "no such file": str(tmp_path / "none.npz"),
        "input 'x' needs an array.*none": write(tmp_path / "a.npz", z=x, label=label),
        "another model": write(tmp_path / "b.npz", x=x[:, 0], label=label),
        "no integer labels": write(tmp_path / "c.npz", x=x),
        r"hold \[2, 3\] samples": write(tmp_path / "d.npz", x=x, label=label[:2]),
        "label 10 is no class": write(tmp_path / "e.npz", x=x, label=label + 8),
        "not an .npz": write(tmp_path / "f.npz", x=np.array([object()])),
        r"'held_out' is int64 \[3\], expected true or false for each of the 3": write(
            tmp_path / "h.npz", x=x, label=label, held_out=label
        ),
        "not true for all of them": write(
            tmp_path / "i.npz", x=x, label=label, held_out=np.ones(3, bool)
        ),
    }
    (tmp_path / "g.npz").write_bytes(b"no zip")
    cases["not an .npz of"] = str(tmp_path / "g.npz")
    for reason, path in cases.items():
        with pytest.raises(PassError, match=reason):
            Adapt(memory=path).run(model.clone(), task(model, {0, 1}))


def test_refuses_to_hold_on_to_classes_that_a_new_head_forgets():
    model, _ = graphs.cnn()
    with pytest.raises(PassError, match="head='new' forgets"):
        Adapt(classes=4, keep_weight=1.0).run(model, task(model, {0, 1}))


def test_refuses_answers_of_a_model_that_never_knew_the_memory(tmp_path):
    model, _ = graphs.cnn()
    x = np.zeros((4, 1, 4, 12, 12), np.float32)
    path = write(tmp_path / "m.npz", x=x, label=np.array([9, 10, 11, 11]))
    chosen = Adapt(classes=12, head="grow", keep_weight=1.0, memory=path)
    with pytest.raises(PassError, match="memory has class 11, the model from before tells 10"):
        chosen.run(model, task(model, {0, 1}))


def test_refuses_to_remember_samples_of_several_classes_or_shapes(tmp_path):
    model, _ = graphs.cnn()
    mixed = [Example({"x": graphs.feed(2, 4, 12, 12)}, {"label": np.array([0, 1])})]
    with pytest.raises(PassError, match="labels of 2 classes"):
        choose(model, find_head(model), mixed, 1)
    shapes = [Example({"x": graphs.feed(1, n)}, {"label": np.array([0])}) for n in (2, 3)]
    with pytest.raises(PassError, match="2 shapes"):
        write_memory(tmp_path / "m.npz", Memory(tuple(shapes)))
    assert not list(tmp_path.iterdir())


def test_consolidation_with_a_grown_head_leaves_its_new_rows_free(first_round):
    model, memory = first_round
    data = dataclasses.replace(task(model, {2, 3}), reference=model.clone())
    chosen = Adapt(
        classes=6, head="grow", steps=10, memory=str(memory), ewc_weight=1.0, keep_weight=1.0
    )
    assert chosen.run(model.clone(), data).changed > 0
