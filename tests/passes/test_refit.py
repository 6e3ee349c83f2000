"""Least squares behind a cut: what it must find, held against numpy by hand and real weights."""

import dataclasses
from itertools import islice

import graphs
import numpy as np
import onnx_ir as ir
import pytest
import torch
from digits_cnn import digits
from fixtures import models, photographs

import edgec
from edgec.export import export
from edgec.passes import Cleanup, Fuse, PassError, PruneStructured, Recover, refit
from edgec.passes.dimension_groups import coupled_groups
from edgec.passes.execution import graph_bytes, run_values
from edgec.passes.removal import Cut, remove
from edgec.rounds import without_training
from edgec.targets import load_target

TWO_LAYERS = """g (float[n, 6] x) => (float[n, 3] y) {
    [a] c = Gemm <transB = 1> (x, w, b)
    r = Relu (c)
    [z] y = Gemm <transB = 1> (r, v, d)
}"""


def two_layers():
    return graphs.graph(
        TWO_LAYERS,
        {
            "w": graphs.weight(16, 6),
            "b": graphs.feed(16, seed=1),
            "v": graphs.weight(3, 16, seed=2),
            "d": graphs.feed(3, seed=3),
        },
    )


def samples(*shape, count=8, **more):
    return [
        {"x": graphs.feed(*shape, seed=seed), **{n: a(seed) for n, a in more.items()}}
        for seed in range(count)
    ]


def pruned(model, calibration, **parameters):
    chosen = PruneStructured(**{"ratio": 0.5, "round_to": 1, "refit": True, **parameters})
    return chosen.run(model.clone(), graphs.context(model, calibration=calibration))


def array(model, name):
    return model.graph.initializers[name].const_value.numpy()


def output_error(model, dense, given):
    """Squared error of the outputs over the dense model's squares."""
    [name] = [value.name for value in dense.graph.outputs]
    runs = zip(run_values(model, [name], given), run_values(dense, [name], given), strict=True)
    pairs = [(ours[name], theirs[name]) for ours, theirs in runs]
    error = sum(float(np.square(ours - theirs).sum()) for ours, theirs in pairs)
    return error / sum(float(np.square(theirs).sum()) for _, theirs in pairs)


