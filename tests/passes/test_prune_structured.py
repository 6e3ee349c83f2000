"""The pass: how many units go and which, the plan, and what it is good for with recover."""

import dataclasses
import json
import math

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from digits_cnn import digits
from two_gemms import array, pruned, two_layers, widths

from edgec.passes import PassError, PruneStructured, Recover
from edgec.passes.dimension_groups import coupled_groups
from edgec.passes.execution import graph_bytes
from edgec.passes.importance import unit_importance
from edgec.passes.importance_measured import measured_importance
from edgec.targets import load_target


@pytest.mark.parametrize(
    ("ratio", "round_to", "kept"),
    [(0.25, 4, 12), (0.25, 8, 16), (0.3, 8, 8), (0.25, 1, 12), (0.9, 4, 4), (0.5, 5, 10)],
)
def test_the_width_is_the_nearest_multiple_and_at_least_one(ratio, round_to, kept):
    assert widths(pruned(ratio=ratio, round_to=round_to)) == (kept, kept)


def test_the_target_says_what_widths_are_multiples_of():
    target = load_target("x86-64")
    assert target.channel_multiple == 16
    narrow = dataclasses.replace(target, channel_multiple=2)
    assert widths(pruned(ratio=0.3)) == (16, 16)
    assert widths(pruned(target=narrow, ratio=0.3)) == (12, 12)


def test_units_of_least_magnitude_go():
    model = two_layers()
    magnitude = np.abs(array(model, "w")).sum(1) + np.abs(array(model, "k")).sum(0)
    rows = array(model, "w")[np.sort(np.argsort(magnitude)[4:])]
    result = pruned(model, round_to=1)
    np.testing.assert_array_equal(array(result.model, "w"), rows)


def by_hand(model, how):
    w, k = array(model, "w").astype(float), array(model, "k").astype(float)
    if how == "l1":
        return np.abs(w).sum(1) + np.abs(k).sum(0)
    if how == "l2":
        return (w**2).sum(1) + (k**2).sum(0)
    return np.array([sum(np.linalg.norm(one - other) for other in w) for one in w])


@pytest.mark.parametrize("how", ["l1", "l2", "geometric-median"])
def test_importance_is_as_defined(how):
    model = two_layers()
    weights = {name: value.const_value for name, value in model.graph.initializers.items()}
    scores = unit_importance(coupled_groups(model).found[0], weights, how)
    np.testing.assert_allclose(scores, by_hand(model, how), rtol=1e-6)


def test_batch_norm_scales_decide_where_asked_for():
    model = graphs.graph(
        """g (float[1, 3, 4, 4] x) => (float[1, 2, 4, 4] y) {
            [a] c = Conv (x, w)
            n = BatchNormalization (c, scale, shift, mean, var)
            [b] y = Conv (n, v)
        }""",
        {
            "w": graphs.weight(4, 3, 1, 1),
            "scale": np.float32([0.5, -2, 0.1, 1]),
            "shift": np.zeros(4, np.float32),
            "mean": np.zeros(4, np.float32),
            "var": np.ones(4, np.float32),
            "v": graphs.weight(2, 4, 1, 1),
        },
    )
    result = pruned(model, importance="bn-scale", ratio=0.5, round_to=1)
    np.testing.assert_array_equal(array(result.model, "scale"), np.float32([-2, 1]))


def test_without_batch_norm_its_scales_cannot_decide():
    result = pruned(importance="bn-scale")
    assert result.changed == 0
    assert {s.node for s in result.skipped if "no BatchNormalization scales it" in s.reason} == {
        "a",
        "d",
    }


def measured(model, how, feeds):
    context = graphs.context(model, calibration=feeds)
    return measured_importance(coupled_groups(model).found, model, context, how)


def test_wanda_weighs_by_what_is_read():
    model, x = two_layers(), graphs.feed(4, 8)
    read = np.maximum(x @ array(model, "w").T + array(model, "b"), 0).astype(float)
    expected = np.abs(array(model, "k")).sum(0) * np.sqrt((read**2).mean(0))
    scores = measured(model, "wanda", [{"x": x}])
    np.testing.assert_allclose(scores["a"], expected, rtol=1e-4)


