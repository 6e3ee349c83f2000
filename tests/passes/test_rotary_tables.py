"""Tables of angles: made by the model's own nodes, and used only where angles grow evenly."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes.rotary_tables import evaluated, grow_evenly, nodes_between

ANGLES = """<ir_version: 10, opset_import: ["" : 21]>
g (int64[B,S] position_ids, float[B] other) => (float[B,1,S,4] cos, float[B,1,S,4] mixed)
<float[4] steps = {1.0, 0.1, 1.0, 0.1}, int64[2] axes = {1, 3}, int64[3] last_axes = {1, 2, 3},
 int64[1] keep = {-1}> {
    p = Cast<to = 1>(position_ids)
    wide = Unsqueeze(p, axes)
    a = Mul(wide, steps)
    cos = Cos(a)
    s = Unsqueeze(other, last_axes)
    mixed = Mul(cos, s)
}"""
RATES = np.array([1.0, 0.1])


def values() -> dict[str, ir.Value]:
    model = ir.from_onnx_text(ANGLES)
    named = {str(value.name): value for node in model.graph for value in node.outputs}
    return {**named, **{str(value.name): value for value in model.graph.inputs}}


def test_a_table_holds_what_the_nodes_give_for_every_position():
    known = values()
    nodes = nodes_between(known["position_ids"], known["cos"])
    assert nodes is not None and [n.op_type for n in nodes] == ["Cast", "Unsqueeze", "Mul", "Cos"]
    table = evaluated(nodes, known["position_ids"], known["cos"], 50)
    expected = np.cos(np.arange(50)[:, None] * np.tile(RATES, 2))
    np.testing.assert_allclose(table, expected, atol=1e-5)


def test_angles_that_read_another_input_have_no_table():
    known = values()
    assert nodes_between(known["position_ids"], known["mixed"]) is None
    assert nodes_between(known["other"], known["cos"]) is None


@pytest.mark.parametrize(
    ("angles", "radius", "even"),
    [
        (np.arange(4096)[:, None] * RATES, 1.0, True),
        (np.arange(4096)[:, None] * RATES, 1.3, True),  # attention factor of long contexts
        (np.sqrt(np.arange(64))[:, None] * RATES, 1.0, False),
        # other frequencies behind position 32, as models of long contexts may have
        (
            np.arange(64)[:, None] * np.where(np.arange(64)[:, None] < 32, RATES, RATES / 8),
            1.0,
            False,
        ),
        (np.arange(64)[:, None] * RATES, np.linspace(1, 2, 64)[:, None], False),
        (np.full((64, 2), np.nan), 1.0, False),
    ],
    ids=["even", "scaled", "slower and slower", "two frequencies", "other radius", "NaN"],
)
def test_only_even_angles_are_rotated_by_the_place_in_the_cache(angles, radius, even):
    tables = ((radius * turn(angles)).astype(np.float32) for turn in (np.cos, np.sin))
    assert grow_evenly(*tables) is even
