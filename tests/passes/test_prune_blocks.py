"""How many blocks go and which, what is measured for that, and the plan."""

import json

import graphs
import numpy as np
import onnx_ir as ir
import pytest
import residual_graphs

from edgec.passes import PassError, PruneBlocks
from edgec.passes.block_importance import block_importance, mean_cosine, output_error
from edgec.passes.execution import graph_bytes
from edgec.passes.residual_blocks import find_blocks

STRENGTHS = (1.0, 0.1, 2.0, 0.01, 0.5)  # of the blocks of tower()


def tower(strengths=STRENGTHS):
    """Blocks of one layer, the last matrix of which is scaled; the fourth matters least."""
    lines = [
        f"m{i} = MatMul (s{i}, w{name}) [block{i}] s{i + 1} = Add (s{i}, m{i})"
        for i, name in enumerate("abcde")
    ]
    text = " ".join(["s0 = Relu (x)", *lines, "y = Relu (s5)"])
    scaled = {
        f"w{name}": graphs.weight(16, 16, seed=i) * np.float32(strength)
        for i, (name, strength) in enumerate(zip("abcde", strengths, strict=True))
    }
    return residual_graphs.custom(text, **scaled)


class Samples:
    def __init__(self, feeds):
        self.feeds = feeds

    def __iter__(self):
        return iter(self.feeds)

    def __len__(self):
        return len(self.feeds)


def context(model, *, feeds=None, **rest):
    feeds = feeds or [{"x": graphs.feed(2, 5, 16, seed=seed)} for seed in range(3)]
    return graphs.context(model, calibration=Samples(feeds), **rest)


def pruned(model=None, **parameters):
    model = model or tower()
    return PruneBlocks(**parameters).run(model, context(model))


def removed(result):
    return [entry["name"] for entry in result.decisions["blocks"] if entry["removed"]]


@pytest.mark.parametrize("how", ["output", "similarity"])
@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"ratio": 0.25}, ["block3"]),
        ({"ratio": 0.4}, ["block1", "block3"]),
        ({"ratio": 0.59}, ["block1", "block3"]),
        ({"blocks": 3}, ["block1", "block3", "block4"]),
        ({"blocks": 5}, ["block0", "block1", "block2", "block3", "block4"]),
    ],
)
def test_the_blocks_that_matter_least_go(parameters, expected, how):
    result = pruned(importance=how, **parameters)
    assert removed(result) == expected and result.changed == len(expected)
    assert graphs.operators(result.model).count("MatMul") == 5 - len(expected)


def test_importance_by_output_is_the_error_of_the_model_without_the_block():
    model, feeds = residual_graphs.pre_norm()
    blocks = find_blocks(model).found
    scores = block_importance(blocks, model, context(model, feeds=[feeds]), "output")
    [expected] = graphs.run(model, **feeds)
    for block in blocks:
        [actual] = graphs.run(residual_graphs.silenced(model, block), **feeds)
        error = np.square(actual - expected).sum() / np.square(expected).sum()
        np.testing.assert_allclose(scores[block.result], error, rtol=1e-4)  # float32 outputs


def test_importance_by_similarity_is_one_minus_the_cosine_at_each_position():
    model, feeds = residual_graphs.pre_norm()
    blocks = find_blocks(model).found
    scores = block_importance(blocks, model, context(model, feeds=[feeds]), "similarity")
    before = feeds["x"].reshape(10, 16)
    [after] = graphs.run(with_output(model, "r1"), **feeds)
    after = after.reshape(10, 16)
    pairs = zip(before, after, strict=True)
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
    np.testing.assert_allclose(scores["r1"], 1 - np.mean(cosines), rtol=1e-4)


def with_output(model, name):
    clone = model.clone()
    clone.graph.outputs[:] = [v for n in clone.graph for v in n.outputs if v.name == name]
    return clone


def test_the_stream_of_an_image_is_compared_along_its_channels():
    model, feeds = residual_graphs.inverted()
    blocks = find_blocks(model).found
    scores = block_importance(blocks, model, context(model, feeds=[feeds]), "similarity")
    [after] = graphs.run(with_output(model, "r1"), **feeds)
    expected = 1 - mean_cosine(np.moveaxis(feeds["x"], 1, -1), np.moveaxis(after, 1, -1), -1)
    np.testing.assert_allclose(scores["r1"], expected, rtol=1e-4)


