"""Who competes with whom, and what goes where milliseconds decide."""

import graphs
import numpy as np
import pytest

from edgec.passes import PruneStructured
from edgec.passes.dimension_groups import Group, coupled_groups
from edgec.passes.unit_ranking import Ranked, fastest, structure

SIZES = {  # two pairs of a pointwise and a depthwise layer, of other widths, and a dense one
    "e1": (16, 3, 1, 1),
    "d1": (16, 1, 3, 3),
    "p1": (8, 16, 1, 1),
    "e2": (32, 8, 1, 1),
    "d2": (32, 1, 3, 3),
    "p2": (8, 32, 1, 1),
    "f1": (24, 8),
    "f2": (4, 24),
}
LAYERS = """g (float[1, 3, 6, 6] x) => (float[1, 4] y) {
    [e1] a = Conv (x, e1)
    [d1] b = Conv <group = 16, pads = [1, 1, 1, 1]> (a, d1)
    [p1] c = Conv (b, p1)
    [e2] d = Conv (c, e2)
    [d2] e = Conv <group = 32, pads = [1, 1, 1, 1]> (d, d2)
    [p2] f = Conv (e, p2)
    p = GlobalAveragePool (f)
    h = Flatten (p)
    [f1] i = Gemm <transB = 1> (h, f1)
    [f2] y = Gemm <transB = 1> (i, f2)
}"""


def layers(**scale):
    """Weights of the named layers multiplied by a number, in their first units only if a pair."""
    weights = {n: graphs.weight(*s, seed=i) for i, (n, s) in enumerate(SIZES.items())}
    for name, factor in scale.items():
        weights[name] = weights[name] * factor
    return graphs.graph(LAYERS, weights)


def kept(result):
    return {entry["name"]: len(entry["kept"]) for entry in result.decisions["groups"]}


def test_groups_of_the_same_layers_are_of_one_structure_at_any_width():
    model = layers()
    found = {group.name: structure(group, model) for group in coupled_groups(model).found}
    assert list(found) == ["e1", "p1", "e2", "p2", "f1"]
    assert found["e1"] == found["e2"]
    assert len(set(found.values())) == 4


def test_another_kernel_is_another_structure():
    model = layers()
    wide = graphs.graph(
        LAYERS.replace("[1, 1, 1, 1]> (d, d2)", "[2, 2, 2, 2]> (d, d2)"),
        {n: graphs.weight(*(s if n != "d2" else (32, 1, 5, 5))) for n, s in SIZES.items()},
    )
    first, other = (
        {group.name: structure(group, m) for group in coupled_groups(m).found}
        for m in (model, wide)
    )
    assert first["e1"] == other["e1"]
    assert first["e2"] != other["e2"]


