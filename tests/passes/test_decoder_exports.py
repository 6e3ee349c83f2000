"""Decoders as optimum exports them: their attention becomes one kernel a layer, proven."""

from __future__ import annotations

import dataclasses
from collections import Counter

import decoders
import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes import Context, Lower, QuantizeWeights
from edgec.passes import lower_decoder as lowering
from edgec.passes.emit_decoder import Emission
from edgec.passes.execution import graph_bytes
from edgec.passes.lower_decoder import can_share_cache, lower_decoder
from edgec.passes.lower_weights import lower_weights
from edgec.targets import load_target

pytestmark = pytest.mark.slow  # transformers and optimum are imported, models exported
FLOAT_NOISE = 2e-5  # other orders of summation, through two layers and 20 tokens
KINDS = ("single", "left", "right")


def context(model: ir.Model, **fields) -> Context:
    return Context(load_target("x86-64"), model, **fields)


@pytest.fixture(scope="module")
def llama() -> ir.Model:
    return decoders.cleaned("llama")


@pytest.fixture(scope="module")
def lowered(llama) -> ir.Model:
    return Lower().run(llama.clone(), context(llama)).model


def op_types(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def signature(model: ir.Model) -> list[tuple]:
    values = [*model.graph.inputs, *model.graph.outputs]
    return [(v.name, v.dtype, str(v.shape)) for v in values]


def without(*kernels: str):
    target = load_target("x86-64")
    kept = tuple(kernel for kernel in target.kernels if kernel not in kernels)
    return dataclasses.replace(target, kernels=kept)


def test_every_attention_of_a_llama_becomes_one_kernel(llama, lowered):
    ops = op_types(lowered)
    assert ops["GroupQueryAttention"] == 2 and ops["RotaryEmbedding"] == 4
    assert ops["SimplifiedLayerNormalization"] == 1
    assert ops["SkipSimplifiedLayerNormalization"] == 4  # the residuals are added as they go
    assert not ops["Softmax"] and not ops["Pow"] and not ops["Neg"]
    assert 2 * len(list(lowered.graph)) < len(list(llama.graph))
    (first, _) = (n for n in lowered.graph if n.op_type == "GroupQueryAttention")
    assert first.attributes.get_int("num_heads") == 4
    assert first.attributes.get_int("kv_num_heads") == 2
    assert first.attributes.get_float("scale") == pytest.approx(0.25)  # heads of 16


def test_names_types_and_shapes_of_inputs_and_outputs_stay(llama, lowered):
    assert signature(lowered) == signature(llama)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lowered_llama_converses_like_the_exported_one(llama, lowered, kind):
    ids, shown = decoders.padded(kind)
    first, second = (decoders.converse(model, ids, shown) for model in (llama, lowered))
    assert decoders.largest_difference(first, second) < FLOAT_NOISE


def test_a_lowered_llama_says_what_transformers_says(lowered):
    import torch

    module, (ids, shown) = decoders.llama(), decoders.padded("left")
    with torch.no_grad():
        expected = module(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(shown),
            position_ids=torch.from_numpy(np.where(shown == 1, shown.cumsum(1) - 1, 1)),
        ).logits.numpy()
    ((_, logits, _),) = decoders.converse(lowered, ids, shown, steps=0)
    at = shown == 1
    assert np.abs(logits[at] - expected[at]).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["llama", "qwen3", "stretched positions", "a key head for each"])
def test_the_kernel_rotates_where_the_context_length_is_known(name):
    model = decoders.cleaned(name)
    result = Lower().run(model.clone(), context(model, context_length=64))
    ops = op_types(result.model)
    assert ops["GroupQueryAttention"] == 2 and not ops["RotaryEmbedding"]
    assert result.decisions["rotates"] and signature(result.model) == signature(model)
    for kind in KINDS:
        ids, shown = decoders.padded(kind)
        first, second = (decoders.converse(m, ids, shown) for m in (model, result.model))
        shared = decoders.converse_shared(result.model, ids, shown, capacity=40)
        for (at, old, _), (_, new, _), (_, also) in zip(first, second, shared, strict=True):
            largest = np.abs(old[at]).max()
            assert np.abs(new[at] - old[at]).max() < FLOAT_NOISE * largest
            assert np.abs(also[at] - old[at]).max() < FLOAT_NOISE * largest
    locked = context(model, context_length=64, lock=dict(result.decisions))
    assert graph_bytes(Lower().run(model.clone(), locked).model) == graph_bytes(result.model)


