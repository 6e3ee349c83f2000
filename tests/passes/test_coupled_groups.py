"""Which positions of which weights go together, by hand, one case an operator or idiom.

A case is a graph of few channels; what is expected is the group by its name: for every axis of a
weight the positions of each unit. Every case is also cut and run.
"""

import graphs
import numpy as np
import pytest
from coupled_axes import IMAGE, TOKENS, check, cut_one, each, group, ints, layout, lengths, weights

from edgec.passes.dimension_groups import coupled_groups


def test_convolution_norm_and_reader_go_together():
    model = check(
        f"""g ({IMAGE}) => (float[1, 2, 4, 4] y) {{
            [a] c = Conv (x, w, b)
            n = BatchNormalization (c, scale, shift, mean, var)
            r = PRelu (n, slope)
            [b] y = Conv (r, v)
        }}""",
        weights(w=(4, 3, 1, 1), b=(4,), scale=(4,), shift=(4,), mean=(4,), slope=(4, 1, 1),
                v=(2, 4, 1, 1), var=np.ones(4, np.float32)),
        "a",
        {"w@0": each(4), "b@0": each(4), "scale@0": each(4), "shift@0": each(4),
         "mean@0": each(4), "var@0": each(4), "slope@0": each(4), "v@1": each(4)},
    )  # fmt: skip
    assert model.graph.initializers["w"].const_value.shape == (3, 3, 1, 1)


def test_depthwise_convolution_follows_and_its_group_shrinks():
    model = check(
        f"""g ({IMAGE}) => (float[1, 2, 4, 4] y) {{
            [a] c = Conv (x, w)
            [d] e = Conv <group = 4, pads = [1, 1, 1, 1]> (c, k, b)
            [b] y = Conv (e, v)
        }}""",
        weights(w=(4, 3, 1, 1), k=(4, 1, 3, 3), b=(4,), v=(2, 4, 1, 1)),
        "a",
        {"w@0": each(4), "k@0": each(4), "b@0": each(4), "v@1": each(4)},
        numbers={("e", "group", 0): (4, each(4))},
    )
    assert [n for n in model.graph if n.name == "d"][0].attributes.get_int("group") == 3


def test_grouped_convolution_loses_whole_groups():
    check(
        f"""g ({IMAGE}) => (float[1, 2, 4, 4] y) {{
            [a] c = Conv (x, w)
            [d] e = Conv <group = 2> (c, k)
            [b] y = Conv (e, v)
        }}""",
        weights(w=(4, 3, 1, 1), k=(6, 2, 1, 1), v=(2, 6, 1, 1)),
        "a",
        {"w@0": [[0, 1], [2, 3]], "k@0": [[0, 1, 2], [3, 4, 5]], "v@1": [[0, 1, 2], [3, 4, 5]]},
        numbers={("e", "group", 0): (2, each(2))},
    )


def test_transposed_convolution_makes_its_second_axis():
    check(
        f"""g ({IMAGE}) => (float[1, 2, 8, 8] y) {{
            [a] c = ConvTranspose <strides = [2, 2], kernel_shape = [2, 2]> (x, w, b)
            [b] y = Conv (c, v)
        }}""",
        weights(w=(3, 4, 2, 2), b=(4,), v=(2, 4, 1, 1)),
        "a",
        {"w@1": each(4), "b@0": each(4), "v@1": each(4)},
    )


def test_a_sum_ties_both_branches():
    check(
        f"""g ({IMAGE}) => (float[1, 2, 4, 4] y) {{
            [a] c = Conv (x, w)
            [b] d = Conv (x, k)
            s = Add (c, d)
            y = Conv (s, v)
        }}""",
        weights(w=(4, 3, 1, 1), k=(4, 3, 1, 1), v=(2, 4, 1, 1)),
        "a",
        {"w@0": each(4), "k@0": each(4), "v@1": each(4)},
    )