def test_taylor_is_the_squared_change_of_the_output():
    """In a linear network with one output the first order is all there is."""
    model = graphs.graph(
        """g (float[1, 8] x) => (float[1, 1] y) {
            [a] c = Gemm <transB = 1> (x, w)
            y = Gemm <transB = 1> (c, v)
        }""",
        {"w": graphs.weight(6, 8), "v": graphs.weight(1, 6, seed=1)},
    )
    x = graphs.feed(1, 8)
    change = ((x @ array(model, "w").T) * array(model, "v"))[0] ** 2
    scores = measured(model, "taylor", [{"x": x}])["a"]
    np.testing.assert_allclose(scores / scores.sum(), change / change.sum(), rtol=1e-4)


@pytest.mark.parametrize("how", ["taylor", "wanda"])
def test_units_that_the_data_never_wakes_go_first(how):
    """Their weights are the largest; a bias holds them below zero."""
    model = two_layers()
    asleep = [1, 5, 6, 11]
    for name, axis in (("w", 0), ("k", 1)):
        weight = np.moveaxis(array(model, name).copy(), axis, 0)
        weight[asleep] *= 10
        model.graph.initializers[name].const_value = ir.tensor(np.moveaxis(weight, 0, axis))
    bias = np.full(16, 3, np.float32)
    bias[asleep] = -100
    model.graph.initializers["b"].const_value = ir.tensor(bias)
    feeds = [{"x": graphs.feed(4, 8, seed=seed)} for seed in range(4)]
    context = graphs.context(model, calibration=feeds)
    result = PruneStructured(ratio=0.25, importance=how, round_to=4).run(model, context)
    kept = result.decisions["groups"][0]["kept"]
    assert sorted(set(range(16)) - set(kept)) == asleep


@pytest.mark.parametrize("how", ["taylor", "wanda"])
def test_without_data_nothing_can_be_measured(how):
    with pytest.raises(PassError, match=f"importance '{how}' needs calibration data"):
        pruned(importance=how)


def test_what_has_no_gradients_cannot_be_ranked_by_them():
    model = graphs.graph(
        """g (float[4, 4] x) => (float[4, 4, 1] y) {
            [a] c = Gemm (x, w)
            s = Gemm (c, v)
            d = Unsqueeze (s, last)
            y = LRN <size = 1> (d)
        }""",
        {
            "w": graphs.weight(4, 16),
            "v": graphs.weight(16, 4),
            "last": np.array([2]),
        },
    )
    with pytest.raises(PassError, match="importance 'taylor' needs gradients: .*LRN"):
        measured(model, "taylor", [{"x": graphs.feed(4, 4)}])


def test_what_only_a_recurrent_layer_reads_is_not_measured_by_wanda():
    model = graphs.graph(
        """g (float[5, 1, 6] x) => (float[5, 1, 1, 4] y) {
            [a] c = MatMul (x, v)
            y = LSTM <hidden_size = 4> (c, w, r)
        }""",
        {"v": graphs.weight(6, 8), "w": graphs.weight(1, 16, 8), "r": graphs.weight(1, 16, 4)},
    )
    context = graphs.context(model, calibration=[{"x": graphs.feed(5, 1, 6)}])
    result = PruneStructured(ratio=0.25, importance="wanda", round_to=2).run(model, context)
    assert result.changed == 0
    assert "no layer that can be measured reads it" in [s.reason for s in result.skipped]


def test_global_ranking_takes_more_where_less_is_lost():
    """The units of 'd' have one tiny half; those of 'a' are much alike."""
    model = two_layers()
    for name, axis in (("k", 0), ("v", 1)):
        weight = np.moveaxis(array(model, name).copy(), axis, 0)
        weight[:8] *= 1e-3
        model.graph.initializers[name].const_value = ir.tensor(np.moveaxis(weight, 0, axis))
    result = pruned(model, ranking="global", ratio=0.25, round_to=4)
    assert widths(result) == (16, 8)


def test_global_ranking_leaves_each_group_its_share():
    result = pruned(ranking="global", ratio=0.7, max_ratio=0.75, round_to=1)
    assert min(widths(result)) >= 4
    assert sum(widths(result)) == 32 - 22


