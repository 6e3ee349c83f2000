"""Which branches are found, which are refused and why, and what a model is without one."""

import graphs
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import residual_graphs
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec.passes.cleanup_shapes import refresh_shapes
from edgec.passes.execution import graph_bytes
from edgec.passes.residual_blocks import find_blocks, remove_blocks


def names(model):
    blocks = find_blocks(model)
    return [b.name for b in blocks.found], {s.node: s.reason for s in blocks.skipped}


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("pre-norm", ["attention", "feed_forward"]),
        ("post-norm", ["first", "second"]),
        ("nested", ["inner", "outer"]),
        ("inverted", ["inverted", "bottleneck"]),
    ],
)
def test_branches_are_found_and_nothing_else_is_looked_at(network, expected):
    model, _ = residual_graphs.NETWORKS[network]()
    assert names(model) == (expected, {})


def test_a_block_knows_its_shortcut_its_nodes_and_its_weights():
    [attention, feed_forward] = find_blocks(residual_graphs.pre_norm()[0]).found
    assert (attention.shortcut, feed_forward.shortcut) == ("x", "r1")
    # the four matrices and the mask; scale and shift of the norm are the other block's, too
    assert attention.weights == 4 * 256 + 5
    assert set(feed_forward.values) == {"n2", "hidden", "active", "fed", "r2"}
    assert feed_forward.nodes[1:] == ("up", "Gelu -> active", "down", "feed_forward")


def test_the_block_around_another_one_takes_it_along():
    inner, outer = find_blocks(residual_graphs.nested()[0]).found
    assert inner.values < outer.values and outer.weights == 2 * inner.weights


NOT_BLOCKS = {
    "an activation": "p = Pow (x, three) y = Add (x, p)",
    "an embedding of positions": "e = MatMul (x, wa) f = MatMul (x, wb) y = Add (e, f)",
    "a bias": "e = MatMul (x, wa) y = Add (e, three)",
    "the same twice": "e = MatMul (x, wa) y = Add (e, e)",
    "a product": "e = MatMul (x, wa) y = Mul (x, e)",
}


@pytest.mark.parametrize("kind", NOT_BLOCKS)
def test_a_sum_that_is_no_residual_branch_is_passed_over(kind):
    model = residual_graphs.custom(NOT_BLOCKS[kind], three=np.float32(3))
    assert names(model) == ([], {})


