"""Ranking by latency: units go where least importance is lost for each millisecond saved."""

import dataclasses
import functools
import json

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from two_gemms import TWO_LAYERS, pruned, two_layers, widths

from edgec.passes import PassError, PruneStructured, pruned_latency
from edgec.passes.latency_table import LatencyTable
from edgec.passes.timing import Timing
from edgec.targets import load_target


def products(asked, settings):
    """A clock by which an operator takes as many milliseconds as its weight has numbers."""
    return [float(np.prod(one.operands[1].shape)) if one.op_type == "Gemm" else 0 for one in asked]


@pytest.fixture
def by_products(monkeypatch):
    table = functools.partial(LatencyTable, measure=products)
    monkeypatch.setattr(pruned_latency, "LatencyTable", table)


def even(model):
    """All of its numbers are of one magnitude, so that all units of a layer matter alike."""
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(np.sign(value.const_value.numpy()) * np.float32(0.1))
    return model


@pytest.mark.usefixtures("by_products")
def test_latency_ranking_takes_units_of_the_expensive_layer():
    """'a' is in 128 + 256 of all 432 products, 'd' in 256 + 48."""
    result = pruned(even(two_layers()), ranking="latency", ratio=0.3, round_to=4)
    assert widths(result) == (8, 16)
    # 4 units of 'a' are 96 products
    assert widths(pruned(even(two_layers()), ranking="latency", ratio=0.2, round_to=4)) == (12, 16)


@pytest.mark.usefixtures("by_products")
def test_a_second_run_by_latency_goes_on_from_the_first():
    model = two_layers()
    context = graphs.context(model)
    settings = {"round_to": 4, "ranking": "latency"}
    first = PruneStructured(ratio=0.25, **settings).run(model.clone(), context)
    assert first.changed
    assert PruneStructured(ratio=0.25, **settings).run(first.model, context).changed == 0
    assert PruneStructured(ratio=0.5, **settings).run(first.model, context).changed


@pytest.mark.usefixtures("by_products")
@pytest.mark.parametrize("costs", ["float32", "int8"])
def test_the_prediction_is_held_to_account(monkeypatch, costs):
    def timed(calls, **settings):
        for _, call in calls:
            call()
        dense = Timing("dense", 500.0, 500.0, 500.0, 4, (500.0,) * 4)
        return dense, dataclasses.replace(dense, median_ms=200.0, taken_ms=(200.0,) * 4)

    monkeypatch.setattr(pruned_latency, "interleave", timed)
    result = pruned(ranking="latency", ratio=0.3, round_to=4, costs=costs)
    # 16 * 8 + 16 * 16 + 3 * 16 products become 8 * 8 + 16 * 8 + 3 * 16
    assert result.findings[1] == (
        f"latency in {costs} predicted 432.00 -> 240.00 ms (1.80x), measured 500.00 -> 200.00 ms "
        "(2.50 ± 0.00x): what is left was predicted with an error of +20.0%"
    )


@pytest.mark.usefixtures("by_products")
def test_a_replayed_plan_measures_nothing(monkeypatch):
    plan = dict(pruned(ranking="latency", ratio=0.3, round_to=4).decisions)
    assert sorted(plan) == ["groups"]
    monkeypatch.setattr(pruned_latency, "LatencyTable", None)
    monkeypatch.setattr(pruned_latency, "interleave", None)
    model = two_layers()
    context = graphs.context(model, lock=plan)
    result = PruneStructured(ranking="latency", ratio=0.3).run(model, context)
    assert widths(result) == (8, 16)
    assert len(result.findings) == 1


@pytest.mark.usefixtures("by_products")
def test_less_than_was_asked_for_is_told():
    result = pruned(ranking="latency", ratio=0.9, max_ratio=0.25, round_to=4)
    assert widths(result) == (12, 12)
    assert "36.1% of the predicted latency go, less than the share of 90.0%" in result.findings[1]


def test_units_that_save_no_time_stay(monkeypatch):
    table = functools.partial(LatencyTable, measure=lambda asked, settings: [1.0] * len(asked))
    monkeypatch.setattr(pruned_latency, "LatencyTable", table)
    result = pruned(ranking="latency", ratio=0.3, round_to=8)
    assert result.changed == 0
    assert [s.reason for s in result.skipped if s.node == "d"] == [
        "its 16 units stay: without some of them the model takes as long"
    ]


@pytest.mark.usefixtures("by_products")
def test_a_proxy_is_called_one():
    own = dataclasses.replace(load_target("x86-64"), arch="riscv64")
    result = pruned(target=own, ranking="latency", ratio=0.3, round_to=4)
    assert any("a proxy: it is not of the kind of 'x86-64'" in text for text in result.findings)


@pytest.mark.usefixtures("by_products")
def test_latencies_are_kept_in_the_cache(tmp_path):
    model = two_layers()
    context = graphs.context(model, cache=tmp_path)
    PruneStructured(ranking="latency", ratio=0.3, round_to=4).run(model, context)
    [file] = (tmp_path / "latencies").iterdir()
    assert 128.0 in json.loads(file.read_text())["latencies_ms"].values()


def test_latency_ranking_measures_real_operators():
    text = TWO_LAYERS.replace("4, 8", "64, 256").replace("4, 3", "64, 3")
    sizes = {"w": (512, 256), "b": (512,), "k": (512, 512), "v": (3, 512)}
    model = graphs.graph(text, {name: graphs.weight(*size) for name, size in sizes.items()})
    # half a layer at a time, so that the noise of a busy machine does not matter
    result = pruned(model, ranking="latency", ratio=0.3, round_to=256)
    assert min(widths(result)) == 256
    assert "was predicted with an error of" in result.findings[-1]


def test_without_inputs_that_run_no_latency_is_known(monkeypatch):
    monkeypatch.setattr(pruned_latency, "proof_feeds", lambda model, context: None)
    with pytest.raises(PassError, match="ranking 'latency' found no inputs that the model runs"):
        pruned(ranking="latency", ratio=0.3)


def test_integers_that_no_kernel_here_takes_are_refused():
    with pytest.raises(PassError, match="costs 'int8' needs 8-bit activations.*has uint16"):
        pruned(target="qualcomm-npu", ranking="latency", ratio=0.3, costs="int8")


@pytest.mark.usefixtures("by_products")
@pytest.mark.parametrize(
    ("target", "calibrated", "form"),
    [("x86-64", True, "int8"), ("x86-64", False, "float32"), ("qualcomm-npu", True, "float32")],
)
def test_convolutions_are_timed_as_the_target_is_going_to_run_them(target, calibrated, form):
    model, feeds = graphs.cnn()
    samples = [feeds] if calibrated else None
    context = graphs.context(model, target, calibration=samples)
    result = PruneStructured(ranking="latency", ratio=0.3).run(model, context)
    assert [t.split()[2] for t in result.findings if t.startswith("latency in")] == [form]