def test_joined_channels_are_two_groups_behind_each_other():
    text = f"""g ({IMAGE}) => (float[1, 2, 4, 4] y) {{
        [a] c = Conv (x, w)
        [b] d = Conv (x, k)
        s = Concat <axis = 1> (c, d)
        y = Conv (s, v)
    }}"""
    given = weights(w=(4, 3, 1, 1), k=(3, 3, 1, 1), v=(2, 7, 1, 1))
    check(text, given, "a", {"w@0": each(4), "v@1": each(4)})
    check(text, given, "b", {"k@0": each(3), "v@1": each(3, start=4)})


def test_split_sizes_follow_the_channels_that_they_count():
    text = f"""g ({IMAGE}) => (float[1, 2, 4, 4] y) {{
        [a] c = Conv (x, w)
        p, q = Split <axis = 1> (c, sizes)
        m = Conv (p, k)
        n = Conv (q, v)
        y = Add (m, n)
    }}"""
    given = weights(w=(5, 3, 1, 1), k=(2, 2, 1, 1), v=(2, 3, 1, 1), sizes=ints(2, 3))
    first, second = (
        {"w@0": each(2), "k@1": each(2)},
        {"w@0": each(3, start=2), "v@1": each(3)},
    )
    check(text, given, "a", first, numbers={("p", 1, 0): (2, each(2))})
    check(text, given, "a#2", second, numbers={("p", 1, 1): (3, each(3))})


def test_equal_shares_without_sizes_stay_equal():
    check(
        f"""g ({IMAGE}) => (float[1, 2, 4, 4] y) {{
            [a] c = Conv (x, w)
            p, q = Split <axis = 1, num_outputs = 2> (c)
            s = Sigmoid (q)
            m = Mul (p, s)
            y = Conv (m, v)
        }}""",
        weights(w=(6, 3, 1, 1), v=(2, 3, 1, 1)),
        "a",
        {"w@0": [[0, 3], [1, 4], [2, 5]], "v@1": each(3)},
    )


def test_slice_bounds_follow():
    text = f"""g ({IMAGE}) => (float[1, 2, 4, 4] y) {{
        [a] c = Conv (x, w)
        s = Slice (c, from, to, axis)
        y = Conv (s, v)
    }}"""
    given = weights(w=(7, 3, 1, 1), v=(2, 3, 1, 1), axis=ints(1))
    given |= {"from": ints(2), "to": ints(-2)}
    numbers = {("s", 2, 0): (5, each(3, start=2))}
    # the bounds of the sliced part move with units of any part
    check(text, given, "a#2", {"w@0": each(3, start=2), "v@1": each(3)}, numbers=numbers)
    numbers = {("s", 1, 0): (2, each(2)), ("s", 2, 0): (5, each(2))}
    check(text, given, "a", {"w@0": each(2)}, numbers=numbers)


def test_flattened_channels_are_blocks_of_positions():
    check(
        f"""g ({IMAGE}) => (float[1, 2] y) {{
            [a] c = Conv (x, w)
            p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c)
            f = Flatten (p)
            y = Gemm (f, v)
        }}""",
        weights(w=(3, 3, 1, 1), v=(12, 2)),
        "a",
        {"w@0": each(3), "v@0": [list(range(4 * i, 4 * i + 4)) for i in range(3)]},
    )


def test_channels_last_are_every_third_position_when_flattened():
    check(
        f"""g ({IMAGE}) => (float[1, 2] y) {{
            [a] c = Conv (x, w)
            p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c)
            t = Transpose <perm = [0, 2, 3, 1]> (p)
            f = Reshape (t, shape)
            y = MatMul (f, v)
        }}""",
        weights(w=(3, 3, 1, 1), v=(12, 2), shape=ints(1, 12)),
        "a",
        {"w@0": each(3), "v@0": [[i, i + 3, i + 6, i + 9] for i in range(3)]},
        numbers={("f", 1, 1): (12, [[i, i + 3, i + 6, i + 9] for i in range(3)])},
    )