REFUSED = {
    "read from outside": (
        "e = MatMul (x, wa) f = MatMul (e, wb) [sum] r = Add (x, f) [late] y = Mul (r, e)",
        "its value 'e' is read by 'late', which stays",
    ),
    "its end read from outside": (
        "e = MatMul (x, wa) [sum] r = Add (x, e) [late] y = Mul (r, e)",
        "its value 'e' is read by 'late', which stays",
    ),
    "read within a branch of If": (
        """e = MatMul (x, wa) f = MatMul (e, wb) [sum] r = Add (x, f)
        z = If (flag) <then_branch = t () => (float[2, 5, 16] u) { [late] u = Identity (e) },
                       else_branch = o () => (float[2, 5, 16] v) { v = Identity (x) }>
        y = Add (z, r)""",
        "its value 'e' is read by 'late', which stays",
    ),
    "control flow": (
        """e = MatMul (x, wa)
        [choice] f = If (flag) <
            then_branch = t () => (float[2, 5, 16] u) { u = MatMul (e, wb) },
            else_branch = o () => (float[2, 5, 16] v) { v = Identity (e) }>
        [sum] y = Add (x, f)""",
        "it contains control flow: 'choice'",
    ),
    "control flow beside it": (
        """[choice] f = If (flag) <
            then_branch = t () => (float[16, 16] u) { u = Identity (wa) },
            else_branch = o () => (float[16, 16] v) { v = Identity (wb) }>
        e = MatMul (x, wc)
        g = MatMul (e, f)
        [sum] y = Add (x, g)""",
        "it contains control flow: 'choice'",
    ),
    "other shapes": (
        """m = ReduceMean (x, one) e = MatMul (m, wa) [sum] y = Add (x, e)""",
        "its sides are of different shapes",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_branch_that_cannot_go_is_refused_with_the_reason(kind):
    lines, reason = REFUSED[kind]
    model = residual_graphs.custom(lines, ", bool flag", one=np.array([1], np.int64))
    refresh_shapes(model)
    found, skipped = names(model)
    assert found == [] and reason in skipped["sum"]


def test_an_output_of_the_model_within_a_branch_keeps_it():
    model, _ = residual_graphs.pre_norm(outputs=", float[2, 5, 16] key")
    found, skipped = names(model)
    assert found == ["feed_forward"]
    assert skipped == {"attention": "its value 'key' is an output of the model"}


def test_sizes_of_the_shortcut_may_be_used_elsewhere():
    model = residual_graphs.custom(
        """size = Shape (x)
        e = MatMul (x, wa)
        f = Reshape (e, size)
        [sum] r = Add (x, f)
        g = MatMul (r, wb)
        y = Reshape (g, size)"""
    )
    assert names(model) == (["sum"], {})


def without(model, *chosen):
    """A clone without these blocks, and what was touched."""
    clone = model.clone()
    blocks = [b for b in find_blocks(clone).found if b.name in chosen or not chosen]
    return clone, remove_blocks(clone, blocks)


def checked(model):
    onnx.checker.check_model(onnx.load_from_string(graph_bytes(model)), full_check=True)
    return model


@pytest.mark.parametrize("network", residual_graphs.NETWORKS)
def test_without_a_block_the_model_is_what_it_is_with_a_branch_times_zero(network):
    model, feeds = residual_graphs.NETWORKS[network]()
    for block in find_blocks(model).found:
        [expected] = graphs.run(residual_graphs.silenced(model, block), optimized=False, **feeds)
        small, _ = without(model, block.name)
        [actual] = graphs.run(checked(small), optimized=False, **feeds)
        np.testing.assert_array_equal(actual, expected)
        assert not np.array_equal(actual, graphs.run(model, optimized=False, **feeds)[0])


@pytest.mark.parametrize("network", residual_graphs.NETWORKS)
def test_all_nodes_and_weights_of_a_block_go_and_the_others_keep_their_names(network):
    model, _ = residual_graphs.NETWORKS[network]()
    for block in find_blocks(model).found:
        small, touched = without(model, block.name)
        here = {v.name for node in small.graph for v in node.outputs}
        before = {v.name for node in model.graph for v in node.outputs}
        assert here == before - block.values
        sizes = [
            sum(v.const_value.size for v in m.graph.initializers.values()) for m in (model, small)
        ]
        assert sizes[0] - sizes[1] == block.weights
        assert set(touched) <= here and touched


def test_all_blocks_at_once_leave_what_stands_between_them():
    small, touched = without(residual_graphs.post_norm()[0])
    # the mask has no reader any more
    assert graphs.operators(small) == ["LayerNormalization", "LayerNormalization"]
    assert set(touched) == {"n1", "y"}
    assert set(small.graph.initializers) == {"scale", "shift"}
    assert [v.name for v in small.graph.inputs] == ["x", "mask"]


def test_a_block_goes_with_the_one_around_it():
    small, touched = without(residual_graphs.nested()[0])
    assert graphs.operators(small) == ["MatMul"] and touched == ("y",)


def test_a_sum_that_is_an_output_keeps_its_name_and_its_shape():
    model = residual_graphs.custom("e = MatMul (x, wa) [sum] y = Add (e, x)")
    small, touched = without(model)
    assert graphs.operators(checked(small)) == ["Identity"]
    assert touched == ("y",) and [v.name for v in small.graph.outputs] == ["y"]
    x = graphs.feed(2, 5, 16)
    np.testing.assert_array_equal(graphs.run(small, x=x)[0], x)


def test_a_weight_that_another_layer_reads_stays():
    model = residual_graphs.custom("e = MatMul (x, wa) [sum] r = Add (x, e) y = MatMul (r, wa)")
    [block] = find_blocks(model).found
    small, _ = without(model)
    assert block.weights == 0 and set(small.graph.initializers) == {"wa"}


def test_a_zero_in_the_last_layer_makes_the_block_worthless():
    model, feeds = residual_graphs.inverted()
    model.graph.initializers["k5"].const_value = ir.tensor(np.zeros((8, 16, 1, 1), np.float32))
    small, _ = without(model, "inverted")
    expected, actual = (graphs.run(m, optimized=False, **feeds)[0] for m in (model, small))
    np.testing.assert_array_equal(actual, expected)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_random_networks_without_a_block_are_those_with_its_branch_times_zero(seed):
    model = residual_graphs.random_network(seed)
    x = graphs.feed(2, 5, 16)
    blocks = find_blocks(model).found
    for block in blocks:
        [expected] = graphs.run(residual_graphs.silenced(model, block), optimized=False, x=x)
        small, _ = without(model, block.name)
        np.testing.assert_array_equal(graphs.run(checked(small), optimized=False, x=x)[0], expected)
    small, _ = without(model)
    assert np.isfinite(graphs.run(checked(small), x=x)[0]).all()
    assert not {b.result for b in blocks} & {v.name for n in small.graph for v in n.outputs} - {"y"}
