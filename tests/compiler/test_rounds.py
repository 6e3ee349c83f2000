"""Pruning in rounds: the steps of a recipe, what they leave, and the same again from a lock."""

from __future__ import annotations

import json
import pathlib
from dataclasses import replace

import graphs
import numpy as np
import onnx_ir as ir
import pytest
import small_models
from digits_cnn import digits

import edgec
from edgec.errors import RecipeError
from edgec.passes import Context, Fuse, Pass, PruneMagnitude, PruneStructured, Recover
from edgec.passes.execution import graph_bytes
from edgec.pipeline import Step, run_passes
from edgec.recipe import from_toml, load_recipe, parameters_of, to_toml, with_settings
from edgec.rounds import in_rounds

RECOVER = Recover(steps=4, batch=2, rate=1.0, bias_rate=0.02)


def samples(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    return [{"x": graphs.feed(1, 4, 12, 12, seed=seed + i)} for i in range(count)]


@pytest.fixture(scope="module")
def context() -> Context:
    """A small CNN as the reference, and data for it."""
    return graphs.context(graphs.cnn()[0], calibration=samples(12, 100), validation=samples(4, 500))


def run(passes: list, context: Context, **rest: object) -> tuple[Step, ...]:
    return run_passes(passes, context, samples(1, 900), **rest)  # type: ignore[arg-type]


def zeros(model: ir.Model) -> dict[str, np.ndarray]:
    """Where each weight of at least 100 numbers is zero."""
    tensors = {n: v.const_value for n, v in model.graph.initializers.items()}
    return {n: t.numpy() == 0 for n, t in tensors.items() if t is not None and t.size >= 100}


def units(step: Step) -> dict[str, int]:
    """Sizes of the first axis of the convolutions' weights."""
    tensors = {n: v.const_value for n, v in step.model.graph.initializers.items()}
    return {n: t.shape.numpy()[0] for n, t in tensors.items() if t is not None and len(t.shape) > 1}


def test_a_pruning_and_the_training_behind_it_are_repeated() -> None:
    passes = with_settings(
        load_recipe("cleanup,prune-structured,recover,quantize-static,recover,lower"),
        ["prune-structured.rounds=2", "prune-structured.ratio=0.5", "recover.steps=7"],
    )
    steps = in_rounds(passes)
    taken = ["prune-structured", "recover"]
    assert [p.name for p in steps] == ["cleanup", *taken * 2, "quantize-static", "recover", "lower"]
    assert [parameters_of(steps[i])["ratio"] for i in (1, 3)] == [0.4375, 0.5]
    assert steps[2] == steps[4] == passes[2]
    assert in_rounds(steps) == steps
    assert from_toml(to_toml(steps), "text") == steps


def test_a_recipe_without_rounds_stays_as_it_is() -> None:
    passes = load_recipe("cleanup,prune-magnitude,quantize-static,recover,lower")
    assert in_rounds(passes) == passes


@pytest.mark.parametrize(
    ("recipe", "behind"),
    [
        ("prune-magnitude", "nothing does"),
        ("prune-magnitude,prune-structured,recover", "'prune-structured' does"),
        ("prune-magnitude,quantize-static,recover", "'quantize-static' does"),
    ],
)
def test_rounds_without_a_training_behind_are_refused(recipe: str, behind: str) -> None:
    passes = with_settings(load_recipe(recipe), ["prune-magnitude.rounds=3"])
    with pytest.raises(RecipeError, match=f"{behind}; put recover behind it, or leave out rounds"):
        in_rounds(passes)


def test_rounds_without_a_training_are_refused_before_the_export(tmp_path: pathlib.Path) -> None:
    told: list[str] = []
    with pytest.raises(RecipeError, match="put recover behind it"):
        edgec.build(
            (small_models.cnn(), (small_models.image(),)),
            target="x86-64",
            output=tmp_path,
            recipe=("cleanup", "prune-magnitude"),
            settings=("prune-magnitude.rounds=2",),
            progress=lambda what, done, total: told.append(what),
        )
    assert told == []


def test_sparsity_is_that_of_one_round_and_early_zeros_stay(context: Context) -> None:
    prune = PruneMagnitude(sparsity=0.9, min_weights=100, rounds=3)
    steps = run([prune, RECOVER], context)
    assert [step.pass_.name for step in steps] == ["prune-magnitude", "recover"] * 3
    assert all(step.result.changed for step in steps)
    before: dict[str, np.ndarray] = {}
    for step in steps:
        after = zeros(step.model)
        for name, was in before.items():
            assert not (was & ~after[name]).any(), f"{name}: a zero came back"
        before = after
    [direct] = run([PruneMagnitude(sparsity=0.9, min_weights=100)], context)
    counts = {n: int(z.sum()) for n, z in zeros(direct.model).items()}
    assert {n: int(z.sum()) for n, z in before.items()} == counts
    # what came to be zero is another choice than at once: the training had its say
    assert any((before[n] != z).any() for n, z in zeros(direct.model).items())


def test_shares_of_units_are_counted_against_the_reference_in_every_round() -> None:
    """Not of what the round before left, also where a norm was folded into the weights."""
    text = """cnn (float[1, 4, 12, 12] x) => (float[1, 10] y) {
        [conv1] c1 = Conv <pads = [1, 1, 1, 1]> (x, k1)
        n1 = BatchNormalization (c1, s1, t1, m1, v1)
        r1 = Relu (n1)
        [conv2] c2 = Conv <pads = [1, 1, 1, 1]> (r1, k2)
        r2 = Relu (c2)
        p = GlobalAveragePool (r2)
        f = Flatten (p)
        [fc] y = Gemm <transB = 1> (f, w, b)
    }"""
    weights = {"k1": graphs.weight(32, 4, 3, 3), "k2": graphs.weight(32, 32, 3, 3, seed=1)}
    weights |= {"w": graphs.weight(10, 32, seed=2), "b": graphs.feed(10)}
    weights |= {n: np.abs(graphs.feed(32, seed=i)) + 0.5 for i, n in enumerate(("s1", "v1"))}
    weights |= {n: graphs.feed(32, seed=7 + i) for i, n in enumerate(("t1", "m1"))}
    context = graphs.context(graphs.graph(text, weights), calibration=samples(12, 100))
    prune = PruneStructured(ratio=0.5, round_to=1, rounds=2)
    steps = run([Fuse(), prune, RECOVER], context)
    [_, direct] = run([Fuse(), PruneStructured(ratio=0.5, round_to=1)], context)
    assert all(step.result.changed for step in steps[1:])
    assert units(steps[1]) != units(steps[3])
    assert units(steps[-1]) == units(direct)


def test_the_decisions_of_every_round_replay_to_the_same_bytes(context: Context) -> None:
    passes = [
        PruneStructured(ratio=0.5, round_to=1, rounds=2),
        RECOVER,
        PruneMagnitude(min_weights=100, rounds=2),
        RECOVER,
    ]
    steps = run(passes, context)
    locked = json.loads(json.dumps([step.result.decisions for step in steps]))
    again = run(passes, context, locked=locked)
    assert len(again) == len(steps) == 8
    assert graph_bytes(again[-1].model) == graph_bytes(steps[-1].model)


@pytest.mark.slow
def test_a_build_in_rounds_and_again_from_its_lock(tmp_path: pathlib.Path) -> None:
    images = small_models.images(12)
    source = edgec.Source(
        small_models.cnn(), (small_models.image(),), input_names=("image",), name="cnn"
    )
    common = {
        "target": "x86-64",
        "calibration": lambda: [{"image": image} for image in images],
        "verify": False,
    }
    recipe = ("cleanup", "fuse", "prune-structured", "recover", "quantize-static", "lower")
    settings = (
        "prune-structured.ratio=0.6",
        "prune-structured.rounds=3",
        "recover.rate=0.5",
        "recover.steps=6",
    )
    first, again = (tmp_path / name / "cnn.edgec" for name in ("first", "again"))
    report = edgec.build(source, output=first, recipe=recipe, settings=settings, **common)
    [lock] = first.parent.glob("*.lock.json")
    shares = [s.parameters["ratio"] for s in report.steps if s.name == "prune-structured"]
    assert shares == pytest.approx([0.6 * 19 / 27, 0.6 * 26 / 27, 0.6])
    assert [s.name for s in report.steps].count("recover") == 3
    assert len(json.loads(lock.read_text())["steps"]) == len(report.steps) == 10
    edgec.build(source, output=again, lock=lock, **common)
    assert again.read_bytes() == first.read_bytes()


@pytest.mark.slow
def test_four_rounds_keep_more_than_one_with_the_same_steps_in_all() -> None:
    """90 % of the large layers of a trained CNN, 160 steps of 32 images without labels."""
    from sklearn.datasets import load_digits

    data = digits()
    images = (load_digits().images[:, None] / 16).astype(np.float32)
    learned = images[np.random.RandomState(0).permutation(len(images))[:1152]]  # none of the test
    feeds = [{"x": learned[i : i + 32]} for i in range(0, len(learned), 32)]
    context = graphs.context(data.model, calibration=feeds[:32], validation=feeds[32:])
    prune = PruneMagnitude(sparsity=0.9, min_weights=500)
    recover = Recover(steps=160, batch=1, rate=1.0, bias_rate=0.02, judgements=4)

    def accuracy(*passes: Pass) -> float:
        steps = run_passes(passes, context, feeds[:1])
        return float((data.logits(steps[-1].model).argmax(1) == data.labels).mean())

    at_once = accuracy(prune, recover)
    in_rounds = accuracy(replace(prune, rounds=4), replace(recover, steps=40))
    assert in_rounds > at_once + 0.1, (at_once, in_rounds)  # the s.e. of the difference is 0.03