def half_idle(model, *names):
    """The first half of the units of these groups have almost no weight."""
    import onnx_ir as ir

    for group in coupled_groups(model).found:
        for part in group.slices if group.name in names else ():
            value = model.graph.initializers[part.name]
            array = np.moveaxis(value.const_value.numpy().copy(), part.axis, 0)
            array[part.indices[: group.units // 2].reshape(-1)] *= 1e-3
            value.const_value = ir.tensor(np.moveaxis(array, 0, part.axis))
    return model


def test_isomorphic_groups_compete_among_themselves_only():
    """Half of 'p1' could go for nothing; nobody of its structure has units to keep for it."""
    model = half_idle(layers(), "e2", "p1")
    context = graphs.context(model)
    settings = {"ratio": 0.25, "round_to": 4}
    alone = PruneStructured(ranking="isomorphic", **settings).run(model.clone(), context)
    together = PruneStructured(ranking="global", **settings).run(model.clone(), context)
    # 12 of the 48 units of 'e1' and 'e2', all where half is idle; 2 of 8 are no multiple of 4
    assert kept(alone) == {"e2": 20, "f1": 20}
    assert kept(together)["p1"] == 4


def ranked(name, scores, *, step=1, dense=None):
    group = Group(name, (name,), "hidden", len(scores), (), (), ())
    return Ranked(group, np.asarray(scores, float), step, dense or len(scores))


def linear(widths, *costs):
    """Latencies of a model whose groups take so many milliseconds for each of their units."""

    def latencies(asked):
        price = dict(zip(widths, costs, strict=True))
        each = [
            {name: price[name] * (widths[name] - gone[name]) for name in widths}
            for _, gone in asked
        ]
        return [
            sum(ms.values()) if name is None else ms[name]
            for (name, _), ms in zip(asked, each, strict=True)
        ]

    return latencies


def left(found):
    return {item.group.name: units for item, units in found.kept.items()}


def test_units_of_the_expensive_layer_go_where_all_matter_alike():
    items = [ranked("cheap", [1] * 8), ranked("dear", [1] * 8)]
    found = fastest(items, 0.5, 0.9, linear({"cheap": 8, "dear": 8}, 1, 9))
    assert left(found) == {"cheap": 8, "dear": 3}
    assert (found.before_ms, found.after_ms, found.reached) == (80, 35, True)


def test_what_matters_more_is_worth_more_milliseconds():
    """A share of the importance for each millisecond: 1 of 10 for 3 against 1 of 100 for 1."""
    items = [ranked("matters", [1] * 10), ranked("idles", [1] * 90 + [1000] * 10)]
    found = fastest(items, 0.1, 0.9, linear({"matters": 10, "idles": 100}, 3, 1))
    assert left(found)["matters"] == 10


def test_the_importance_of_units_is_a_share_of_their_layer():
    """The narrow layer saves twice as much by a unit, but a unit is four times as much of it."""
    items = [ranked("narrow", [5] * 8), ranked("wide", [1] * 32)]
    found = fastest(items, 0.1, 0.9, linear({"narrow": 8, "wide": 32}, 2, 1))
    assert left(found)["narrow"] == 8


def test_steps_that_only_save_together_are_taken_together():
    """Kernels of 4 lanes: the first and the second unit save nothing."""

    def latencies(asked):
        return [float(-(-(8 - gone["a"]) // 4)) for _, gone in asked]

    found = fastest([ranked("a", [1] * 8)], 0.5, 0.9, latencies)
    assert left(found) == {"a": 4}


def test_a_group_that_saves_nothing_is_left_alone():
    items = [ranked("idle", [1] * 8), ranked("works", [1] * 8)]
    found = fastest(items, 0.9, 0.5, linear({"idle": 8, "works": 8}, 0.0, 1))
    assert left(found) == {"idle": 8, "works": 4}
    assert [item.group.name for item in found.idle] == ["idle"]
    assert not found.reached


def test_a_larger_ratio_only_adds_to_what_goes():
    scores = np.random.default_rng(0).uniform(size=(3, 32))
    items = [ranked(name, row) for name, row in zip("abc", scores, strict=True)]
    cost = linear(dict.fromkeys("abc", 32), 1, 2, 3)
    steps = [left(fastest(items, ratio, 0.9, cost)) for ratio in (0.1, 0.3, 0.5, 0.7)]
    for fewer, more in zip(steps[1:], steps, strict=False):
        assert all(fewer[name] <= more[name] for name in "abc")


def test_the_share_counts_against_the_reference():
    """16 of its 32 units are gone already: half of the time is saved."""
    cost = linear({"a": 16}, 1)
    assert left(fastest([ranked("a", [1] * 16, dense=32)], 0.5, 0.9, cost)) == {"a": 16}
    assert left(fastest([ranked("a", [1] * 16, dense=32)], 0.75, 0.9, cost)) == {"a": 8}


@pytest.mark.parametrize(("units", "step", "first"), [(64, 8, 56), (1152, 8, 1024), (48, 5, 45)])
def test_wide_groups_lose_more_units_at_a_time(units, step, first):
    """Not more than 16 steps, each as many roundings as a power of two."""
    found = fastest([ranked("a", [1] * units, step=step)], 0.01, 0.99, linear({"a": units}, 1))
    assert left(found) == {"a": first}
