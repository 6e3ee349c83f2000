"""Which axes cannot be cut, with the reason, one case an operator or idiom."""

import graphs
import numpy as np
import pytest
from coupled_axes import IMAGE, check, each, ints, weights

from edgec.passes.dimension_groups import coupled_groups


def reasons(text, given):
    return {skip.node: skip.reason for skip in coupled_groups(graphs.graph(text, given)).skipped}


REFUSED = {
    "s = Softmax <axis = 1> (c)": "Softmax: it takes this axis as a whole",
    "s = ReduceMax <keepdims = 1> (c, one)": "ReduceMax: it reduces this axis",
    "s = CumSum (c, axis)": "CumSum: it takes this axis as a whole",
    "s = Gather <axis = 1> (c, order)": "Gather: it picks positions of this axis",
    "s = Slice (c, zero, many, one, two)": "Slice: it takes positions that are computed",
    "s = Pad (c, pads)": "Pad: it adds positions",
    "s = EyeLike (c)": "EyeLike: it is not followed",
    "s = LRN <size = 3> (c)": "LRN: it is not followed",
    """d = Shape (c)
       e = Gather (d, axis)
       f = Cast <to = 1> (e)
       s = Mul (c, f)""": "Mul: its length is calculated with",
    """d = Shape <start = 1, end = 2> (c)
       e = Div (d, two)
       s = Slice (c, zero, e, one)""": "Div: its length is calculated with",
    """t = Less (number, number)
       s = If (t) <
           then_branch = a () => (u) { u = Relu (c) },
           else_branch = b () => (v) { v = Neg (c) }>""": "a branch or loop returns it ('If",
}


@pytest.mark.parametrize("line", REFUSED, ids=lambda line: line.split(" = ")[-1].split()[0])
def test_what_cannot_be_followed_is_refused_with_the_reason(line):
    text = f"""g (float[1, 3, 4, 4] x) => (float[1, 1, 4, 4] y) {{
        [a] c = Conv (x, w)
        {line}
        m = ReduceSum (s, one)
        y = Relu (m)
    }}"""
    given = weights(
        w=(4, 3, 1, 1), one=ints(1), zero=ints(0), two=ints(2), many=ints(9), axis=np.int64(1),
        order=ints(2, 0), pads=ints(0, 1, 0, 0, 0, 0, 0, 0), number=np.float32(1),
    )  # fmt: skip
    assert REFUSED[line] in reasons(text, given)["a"]


NUMBERS = {  # q: a number that is another one where h has fewer columns; the node that takes it
    "half of a width": ("n = Gather (sizes, i1) q = Div (n, two)", "Div"),
    "a product of sizes": ("q = ReduceProd <keepdims = 0> (sizes)", "ReduceProd"),
    "the number of elements": ("q = Size (h)", "Size"),
    "a computed choice": ("n = Gather (sizes, i) q = Squeeze (n)", "Gather"),
    "a comparison": ("n = Gather (sizes, i1) l = Less (two, n) q = Cast <to = 7> (l)", "Less"),
    "a count": ("n = Gather (sizes, i1) r = Range (i0, n, two) q = ReduceMax <keepdims = 0> (r)",
                "Range"),
    "a part of a table": ("""n = Gather (sizes, one) t = Slice (table, zero, n)
                             q = ReduceMax <keepdims = 0> (t)""", "Slice"),
    "a part of all sizes": ("n, m = Split (sizes, ones) q = Squeeze (m)", "Split"),
    "a choice of sizes": ("""e = Equal (sizes, zero) o = Where (e, ones, sizes)
                             q = Gather (o, i1)""", "Equal"),
    "repeats": ("n = Gather (sizes, one) t = Tile (zero, n) q = Size (t)", "Tile"),
    "a picked row": ("n = Gather (sizes, i1) q = Gather (table, n)", "Gather"),
    "a loop": ("""n = Gather (sizes, i1)
                  q = Loop (n, , i0) <body = b (int64 i, bool go, int64 a) => (bool on, int64 z) {
                      on = Identity (go) z = Add (a, two) }>""", "Loop"),
}  # fmt: skip