@pytest.mark.parametrize("ranking", ["local", "global", "isomorphic"])
def test_a_second_run_goes_on_from_the_first(ranking):
    """Shares count against the reference: a larger ratio takes what is missing to it."""
    model = two_layers()
    context = graphs.context(model)
    first = PruneStructured(ratio=0.25, round_to=4, ranking=ranking).run(model.clone(), context)
    same = PruneStructured(ratio=0.25, round_to=4, ranking=ranking).run(first.model, context)
    assert same.changed == 0
    more = PruneStructured(ratio=0.5, round_to=4, ranking=ranking).run(first.model, context)
    assert sum(widths(more)) == 16


def test_a_layer_named_in_skip_keeps_its_width():
    result = pruned(skip=("a",), round_to=4)
    assert widths(result) == (16, 12)
    assert [s.reason for s in result.skipped if s.node == "a"] == ["'a' is named in skip"]


@pytest.mark.parametrize(
    ("named", "kept"), [("Relu -> r", (16, 12)), ("Relu -> s", (12, 16)), ("z", (12, 12))]
)
def test_a_node_named_in_skip_that_hands_units_on_keeps_them(named, kept):
    """A Relu's output has the units of the layer before it, that of the last layer has none."""
    result = pruned(skip=(named,), round_to=4)
    assert widths(result) == kept
    reasons = [s.reason for s in result.skipped if "skip" in s.reason]
    assert reasons == [f"'{named}' is named in skip"] * (kept != (12, 12))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"skip": ("a",)}, "'a' is named in skip"),
        ({"skip": ("Relu -> r",)}, "'Relu -> r' is named in skip"),
        ({"kinds": ("channel",)}, "its units are of kind 'hidden', which kinds leaves out"),
    ],
)
def test_a_plan_against_the_settings_is_refused(settings, reason):
    plan = dict(pruned(round_to=4).decisions)
    model = two_layers()
    with pytest.raises(PassError, match=f"the plan cuts group 'a', but {reason}"):
        PruneStructured(**settings).run(model, graphs.context(model, lock=plan))


def test_a_plan_that_changes_a_mean_is_refused_unless_mixed_is_set():
    model, _ = graphs.transformer()
    plan = dict(pruned(model.clone(), mixed=True, round_to=8).decisions)
    context = graphs.context(model, lock=plan)
    with pytest.raises(PassError, match="cuts group 'embed', but .* mixed=true cuts it"):
        PruneStructured().run(model.clone(), context)
    assert PruneStructured(mixed=True).run(model.clone(), context).decisions == plan


def squeezed():
    """The Squeeze drops every axis of one: with a single channel there would be nothing to read."""
    return graphs.graph(
        """g (float[1, 3, 4, 4] x) => (float[2] y) {
            [a] c = Conv (x, w)
            p = GlobalAveragePool (c)
            s = Squeeze (p)
            y = MatMul (s, v)
        }""",
        {"w": graphs.weight(4, 3, 1, 1), "v": graphs.weight(4, 2)},
    )


def test_an_axis_that_a_squeeze_would_drop_keeps_two_units():
    model = squeezed()
    result = pruned(model.clone(), ratio=0.9, round_to=1)
    assert array(result.model, "w").shape[0] == 2
    assert graphs.run(result.model, x=graphs.feed(1, 3, 4, 4))[0].shape == (2,)
    plan = {"groups": [entry(kind="channel", units=4, kept=[3])]}
    with pytest.raises(PassError, match="keeps 1 of 4 units of group 'a', which needs 2: a Sq"):
        PruneStructured().run(model, graphs.context(model, lock=plan))


def test_a_name_in_skip_that_is_no_node_is_an_error():
    with pytest.raises(PassError, match="skip names 'aa', no node of the model"):
        pruned(skip=("aa",))


NOTHING = {
    "kinds": (
        {"kinds": ("channel", "head")},
        "of kind 'hidden', which kinds leaves out ('a', 'd')",
    ),
    "scores": (
        {"importance": "bn-scale"},
        "no BatchNormalization scales it; fuse folds them away ('a', 'd')",
    ),
    "rounding": ({"round_to": 16}, "its 16 units stay: they go 16 at a time ('a', 'd')"),
    "skip": ({"skip": ("a", "d")}, "'a' is named in skip ('a'); 'd' is named in skip ('d')"),
}