def test_a_layer_gets_the_solution_of_numpys_least_squares(monkeypatch):
    monkeypatch.setattr(refit, "RIDGES", (0.0,))
    model, given = two_layers(), samples(64, 6)
    result = pruned(model, given)
    [[r, y]] = [
        [np.concatenate([v[n] for v in run_values(model, ["r", "y"], given)]) for n in ("r", "y")]
    ]
    kept = result.decisions["groups"][0]["kept"]
    x = np.concatenate([r[:, kept], np.ones((len(r), 1))], axis=1).astype(np.float64)
    expected = np.linalg.lstsq(x, y.astype(np.float64), rcond=None)[0].T
    np.testing.assert_allclose(array(result.model, "v"), expected[:, :-1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(array(result.model, "d"), expected[:, -1], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(array(result.model, "b"), array(model, "b")[kept])


TOKENS = """g (float[n, 5, 6] x) => (float[n, 5, 3] y) {
    [a] c = MatMul (x, w)
    e = Add (b, c)
    r = Relu (e)
    [z] f = MatMul (r, v)
    y = Add (f, d)
}"""


@pytest.mark.parametrize("shape", [(3,), (1, 1, 3), ()])
def test_a_bias_that_is_an_add_of_its_own_is_fitted_if_it_has_a_number_a_channel(
    monkeypatch, shape
):
    """As a linear layer on tokens is exported; what is no such bias is part of the sum to fit."""
    monkeypatch.setattr(refit, "RIDGES", (0.0,))
    bias = graphs.feed(3, seed=3).reshape(shape) if shape else np.float32(0.5)
    model = graphs.graph(
        TOKENS,
        {
            "w": graphs.weight(6, 16),
            "b": graphs.feed(16, seed=1),
            "v": graphs.weight(16, 3, seed=2),
            "d": np.asarray(bias),
        },
    )
    given = samples(8, 5, 6)
    result = pruned(Cleanup().run(model, graphs.context(model)).model, given)
    r, y, f = (
        np.concatenate([v[n] for v in run_values(model, [n], given)]).astype(np.float64)
        for n in "ryf"
    )
    x = r[..., result.decisions["groups"][0]["kept"]].reshape(-1, 8)
    own = shape == (3,)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1) if own else x
    expected = np.linalg.lstsq(x, (y if own else f).reshape(-1, 3), rcond=None)[0]
    np.testing.assert_allclose(array(result.model, "v"), expected[:8], rtol=1e-4, atol=1e-6)
    fitted = expected[8] if own else bias
    np.testing.assert_allclose(array(result.model, "d"), fitted, rtol=1e-4, atol=1e-6)


def test_units_that_say_the_same_twice_are_not_missed():
    model = two_layers()
    w, b = array(model, "w").copy(), array(model, "b").copy()
    w[8:], b[8:] = w[:8], b[:8]
    weights = {"w": w, "b": b, "v": array(model, "v"), "d": array(model, "d")}
    twice = graphs.graph(TWO_LAYERS, weights)
    # of each pair one goes, by hand: no importance tells the two apart
    given, fresh = samples(64, 6), samples(64, 6, count=12)[8:]
    [group] = coupled_groups(twice).found
    cut = twice.clone()
    [own] = coupled_groups(cut).found
    remove(cut, [Cut(own, tuple(range(8)))])
    bare = output_error(cut, twice, fresh)
    refit.refit(cut, twice, [Cut(group, tuple(range(8)))], given, progress=lambda *_: None)
    assert bare > 0.03
    assert output_error(cut, twice, fresh) < 1e-3


SHORTCUT = """g (float[n, 4, 6, 6] x) => (float[n, 4, 6, 6] y) {
    [a] c = Conv (x, w)
    r = Relu (c)
    [b] e = Conv <group = 2> (r, v)
    s = Add (e, x)
    [c] f = Conv (s, u)
    q = Relu (f)
    [d] g = Conv (q, t)
    y = Add (g, s)
}"""


def shortcuts(size=6):
    """Two blocks whose Relus pass all of a positive input; the first cannot be refitted."""
    model = graphs.graph(
        SHORTCUT.replace("6, 6", f"{size}, {size}"),
        {
            "w": np.abs(graphs.weight(16, 4, 1, 1)),
            "v": np.abs(graphs.weight(4, 8, 1, 1, seed=1)),
            "u": np.abs(graphs.weight(16, 4, 1, 1, seed=2)),
            "t": graphs.weight(4, 16, 1, 1, seed=3),
        },
    )
    return Cleanup().run(model, graphs.context(model)).model


def positive(count):
    return [{"x": np.abs(feeds["x"])} for feeds in samples(2, 4, 6, 6, count=count)]


def test_what_a_shortcut_lost_is_made_up_for_behind_it(monkeypatch):
    monkeypatch.setattr(refit, "RIDGES", (1e-6,))
    model, given = shortcuts(), positive(16)
    fresh = positive(24)[16:]
    bare = output_error(pruned(model, given, refit=False).model, model, fresh)
    fitted = output_error(pruned(model, given).model, model, fresh)
    # the branch alone as the aim: the shortcut's error is carried on
    monkeypatch.setattr(refit, "_total", lambda node: node.outputs[0].name)
    alone = output_error(pruned(model, given).model, model, fresh)
    assert fitted < 0.01 * alone < 0.01 * bare


def test_depthwise_layers_and_layers_in_front_of_the_cut_stay():
    data = digits()
    result = pruned(data.model, data.calibration, ratio=0.25)
    changed = set(result.decisions["refit"])
    assert {"w2", "b2", "w4", "b4", "w5", "b5"} == changed


def test_fitting_brings_back_digits_that_a_cut_lost():
    data = digits()

    def correct(model):
        return float((data.logits(model).argmax(-1) == data.labels).mean())

    bare = correct(pruned(data.model, data.calibration, refit=False).model)
    assert correct(data.model) > 0.95
    assert correct(pruned(data.model, data.calibration).model) > bare + 0.1


def test_a_lock_repeats_it_without_data_and_a_plan_fits_anew():
    data = digits()
    made = pruned(data.model, data.calibration)
    chosen = PruneStructured(ratio=0.5, round_to=1, refit=True)
    context = graphs.context(data.model)
    again = chosen.run(data.model.clone(), dataclasses.replace(context, lock=made.decisions))
    assert graph_bytes(again.model) == graph_bytes(made.model)
    plan = {"groups": made.decisions["groups"]}
    other = dataclasses.replace(context, lock=plan, calibration=data.calibration[:24])
    fitted = chosen.run(data.model.clone(), other)
    assert fitted.decisions["refit"].keys() == made.decisions["refit"].keys()
    assert graph_bytes(fitted.model) != graph_bytes(made.model)


def test_a_lock_of_a_cut_that_took_nothing_needs_no_data_either():
    """A round may be too small for a step."""
    model = two_layers()
    made = pruned(model, samples(4, 6), ratio=0.25, round_to=16)
    assert made.changed == 0 and made.decisions == {"groups": [], "refit": {}}
    context = graphs.context(model, lock=made.decisions)
    again = PruneStructured(ratio=0.25, round_to=16, refit=True).run(model.clone(), context)
    assert again.decisions == made.decisions


def test_without_data_it_is_refused():
    model = two_layers()
    with pytest.raises(PassError, match="refit needs calibration data"):
        pruned(model, None)


def wide():
    return graphs.graph(
        TWO_LAYERS.replace("[n, 6]", "[n, 32]"),
        {
            "w": graphs.weight(128, 32),
            "b": graphs.feed(128, seed=1),
            "v": graphs.weight(3, 128, seed=2),
            "d": graphs.feed(3, seed=3),
        },
    )


@pytest.mark.parametrize("count", [16, 64, 96])
def test_a_layer_with_as_many_inputs_as_samples_is_better_than_the_bare_cut(count):
    model, fresh = wide(), samples(256, 32, count=101)[100:]
    bare = output_error(pruned(model, None, refit=False).model, model, fresh)
    fitted = output_error(pruned(model, samples(1, 32, count=count)).model, model, fresh)
    assert fitted < 0.5 * bare


def test_the_held_out_samples_choose_how_far_weights_move(monkeypatch):
    model, fresh = wide(), samples(256, 32, count=101)[100:]
    chosen = output_error(pruned(model, samples(1, 32, count=16)).model, model, fresh)
    fixed = []
    for ridge in refit.RIDGES:
        monkeypatch.setattr(refit, "RIDGES", (ridge,))
        result = pruned(model, samples(1, 32, count=16))
        fixed.append(output_error(result.model, model, fresh))
    assert min(fixed) <= chosen < 0.95 * max(fixed)


def test_a_layer_that_no_fit_makes_better_stays(monkeypatch):
    monkeypatch.setattr(refit, "RIDGES", (1e-6,))
    model, fresh = wide(), samples(256, 32, count=101)[100:]
    bare = output_error(pruned(model, None, refit=False).model, model, fresh)
    result = pruned(model, samples(1, 32, count=96))
    assert output_error(result.model, model, fresh) == bare
    reasons = {skip.node: skip.reason for skip in result.skipped}
    assert reasons["z"] == "not refitted: no fit was better on held-out samples"


def test_sorted_samples_are_fitted_as_mixed_ones():
    """Of two kinds of inputs, a fit to the first samples would know one alone."""
    model, rng = shortcuts(16), np.random.default_rng(0)
    kinds = [np.float32([1, 0, 0, 1]), np.float32([0, 1, 1, 0])]
    given = [
        {"x": np.abs(rng.standard_normal((1, 4, 16, 16), np.float32)) * kind[:, None, None]}
        for kind in kinds
        for _ in range(100)
    ]
    bare = output_error(pruned(model, given, refit=False).model, model, given)
    assert output_error(pruned(model, given).model, model, given) < 0.05 * bare


def test_samples_are_taken_one_by_one_and_evenly_spaced():
    held = []

    class Lazy:
        def __len__(self):
            return 10

        def __iter__(self):
            for number in range(10):
                held.append(number)
                yield {"x": np.float32([number])}

    taken = [int(feeds["x"][0]) for feeds in refit.Spread(Lazy(), 4)]
    assert taken == [2, 4, 7, 9]
    assert len(refit.Spread(Lazy(), 100)) == len(list(refit.Spread(Lazy(), 100))) == 10
    assert next(iter(refit.Spread(Lazy(), 10)))["x"] == 0
    assert held[-1] == 0  # the others are not even loaded


def test_a_layer_that_reads_nothing_but_zeros_stays():
    model = two_layers()
    dead = graphs.graph(
        TWO_LAYERS.replace("(r, v, d)", "(r, v)"),
        {"w": np.zeros((16, 6), np.float32), "b": np.zeros(16, np.float32), "v": array(model, "v")},
    )
    result = pruned(dead, samples(8, 6))
    assert result.decisions["refit"] == {}
    assert any(s.node == "z" and "not refitted" in s.reason for s in result.skipped)


def test_rows_that_are_missing_in_a_sample_are_no_trouble():
    given = samples(8, 6)
    given[0]["x"] = np.zeros((0, 6), np.float32)
    assert pruned(two_layers(), given).decisions["refit"].keys() == {"v", "d"}


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"d": np.float32([1])}, "bias is not one number a channel"),
        ({"alpha": 0.5}, "scales or transposes"),
        ({"half": True}, "not float32 tensors"),
    ],
)
def test_layers_that_cannot_be_fitted_are_named_and_refused_if_there_is_no_other(how, reason):
    model = two_layers()
    weights = {name: array(model, name) for name in ("w", "b", "v", "d")}
    text = TWO_LAYERS
    if "alpha" in how:
        text = text.replace("[z] y = Gemm <transB", "[z] y = Gemm <alpha = 0.5, transB")
    if "half" in how:
        weights = {name: weight.astype(np.float16) for name, weight in weights.items()}
        text = text.replace("float[", "float16[")
    weights["d"] = how.get("d", weights["d"])
    given = [{"x": f["x"].astype(weights["w"].dtype)} for f in samples(8, 6)]
    with pytest.raises(PassError, match=f"no layer behind the cuts.*'z': not refitted.*{reason}"):
        pruned(graphs.graph(text, weights), given)