@pytest.mark.parametrize("case", NUMBERS)
def test_a_length_that_is_calculated_with_stays(case):
    lines, taker = NUMBERS[case]
    text = f"""g (float[batch, 6] x, int64[1] i) => (float[batch, 3] y) {{
        [a] h = MatMul (x, w)
        sizes = Shape (h)
        {lines}
        f = Cast <to = 1> (q)
        d = Div (h, f)
        y = MatMul (d, v)
    }}"""
    given = weights(
        w=(6, 16), v=(16, 3), two=np.int64(2), i0=np.int64(0), i1=np.int64(1), one=ints(1),
        zero=ints(0), ones=ints(1, 1), table=np.arange(40),
    )  # fmt: skip
    graphs.run(graphs.graph(text, given), x=graphs.feed(2, 6), i=ints(1))  # a model that runs
    assert f"{taker}: its length is calculated with" in reasons(text, given)["a"]
    assert not coupled_groups(graphs.graph(text, given)).found


def test_a_length_that_a_branch_or_the_model_returns_stays():
    text = """g (float[batch, 6] x) => (float[batch, 3] y, int64[2] n) {
        [a] h = MatMul (x, w)
        y = MatMul (h, v)
        n = Shape (h)
    }"""
    given = weights(w=(6, 16), v=(16, 3))
    assert "it is an output of the model ('n')" in reasons(text, given)["a"]


def test_a_length_that_only_states_a_shape_follows():
    """Of h itself, of what is made beside it, and of a fill of its size."""
    check(
        """g (float[batch, 6] x) => (float[batch, 3] y) {
            [a] h = MatMul (x, w)
            sizes = Shape (h)
            width = Gather (sizes, one)
            wide = Cast <to = 7> (width)
            n = Concat <axis = 0> (most, wide)
            r = Reshape (h, n)
            e = Expand (number, sizes)
            f = ConstantOfShape (sizes)
            s = Sum (r, e, f)
            y = MatMul (s, v)
        }""",
        weights(w=(6, 4), v=(4, 3), one=ints(1), most=ints(-1), number=np.float32([1])),
        "a",
        {"w@1": each(4), "v@0": each(4)},
        kind="hidden",
        x=graphs.feed(2, 6),
    )


@pytest.mark.parametrize(
    ("line", "opset", "stays"),
    [
        ("Softmax", 12, True), ("Softmax <axis = -2>", 12, False), ("Softmax", 13, False),
        ("LogSoftmax", 11, True), ("Hardmax", 11, True), ("Hardmax <axis = 3>", 11, False),
    ],
)  # fmt: skip
def test_what_is_normalised_below_opset_13(line, opset, stays):
    """All axes from the named one on together, by default from the second on."""
    text = f"""g ({IMAGE}) => (float[1, 2, 4, 4] y) {{
        [a] c = Conv (x, w)
        s = {line} (c)
        y = Conv (s, v)
    }}"""
    model = graphs.graph(text, weights(w=(4, 3, 1, 1), v=(2, 4, 1, 1)), opset)
    assert (coupled_groups(model).found == ()) == stays


def test_the_greatest_of_a_batch_leaves_the_channels_alone():
    """ArgMax takes the first axis where none is named."""
    text = """g (float[batch, 6] x) => (float[1, 3] y) {
        [a] h = MatMul (x, w)
        m = ArgMax (h)
        f = Cast <to = 1> (m)
        y = MatMul (f, v)
    }"""
    given = weights(w=(6, 4), v=(4, 3))
    check(text, given, "a", {"w@1": each(4), "v@0": each(4)}, kind="hidden", x=graphs.feed(2, 6))


def test_a_value_of_an_input_or_output_stays():
    text = """g (float[1, 4, 4, 4] x) => (float[1, 4, 4, 4] y) {
        [a] c = Conv (x, w)
        y = Add (c, x)
    }"""
    assert "it is an input of the model ('x')" in reasons(text, weights(w=(4, 4, 1, 1)))["a"]