def test_the_cosine_of_nothing_and_nothing_is_one():
    zero, one = np.zeros((1, 3), np.float32), np.ones((1, 3), np.float32)
    assert mean_cosine(zero, zero, -1) == 1 and mean_cosine(zero, one, -1) == 0
    assert mean_cosine(one, -one, -1) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        ([np.float32([3, 4])], [np.float32([3, 4])], 0.0),
        ([np.float32([3, 4])], [np.float32([0, 4])], 9 / 25),
        ([np.float32([3, -np.inf])], [np.float32([0, -np.inf])], 1.0),
        ([np.float32([3, 4])], [np.float32([np.nan, 4])], 1e30),
        # integers count only where there are no floats
        ([np.float32([3, 4]), np.int64([1])], [np.float32([3, 4]), np.int64([2])], 0.0),
        ([np.int64([1, 2, 3, 4])], [np.int64([1, 2, 3, 5])], 0.25),
        ([np.float32([1]), np.float32([2])], [np.float32([0]), np.float32([2])], 0.5),
    ],
)
def test_the_error_of_outputs(expected, actual, error):
    assert output_error([expected], [actual]) == pytest.approx(error)


def test_a_block_that_adds_nothing_changes_no_output():
    model = tower((1, 1, 0, 1, 1))
    result = pruned(model.clone(), blocks=1)
    assert removed(result) == ["block2"]
    assert result.decisions["blocks"][2]["importance"] == 0
    x = graphs.feed(2, 5, 16)
    before, after = (graphs.run(m, optimized=False, x=x)[0] for m in (model, result.model))
    np.testing.assert_array_equal(after, before)


def test_among_equals_the_last_goes_first():
    assert removed(pruned(tower((0, 0, 0, 0, 0)), blocks=2)) == ["block3", "block4"]


@pytest.mark.parametrize("how", ["output", "similarity"])
def test_a_second_run_changes_nothing_and_a_larger_share_goes_on(how):
    model = tower()
    given = context(model)
    first = PruneBlocks(ratio=0.4, importance=how).run(model.clone(), given)
    before = graph_bytes(first.model)
    again = PruneBlocks(ratio=0.4, importance=how).run(first.model, given)
    assert (again.changed, graph_bytes(again.model)) == (0, before)
    assert again.findings == ("no residual block goes: 2 of 5 may, 2 went before",)
    more = PruneBlocks(blocks=4, importance=how).run(first.model, given)
    assert more.changed == 2 and graphs.operators(more.model).count("MatMul") == 1


def test_a_block_that_becomes_free_when_another_went_is_not_taken_for_it():
    """The first one makes a value that the second reads, as T5's first attention does."""
    model = residual_graphs.custom(
        """e = MatMul (x, wa) [first] r = Add (x, e)
        f = MatMul (r, wb) g = Mul (f, e) [second] s = Add (r, g)
        h = MatMul (s, wc) [third] t = Add (s, h)
        y = Relu (t)""",
        wc=graphs.weight(16, 16) * 10,
    )
    given = context(model)
    once = PruneBlocks(ratio=0.5).run(model.clone(), given)
    assert removed(once) == ["second"]
    assert [block.name for block in find_blocks(once.model).found] == ["first", "third"]
    assert PruneBlocks(ratio=0.5).run(once.model, given).changed == 0


def test_the_reference_may_hide_its_weights_behind_nodes_that_rename():
    model = tower()
    reference = model.clone()
    weight = reference.graph.initializers["wa"]
    node = ir.node("Identity", [weight])
    node.outputs[0].name = "renamed"
    reference.graph.insert_before(reference.graph[0], node)
    ir.convenience.replace_all_uses_with(weight, node.outputs[0])
    node.replace_input_with(0, weight)
    first = pruned(model, blocks=2).model
    again = PruneBlocks(blocks=2).run(first, context(reference))
    assert again.changed == 0


def test_less_than_one_block_is_none_and_the_report_says_so():
    result = pruned(ratio=0.19)
    assert (result.changed, removed(result)) == (0, [])
    assert result.findings == ("no residual block goes: 0 of 5 may, 0 went before",)


def test_a_block_around_others_counts_with_them():
    model, feeds = residual_graphs.nested()
    # the outer branch is worth next to nothing, the inner one much of it
    for name in ("wb", "wa"):
        value = model.graph.initializers[name]
        scale = np.float32(1e-3 if name == "wa" else 1)
        value.const_value = ir.tensor(value.const_value.numpy() * scale, name=name)
    one = PruneBlocks(blocks=1).run(model.clone(), context(model, feeds=[feeds]))
    both = PruneBlocks(blocks=2).run(model.clone(), context(model, feeds=[feeds]))
    assert removed(one) == ["inner"] and removed(both) == ["inner", "outer"]
    assert both.changed == 2 and graphs.operators(both.model) == ["MatMul"]


def test_a_model_without_residual_blocks_needs_no_data_and_is_left_alone():
    model, _ = graphs.mlp()
    result = PruneBlocks().run(model, graphs.context(model))
    assert (result.changed, result.findings, result.skipped) == (0, (), ())


@pytest.mark.parametrize("data", [None, Samples([])])
def test_without_data_there_is_no_choice(data):
    model = tower()
    with pytest.raises(PassError, match="needs calibration data .* or --plan with the lock file"):
        PruneBlocks().run(model, graphs.context(model, calibration=data))


