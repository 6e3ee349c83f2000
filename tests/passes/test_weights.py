"""Integers for weights against numpy by hand, and the editor's names."""

import graphs
import numpy as np
import pytest

from edgec.passes.weights import (
    Editor,
    Refused,
    constant,
    float_weight,
    quantize_channels,
)


def test_channel_scale_maps_the_largest_weight_to_127():
    w = np.array([[1.0, -2.0], [0.5, 4.0]], np.float32)
    q = quantize_channels(w, (1,))
    np.testing.assert_array_equal(q.scale, np.array([1 / 127, 4 / 127], np.float32))
    np.testing.assert_array_equal(q.values, [[127, -64], [64, 127]])


def test_zero_channel_keeps_scale_one():
    q = quantize_channels(np.zeros((3, 2), np.float32), (0,))
    np.testing.assert_array_equal(q.scale, [1, 1, 1])
    assert not q.values.any()


def test_subnormal_weights_give_no_nan_and_no_infinity():
    q = quantize_channels(np.full((2, 2), 1e-44, np.float32), (0,))
    assert np.isfinite(q.scale).all() and (q.scale > 0).all()


def test_seven_bits_stay_within_63():
    q = quantize_channels(graphs.weight(16, 16), (0,), bits=7)
    assert np.abs(q.values.astype(int)).max() == 63


def test_constant_sees_through_a_transpose_and_not_through_an_overridable_initializer():
    model, _ = graphs.transformer()
    table = model.graph.initializers["table"]
    head = next(n for n in model.graph if n.name == "lm_head").inputs[1]
    np.testing.assert_array_equal(constant(head), table.const_value.numpy().T)
    model.graph.inputs.append(table)
    assert constant(table) is None and constant(head) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weight_that_is_not_finite_is_refused(bad):
    model, _ = graphs.mlp()
    value = model.graph.initializers["w1"]
    array = value.const_value.numpy().copy()
    array[3, 3] = bad
    editor = Editor(model)
    with pytest.raises(Refused, match="NaN or infinity"):
        float_weight(editor.constant(model.graph, "bad", array))


def test_fresh_names_avoid_what_is_there_and_repeat_on_a_clone():
    model, _ = graphs.mlp()
    names = [Editor(m).fresh("w1") for m in (model, model.clone())]
    assert names == ["w1_1", "w1_1"]