def test_int4_queries_keys_and_values_come_out_of_one_product(llama):
    settings = QuantizeWeights(bits=4, block_size=32, embedding_bits=4, min_weights=1)
    given = context(llama, context_length=64)
    stored = settings.run(llama.clone(), given).model
    apart = lower_decoder(lower_weights(stored.clone(), given).model, given).model
    joined = Lower().run(stored.clone(), given).model
    attentions = [n for n in joined.graph if n.op_type == "GroupQueryAttention"]
    assert all(n.inputs[1] is None and n.inputs[2] is None for n in attentions)
    assert all(n.inputs[0].producer().attributes.get_int("N") == 128 for n in attentions)
    ids, shown = decoders.padded("left")
    # other kernels for other widths, behind each of which activations are rounded
    first, second = (decoders.converse(m, ids, shown) for m in (apart, joined))
    at, old, _ = first[0]
    assert np.abs(second[0][1][at] - old[at]).max() < 0.02 * np.abs(old[at]).max()


def test_rotation_that_forgets_the_padding_stays_outside(llama, monkeypatch):
    def forgets(self, at, match):
        return [*real(self, at, match)[:2], self._input("position_ids")]

    real = Emission._rotation
    monkeypatch.setattr(Emission, "_rotation", forgets)
    result = lower_decoder(llama.clone(), context(llama, context_length=64))
    assert op_types(result.model)["RotaryEmbedding"] == 4 and not result.decisions["rotates"]
    assert "rotating inside GroupQueryAttention changes the logits" in result.findings[-1]
    assert result.changed == 2 and not result.skipped
    ids, shown = decoders.padded("left")
    pair = [decoders.converse(m, ids, shown) for m in (llama, result.model)]
    assert decoders.largest_difference(*pair) < FLOAT_NOISE


def test_tables_that_would_be_too_large_are_not_made(llama):
    given = context(llama, context_length=1 << 20)
    result = lower_decoder(llama.clone(), given)
    assert op_types(result.model)["RotaryEmbedding"] == 4 and not result.decisions["rotates"]


def test_a_prompt_may_come_in_pieces(llama, lowered):
    ids, shown = decoders.padded("single", length=12)
    for model in (llama, lowered):
        session = decoders.open_session(model)
        wanted = {i.name: i.shape for i in session.get_inputs()}
        past = {
            n: np.zeros((1, s[1], 0, s[3]), np.float32) for n, s in wanted.items() if "past" in n
        }
        for start, end in ((0, 7), (7, 12)):
            feeds = {
                "input_ids": ids[:, start:end],
                "attention_mask": shown[:, :end],
                "position_ids": np.arange(start, end)[None],
                **past,
            }
            outputs = dict(
                zip(
                    [o.name for o in session.get_outputs()],
                    session.run(None, {k: v for k, v in feeds.items() if k in wanted}),
                    strict=True,
                )
            )
            past = {n: outputs[n.replace("past_key_values", "present")] for n in past}
        if model is llama:
            expected = outputs["logits"]
    assert np.abs(outputs["logits"] - expected).max() < FLOAT_NOISE * np.abs(expected).max()


@pytest.mark.parametrize("name", sorted(set(decoders.MODELS) - {"llama"}))
def test_other_decoders_converse_alike_on_padded_batches(name):
    model = decoders.cleaned(name)
    result = lower_decoder(model.clone(), context(model))
    assert result.changed == 2 and not result.skipped
    assert op_types(result.model)["RotaryEmbedding"] == (0 if name == "gpt2" else 4)
    for kind in KINDS:
        ids, shown = decoders.padded(kind)
        pair = [decoders.converse(m, ids, shown) for m in (model, result.model)]
        assert decoders.largest_difference(*pair) < FLOAT_NOISE


def test_a_rewriting_that_forgets_the_mask_is_left_with_its_error(llama, monkeypatch):
    # what some fusions do; right on one row, wrong behind padding
    monkeypatch.setattr(Emission, "_bias", lambda self, at, mask: None)
    result = lower_decoder(llama.clone(), context(llama))
    assert result.changed == 0 and len(result.skipped) == 2
    assert all("GroupQueryAttention differs by" in skip.reason for skip in result.skipped)
    assert "2 of 2 attentions over a cache stay" in result.findings[0]
    assert graph_bytes(result.model) == graph_bytes(llama)


def test_attention_that_looks_ahead_is_left(llama):
    model = llama.clone()
    for node in list(model.graph):
        if node.op_type == "Add" and any(
            use.node.op_type == "Softmax" for use in node.outputs[0].uses()
        ):
            nothing = ir.Value(name=f"{node.name}_none", const_value=ir.tensor(np.float32([0])))
            model.graph.register_initializer(nothing)
            node.replace_input_with(1, nothing)
    result = lower_decoder(model.clone(), context(model))
    assert result.changed == 0 and len(result.skipped) == 2