def test_squeeze_and_excitation_follows_its_map():
    text = f"""g ({IMAGE}) => (float[1, 2, 4, 4] y) {{
        [a] c = Conv (x, w)
        p = ReduceMean (c, axes)
        [b] h = Conv (p, k)
        r = Relu (h)
        [d] e = Conv (r, l)
        s = Sigmoid (e)
        m = Mul (c, s)
        y = Conv (m, v)
    }}"""
    given = weights(w=(4, 3, 1, 1), k=(2, 4, 1, 1), l=(4, 2, 1, 1), v=(2, 4, 1, 1), axes=ints(2, 3))
    check(text, given, "a", {"w@0": each(4), "k@1": each(4), "l@0": each(4), "v@1": each(4)})
    check(text, given, "b", {"k@0": each(2), "l@1": each(2)})


def test_group_norm_loses_whole_groups():
    check(
        f"""g ({IMAGE}) => (float[1, 2, 4, 4] y) {{
            [a] c = Conv (x, w)
            n = GroupNormalization <num_groups = 2> (c, scale, bias)
            y = Conv (n, v)
        }}""",
        weights(w=(4, 3, 1, 1), scale=(4,), bias=(4,), v=(2, 4, 1, 1)),
        "a",
        {f"{name}": [[0, 1], [2, 3]] for name in ("w@0", "scale@0", "bias@0", "v@1")},
        numbers={("n", "num_groups", 0): (2, each(2))},
    )


def test_pixel_shuffle_makes_its_channels_of_blocks():
    check(
        f"""g ({IMAGE}) => (float[1, 2, 8, 8] y) {{
            [a] c = Conv (x, w)
            d = DepthToSpace <blocksize = 2, mode = "CRD"> (c)
            y = Conv (d, v)
        }}""",
        weights(w=(8, 3, 1, 1), v=(2, 2, 1, 1)),
        "a",
        {"w@0": [[0, 1, 2, 3], [4, 5, 6, 7]], "v@1": each(2)},
    )


def test_resized_and_padded_maps_keep_their_channels():
    check(
        f"""g ({IMAGE}) => (float[1, 2, 10, 10] y) {{
            [a] c = Conv (x, w)
            r = Resize (c, , , sizes)
            p = Pad (r, pads)
            y = Conv (p, v)
        }}""",
        weights(w=(4, 3, 1, 1), v=(2, 4, 1, 1), sizes=ints(1, 4, 8, 8),
                pads=ints(0, 0, 1, 1, 0, 0, 1, 1)),
        "a",
        {"w@0": each(4), "v@1": each(4)},
        numbers={("r", 3, 1): (4, each(4))},
    )  # fmt: skip


ATTENTION = """
    q0 = MatMul (x, wq)
    q1 = Reshape (q0, q_shape)
    q = Transpose <perm = [0, 2, 1, 3]> (q1)
    k0 = MatMul (x, wk)
    k1 = Reshape (k0, kv_shape)
    k = Transpose <perm = [0, 2, 3, 1]> (k1)
    v0 = MatMul (x, wv)
    v1 = Reshape (v0, kv_shape)
    v = Transpose <perm = [0, 2, 1, 3]> (v1)
    {repeated}
    s = MatMul (q, {k})
    p = Softmax (s)
    m = MatMul (p, {v})
    t = Transpose <perm = [0, 2, 1, 3]> (m)
    f = Reshape (t, joined)
    y = MatMul (f, wo)
"""
REPEATED = """
    ku = Unsqueeze (k, two)
    ke = Expand (ku, k_wide)
    kk = Reshape (ke, k_shape)
    vu = Unsqueeze (v, two)
    ve = Expand (vu, v_wide)
    vv = Reshape (ve, v_shape)
"""


def blocks(units, width):
    return [list(range(width * i, width * (i + 1))) for i in range(units)]


