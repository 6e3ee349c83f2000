"""Adapt trains by the loop of recover: early end, accumulation, memory, precision, checkpoints."""

import dataclasses

import graphs
import numpy as np
import pytest
from labelled_samples import context, separable

from edgec.passes import PassError
from edgec.passes.adapt import Adapt, Adapted
from edgec.passes.execution import graph_bytes


def trained(settings: Adapt, **rest: object) -> Adapted:
    model, _ = graphs.cnn()
    return settings.train(model.clone(), context(model, **rest))


def test_a_training_that_no_longer_gains_ends_early():
    still = Adapt(steps=40, batch=4, rate=1e-30, judgements=20, patience=3)  # nothing moves
    outcome = trained(still).outcome
    assert outcome.steps == len(outcome.losses) == 6  # judged every second step
    patient = dataclasses.replace(still, patience=0, steps=8)
    assert trained(patient).outcome.steps == 8


def test_summed_gradients_of_small_stacks_are_those_of_the_batch():
    whole, parts = (
        trained(Adapt(steps=8, batch=16, micro_batch=size)).outcome.losses for size in (0, 3)
    )
    assert parts == pytest.approx(whole, rel=1e-3)  # sums in another order
    assert parts != whole


def test_segments_that_are_computed_again_give_the_same_bytes():
    kept, again = (trained(Adapt(steps=6, segments=count)) for count in (1, 4))
    assert again.outcome == kept.outcome
    assert graph_bytes(again.model) == graph_bytes(kept.model)


def test_bf16_computes_products_in_bfloat16_and_still_learns():
    exact, short = (
        trained(Adapt(steps=40, rate=0.01, precision=p)).outcome for p in ("float32", "bf16")
    )
    assert short.before == exact.before  # judged in full precision
    assert short.losses != exact.losses
    assert short.losses[:5] == pytest.approx(exact.losses[:5], rel=0.05)  # 8 bits of mantissa
    assert short.after < 0.2 * short.before


class Killed(BaseException):
    """In place of a signal that cannot be caught."""


def killed_at(step: int):
    def announce(what: str, done: int, total: int) -> None:
        if done == step:
            raise Killed

    return announce


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "full"},
        {"method": "lora", "rank": 2},
        {"method": "full", "classes": 12, "head": "grow", "keep_weight": 1.0},
        {"method": "full", "memory": "m.npz", "ewc_weight": 10.0},
    ],
    ids=["full", "lora", "answers", "memory"],
)
def test_an_interrupted_training_goes_on_to_the_same_bytes(tmp_path, settings):
    if "memory" in settings:
        feeds, labels = separable(12, seed=9)
        settings = settings | {"memory": str(tmp_path / "m.npz")}
        x, label = (np.stack([s[k] for s in of]) for of, k in ((feeds, "x"), (labels, "label")))
        np.savez(tmp_path / "m.npz", x=x, label=label)
    chosen, work = Adapt(steps=12, rate=0.01, save_every=3, **settings), tmp_path / "work"
    wanted = trained(chosen)
    with pytest.raises(Killed):
        trained(chosen, work=work, progress=killed_at(8))
    made = trained(chosen, work=work)
    assert made.outcome.findings == ("went on at step 6 of an interrupted training",)
    assert made.outcome.losses == wanted.outcome.losses
    assert graph_bytes(made.model) == graph_bytes(wanted.model)
    for layer, pair in wanted.matrices.items():
        for one, other in zip(pair, made.matrices[layer], strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_checkpoint_of_other_settings_is_told_and_not_used(tmp_path):
    with pytest.raises(Killed):
        trained(Adapt(steps=12, save_every=3), work=tmp_path, progress=killed_at(8))
    made = trained(Adapt(steps=12, save_every=3, rate=0.01), work=tmp_path)
    (finding,) = made.outcome.findings
    assert "holds step 6 of a training that was interrupted; its settings differ" in finding


def test_settings_out_of_range_are_refused_in_the_name_of_the_pass():
    with pytest.raises(PassError, match="adapt: no precision 'bf61', did you mean 'bf16'"):
        Adapt(precision="bf61")
    with pytest.raises(PassError, match="adapt: patience is -1, expected 0 or more"):
        Adapt(patience=-1)


def test_a_micro_batch_that_the_graph_cannot_stack_is_told():
    text = """g (float[1, 4, 12, 12] x) => (float[1, 4] y) {
        p = GlobalAveragePool (x)
        r = Reshape (p, one_row)
        y = MatMul (r, w)
    }"""
    model = graphs.graph(text, {"one_row": np.array([1, 4]), "w": graphs.weight(4, 4)})
    told = [
        Adapt(steps=1, batch=4, micro_batch=size).train(model.clone(), context(model)).outcome
        for size in (0, 2)
    ]
    assert told[0].findings == ()
    assert told[1].findings == (
        "micro_batch = 2 had no effect: this graph takes one sample at a time",
    )
