"""Training: schedule, early end, accumulated gradients, memory, precision, checkpoints."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import graphs
import numpy as np
import onnx_ir as ir
import pytest
import safetensors
import torch
import trainings_together

from edgec.passes import PassError, QuantizeStatic, Recover
from edgec.passes.execution import graph_bytes
from edgec.passes.lesson import Lesson, Outcome
from edgec.passes.torch_graph import to_torch
from edgec.passes.training_settings import rate_share
from edgec.passes.training_state import Progress
from edgec.passes.training_task import Task
from edgec.targets import load_target


def samples(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    return [{"x": graphs.feed(1, 4, 12, 12, seed=seed + i)} for i in range(count)]


@pytest.fixture(scope="module")
def quantized() -> tuple[ir.Model, object]:
    """An int8 CNN with per-tensor weights, and the context of it."""
    reference, _ = graphs.cnn()
    target = load_target("x86-64")
    coarse = dataclasses.replace(target, int8=dataclasses.replace(target.int8, per_channel=False))
    context = graphs.context(
        reference, coarse, calibration=samples(24, 100), validation=samples(8, 500)
    )
    chosen = QuantizeStatic(ranges="minmax", rounding="nearest", bias_correction=False)
    return chosen.run(reference.clone(), context).model, context


def trained(model: ir.Model, context, settings: Recover, **rest) -> tuple[Outcome, ir.Model]:
    """The outcome of a training and the model with what was learned."""
    model = model.clone()
    twin = to_torch(model)
    outcome = Lesson(twin, Task.of(model, context, settings), **rest).train()
    twin.write_back(model)
    return outcome, model


def test_the_rate_climbs_linearly_and_falls_by_a_cosine():
    shares = [rate_share(step, 100, 0.2) for step in range(100)]
    assert np.diff(shares[:20]) == pytest.approx(1 / 21)
    assert shares[20] == 1.0
    assert shares[60] == pytest.approx(0.5)  # half way down
    assert shares[80] == pytest.approx((1 + math.cos(0.75 * math.pi)) / 2)
    assert min(shares) > 0 and (np.diff(shares[20:]) < 0).all()
    assert [rate_share(0, 1, w) for w in (0.0, 0.3)] == [1.0, 1.0]


def test_a_step_has_the_rate_of_the_schedule(quantized):
    model, context = quantized
    moved = []
    for warmup in (0.0, 0.9):
        settings = Recover(steps=10, rate=0.0, bias_rate=0.01, warmup=warmup)
        twin = to_torch(model)
        start = {n: p.detach().clone() for n, p in twin.named_parameters()}

        def stop(what: str, done: int, total: int, twin=twin, start=start) -> None:
            ways = [(p.detach() - start[n]).abs().max() for n, p in twin.named_parameters()]
            moved.append(float(max(ways)))
            raise Killed

        with pytest.raises(Killed):
            Lesson(twin, Task.of(model, context, settings), announce=stop).train()
    # Adam's first step is as large as the rate, whatever the gradient
    assert moved[1] == pytest.approx(0.1 * moved[0], rel=1e-3)


def test_a_model_without_what_the_rates_are_for_is_left_alone():
    model = graphs.graph(
        "net (float[n, 4] x) => (float[n, 3] y) { y = MatMul (x, w) }", {"w": graphs.weight(4, 3)}
    )
    context = graphs.context(model, calibration=[{"x": graphs.feed(2, 4)}])
    result = Recover(rate=0.0).run(model.clone(), context)
    assert result.changed == 0
    assert "of what the rates are for, this model has nothing" in result.findings[0]


def test_a_training_that_no_longer_gains_ends_early(quantized):
    model, context = quantized
    harmful = Recover(steps=60, rate=500.0, bias_rate=50.0, judgements=20, patience=3)
    outcome, _ = trained(model, context, harmful)
    assert outcome.steps == len(outcome.losses) == 9  # judged every third step
    assert not outcome.improved
    patient, _ = trained(model, context, dataclasses.replace(harmful, steps=20, patience=0))
    assert patient.steps == 20


def test_summed_gradients_of_small_stacks_are_those_of_the_batch(quantized):
    model, context = quantized
    # of the outputs alone: the features' loss is relative to the mean square of each stack
    settings = Recover(steps=8, rate=0.05, features=0)
    whole, three, one = (
        trained(model, context, dataclasses.replace(settings, micro_batch=size))[0]
        for size in (0, 3, 1)
    )
    for parts in (three, one):
        assert parts.losses == pytest.approx(whole.losses, rel=1e-3)  # sums in another order
    assert three.losses != whole.losses


def test_segments_that_are_computed_again_give_the_same_bytes(quantized):
    model, context = quantized
    settings = Recover(steps=4, rate=0.05)
    kept, again = (
        trained(model, context, dataclasses.replace(settings, segments=count)) for count in (1, 4)
    )
    assert again[0] == kept[0]
    assert graph_bytes(again[1]) == graph_bytes(kept[1])


DEEP = """
import pathlib, re
import graphs, torch
from edgec.passes.torch_graph import to_torch