def test_a_named_node_keeps_its_block():
    model, feeds = residual_graphs.nested()
    result = PruneBlocks(blocks=2, skip=("deep",)).run(model, context(model, feeds=[feeds]))
    assert result.changed == 0
    assert {(s.node, s.reason) for s in result.skipped} == {
        ("inner", "'deep' is named in skip"),
        ("outer", "'deep' is named in skip"),
    }
    with pytest.raises(PassError, match="skip names 'block9', no node of the model"):
        pruned(skip=("block9",))


def test_branches_that_cannot_go_are_reported():
    model = residual_graphs.custom(
        "e = MatMul (x, wa) [sum] r = Add (x, e) y = Mul (r, e)",
    )
    [skip] = pruned(model).skipped
    assert skip.node == "sum" and "is read by" in skip.reason


@pytest.mark.parametrize(
    ("how", "reason"),
    [("output", "the outputs have other shapes"), ("similarity", "are of different shapes")],
)
def test_a_block_whose_sides_turn_out_to_differ_stays(how, reason):
    model = graphs.graph(
        """net (float[a, 16] x) => (float[b, 16] y) {
            [grow] g = MatMul (w, x)
            [sum] y = Add (x, g)
        }""",
        {"w": graphs.weight(3, 1)},
    )
    given = context(model, feeds=[{"x": graphs.feed(1, 16)}])
    result = PruneBlocks(blocks=1, importance=how).run(model, given)
    assert result.changed == 0 and reason in result.skipped[0].reason


def test_the_report_says_how_many_blocks_and_weights_went():
    result = pruned(blocks=2)
    assert result.findings == (
        "2 of 5 residual blocks are gone: 1280 numbers in weights became 768 (60.0%)",
    )
    assert set(result.touched) == {"m2", "s3", "m4", "s5"}


def test_the_plan_removes_the_same_blocks_from_a_retrained_model_without_data():
    plan = json.loads(json.dumps(dict(pruned(blocks=2).decisions)))
    assert plan["blocks"][1] == {
        "name": "block1",
        "result": "s2",
        "shortcut": "s1",
        "nodes": 2,
        "weights": 256,
        "importance": plan["blocks"][1]["importance"],
        "removed": True,
    }
    retrained = tower((0.01, 3, 0.01, 3, 0.01))
    # other parameters than those of the plan: the plan counts
    result = PruneBlocks(blocks=4).run(retrained, graphs.context(retrained, lock=plan))
    assert removed(result) == ["block1", "block3"] and result.decisions == plan
    assert set(result.model.graph.initializers) == {"wa", "wc", "we"}


def test_a_plan_that_removes_a_node_named_in_skip_is_refused():
    model, plan = tower(), dict(pruned(blocks=2).decisions)
    context = graphs.context(model, lock=plan)
    with pytest.raises(PassError, match="removes block 'block1', but 'block1' is named in skip"):
        PruneBlocks(skip=("block1",)).run(model.clone(), context)
    assert PruneBlocks(skip=("block0",)).run(model.clone(), context).decisions == plan


def entry(**changes):
    known = {"name": "block0", "result": "s1", "shortcut": "s0", "nodes": 2, "weights": 256}
    return known | {"removed": True} | changes


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([entry(result="s9")], "has a residual block 'block0' of 2 nodes and 256 weights, which"),
        ([entry(weights=512)], "made for another architecture"),
        ([entry(nodes=3)], "made for another architecture"),
        ([entry(shortcut="x")], "made for another architecture"),
        ([entry(shortcut="x", removed=False)], "made for another architecture"),
        ([{"name": "block0"}], r"blocks\[0\] \('block0'\) has no result, expected a text"),
        ([entry(result=[])], r"result is \[\], expected a text"),
        ([entry(removed="no")], "removed is 'no', expected true or false"),
        ([entry(nodes=2.5)], "nodes is 2.5, expected a whole number, 0 or more"),
        ([entry(), entry()], "it stands there twice, expected another result for each"),
        (7, "the pruning plan: blocks is 7, expected a list"),
    ],
)
def test_a_plan_for_another_model_or_a_damaged_one_is_refused(blocks, message):
    model = tower()
    with pytest.raises(PassError, match=message):
        PruneBlocks().run(model, graphs.context(model, lock={"blocks": blocks}))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"ratio": 0.0}, "ratio is 0.0, expected a share above 0 and below 1"),
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"blocks": -1}, "blocks is -1, expected 0 or more"),
        ({"importance": "outputs"}, "importance has no 'outputs', did you mean 'output'"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters, message):
    with pytest.raises(PassError, match=message):
        PruneBlocks(**parameters)


def test_more_blocks_than_there_are_is_an_error():
    with pytest.raises(PassError, match="blocks is 6, but only 5 residual blocks"):
        pruned(blocks=6)
