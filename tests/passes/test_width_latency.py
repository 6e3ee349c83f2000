"""What is counted of a model at other widths, and with which sizes."""

import graphs
import numpy as np
import pytest

from edgec.passes import PassError
from edgec.passes.dimension_groups import coupled_groups
from edgec.passes.latency_table import LatencyTable
from edgec.passes.width_latency import WidthLatency
from edgec.targets import load_target

TARGET = load_target("x86-64")
RESIDUAL = """g (float[1, 3, 6, 6] x) => (float[1, 4] y) {
    [a] c = Conv (x, a)
    n = Relu (c)
    [d] m = Conv <group = 8, pads = [1, 1, 1, 1]> (n, d)
    h = HardSwish (m)
    [b] e = Conv (h, b)
    s = Add (e, n)
    r = Relu (s)
    p = GlobalAveragePool (r)
    f = Reshape (p, flat)
    [z] y = Gemm <transB = 1> (f, z)
}"""


def residual(channels=3):
    weights = {
        "a": graphs.weight(8, channels, 1, 1),
        "d": graphs.weight(8, 1, 3, 3, seed=1),
        "b": graphs.weight(8, 8, 1, 1, seed=2),
        "z": graphs.weight(4, 8, seed=3),
        "flat": np.array([1, 8]),
    }
    text = RESIDUAL.replace("[1, 3, 6, 6]", f"[1, {channels}, 6, 6]")
    return graphs.graph(text, weights), {"x": graphs.feed(1, channels, 6, 6)}


class Clock:
    """Notes the operators; each takes as many milliseconds as its operands have numbers."""

    def __init__(self, unknown=()):
        self.seen, self.unknown = [], unknown

    def __call__(self, asked, settings):
        self.seen += asked
        return [
            None
            if one.op_type in self.unknown
            else float(sum(np.prod(o.shape) for o in one.operands if o is not None))
            for one in asked
        ]

    def shapes(self):
        return [(one.op_type, *(o and o.shape for o in one.operands)) for one in self.seen]


def predictor(model, feeds, clock, integers=None):
    table = LatencyTable(TARGET.session, None, clock)
    return WidthLatency(model, coupled_groups(model).found, feeds, table, integers)


def test_sizes_follow_the_widths():
    clock = Clock()
    widths = predictor(*residual(), clock)
    widths.milliseconds([(None, {"a": 3})])
    assert clock.shapes() == [
        ("Conv", (1, 3, 6, 6), (5, 3, 1, 1)),
        ("Conv", (1, 5, 6, 6), (5, 1, 3, 3)),
        ("HardSwish", (1, 5, 6, 6)),
        ("Conv", (1, 5, 6, 6), (5, 5, 1, 1)),
        ("GlobalAveragePool", (1, 5, 6, 6)),
        ("Gemm", (1, 5), (4, 5)),
    ]
    assert [one.attributes["group"].as_int() for one in clock.seen[1:2]] == [5]


def test_a_wider_model_can_be_asked_for():
    clock = Clock()
    predictor(*residual(), clock).milliseconds([(None, {"a": -8})])
    assert clock.shapes()[1] == ("Conv", (1, 16, 6, 6), (16, 1, 3, 3))


def test_quantized_layers_hold_their_activations_and_sums_count():
    clock = Clock()
    predictor(*residual(8), clock, TARGET.int8).milliseconds([(None, {})])
    forms = [(one.op_type, one.integers is not None) for one in clock.seen]
    assert ("Add", True) in forms and ("Gemm", True) in forms
    assert ("Relu", True) not in forms


def two_groups():
    model = graphs.graph(
        """g (float[2, 6] x) => (float[2, 4] y) {
            [a] c = Gemm <transB = 1> (x, w)
            [b] d = Gemm <transB = 1> (c, k)
            y = Gemm <transB = 1> (d, v)
        }""",
        {
            "w": graphs.weight(8, 6),
            "k": graphs.weight(10, 8, seed=1),
            "v": graphs.weight(4, 10, seed=2),
        },
    )
    return model, {"x": graphs.feed(2, 6)}


def test_a_group_is_asked_for_what_its_width_is_in():
    widths = predictor(*two_groups(), Clock())
    first = (2 * 6 + 8 * 6) + (2 * 8 + 10 * 8)
    second = (2 * 8 + 10 * 8) + (2 * 10 + 4 * 10)
    assert widths.milliseconds([("a", {}), ("b", {}), (None, {})]) == [
        first,
        second,
        first + (2 * 10 + 4 * 10),
    ]
    # between the two the layer has both widths
    [narrow] = widths.milliseconds([("b", {"a": 2, "b": 5})])
    assert narrow == (2 * 6 + 5 * 6) + (2 * 5 + 4 * 5)


def test_nothing_is_measured_twice():
    clock = Clock()
    widths = predictor(*two_groups(), clock)
    widths.milliseconds([("a", {"a": 2}), ("a", {"a": 2, "b": 0})])
    widths.milliseconds([("a", {"a": 2})])
    assert len(clock.seen) == 2


def test_numbers_that_state_sizes_follow():
    model = graphs.graph(
        """g (float[5, 2, 6] x) => (float[5, 1, 2, 3] y) {
            [a] h, last = LSTM <hidden_size = 8> (x, w, r)
            [b] y = MatMul (h, v)
        }""",
        {
            "w": graphs.weight(1, 32, 6),
            "r": graphs.weight(1, 32, 8, seed=1),
            "v": graphs.weight(8, 3, seed=2),
        },
    )
    clock = Clock()
    predictor(model, {"x": graphs.feed(5, 2, 6)}, clock).milliseconds([(None, {"a": 2})])
    lstm = clock.seen[0]
    assert lstm.attributes["hidden_size"].as_int() == 6
    assert [operand.shape for operand in lstm.operands] == [(5, 2, 6), (1, 24, 6), (1, 24, 6)]
    assert lstm.outputs == 2


def test_lists_of_sizes_follow():
    model = graphs.graph(
        """g (float[2, 6] x) => (float[2, 3] y) {
            [a] c = Gemm <transB = 1> (x, w)
            one, two = Split <axis = 1> (c, parts)
            s = Mul (one, two)
            y = MatMul (s, v)
        }""",
        {"w": graphs.weight(16, 6), "v": graphs.weight(8, 3), "parts": np.array([8, 8])},
    )
    clock = Clock()
    widths = predictor(model, {"x": graphs.feed(2, 6)}, clock)
    [group] = coupled_groups(model).found
    widths.milliseconds([(None, {group.name: 2})])
    [split] = [one for one in clock.seen if one.op_type == "Split"]
    assert split.operands[1].values.tolist() == [6, 6]
    assert split.operands[0].shape == (2, 12)


def test_what_cannot_be_measured_is_named_and_counts_nothing():
    model, feeds = residual()
    everything = predictor(model, feeds, Clock()).milliseconds([(None, {})])
    widths = predictor(model, feeds, Clock(unknown=("HardSwish",)))
    assert widths.milliseconds([(None, {})]) == [everything[0] - 8 * 36]
    assert list(widths.left_out) == ["HardSwish"]


def test_feeds_that_the_model_refuses_are_an_error():
    model, _ = residual()
    with pytest.raises(PassError, match="cannot run the model on these inputs"):
        predictor(model, {"x": graphs.feed(1, 4, 6, 6)}, Clock())