@pytest.mark.parametrize("case", NOTHING)
def test_that_nothing_can_be_cut_is_told_with_the_reasons(case):
    settings, reasons = NOTHING[case]
    result = pruned(**settings)
    [finding] = result.findings
    assert result.changed == 0 and finding.startswith("nothing can be cut: ")
    assert f"{reasons}; its outputs stay: it is an output of the model ('y') ('z')" in finding


def test_that_something_could_be_cut_at_another_share_is_no_finding():
    assert pruned(ratio=0.1, round_to=8).findings == ()
    first = pruned(ratio=0.5, round_to=8)  # there is nothing left to cut: it has been
    assert first.changed
    context = graphs.context(two_layers())
    again = PruneStructured(ratio=0.5, round_to=8).run(first.model, context)
    assert (again.changed, again.findings) == (0, ())


def test_of_many_reasons_the_first_are_told():
    names = "abcdefg"
    lines = "\n".join(f"[{n}] h{n} = Gemm (x, w{n})  y{n} = Gemm (h{n}, v{n})" for n in names)
    outputs = ", ".join(f"float[4, 2] y{n}" for n in names)
    given = {f"w{n}": graphs.weight(8, 4 + i) for i, n in enumerate(names)}
    given |= {f"v{n}": graphs.weight(4 + i, 2) for i, n in enumerate(names)}
    model = graphs.graph(f"g (float[4, 8] x) => ({outputs}) {{ {lines} }}", given)
    [finding] = pruned(model).findings
    assert finding == (
        "nothing can be cut: its 4 units stay: they go 16 at a time ('a'); its 5 units stay: they "
        "go 16 at a time ('b'); its 6 units stay: they go 16 at a time ('c'); 11 reasons more are "
        "in the report"
    )


def test_kinds_that_are_left_out_stay():
    result = pruned(kinds=("channel", "head"))
    assert widths(result) == (16, 16)
    assert "of kind 'hidden', which kinds leaves out" in result.skipped[-1].reason


def test_what_a_norm_takes_its_mean_over_goes_only_if_asked():
    model, feeds = graphs.transformer()
    kept = pruned(model.clone())
    assert array(kept.model, "gamma").shape == (48,)
    assert any("mixed=true cuts it all the same" in s.reason for s in kept.skipped)
    cut = pruned(model.clone(), mixed=True, round_to=8)
    assert array(cut.model, "gamma").shape == (40,)
    assert graphs.run(cut.model, **feeds)[0].shape == (2, 9, 50)


def test_a_group_too_narrow_to_round_is_told():
    result = pruned(ratio=0.25, round_to=16)
    assert result.changed == 0
    assert "its 16 units stay: they go 16 at a time" in result.skipped[-1].reason


def test_the_plan_says_what_is_kept_and_the_finding_how_much():
    result = pruned(round_to=4)
    plan = json.loads(json.dumps(dict(result.decisions)))
    first, second = plan["groups"]
    assert (first["name"], first["kind"], first["units"]) == ("a", "hidden", 16)
    assert len(first["kept"]) == 12 and first["kept"] == sorted(first["kept"])
    assert second["name"] == "d"
    # w 16 * 8, b 16, k 16 * 16, v 3 * 16, then with 12 for 16
    assert result.findings == (
        "8 of 32 units in 2 groups are cut: 448 numbers in weights became 288 (64.3%)",
    )
    assert result.changed == 4
    assert result.touched == ("c", "e", "y")


def test_the_plan_cuts_a_retrained_model_in_the_same_places():
    plan = dict(pruned(round_to=4).decisions)
    retrained = two_layers()
    for name in ("w", "k"):
        new = graphs.weight(*array(retrained, name).shape, seed=77)
        retrained.graph.initializers[name].const_value = ir.tensor(new)
    context = graphs.context(retrained, lock=plan)
    expected = array(retrained, "w")[plan["groups"][0]["kept"]]
    # other parameters than those of the plan: the plan counts
    result = PruneStructured(ratio=0.9).run(retrained, context)
    np.testing.assert_array_equal(array(result.model, "w"), expected)
    assert result.decisions == plan


def test_kept_units_may_stand_in_any_order():
    model, plan = two_layers(), {"groups": [entry(kept=[3, 0, 2])]}
    result = PruneStructured().run(model.clone(), graphs.context(model, lock=plan))
    np.testing.assert_array_equal(array(result.model, "w"), array(model, "w")[[0, 2, 3]])