def test_a_sum_of_unnamed_sizes_may_broadcast_and_is_not_the_aim():
    model = shortcuts()
    node = model.graph.node("d")
    for value in (node.outputs[0], model.graph.outputs[0]):
        value.shape = ir.Shape([None, 4, 6, 6])
    assert refit._total(node) == "g"


def test_what_was_fitted_counts_as_changed_and_touched():
    data = digits()
    bare = pruned(data.model, data.calibration, ratio=0.25, refit=False)
    result = pruned(data.model, data.calibration, ratio=0.25)
    assert result.changed > bare.changed
    assert set(result.touched) >= {*bare.touched, "y"}


def test_a_glance_at_the_widths_does_not_fit():
    [glance] = without_training([PruneStructured(ratio=0.5, refit=True, rounds=2), Recover()])
    assert not glance.refit and glance.rounds == 1


def test_samples_with_nan_are_refused_by_the_name_of_the_layer():
    model, given = two_layers(), samples(4, 6)
    given[3]["x"][0, 0] = np.nan
    with pytest.raises(PassError, match="'z' reads or gives NaN"):
        pruned(model, given)


def test_names_and_shapes_are_those_of_the_cut():
    model, given = shortcuts(), positive(8)
    bare, fitted = pruned(model, given, refit=False).model, pruned(model, given).model
    for name, value in bare.graph.initializers.items():
        assert array(fitted, name).shape == tuple(value.shape)
        assert array(fitted, name).dtype == value.dtype.numpy()


@pytest.mark.slow
def test_a_fused_network_of_real_weights_loses_less():
    given = [{"image": photographs.tensor(i)} for i in islice(photographs.unlabelled(), 34)]
    source = edgec.Source(
        models.efficientnet_lite0(),
        (torch.zeros(1, 3, 224, 224),),
        input_names=("image",),
        output_names=("logits",),
    )
    reference = export(source, load_target("x86-64")).model
    context = graphs.context(reference, calibration=given[:24])
    model = Fuse().run(Cleanup().run(context.reference.clone(), context).model, context).model
    chosen = PruneStructured(ratio=0.125, importance="wanda")
    bare = chosen.run(model.clone(), context).model
    fitted = dataclasses.replace(chosen, refit=True).run(model.clone(), context).model
    assert output_error(fitted, model, given[24:]) < 0.6 * output_error(bare, model, given[24:])