torch.set_num_threads(1)
nodes = "".join(f"h{i + 1} = Tanh (h{i})" + chr(10) for i in range(60))
text = f"deep (float[n, 500000] x) => (float[n, 500000] h60) {{ h0 = Mul (x, w) {nodes} }}"
twin = to_torch(graphs.graph(text, {"w": graphs.weight(500_000)}))
x = torch.randn(2, 500_000)
for segments in (8, 1):
    twin({"x": x}, segments=segments)["h60"].mean().backward()
    print(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""


def test_segments_need_a_fraction_of_the_memory():
    tests = pathlib.Path(graphs.__file__).parent
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # a freed value is gone: the peak is exact
    done = subprocess.run(
        [sys.executable, "-c", DEEP],
        cwd=tests,
        env={**os.environ, **returned},
        capture_output=True,
        text=True,
        check=True,
    )
    again, kept = map(int, done.stdout.split())  # peaks in kB, the smaller one first
    # 60 values of 4 MB, or 8 between the segments and 8 inside of one, and their gradients
    assert kept - again > 120_000


def test_bf16_computes_products_in_bfloat16_and_still_wins_back():
    model, context = trainings_together.student()
    settings = trainings_together.ways()["replicated"]
    exact, short = (
        trained(model, context, dataclasses.replace(settings, precision=p))[0]
        for p in ("float32", "bf16")
    )
    assert short.before == exact.before  # judged in full precision
    assert exact.after < 0.7 * exact.before
    assert short.after == pytest.approx(exact.after, rel=0.1)
    assert short.losses != exact.losses
    assert short.losses == pytest.approx(exact.losses, rel=0.1)  # 8 bits of mantissa


def test_a_training_on_more_threads_leaves_the_number_of_threads(quantized):
    model, context = quantized
    before = torch.get_num_threads()
    trained(model, context, Recover(steps=1, threads=2))
    assert torch.get_num_threads() == before


class Killed(BaseException):
    """In place of a signal that cannot be caught."""


def interrupted(model, context, settings, folder, step: int) -> None:
    """A training that ends without a word before it has saved what came after ``step``."""

    def announce(what: str, done: int, total: int) -> None:
        if done == step:
            raise Killed

    with pytest.raises(Killed):
        trained(model, context, settings, folder=folder, announce=announce)


@pytest.mark.parametrize("step", [5, 6, 11])
def test_an_interrupted_training_goes_on_to_the_same_bytes(quantized, tmp_path, step):
    model, context = quantized
    settings = Recover(steps=12, rate=0.05, save_every=3)
    wanted, expected = trained(model, context, settings)
    interrupted(model, context, settings, tmp_path, step)
    outcome, made = trained(model, context, settings, folder=tmp_path)
    assert outcome.losses == wanted.losses and outcome.after == wanted.after
    assert outcome.findings == (
        f"went on at step {(step - 1) // 3 * 3} of an interrupted training",
    )
    assert graph_bytes(made) == graph_bytes(expected)


def test_a_finished_training_is_not_done_again(quantized, tmp_path):
    model, context = quantized
    settings = Recover(steps=6, rate=0.05)
    wanted, expected = trained(model, context, settings, folder=tmp_path)
    asked: list[int] = []
    outcome, made = trained(
        model,
        context,
        settings,
        folder=tmp_path,
        announce=lambda what, done, total: asked.append(done),
    )
    assert outcome == wanted and not asked
    assert graph_bytes(made) == graph_bytes(expected)


def classifier(width: int) -> ir.Model:
    """Two convolutions of a width, and ten classes."""
    text = """net (float[n, 4, 12, 12] x) => (float[n, 10] y) {
        c1 = Conv <pads = [1, 1, 1, 1]> (x, k1)
        r1 = Relu (c1)
        c2 = Conv (r1, k2)
        p = GlobalAveragePool (c2)
        f = Flatten (p)
        y = Gemm (f, w)
    }"""
    weights = {
        "k1": graphs.weight(width, 4, 3, 3),
        "k2": graphs.weight(width, width, 3, 3, seed=1),
        "w": graphs.weight(width, 10, seed=2),
    }
    return graphs.graph(text, weights)


def test_projections_and_the_order_easy_first_go_on_too(tmp_path):
    narrow = classifier(8)
    context = graphs.context(classifier(24), calibration=samples(12, 100))
    settings = Recover(steps=6, rate=1.0, bias_rate=1e-3, order="easy-first", save_every=2)
    wanted, expected = trained(narrow, context, settings)
    interrupted(narrow, context, settings, tmp_path, 5)
    (file,) = tmp_path.iterdir()
    with safetensors.safe_open(file, framework="pt") as archive:
        assert {"now/projection 0", "adam/exp_avg/projection 1"} <= set(archive.keys())
    outcome, made = trained(narrow, context, settings, folder=tmp_path)
    assert outcome.losses == wanted.losses
    assert graph_bytes(made) == graph_bytes(expected)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("settings", {"settings": Recover(steps=12, rate=0.06, save_every=3)}),
        ("seed", {"seed": 1}),
        ("data", {"calibration": samples(24, 101)}),
    ],
)
def test_a_checkpoint_of_another_training_is_told_and_not_used(quantized, tmp_path, what, change):
    model, context = quantized
    settings = Recover(steps=12, rate=0.05, save_every=3)
    interrupted(model, context, settings, tmp_path, 7)
    settings = change.pop("settings", settings)
    context = dataclasses.replace(context, **change)
    outcome, made = trained(model, context, settings, folder=tmp_path)
    (finding,) = outcome.findings
    assert f"holds step 6 of a training that was interrupted; its {what} differ" in finding
    assert graph_bytes(made) == graph_bytes(trained(model, context, settings)[1])


