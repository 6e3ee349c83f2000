"""Attention over a cache becomes one kernel where whole conversations prove it, and only there."""

from __future__ import annotations

import dataclasses
from collections import Counter

import decoders
import numpy as np
import onnx_ir as ir
import pytest
from written_decoder import decoder

from edgec.passes import Context
from edgec.passes import lower_decoder as lowering
from edgec.passes.emit_decoder import Emission
from edgec.passes.execution import graph_bytes
from edgec.passes.lower_decoder import can_share_cache, lower_decoder
from edgec.targets import load_target

FLOAT_NOISE = 1e-5  # the kernel sums in another order


def context(model: ir.Model, **fields) -> Context:
    return Context(load_target("x86-64"), model, **fields)


def op_types(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("kind", ["single", "left", "right"])
def test_it_becomes_one_node_and_converses_alike(kind):
    model = decoder()
    result = lower_decoder(model.clone(), context(model))
    assert result.changed == 1 and not result.skipped
    ops = op_types(result.model)
    assert ops["GroupQueryAttention"] == 1 and not ops["Softmax"] and not ops["Transpose"]
    node = next(n for n in result.model.graph if n.op_type == "GroupQueryAttention")
    assert node.attributes.get_float("scale") == pytest.approx(0.6)
    ids, shown = decoders.padded(kind)
    pair = [decoders.converse(m, ids, shown) for m in (model, result.model)]
    assert decoders.largest_difference(*pair) < FLOAT_NOISE


def test_lengths_come_from_ids_and_mask_so_that_one_buffer_will_do():
    model = decoder()
    lowered = lower_decoder(model.clone(), context(model)).model
    assert can_share_cache(lowered) and not can_share_cache(model)
    ids, shown = decoders.padded("left")
    growing = decoders.converse(model, ids, shown)
    shared = decoders.converse_shared(lowered, ids, shown, capacity=33)
    for (at, logits, _), (_, other) in zip(growing, shared, strict=True):
        assert np.abs(other[at] - logits[at]).max() < FLOAT_NOISE * np.abs(logits[at]).max()


def test_a_rewriting_that_forgets_the_mask_is_left_with_its_error(monkeypatch):
    # what some fusions do: right on one row, wrong behind padding
    monkeypatch.setattr(Emission, "_bias", lambda self, at, mask: None)
    model = decoder()
    result = lower_decoder(model.clone(), context(model))
    assert result.changed == 0 and graph_bytes(result.model) == graph_bytes(model)
    assert "GroupQueryAttention differs by" in result.skipped[0].reason
    assert "1 of 1 attentions over a cache stay" in result.findings[0]


@pytest.mark.parametrize(
    "change",
    [
        ("seen = And(causal, attended4)", "seen = Or(causal, attended4)"),  # looks ahead
        ("q4 = Reshape(q, four)", "q3 = Reshape(q, mixed) q4 = Transpose<perm = [0, 1, 3, 2]>(q3)"),
        ("axis = 2>(past_value, vh)", "axis = 2>(past_value, kh)"),
    ],
    ids=["looks ahead", "mixes heads", "keys as values"],
)
def test_whatever_is_rewritten_computes_the_same(change):
    mixed = ("int64 zero = {0}", "int64 zero = {0}, int64[4] mixed = {0, 0, 8, 4}")
    model = decoder(change, mixed)
    result = lower_decoder(model.clone(), context(model))
    assert result.changed + len(result.skipped) == 1
    assert result.changed == (0 if "Or(" in change[1] else 1)
    ids, shown = decoders.padded("left")
    pair = [decoders.converse(m, ids, shown) for m in (model, result.model)]
    assert decoders.largest_difference(*pair) < FLOAT_NOISE


def test_a_kernel_that_refuses_leaves_the_graph_with_its_words(monkeypatch):
    emit = Emission.emit
    monkeypatch.setattr(
        Emission, "emit", lambda self, m: emit(self, dataclasses.replace(m, kv_heads=4))
    )
    model = decoder()
    result = lower_decoder(model.clone(), context(model))
    assert result.changed == 0
    assert result.skipped[0].reason.startswith("GroupQueryAttention: ONNX Runtime cannot")


def test_a_target_without_the_kernel_keeps_the_graph():
    model = decoder()
    target = dataclasses.replace(load_target("x86-64"), kernels=())
    result = lower_decoder(model.clone(), dataclasses.replace(context(model), target=target))
    assert result.changed == 0 and graph_bytes(result.model) == graph_bytes(model)


def test_a_lock_is_followed_without_a_proof(monkeypatch):
    model = decoder()
    result = lower_decoder(model.clone(), context(model))
    monkeypatch.setattr(lowering, "largest_errors", lambda *args: pytest.fail("proven again"))
    again = lower_decoder(model.clone(), context(model, lock=dict(result.decisions)))
    assert graph_bytes(again.model) == graph_bytes(result.model)
    none = lower_decoder(model.clone(), context(model, lock={"decoder": []}))
    assert none.changed == 0 and graph_bytes(none.model) == graph_bytes(model)
