"""Removal of random units of random groups from random networks, and its refusals."""

import graphs
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import random_graphs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgec.passes import PassError
from edgec.passes.dimension_groups import coupled_groups
from edgec.passes.equivalence import difference
from edgec.passes.execution import graph_bytes, open_session
from edgec.passes.removal import Cut, remove


def without_weight(model, cuts):
    """A copy whose units have zeros in all that makes them and all that reads them."""
    model = model.clone()
    for cut in cuts:
        for part in cut.group.slices:
            if part.role in ("produces", "consumes"):
                value = model.graph.initializers[part.name]
                array = np.moveaxis(value.const_value.numpy().copy(), part.axis, 0)
                array[part.indices[list(cut.units)].reshape(-1)] = 0
                value.const_value = ir.tensor(np.moveaxis(array, 0, part.axis))
    return model


def check_shapes(model, feeds):
    """The shapes that the graph states are those that ONNX infers and that a run has."""
    proto = onnx.load_from_string(graph_bytes(model))
    onnx.checker.check_model(proto, full_check=True)
    values = {v.name: v for node in model.graph for v in node.outputs}
    named = [name for name, value in values.items() if value.shape is not None]
    for name, array in zip(
        named, open_session(model, outputs=named, optimized=False).run(None, feeds), strict=True
    ):
        stated = [d if isinstance(d, int) else None for d in values[name].shape]
        assert all(s in (None, n) for s, n in zip(stated, array.shape, strict=True)), name


@st.composite
def pruned(draw):
    """A random network, and cuts of some of its groups."""
    seeds = st.integers(0, 1000)
    blocks = draw(st.lists(st.tuples(st.sampled_from(random_graphs.BLOCKS), seeds), max_size=6))
    model = random_graphs.network(blocks)
    cuts = []
    for group in coupled_groups(model).found:
        units = st.sets(st.integers(0, group.units - 1), max_size=group.units - 1)
        cuts.append(Cut(group, tuple(sorted(draw(units)))))
    return model, cuts


@given(pruned())
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_units_without_weight_can_go_without_a_trace(case):
    compare(*case)


@pytest.mark.slow
@given(pruned())
@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
def test_units_without_weight_can_go_without_a_trace_in_many_networks(case):
    compare(*case)


def compare(model, cuts):
    feeds = {"x": graphs.feed(2, 4, 4, 4)}
    from edgec.passes.cleanup_shapes import refresh_shapes

    refresh_shapes(model)
    zeroed = without_weight(model, cuts)
    small = model.clone()
    remove(small, cuts)
    check_shapes(small, feeds)
    [expected], [actual] = graphs.run(zeroed, **feeds), graphs.run(small, **feeds)
    assert actual.shape == expected.shape
    if not any(cut.group.mixed and cut.units for cut in cuts):
        # sums in another order; a wrong position is off by more than 1e-2
        assert difference(expected, actual) < 1e-4


def test_all_units_of_a_group_cannot_go():
    model, _ = graphs.mlp()
    [group] = coupled_groups(model).found
    with pytest.raises(PassError, match="group 'fc1' has 64 units, of which some have to stay"):
        remove(model, [Cut(group, tuple(range(64)))])


def test_a_unit_that_is_not_there_cannot_go():
    model, _ = graphs.mlp()
    [group] = coupled_groups(model).found
    with pytest.raises(PassError, match=r"units \[64\] cannot be removed"):
        remove(model, [Cut(group, (64,))])
