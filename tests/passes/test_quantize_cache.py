"""Key-value caches of int8: what the kernel keeps, what callers see, and what stays float32."""

from __future__ import annotations

import dataclasses

import decoders
import numpy as np
import onnx_ir as ir
import pytest
from written_decoder import decoder

from edgec.passes import Context, PassError, QuantizeCache
from edgec.passes.execution import graph_bytes, open_session, run_feeds
from edgec.passes.lower_decoder import lower_decoder
from edgec.targets import load_target
from edgec_runtime.integer_cache import METADATA, scales_of

LENGTH = 64


def texts(count: int = 16, length: int = 24) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    empty = np.zeros((1, 2, 0, 8), np.float32)
    return [
        {
            "input_ids": random.integers(0, 97, (1, length)),
            "attention_mask": np.ones((1, length), np.int64),
            "past_key_values.0.key": empty,
            "past_key_values.0.value": empty,
        }
        for _ in range(count)
    ]


def context(model: ir.Model, **fields) -> Context:
    return Context(load_target("x86-64"), model, context_length=LENGTH, **fields)


@pytest.fixture
def lowered() -> ir.Model:
    model = decoder()
    return lower_decoder(model, context(model)).model


def cached(model: ir.Model, **fields):
    given = context(model, calibration=texts(), **fields)
    return QuantizeCache().run(model.clone(), given)


def test_caches_become_integers_with_a_scale_a_channel(lowered):
    result = cached(lowered)
    assert result.changed == 1
    kinds = {v.name: v.dtype for v in (*result.model.graph.inputs, *result.model.graph.outputs)}
    for name in ("past_key_values.0.key", "present.0.value"):
        assert kinds[name] == ir.DataType.INT8
    presents = [
        run_feeds(open_session(lowered, outputs=["present.0.key"]), feeds)[0] for feeds in texts()
    ]
    expected = np.abs(np.concatenate(presents, axis=2)).max((0, 2)) * 1.1 / 127
    scales = scales_of(result.model.metadata_props[METADATA])
    np.testing.assert_allclose(scales["past_key_values.0.key"][0, :, 0], expected, rtol=1e-6)
    np.testing.assert_array_equal(scales["past_key_values.0.key"], scales["present.0.key"])


@pytest.mark.parametrize("kind", ["single", "left", "right"])
def test_a_conversation_by_integers_is_near_the_one_by_floats(lowered, kind):
    ids, shown = decoders.padded(kind)
    pair = [decoders.converse(m, ids, shown) for m in (lowered, cached(lowered).model)]
    worst = 0.0
    for (at, exact, _), (_, rounded, _) in zip(*pair, strict=True):
        worst = max(worst, np.abs(rounded[at] - exact[at]).max() / np.abs(exact[at]).max())
    assert 1e-5 < worst < 0.02  # rounded, and by little


def test_what_is_cached_is_the_nearest_integer(lowered):
    feeds = texts()[0]
    model = cached(lowered).model
    scale = scales_of(model.metadata_props[METADATA])["present.0.key"]
    exact, rounded = (
        run_feeds(open_session(m, outputs=["present.0.key"]), feeds)[0] for m in (lowered, model)
    )
    assert np.abs(rounded - exact).max() > 0
    assert (np.abs(rounded - exact) <= 0.51 * scale).all()
    # floats that came out go in again as the same integers
    again = {**feeds, "past_key_values.0.key": rounded, "past_key_values.0.value": rounded}
    again["attention_mask"] = np.ones((1, 48), np.int64)
    present = run_feeds(open_session(model, outputs=["present.0.key"]), again)[0]
    np.testing.assert_allclose(present[:, :, :24], rounded, rtol=1e-6, atol=1e-7)


def test_padding_does_not_widen_the_scales(lowered):
    plain = cached(lowered).decisions
    padded = texts()
    for feeds in padded:  # tokens that nobody has seen, hidden
        feeds["input_ids"] = np.concatenate([np.full((1, 6), 96), feeds["input_ids"]], axis=1)
        feeds["attention_mask"] = np.concatenate(
            [np.zeros((1, 6), np.int64), feeds["attention_mask"]], axis=1
        )
    given = context(lowered, calibration=padded)
    assert QuantizeCache().run(lowered.clone(), given).decisions == plain


def test_a_lock_is_followed_without_data(lowered):
    result = cached(lowered)
    locked = context(lowered, lock=dict(result.decisions))
    again = QuantizeCache().run(lowered.clone(), locked)
    assert graph_bytes(again.model) == graph_bytes(result.model)


def test_without_data_it_says_what_it_needs(lowered):
    with pytest.raises(PassError, match="needs calibration data"):
        QuantizeCache().run(lowered.clone(), context(lowered))
    with pytest.raises(PassError, match="samples is 0, expected above 0"):
        QuantizeCache(samples=0)


def test_numbers_that_are_none_are_named(lowered):
    model = lowered.clone()
    table = model.graph.initializers["table"]
    table.const_value = ir.tensor(np.full((97, 32), np.nan, np.float32), name="table")
    with pytest.raises(PassError, match="calibration sample 0: 'present.0.key' holds NaN"):
        cached(model)


def test_other_targets_and_other_readers_keep_their_caches(lowered):
    target = dataclasses.replace(load_target("x86-64"), kernels=("GroupQueryAttention",))
    given = dataclasses.replace(context(lowered, calibration=texts()), target=target)
    result = QuantizeCache().run(lowered.clone(), given)
    assert result.changed == 0 and "has no GroupQueryAttention" in result.skipped[0].reason
    model = lowered.clone()
    shape = ir.node("Shape", [next(v for v in model.graph.inputs if len(v.shape) == 4)])
    shape.outputs[0].name = "cache_shape"
    model.graph.append(shape)
    assert "read by something else" in cached(model).skipped[0].reason
    twice = cached(cached(lowered).model)
    assert twice.changed == 0 and twice.skipped[0].reason == "its cache is not float32"
    unfused = decoder()
    assert cached(unfused).changed == 0