def test_a_head_is_a_unit_of_all_four_matrices():
    nodes = ATTENTION.format(repeated="", k="k", v="v").replace("q0 =", "[q] q0 =", 1)
    text = f"g ({TOKENS}) => (float[2, 5, 6] y) {{{nodes}}}"
    given = weights(wq=(6, 12), wk=(6, 12), wv=(6, 12), wo=(12, 6), q_shape=ints(0, 0, 3, 4),
                    kv_shape=ints(0, 0, 3, 4), joined=ints(0, 0, 12))  # fmt: skip
    model = check(
        text,
        given,
        "q",
        {f"{name}": blocks(3, 4) for name in ("wq@1", "wk@1", "wv@1", "wo@0")},
        kind="head",
        numbers={
            ("q1", 1, 2): (3, each(3)),
            ("k1", 1, 2): (3, each(3)),
            ("v1", 1, 2): (3, each(3)),
            ("f", 1, 2): (12, blocks(3, 4)),
        },
        x=graphs.feed(2, 5, 6),
    )
    # the widths of heads are factors inside: they stay
    assert [g.name for g in coupled_groups(model).found] == ["q"]


def test_a_key_head_takes_its_queries_along():
    nodes = ATTENTION.format(repeated=REPEATED, k="kk", v="vv").replace("q0 =", "[q] q0 =", 1)
    text = f"g ({TOKENS}) => (float[2, 5, 6] y) {{{nodes}}}"
    given = weights(
        wq=(6, 8), wk=(6, 4), wv=(6, 4), wo=(8, 6), two=ints(2), q_shape=ints(0, 0, 4, 2),
        kv_shape=ints(0, 0, 2, 2), k_wide=ints(2, 2, 2, 2, 5), k_shape=ints(2, 4, 2, 5),
        v_wide=ints(2, 2, 2, 5, 2), v_shape=ints(2, 4, 5, 2), joined=ints(0, 0, 8),
    )  # fmt: skip
    model = graphs.graph(text, given)
    found = group(model, "q")
    assert found.kind == "head" and found.units == 2
    assert layout(found) == {
        "wq@1": blocks(2, 4),
        "wk@1": blocks(2, 2),
        "wv@1": blocks(2, 2),
        "wo@0": blocks(2, 4),
    }
    before, after = cut_one(model, found, x=graphs.feed(2, 5, 6))
    assert before == after


def test_queries_keys_and_values_of_one_matrix_share_their_heads():
    check(
        f"""g ({TOKENS}) => (float[2, 5, 6] y) {{
            [qkv] a = MatMul (x, w)
            r = Reshape (a, shape)
            t = Transpose <perm = [2, 0, 3, 1, 4]> (r)
            q = Gather (t, i0)
            k0 = Gather (t, i1)
            v = Gather (t, i2)
            k = Transpose <perm = [0, 1, 3, 2]> (k0)
            s = MatMul (q, k)
            p = Softmax (s)
            m = MatMul (p, v)
            u = Transpose <perm = [0, 2, 1, 3]> (m)
            f = Reshape (u, joined)
            y = MatMul (f, wo)
        }}""",
        weights(w=(6, 18), wo=(6, 6), shape=ints(0, 0, 3, 2, 3), joined=ints(0, 0, -1),
                i0=np.int64(0), i1=np.int64(1), i2=np.int64(2)),
        "qkv",
        {
            "w@1": [[0, 1, 2, 6, 7, 8, 12, 13, 14], [3, 4, 5, 9, 10, 11, 15, 16, 17]],
            "wo@0": blocks(2, 3),
        },
        kind="head",
        numbers={("r", 1, 3): (2, each(2))},
        x=graphs.feed(2, 5, 6),
    )  # fmt: skip