def entry(**changes):
    return {"name": "a", "kind": "hidden", "units": 16, "kept": [0, 1]} | changes


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            [entry(name="b")],
            "group 'b' of 16 units of kind 'hidden', which this model does not have",
        ),
        (
            [entry(units=12)],
            "group 'a' of 12 units of kind 'hidden', which this model does not have",
        ),
        ([entry(kind="head")], "made for another architecture"),
        ([entry(kept=[16])], r"kept\[0\] is 16, expected a whole number from 0 to 15"),
        ([entry(kept=[-1])], r"kept\[0\] is -1, expected"),
        ([entry(kept=[0, math.inf])], r"kept\[1\] is inf, expected"),
        ([entry(kept=[0.7, 1.2])], r"kept\[0\] is 0.7, expected"),
        ([entry(kept=[0, "1"])], r"kept\[1\] is '1', expected"),
        ([entry(kept=[True])], r"kept\[0\] is True, expected"),
        ([entry(kept="0123")], "kept is '0123', expected a list of unit numbers"),
        ([entry(kept=[0, 0, 1])], "kept has 0 more than once, expected each unit once"),
        ([entry(kept=[])], "kept is empty, expected at least one of 16 units"),
        ([entry(units=True)], "units is True, expected a whole number above 0"),
        ([entry(kind=[])], r"kind is \[\], expected channel or head or hidden"),
        ([entry(), entry()], r"groups\[1\] \('a'\): it stands there twice"),
        ([{"name": "a"}], r"groups\[0\] \('a'\) has no kind, expected channel"),
        ([7], r"groups\[0\] is 7, expected name, kind, units, kept"),
        ([entry(kept="0" * 99)], r"kept is '0+\.\.\., expected .*; correct the plan, or take it"),
        (7, "the pruning plan: groups is 7, expected a list"),
    ],
)
def test_a_plan_for_another_model_or_a_damaged_one_is_refused(groups, message):
    model = two_layers()
    with pytest.raises(PassError, match=message):
        PruneStructured().run(model, graphs.context(model, lock={"groups": groups}))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"ratio": -0.1}, "ratio is -0.1, expected a share below 1"),
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"max_ratio": 1.5}, "max_ratio is 1.5"),
        ({"max_ratio": 0.0}, "max_ratio is 0.0"),
        ({"max_ratio": 0.5}, "max_ratio is 0.5, but ranking is local.*no effect; leave .* out, or"),
        ({"costs": "int8"}, "costs is int8, but ranking is local.*no effect; leave .* out, or"),
        ({"round_to": -1}, "round_to is -1"),
        ({"ranking": "globl"}, "ranking has no 'globl', did you mean 'global'"),
        ({"costs": "int4"}, "costs has no 'int4'"),
        ({"importance": "l3"}, "importance has no 'l3'"),
        ({"kinds": ("heads",)}, "kinds has no 'heads', did you mean 'head'"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters, message):
    with pytest.raises(PassError, match=message):
        PruneStructured(**parameters)


def test_without_a_share_there_has_to_be_a_promise():
    with pytest.raises(PassError, match="how much may go.*ratio=0.25, or a promise.*--max-drop"):
        pruned(ratio=0.0)


@pytest.mark.slow
def test_recover_wins_back_what_half_of_the_channels_knew():
    """Trained on digits: the pruned network forgets, and learns it again from the dense one."""
    data = digits()
    context = graphs.context(data.model, calibration=data.calibration, validation=data.validation)
    small = PruneStructured(ratio=0.5).run(data.model.clone(), context)
    recovered = Recover(steps=300, rate=1.0, bias_rate=0.02).run(small.model.clone(), context)

    def accuracy(model):
        return float((data.logits(model).argmax(1) == data.labels).mean())

    dense, forgot, learnt = map(accuracy, (data.model, small.model, recovered.model))
    assert len(graph_bytes(recovered.model)) < 0.65 * len(graph_bytes(data.model))
    assert forgot < dense - 0.1
    # on the 597 samples of the test set
    assert learnt > dense - 0.05


def test_the_same_units_go_each_time():
    first, second = pruned(), pruned()
    assert graph_bytes(first.model) == graph_bytes(second.model)
