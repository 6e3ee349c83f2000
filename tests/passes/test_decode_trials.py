"""The conversations that prove rewrites of a decoder, and the models that they know."""

from __future__ import annotations

import decoders
import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes import Context
from edgec.passes.decode_trials import (
    STEPS,
    Twin,
    decoder_of,
    largest_errors,
    run_trial,
    trials_for,
)
from edgec.targets import load_target

# logits and one cache: ids + the sum of what the mask shows; the cache holds the ids
COUNTING = """g (int64[B,S] input_ids, int64[B,T] attention_mask, float[B,1,P,1] past)
    => (float[B,S,50] logits, float[B,1,T,1] present)
<int64[2] sides = {1, 3}, int64[3] wide = {1, 1, 50}, int64[1] last = {-1}, float one = {1.0}> {
    new = Cast<to = 1>(input_ids)
    new4 = Unsqueeze(new, sides)
    present = Concat<axis = 2>(past, new4)
    shown = Cast<to = 1>(attention_mask)
    count = ReduceSum(shown, last)
    sum = Add(new, count)
    again = Add(count, new)
    off = Add(sum, one)
    three = Unsqueeze(sum, last)
    logits = Expand(three, wide)
}"""


def counting(*changes: tuple[str, str]) -> ir.Model:
    text = COUNTING
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    for value in (*model.graph.inputs, *model.graph.outputs):  # names with dots cannot be written
        value.name = {"past": "past_key_values.0.key", "present": "present.0.key"}.get(
            value.name, value.name
        )
    return model


def context(model: ir.Model, **fields) -> Context:
    return Context(load_target("x86-64"), model, **fields)


def test_trials_are_whole_left_and_right_padded_conversations_of_20_steps():
    model = counting()
    decoder = decoder_of(model)
    assert decoder.vocabulary == 50 and decoder.caches == {"past_key_values.0.key": (1, 1)}
    single, batch = trials_for(decoder, context(model))
    assert single.pieces == (9, 4, *[1] * STEPS) and single.shown.all()
    assert batch.pieces == (9, *[1] * STEPS) and batch.shown[:, 9:].all()
    assert batch.shown[:, :9].tolist() == [
        [0] + [1] * 8,
        [1] * 9,
        [0] * 3 + [1] * 6,
        [1] * 6 + [0] * 3,
    ]
    again = trials_for(decoder, context(model))
    assert np.array_equal(again[1].ids, batch.ids) and batch.ids.max() < 50


def test_the_models_own_caches_are_fed_back():
    model = counting()
    decoder = decoder_of(model)
    single, _ = trials_for(decoder, context(model))
    runs = list(run_trial(model, decoder, single, ["present.0.key"]))
    assert len(runs) == 22
    assert np.array_equal(runs[-1][1]["present.0.key"].ravel(), single.ids[0])


def test_twins_are_compared_in_all_runs():
    model = counting()
    decoder = decoder_of(model)
    twins = [Twin("sum", "again"), Twin("sum", "off"), Twin("sum", "new4")]
    errors = largest_errors(model, decoder, trials_for(decoder, context(model)), twins)
    assert errors[0] == 0.0 and 0 < errors[1] < 1 and errors[2] == float("inf")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ([("attention_mask", "mask")], "its inputs are not input_ids, attention_mask"),
        (
            [("float[B,1,P,1] past)", "float[B,H,P,1] past)")],
            "size of the heads of 'past_key_values.0.key' is not known",
        ),
        (
            [("float[B,1,P,1] past)", "float16[B,1,P,1] past)"), ("(past, new4)", "(new4, new4)")],
            "'past_key_values.0.key' is not float32 with four axes",
        ),
        (
            [("float[B,1,T,1] present)", "float[B,1,T,1] kept)"), ("present =", "kept =")],
            "it has no output 'present.0.key' for the input 'past_key_values.0.key'",
        ),
    ],
)
def test_other_models_are_told_apart(changes, reason):
    assert reason in decoder_of(counting(*changes))


@pytest.mark.slow
def test_a_tiny_llama_is_one():
    decoder = decoder_of(decoders.cleaned("llama"))
    assert decoder.has_positions and decoder.vocabulary == decoders.WORDS
    assert len(decoder.caches) == 4 and set(decoder.caches.values()) == {(2, 16)}