def test_saving_more_often_is_the_same_training(quantized, tmp_path):
    model, context = quantized
    settings = Recover(steps=12, rate=0.05, save_every=3)
    interrupted(model, context, settings, tmp_path, 7)
    other = dataclasses.replace(settings, save_every=5)
    outcome, _ = trained(model, context, other, folder=tmp_path)
    assert "went on at step 6" in outcome.findings[0]


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign"])
def test_a_damaged_checkpoint_is_told_and_not_used(quantized, tmp_path, damage):
    model, context = quantized
    settings = Recover(steps=6, rate=0.05, save_every=3)
    interrupted(model, context, settings, tmp_path, 5)
    (file,) = tmp_path.iterdir()
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(2)}, file)
    else:
        file.write_bytes(file.read_bytes()[: 1000 if damage == "cut" else 0])
    outcome, made = trained(model, context, settings, folder=tmp_path)
    (finding,) = outcome.findings
    assert "cannot be read" in finding and "began anew" in finding
    assert graph_bytes(made) == graph_bytes(trained(model, context, settings)[1])


def test_a_checkpoint_holds_no_pickle_and_its_header_is_json(quantized, tmp_path):
    model, context = quantized
    settings = Recover(steps=4, rate=0.0, bias_rate=1e-3, save_every=2)
    interrupted(model, context, settings, tmp_path, 3)
    (file,) = tmp_path.iterdir()
    with safetensors.safe_open(file, framework="pt") as archive:
        header = archive.metadata()
        names = {name.partition("/")[0] for name in archive.keys()}
    progress = Progress(**json.loads(header["progress"]))
    assert progress.step == 2 and len(progress.losses) == 2 and not progress.ended
    assert set(json.loads(header["digests"])) >= {"model", "reference", "data", "settings", "seed"}
    assert names == {"best", "now", "adam"}


def test_a_folder_that_cannot_be_written_costs_the_checkpoint_alone(quantized, tmp_path):
    model, context = quantized
    blocked = tmp_path / "file"
    blocked.write_text("")
    outcome, _ = trained(model, context, Recover(steps=4, save_every=1), folder=blocked / "work")
    (finding,) = outcome.findings
    assert "no checkpoint could be written" in finding


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("precision", "bf61", "no precision 'bf61', did you mean 'bf16'"),
        ("warmup", 1.0, "warmup is 1.0, expected 0 or more and below 1"),
        ("judgements", 0, "judgements is 0, expected above 0"),
        ("segments", 0, "segments is 0, expected above 0"),
        ("threads", 0, "threads is 0, expected above 0"),
        ("save_every", 0, "save_every is 0, expected above 0"),
        ("patience", -1, "patience is -1, expected 0 or more"),
        ("micro_batch", -1, "micro_batch is -1, expected 0 or more"),
        ("micro_batch", 9, "micro_batch is 9, more than the batch of 8, so it would change noth"),
        ("patience", 10, "patience is 10, but held-out samples are judged 10 times, so nothing"),
    ],
)
def test_settings_out_of_range_are_refused(field, value, message):
    with pytest.raises(PassError, match=message):
        Recover(**{field: value})
