"""Weights of a decoder: head and table stored once, widths within a budget, and the graph fast."""

from __future__ import annotations

import dataclasses
from collections import Counter

import decoders
import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes import Context, Lower, PassError, QuantizeWeights, Recover
from edgec.passes.execution import graph_bytes
from edgec.targets import load_target

pytestmark = pytest.mark.slow  # a model is exported by optimum
TARGET = load_target("x86-64")
SETTINGS = {"bits": 4, "block_size": 32, "min_weights": 100}


class Samples(list):
    """Feeds."""


@pytest.fixture(scope="module")
def llama() -> ir.Model:
    return decoders.cleaned("llama")


def context(model: ir.Model, **fields) -> Context:
    return Context(TARGET, model, **fields)


def prompts(model: ir.Model, count: int = 4) -> Samples:
    """Feeds of prompts with an empty past."""
    made = Samples()
    for seed in range(count):
        ids = np.random.default_rng(seed).integers(0, decoders.WORDS, (1, 16))
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(16)[None],
        }
        for value in model.graph.inputs:
            if str(value.name).startswith("past"):
                shape = (1, value.shape[1], 0, value.shape[3])
                feeds[str(value.name)] = np.zeros(shape, np.float32)
        made.append(feeds)
    return made


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def lowered(model: ir.Model, **settings) -> ir.Model:
    result = QuantizeWeights(**{**SETTINGS, **settings}).run(model.clone(), context(model))
    return Lower().run(result.model, context(model)).model


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_all_products_the_head_and_the_table_are_stored_in_4_bits(llama, scheme):
    made = lowered(llama, scheme=scheme)
    found = ops(made)
    assert found["MatMulNBits"] == 15 and found["GatherBlockQuantized"] == 1  # 7 a layer, the head
    assert found["GroupQueryAttention"] == 2 and found["MatMul"] == 1  # angles
    stored = [v for v in made.graph.initializers.values() if len(v.shape)]
    tables = [v for v in stored if v.shape[0] == decoders.WORDS]
    assert sum(v.dtype == ir.DataType.UINT8 and len(v.shape) == 3 for v in tables) == 1
    floats = [v for v in tables if v.dtype == ir.DataType.FLOAT]
    assert [v.shape[1] for v in floats] == [2]  # one scale for each block of 32
    ids, shown = decoders.padded("left")
    first, second = (decoders.converse(m, ids, shown) for m in (llama, made))
    # 4 bits of random weights: near, and not the same
    at, logits, _ = first[0]
    error = second[0][1][at] - logits[at]
    assert 0.001 < np.square(error).mean() / np.square(logits[at]).mean() < 0.2


def bits_of(result) -> dict[str, int]:
    return dict(result.decisions["bits"])


@pytest.mark.parametrize("with_data", [False, True])
def test_a_budget_gives_8_bits_to_those_that_need_them_most(llama, with_data):
    given = context(llama, calibration=prompts(llama) if with_data else None)
    settings = QuantizeWeights(**SETTINGS, bits_per_weight=6.0, method="rtn")
    result = settings.run(llama.clone(), given)
    widths = bits_of(result)
    assert set(widths.values()) == {4, 8} and len(widths) == 15
    assert "bits a weight with scales" in result.findings[0]
    made = Lower().run(result.model, context(llama)).model
    rows = Counter()  # products of one width are joined, so their rows are counted
    for node in made.graph:
        if node.op_type == "MatMulNBits":
            rows[node.attributes.get_int("bits")] += node.attributes.get_int("N")
    asked = Counter()
    for name, bits in widths.items():
        value, axis = name.rsplit(":", 1)
        asked[bits] += llama.graph.initializers[value].shape[1 - int(axis)]
    assert rows == asked
    # storage as the kernel reads it: packed integers and scales
    packed = {
        v.name: v
        for n in made.graph
        if n.op_type == "MatMulNBits"
        for v in n.inputs[1:3]
        if v is not None
    }
    size = sum(v.const_value.nbytes for v in packed.values()) * 8
    weights = 97 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert 5.0 < size / weights <= 6.0


def test_more_bits_lose_less(llama):
    ids, shown = decoders.padded("single")
    reference = decoders.converse(llama, ids, shown, steps=0)[0][1]
    errors = []
    for settings in ({}, {"bits_per_weight": 7.0}, {"bits": 8}):
        logits = decoders.converse(lowered(llama, **settings), ids, shown, steps=0)[0][1]
        errors.append(float(np.square(logits - reference).mean()))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("method", ["rtn", "clip", "gptq", "awq"])
def test_a_lock_replays_the_widths(llama, method):
    given = context(llama, calibration=prompts(llama))
    settings = QuantizeWeights(**SETTINGS, bits_per_weight=6.0, method=method)
    result = settings.run(llama.clone(), given)
    again = settings.run(llama.clone(), dataclasses.replace(given, lock=result.decisions))
    assert graph_bytes(again.model) == graph_bytes(result.model)
    assert again.decisions == result.decisions


def test_a_budget_below_4_bits_and_scales_is_refused(llama):
    settings = QuantizeWeights(**SETTINGS, bits_per_weight=4.5)
    with pytest.raises(PassError, match="bits_per_weight is 4.5, but 4 bits with scales.*5.00"):
        settings.run(llama.clone(), context(llama))


@pytest.mark.parametrize(
    "settings",
    [{"bits_per_weight": 4.0}, {"bits_per_weight": 17.0}, {"bits": 3, "bits_per_weight": 6.0}],
)
def test_a_budget_that_makes_no_sense_is_refused(settings):
    with pytest.raises(PassError, match="bits_per_weight is .* expected more than 4"):
        QuantizeWeights(**settings)


def test_a_model_whose_weights_are_all_too_small_stays_as_it_is(llama):
    result = QuantizeWeights(bits=4, min_weights=10**9).run(llama.clone(), context(llama))
    assert result.changed == 0 and graph_bytes(result.model) == graph_bytes(llama)


def test_scales_of_a_decoder_learn_and_its_integers_stay(llama):
    data = prompts(llama, 12)
    given = context(llama, calibration=data[:8], validation=data[8:])
    stored = QuantizeWeights(**SETTINGS, method="rtn").run(llama.clone(), given).model
    learned = Recover(
        scale_rate=3e-3,
        bias_rate=0.0,
        steps=12,
        batch=2,
        splice=False,
        features=0,
        feature_weight=0.0,
        judgements=3,
    ).run(stored.clone(), given)
    told = learned.findings[0]  # held-out distance A before, B after ...
    before, after = (float(told.split()[index]) for index in (2, 4))
    assert after < before, told
    assert learned.changed > 10  # scales
    for name, value in stored.graph.initializers.items():
        new = learned.model.graph.initializers[name]
        if value.dtype in (ir.DataType.INT4, ir.DataType.UINT4):
            assert np.array_equal(new.const_value.numpy(), value.const_value.numpy())
