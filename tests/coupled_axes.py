"""Groups of coupled axes: what one is laid out as, and a cut of it by hand."""

import graphs
import numpy as np

from edgec.passes.dimension_groups import coupled_groups
from edgec.passes.removal import Cut, remove

IMAGE = "float[1, 3, 4, 4] x"
TOKENS = "float[2, 5, 6] x"


def weights(**shapes):
    """Random weights of these shapes; arrays are taken as they are."""
    return {
        name: graphs.weight(*shape, seed=i) if isinstance(shape, tuple) else np.asarray(shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


def ints(*values):
    return np.array(values, np.int64)


def group(model, name):
    found = {group.name: group for group in coupled_groups(model).found}
    assert name in found, f"groups are {list(found)}"
    return found[name]


def layout(chosen):
    return {f"{part.name}@{part.axis}": part.indices.tolist() for part in chosen.slices}


def lengths(chosen):
    return {(x.node, *x.path, x.position): (x.length, x.indices.tolist()) for x in chosen.lengths}


def each(count, start=0):
    """One position a unit."""
    return [[start + i] for i in range(count)]


def cut_one(model, chosen, **feeds):
    """The output's shapes before and after the removal of unit 1; both run."""
    before = [y.shape for y in graphs.run(model, **feeds)]
    remove(model, [Cut(chosen, (1,))])
    after = graphs.run(model, **feeds)
    assert all(np.isfinite(y).all() for y in after)
    return before, [y.shape for y in after]


def check(text, given, name, expected, *, kind="channel", numbers=None, x=None):
    """The group has this layout, and the graph runs without its second unit."""
    model = graphs.graph(text, given)
    found = group(model, name)
    assert (found.kind, found.units) == (kind, len(next(iter(expected.values()))))
    assert layout(found) == expected
    assert lengths(found) == (numbers or {})
    before, after = cut_one(model, found, x=graphs.feed(1, 3, 4, 4) if x is None else x)
    assert before == after
    return model
