"""Magnitude and N:M pruning against numpy by hand."""

import graphs
import numpy as np
import pytest

from edgec.passes import PassError, PruneMagnitude
from edgec.passes.prune_magnitude import prune_groups, prune_unstructured


def weights_of(model, name):
    node = next(n for n in model.graph if n.name == name)
    return node.inputs[1].const_value.numpy()


def test_exact_share_of_the_smallest_weights_is_zero():
    w = graphs.weight(10, 30)
    pruned = prune_unstructured(w, 0.7)
    assert (pruned == 0).sum() == 210
    assert np.abs(w[pruned == 0]).max() <= np.abs(pruned[pruned != 0]).min()
    np.testing.assert_array_equal(pruned[pruned != 0], w[pruned != 0])


@pytest.mark.parametrize("axis", [0, 1])
def test_two_of_every_four_survive_along_the_axis(axis):
    w = graphs.weight(8, 8)
    pruned = prune_groups(w, axis, kept=2, group=4)
    groups = np.moveaxis(pruned, axis, -1).reshape(-1, 4)
    originals = np.moveaxis(w, axis, -1).reshape(-1, 4)
    for group, original in zip(groups, originals, strict=True):
        expected = np.sort(np.abs(original))[2:]
        np.testing.assert_array_equal(np.sort(np.abs(group))[2:], expected)
        assert (group == 0).sum() == 2


def test_pattern_runs_along_the_input_dimension_of_each_operator():
    model, _ = graphs.mlp()
    result = PruneMagnitude(pattern="2:4").run(model, graphs.context(model))
    assert result.changed == 2 and result.touched == ("h", "m")
    transposed, plain = weights_of(result.model, "fc1"), weights_of(result.model, "fc2")
    assert ((transposed.reshape(64, -1, 4) != 0).sum(-1) == 2).all()  # [out, in]
    assert ((plain.T.reshape(40, -1, 4) != 0).sum(-1) == 2).all()  # [in, out]


def test_clone_keeps_its_weights():
    model, _ = graphs.mlp()
    clone = model.clone()
    before = clone.graph.initializers["w1"].const_value.numpy().copy()
    PruneMagnitude().run(model, graphs.context(model))
    np.testing.assert_array_equal(clone.graph.initializers["w1"].const_value.numpy(), before)


def test_small_named_and_indivisible_layers_are_left_with_a_reason():
    model, _ = graphs.cnn()
    chosen = PruneMagnitude(pattern="3:8", min_weights=300, skip=("fc",))
    reasons = {s.node: s.reason for s in chosen.run(model, graphs.context(model)).skipped}
    assert "fewer than min_weights" in reasons["depthwise"]
    assert reasons["fc"] == "named in skip"
    assert "needs a multiple of 8" in reasons["conv1"]


def test_table_that_is_also_gathered_is_not_pruned():
    model, _ = graphs.transformer()
    lm_head = next(n for n in model.graph if n.name == "lm_head")
    lm_head.replace_input_with(1, model.graph.initializers["wo"])
    gather = next(n for n in model.graph if n.name == "embed")
    gather.replace_input_with(0, model.graph.initializers["wo"])
    result = PruneMagnitude().run(model, graphs.context(model))
    assert {s.node for s in result.skipped} >= {"out", "lm_head"}
    assert all("also used by 'embed'" in s.reason for s in result.skipped)


def test_finding_says_that_it_buys_no_speed():
    model, _ = graphs.mlp()
    (finding,) = PruneMagnitude(sparsity=0.75).run(model, graphs.context(model)).findings
    assert finding.startswith("75.0 % of 8704 weights") and "nor faster" in finding


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sparsity": 1.0}, "sparsity is 1.0, expected"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"pattern": "4:2"}, "pattern is '4:2', expected 'N:M'"),
        ({"pattern": "half"}, "pattern is 'half'"),
        ({"min_weights": -1}, "min_weights is -1"),
    ],
)
def test_wrong_parameters_are_refused(parameters, message):
    with pytest.raises(PassError, match=message):
        PruneMagnitude(**parameters)


def test_misspelt_skip_suggests_the_node():
    model, _ = graphs.cnn()
    with pytest.raises(PassError, match="did you mean 'conv1'"):
        PruneMagnitude(skip=("conv_1",)).run(model, graphs.context(model))
