"""Attention over a cache is recognised behind whatever moves its operands, or refused with why."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from edgec.passes.match_decoder import find_cached_attentions

# 4 query heads of 8 for 2 key heads, repeated by Expand
ATTENTION = """g (float[B,S,32] q, float[B,S,16] k, float[B,S,16] v, float[B,1,S,T] bias,
    float[B,2,P,8] old_keys, float[B,2,P,8] old_values)
    => (float[B,S,32] y, float[B,2,T,8] keys, float[B,2,T,8] values)
<int64[4] four = {0, 0, 4, 8}, int64[4] two = {0, 0, 2, 8}, int64[3] merge = {0, 0, 32},
 float root = {0.5}, int64[1] axis = {2}, int64[5] times = {1, 1, 2, 1, 1},
 int64[4] flat = {0, 4, -1, 8}> {
    q4 = Reshape(q, four)
    qh = Transpose<perm = [0, 2, 1, 3]>(q4)
    k4 = Reshape(k, two)
    kh = Transpose<perm = [0, 2, 1, 3]>(k4)
    v4 = Reshape(v, two)
    vh = Transpose<perm = [0, 2, 1, 3]>(v4)
    keys = Concat<axis = -2>(old_keys, kh)
    values = Concat<axis = 2>(old_values, vh)
    k5 = Unsqueeze(keys, axis)
    k5r = Expand(k5, times)
    kr = Reshape(k5r, flat)
    kt = Transpose<perm = [0, 1, 3, 2]>(kr)
    ktr = Mul(kt, root)
    v5 = Unsqueeze(values, axis)
    v5r = Expand(v5, times)
    vr = Reshape(v5r, flat)
    scores = MatMul(qh, ktr)
    scaled = Mul(scores, root)
    masked = Add(scaled, bias)
    p = Softmax<axis = -1>(masked)
    o = MatMul(p, vr)
    t = Transpose<perm = [0, 2, 1, 3]>(o)
    y = Reshape(t, merge)
}"""


def attention(*changes: tuple[str, str]) -> ir.Model:
    text = ATTENTION
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    for node in model.graph:
        if node.op_type in ("Reshape", "Transpose") and node.outputs[0].shape is None:
            node.outputs[0].shape = ir.Shape([None] * 4)
    return model


def test_heads_sizes_and_scale_are_found_behind_repetition_and_factors():
    (match,), skipped = find_cached_attentions(attention(), rotary=True)
    assert not skipped
    assert (match.heads, match.kv_heads, match.size, match.scale) == (4, 2, 8, 0.25)
    operands = (match.query, match.key, match.value)
    assert [operand.merged.name for operand in operands] == ["q", "k", "v"]
    assert (match.keys.past.name, match.keys.present.name) == ("old_keys", "keys")
    assert (match.values.past.name, match.values.present.name) == ("old_values", "values")
    assert match.end.name == "y" and match.mask.root.name == "bias" and match.rotary is None


def test_a_mask_is_followed_through_the_cut_to_the_length_of_the_keys():
    cut = (
        "masked = Add(scaled, bias)",
        "hidden = Less(bias, root) cut = Slice(hidden, zero, end, last, one)"
        " chosen = Where(cut, none, low) masked = Add(scaled, chosen)",
    )
    numbers = (
        "float root = {0.5}",
        "float root = {0.5}, int64[1] zero = {0}, int64[1] end = {99}, int64[1] last = {3},"
        " int64[1] one = {1}, float none = {0.0}, float low = {-3.4e38}",
    )
    (match,), _ = find_cached_attentions(attention(cut, numbers), rotary=True)
    assert match.mask.root.name == "hidden" and match.mask.shown == 0.0
    assert match.mask.hidden == pytest.approx(-3.4e38)


def test_a_mask_cut_elsewhere_is_taken_as_it_is():
    cut = (
        "masked = Add(scaled, bias)",
        "cut = Slice(bias, one, end, last) masked = Add(scaled, cut)",
    )
    numbers = (
        "float root = {0.5}",
        "float root = {0.5}, int64[1] one = {1}, int64[1] end = {99}, int64[1] last = {3}",
    )
    (match,), _ = find_cached_attentions(attention(cut, numbers), rotary=True)
    assert match.mask.root.name == "cut"


def test_rows_that_attend_to_nothing_may_be_guarded_against_nan():
    guard = (
        "o = MatMul(p, vr)",
        "bad = IsNaN(p) safe = Where(bad, none, p) o = MatMul(safe, vr)",
    )
    number = ("float root = {0.5}", "float root = {0.5}, float none = {0.0}")
    (match,), _ = find_cached_attentions(attention(guard, number), rotary=True)
    assert match.end.name == "y"
    other = ("float root = {0.5}", "float root = {0.5}, float none = {1.0}")
    assert find_cached_attentions(attention(guard, other), rotary=True)[0] == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            (", float[B,2,T,8] keys, float[B,2,T,8] values)", ", float[B,2,T,8] values)"),
            "its cache 'keys' is no output of the graph",
        ),
        (
            ("float[B,2,P,8] old_keys", "float[B,H,P,8] old_keys"),
            "number or size of the heads of 'old_keys' is not known",
        ),
        (
            ("float[B,2,P,8] old_values", "float[B,2,P,4] old_values"),
            "number or size of the heads of 'old_keys' is not known",
        ),
        (("float root = {0.5}", "float root = {-0.5}"), None),
        (("scaled = Mul(scores, root)", "scaled = Mul(scores, minus)"), "multiplied by -0.5"),
        (("perm = [0, 2, 1, 3]>(o)", "perm = [0, 2, 3, 1]>(o)"), "not merged behind a Transpose"),
    ],
)
def test_what_cannot_be_rewritten_is_told(change, reason):
    minus = ("int64[1] axis = {2}", "int64[1] axis = {2}, float minus = {-1.0}")
    found, skipped = find_cached_attentions(attention(change, minus), rotary=True)
    if reason is None:  # twice negative
        assert len(found) == 1
        return
    (skip,) = skipped
    assert found == [] and reason in skip.reason


def test_the_number_of_query_heads_may_be_unknown():
    changes = (
        ("float[B,S,32] q,", "float[B,S,W] q,"),
        ("=> (float[B,S,32] y,", "=> (float[B,S,W] y,"),
    )
    found, skipped = find_cached_attentions(attention(*changes), rotary=True)
    assert found == [] and skipped[0].reason == "number of its query heads is not known"


@pytest.mark.parametrize(
    "change",
    [
        ("Concat<axis = -2>", "Concat<axis = 1>"),
        ("Concat<axis = -2>(old_keys, kh)", "Concat<axis = -2>(kh, old_keys)"),
        ("Concat<axis = -2>(old_keys, kh)", "Identity(kh)"),
    ],
)
def test_attention_without_such_a_cache_is_none(change):
    assert find_cached_attentions(attention(change), rotary=True) == ([], [])