def test_only_the_false_one_of_two_is_left(llama, monkeypatch):
    emit = Emission.emit
    seen = []

    def wrong_second(self, match):
        seen.append(match.end.name)
        second = match.end.name == sorted(set(seen))[-1] and len(set(seen)) == 2
        return emit(self, dataclasses.replace(match, scale=2 * match.scale) if second else match)

    monkeypatch.setattr(Emission, "emit", wrong_second)
    result = lower_decoder(llama.clone(), context(llama))
    assert result.changed == 1 and len(result.skipped) == 1
    assert "1 of 2 attentions over a cache run as" in result.findings[0]
    assert op_types(result.model)["Softmax"] == 1


def test_one_that_does_not_run_leaves_the_other(llama, monkeypatch):
    emit = Emission.emit
    names: list[str] = []

    def broken_second(self, match):
        names.extend([match.end.name] if match.end.name not in names else [])
        broken = match.end.name == names[-1] and len(names) == 2
        return emit(self, dataclasses.replace(match, kv_heads=4) if broken else match)

    monkeypatch.setattr(Emission, "emit", broken_second)
    result = lower_decoder(llama.clone(), context(llama))
    assert result.changed == 1
    (skip,) = result.skipped
    assert skip.reason.startswith("GroupQueryAttention: ONNX Runtime cannot")


def test_a_target_without_the_kernel_keeps_the_graph(llama):
    given = dataclasses.replace(context(llama), target=without("GroupQueryAttention"))
    result = lower_decoder(llama.clone(), given)
    assert result.changed == 0 and graph_bytes(result.model) == graph_bytes(llama)


def test_a_target_without_rotary_embedding_keeps_that_part(llama):
    given = dataclasses.replace(context(llama), target=without("RotaryEmbedding"))
    result = lower_decoder(llama.clone(), given)
    ops = op_types(result.model)
    assert result.changed == 2 and ops["Neg"] == 4 and not ops["RotaryEmbedding"]
    ids, shown = decoders.padded("left")
    pair = [decoders.converse(m, ids, shown) for m in (llama, result.model)]
    assert decoders.largest_difference(*pair) < FLOAT_NOISE


def test_a_lock_is_followed_without_a_proof(llama, monkeypatch):
    result = lower_decoder(llama.clone(), context(llama))
    monkeypatch.setattr(lowering, "largest_errors", lambda *args: pytest.fail("proven again"))
    again = lower_decoder(llama.clone(), context(llama, lock=dict(result.decisions)))
    assert graph_bytes(again.model) == graph_bytes(result.model)


def test_lowering_twice_changes_nothing_the_second_time(llama, lowered):
    again = Lower().run(lowered.clone(), context(llama))
    assert again.changed == 0 and graph_bytes(again.model) == graph_bytes(lowered)


def test_a_decoder_with_unknown_inputs_is_left_with_the_reason(llama):
    model = llama.clone()
    model.graph.inputs.append(
        ir.Value(name="token_type_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    )
    result = lower_decoder(model.clone(), context(model))
    assert result.changed == 0
    assert "its inputs are not input_ids, attention_mask" in result.skipped[0].reason


def test_real_texts_take_part_in_the_proof(llama, monkeypatch):
    texts = [{"input_ids": np.full((1, 30), 7 + row)} for row in range(5)]

    class Samples(list):
        """Feeds."""

    seen = []
    real = lowering.largest_errors

    def spied(model, decoder, trials, twins):
        seen.extend(trials)
        return real(model, decoder, trials, twins)

    monkeypatch.setattr(lowering, "largest_errors", spied)
    result = lower_decoder(llama.clone(), context(llama, calibration=Samples(texts)))
    assert result.changed == 2
    assert seen[0].ids[0, :24].tolist() == [7] * 24
    assert seen[1].ids[:, 0].tolist() == [7, 8, 9, 10]


def test_batches_with_several_new_tokens_behind_a_past_are_refused_by_the_kernel(lowered):
    # the unfused graph takes them: a finding tells it
    feeds = {
        "input_ids": np.ones((2, 3), np.int64),
        "attention_mask": np.ones((2, 5), np.int64),
        "position_ids": np.arange(2, 5)[None].repeat(2, 0),
    }
    for value in lowered.graph.inputs:
        if str(value.name).startswith("past"):
            feeds[str(value.name)] = np.zeros((2, value.shape[1], 2, value.shape[3]), np.float32)
    session = decoders.open_session(lowered)
    with pytest.raises(Exception, match="batch_size must be 1"):
        session.run(None, feeds)


@pytest.mark.parametrize("kind", ["single", "left"])
def test_past_and_present_may_be_one_buffer(llama, lowered, kind):
    assert can_share_cache(lowered) and not can_share_cache(llama)
    ids, shown = decoders.padded(kind)
    growing = decoders.converse(llama, ids, shown)
    shared = decoders.converse_shared(lowered, ids, shown, capacity=40)
    for (at, logits, _), (_, other) in zip(growing, shared, strict=True):
        error = np.abs(other[at] - logits[at]).max() / np.abs(logits[at]).max()
        assert error < FLOAT_NOISE
