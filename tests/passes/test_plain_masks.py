"""Masks of a decoder that hide padding and later positions alone, and those that hide more."""

from __future__ import annotations

from collections import Counter

import decoders
import onnx_ir as ir
import pytest
from written_decoder import decoder

from edgec.passes import Context, plain_masks
from edgec.passes.execution import graph_bytes
from edgec.passes.lower_decoder import lower_decoder
from edgec.targets import load_target

FLOAT_NOISE = 1e-5  # the kernel sums in another order
LENGTH = 200  # of the context
WINDOW = (
    "seen = And(causal, attended4)",
    "near = Sub(column, window) local = Greater(keys_at, near) close = And(causal, local) "
    "seen = And(close, attended4)",
)
KINDS = ("single", "left", "right")


def context(model: ir.Model, **fields) -> Context:
    return Context(load_target("x86-64"), model, **fields)


def window(length: int) -> tuple[tuple[str, str], ...]:
    """Changes to the decoder: a query sees so many positions, its own included."""
    return WINDOW, ("int64 zero = {0}", f"int64 zero = {{0}}, int64 window = {{{length}}}")


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_mask_is_left_to_the_kernel_but_for_the_padding(kind):
    model = decoder()
    result = lower_decoder(model.clone(), context(model, context_length=LENGTH))
    assert result.decisions["plain_masks"] == ["seen"]
    assert not ops(result.model)["LessOrEqual"] and not ops(result.model)["Range"]
    ids, shown = decoders.padded(kind)
    pair = [decoders.converse(m, ids, shown) for m in (model, result.model)]
    assert decoders.largest_difference(*pair) < FLOAT_NOISE


@pytest.mark.parametrize("length", [5, LENGTH - 1])
def test_a_window_shows_at_the_end_of_the_context_and_stays(length):
    model = decoder(*window(length))
    result = lower_decoder(model.clone(), context(model, context_length=LENGTH))
    assert result.changed == 1 and result.decisions["plain_masks"] == []
    assert ops(result.model)["Greater"] == 1
    ids, shown = decoders.padded("left")
    pair = [decoders.converse(m, ids, shown) for m in (model, result.model)]
    assert decoders.largest_difference(*pair) < FLOAT_NOISE


def test_a_window_as_wide_as_the_context_hides_nothing():
    model = decoder(*window(LENGTH))
    result = lower_decoder(model.clone(), context(model, context_length=LENGTH))
    assert result.decisions["plain_masks"] == ["seen"] and not ops(result.model)["Greater"]


@pytest.mark.parametrize(
    "change",
    [
        ("float none = {0.0}", "float none = {0.5}"),
        ("float low = {-3.4e38}", "float low = {-5.0}"),
        ("seen = And(causal, attended4)", "seen = Or(causal, attended4)"),
        ("seen = And(causal, attended4)", "seen = And(attended4, attended4)"),
        ("seen = And(causal, attended4)", "seen = And(causal, causal)"),
    ],
    ids=["adds to what it shows", "hides a little", "shows too much", "looks ahead", "no padding"],
)
def test_other_masks_are_not_plain(change):
    model = decoder(change)
    result = lower_decoder(model.clone(), context(model, context_length=LENGTH))
    assert not result.decisions.get("plain_masks")


def test_without_a_context_length_nothing_is_proven():
    model = decoder()
    result = lower_decoder(model.clone(), context(model))
    assert result.changed == 1 and result.decisions["plain_masks"] == []
    assert ops(result.model)["LessOrEqual"] == 1


def test_a_lock_is_followed(monkeypatch):
    model = decoder()
    given = context(model, context_length=LENGTH)
    result = lower_decoder(model.clone(), given)
    monkeypatch.setattr(plain_masks, "open_session", lambda *a, **k: pytest.fail("proven again"))
    locked = context(model, context_length=LENGTH, lock=dict(result.decisions))
    assert graph_bytes(lower_decoder(model.clone(), locked).model) == graph_bytes(result.model)