def test_a_gated_layer_cuts_gate_and_value_together():
    check(
        f"""g ({TOKENS}) => (float[2, 5, 6] y) {{
            [gate] a = MatMul (x, wg)
            s = Sigmoid (a)
            m0 = Mul (a, s)
            [up] b = MatMul (x, wu)
            m = Mul (m0, b)
            y = MatMul (m, wd)
        }}""",
        weights(wg=(6, 4), wu=(6, 4), wd=(4, 6)),
        "gate",
        {"wg@1": each(4), "wu@1": each(4), "wd@0": each(4)},
        kind="hidden",
        x=graphs.feed(2, 5, 6),
    )


def test_the_width_of_an_embedding_can_go():
    model = graphs.graph(
        """g (int64[3] ids) => (float[3, 2] y) {
            [embed] e = Gather (table, ids)
            y = Gemm <transB = 1> (e, w)
        }""",
        weights(table=(7, 4), w=(2, 4)),
    )
    found = group(model, "embed")
    assert layout(found) == {"table@1": each(4), "w@1": each(4)}
    before, after = cut_one(model, found, ids=ints(1, 0, 6))
    assert before == after


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_a_hidden_unit_is_a_position_of_every_gate_in_both_directions(kind, gates):
    hidden = 3
    model = graphs.graph(
        f"""g (float[5, 1, 6] x) => (float[5, 1, 2] y) {{
            [cell] a = {kind} <hidden_size = 3, direction = "bidirectional"> (x, w, r, b, , h)
            t = Transpose <perm = [0, 2, 1, 3]> (a)
            f = Reshape (t, shape)
            y = MatMul (f, v)
        }}""",
        weights(
            w=(2, gates * hidden, 6), r=(2, gates * hidden, hidden), b=(2, 2 * gates * hidden),
            h=(2, 1, hidden), v=(2 * hidden, 2), shape=ints(0, 0, 6),
        ),
    )  # fmt: skip
    found = group(model, "cell")

    def strided(count):
        return [[hidden * g + i for g in range(count)] for i in range(hidden)]

    assert found.kind == "hidden"
    assert layout(found) == {
        "w@1": strided(gates),
        "r@1": strided(gates),
        "r@2": each(hidden),
        "b@1": strided(2 * gates),
        "h@2": each(hidden),
        "v@0": strided(2),
    }
    assert lengths(found) == {
        ("a", "hidden_size", 0): (3, each(3)),
        ("f", 1, 2): (6, strided(2)),
    }
    before, after = cut_one(model, found, x=graphs.feed(5, 1, 6))
    assert before == after


def test_sizes_shared_by_two_layers_are_copied_before_they_change():
    """Both Reshapes read one computed list of sizes; only the first layer's heads go."""
    model = graphs.graph(
        """g (float[batch, 6] x) => (float[batch, 4] y, float[batch, 4] z) {
            n = Shape <end = 1> (x)
            sizes = Concat <axis = 0> (n, heads, width)
            [a] a0 = MatMul (x, wa)
            a1 = Reshape (a0, sizes)
            a2 = Relu (a1)
            a3 = Flatten (a2)
            y = MatMul (a3, va)
            [b] b0 = MatMul (x, wb)
            b1 = Reshape (b0, sizes)
            b2 = Relu (b1)
            b3 = Flatten (b2)
            z = MatMul (b3, vb)
        }""",
        weights(wa=(6, 8), va=(8, 4), wb=(6, 8), vb=(8, 4), heads=ints(4), width=ints(2)),
    )
    found = group(model, "a")
    assert lengths(found) == {("a1", 1, 1, 0): (4, each(4))}
    before, after = cut_one(model, found, x=graphs.feed(3, 6))
    assert before == after
    assert model.graph.initializers["wb"].const_value.shape == (6, 8)
    assert sorted(graphs.operators(model)).count("Concat") == 2


def test_a_mean_over_units_is_told():
    model, feeds = graphs.transformer()
    stream = group(model, "embed")
    assert "LayerNormalization takes its mean over them" in stream.mixed
    before, after = cut_one(model, stream, **feeds)
    assert before == after
