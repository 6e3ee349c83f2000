"""Adapt: new heads, all weights, low-rank branches; and every refusal."""

import dataclasses

import graphs
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from labelled_samples import context, separable

from edgec.passes import Cleanup, PassError
from edgec.passes.adapt import Adapt, check_used, weights
from edgec.passes.execution import graph_bytes
from edgec.passes.head import find_head, replace_head
from edgec.passes.lora import add_branches, branches
from edgec.passes.torch_graph import to_torch


def accuracy(model: ir.Model, classes: int = 4) -> float:
    feeds, labels = separable(64, classes, seed=2)
    found = [graphs.run(model, **f)[0].reshape(-1).argmax() for f in feeds]
    return float(np.mean([a == b["label"][0] for a, b in zip(found, labels, strict=True)]))


@pytest.mark.parametrize("method", ["head", "full", "lora"])
def test_each_method_learns_the_labels(method):
    model, _ = graphs.cnn()
    before = accuracy(model)
    result = Adapt(method=method, steps=60, rate=0.01).run(model.clone(), context(model))
    assert result.changed > 0
    assert accuracy(result.model) > max(before, 0.9)
    assert "held-out cross-entropy" in result.findings[0]


def test_method_head_moves_nothing_but_the_head():
    model, _ = graphs.cnn()
    adapted = Adapt(method="head", steps=5).run(model.clone(), context(model)).model
    moved = {
        name
        for name, value in model.graph.initializers.items()
        if value.const_value.tobytes() != adapted.graph.initializers[name].const_value.tobytes()
    }
    assert moved == {"w", "b"}


def test_method_lora_changes_each_weight_by_a_matrix_of_its_rank():
    model, _ = graphs.cnn()
    chosen = Adapt(method="lora", steps=20, rate=0.01, rank=2)
    adapted = chosen.run(model.clone(), context(model)).model
    for name in ("k1", "w"):
        old, new = (m.graph.initializers[name].const_value.numpy() for m in (model, adapted))
        moved = (new - old).reshape(len(old), -1)
        assert np.linalg.matrix_rank(moved, tol=1e-5) == 2
    assert [n.op_type for n in adapted.graph] == [n.op_type for n in model.graph]


def test_constants_of_the_calculation_are_no_weights():
    model, _ = graphs.cnn()
    assert set(weights(model, to_torch(model).trained())) == {"k1", "b1", "k2", "w", "b"}


@pytest.mark.parametrize("make", [graphs.cnn, graphs.mlp, graphs.transformer])
def test_a_merged_branch_computes_what_the_branch_did(make):
    model, feeds = make()
    found, _ = branches(model, 2)
    random = np.random.default_rng(3)
    matrices = {
        b.layer: tuple(random.standard_normal(s).astype(np.float32) / 4 for s in (b.down, b.up))
        for b in found
    }
    beside, merged = model.clone(), model.clone()
    names = {b.layer: (f"{b.layer}.down", f"{b.layer}.up") for b in found}
    assert add_branches(beside, found, names, matrices) == ()
    onnx.checker.check_model(onnx.load_from_string(graph_bytes(beside)))
    for branch in found:
        branch.merge(merged, *matrices[branch.layer])
    expected, plain = graphs.run(beside, **feeds)[0], graphs.run(model, **feeds)[0]
    assert np.abs(expected - plain).max() > 0.1
    # float32 summation in another order
    np.testing.assert_allclose(graphs.run(merged, **feeds)[0], expected, rtol=1e-3, atol=1e-3)


def test_a_branch_beside_a_strided_padded_convolution_and_a_scaled_gemm():
    text = """g (float[n, 3, 9, 9] x) => (float[n, 5] y) {
        [conv] c = Conv <pads = [1, 1, 1, 1], strides = [2, 2], dilations = [1, 1]> (x, k, kb)
        p = GlobalAveragePool (c)
        f = Flatten (p)
        [fc] y = Gemm <alpha = 0.5, transB = 1> (f, w, b)
    }"""
    numbers = {
        "k": graphs.weight(8, 3, 3, 3),
        "kb": graphs.feed(8),
        "w": graphs.weight(5, 8),
        "b": graphs.feed(5),
    }
    model = graphs.graph(text, numbers)
    found, _ = branches(model, 3)
    matrices = {b.layer: (graphs.feed(*b.down), graphs.feed(*b.up, seed=4)) for b in found}
    beside, merged = model.clone(), model.clone()
    add_branches(beside, found, {b.layer: (f"{b.layer}d", f"{b.layer}u") for b in found}, matrices)
    for branch in found:
        branch.merge(merged, *matrices[branch.layer])
    x = graphs.feed(2, 3, 9, 9)
    # float32 summation in another order
    np.testing.assert_allclose(
        graphs.run(merged, x=x)[0], graphs.run(beside, x=x)[0], rtol=1e-3, atol=1e-3
    )


def test_new_branches_change_nothing():
    model, feeds = graphs.cnn()
    work, _ = Adapt(rank=2)._with_branches(model, branches(model, 2)[0], seed=0)
    assert graphs.operators(work).count("Add") == 2
    np.testing.assert_array_equal(graphs.run(work, **feeds)[0], graphs.run(model, **feeds)[0])


@pytest.mark.parametrize(
    ("body", "numbers"),
    [
        ("[fc] y = Gemm <transB = 1> (x, w, b)", {"w": (6, 8), "b": (6,)}),
        ("[fc] y = Gemm (x, w, b)", {"w": (8, 6), "b": (6,)}),
        ("[fc] m = MatMul (x, w)\n y = Add (m, b)", {"w": (8, 6), "b": (6,)}),
        ("[fc] m = MatMul (x, w)\n y = Softmax <axis = -1> (m)", {"w": (8, 6)}),
        (
            "u = Unsqueeze (x, axes)\n [fc] c = Conv (u, w, b)\n y = Flatten (c)",
            {"w": (6, 8, 1, 1), "b": (6,)},
        ),
    ],
    ids=["gemm", "gemm-straight", "matmul-add", "softmax", "conv"],
)
def test_a_new_head_has_its_classes_and_the_output_follows(body, numbers):
    given = {name: graphs.feed(*shape) for name, shape in numbers.items()}
    text = f"g (float[n, 8] x) => (float[n, 6] y) {{ {body} }}"
    model = graphs.graph(text, given | {"axes": np.array([2, 3])})
    old = graphs.run(model, x=graphs.feed(3, 8))[0]
    assert replace_head(model, 9, "grow", seed=0).classes == 9
    new = graphs.run(model, x=graphs.feed(3, 8))[0]
    assert list(model.graph.outputs[0].shape)[1] == 9 and new.shape == (3, 9)
    onnx.checker.check_model(onnx.load_from_string(graph_bytes(model)), full_check=True)
    if "Softmax" not in body:
        np.testing.assert_array_equal(new[:, :6], old)
    replace_head(model, 2, "new", seed=0)
    assert graphs.run(model, x=graphs.feed(3, 8))[0].shape == (3, 2)


def test_a_reshape_to_the_old_number_of_classes_follows():
    text = """g (float[n, 8] x) => (float[n, 6] y) {
        [fc] m = MatMul (x, w)
        y = Reshape (m, to)
    }"""
    model = graphs.graph(text, {"w": graphs.feed(8, 6), "to": np.array([-1, 6])})
    replace_head(model, 3, "new", seed=0)
    assert graphs.run(model, x=graphs.feed(5, 8))[0].shape == (5, 3)


def test_a_new_head_learns_with_each_method():
    model, _ = graphs.cnn()
    for method in ("head", "lora"):
        chosen = Adapt(method=method, classes=4, steps=60, rate=0.02, rank=2)
        adapted = chosen.run(model.clone(), context(model)).model
        assert graphs.run(adapted, x=graphs.feed(1, 4, 12, 12))[0].shape == (1, 4)
        assert accuracy(adapted) > 0.9


def test_same_seed_gives_the_same_bytes_and_another_seed_others():
    model, _ = graphs.cnn()
    chosen = Adapt(method="lora", classes=4, steps=5)
    data = context(model)
    first, second = (graph_bytes(chosen.run(model.clone(), data).model) for _ in range(2))
    other = chosen.run(model.clone(), dataclasses.replace(data, seed=1)).model
    assert first == second != graph_bytes(other)


def test_a_rate_that_only_harms_leaves_the_weights_as_they_were():
    model, _ = graphs.cnn()
    learned = Adapt(steps=60, rate=0.01).run(model.clone(), context(model)).model
    # one step, since more of that size may part the classes by chance
    result = Adapt(steps=1, rate=1e4).run(learned.clone(), context(model))
    assert result.changed == 0 and graph_bytes(result.model) == graph_bytes(learned)


def test_refuses_data_without_labels():
    model, _ = graphs.cnn()
    data = dataclasses.replace(context(model), calibration_labels=None)
    with pytest.raises(PassError, match="no class labels.*named 'label'"):
        Adapt().run(model, data)
    with pytest.raises(PassError, match="needs data to learn from"):
        Adapt().run(model, graphs.context(model))


def test_refuses_a_replay_that_leaves_no_room_and_layers_without_lora():
    with pytest.raises(PassError, match="leaves no room"):
        Adapt(memory="m.npz", batch=1, replay=0.5)
    with pytest.raises(PassError, match="leaves no room"):
        Adapt(memory="m.npz", batch=4, replay=0.9)
    with pytest.raises(PassError, match="layers are for method 'lora'"):
        Adapt(method="head", layers=("fc1",))


def test_refuses_a_label_that_is_no_class():
    model, _ = graphs.cnn()
    with pytest.raises(PassError, match="sample 10: label 10 is no class: .* 10 apart, 0 to 9"):
        Adapt().run(model, context(model, classes=11))


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (np.array([-1]), r"label -1 is no class: .* 0 to 9; mend the label$"),
        (
            np.array([12]),
            r"mend the label, or set classes to 13 or more \(a bundle keeps its own\)$",
        ),
        (
            np.array([1.0]),
            r"sample 0 has labels of float64; convert them to integers, named 'label'",
        ),
        (np.array(["a"]), r"sample 0 has labels of <U1; convert them to integers"),
    ],
)
def test_advice_on_labels_is_what_helps(label, reason):
    model, _ = graphs.cnn()
    feeds, _ = separable(4)
    data = graphs.context(model, calibration=feeds, calibration_labels=[{"label": label}] * 4)
    with pytest.raises(PassError, match=reason):
        Adapt().run(model, data)


def test_refuses_labels_that_do_not_pair_off_with_rows():
    model, _ = graphs.cnn()
    feeds, _ = separable(4)
    labels = [{"label": np.array([1, 2])}] * 4
    data = graphs.context(model, calibration=feeds, calibration_labels=labels)
    with pytest.raises(PassError, match="labels for .* rows"):
        Adapt().run(model, data)


def test_refuses_a_graph_that_the_twin_cannot_run_and_names_the_node():
    text = """g (float[n, 8] x) => (float[n, 4] y) {
        [odd] h = Det_ (x)
        [fc] y = MatMul (h, w)
    }""".replace("Det_", "Bernoulli")
    model = graphs.graph(text, {"w": graphs.weight(8, 4)})
    samples = [{"x": graphs.feed(1, 8, seed=i)} for i in range(4)]
    labels = [{"label": np.array([i])} for i in range(4)]
    data = graphs.context(model, calibration=samples, calibration_labels=labels)
    with pytest.raises(PassError, match="'odd'"):
        Adapt().run(model, data)


@pytest.mark.parametrize(
    ("text", "numbers", "reason"),
    [
        ("g (float[n, 8] x) => (float[n, 8] y) { y = Relu (x) }", {}, "'y' comes from node"),
        (
            "g (float[n, 8] x) => (float[n, 4] y) { m = MatMul (x, w)\n [cut] y = Relu (m) }",
            {"w": (8, 4)},
            r"'cut' \(Relu\)",
        ),
        (
            "g (float[n, 8] x, float[8, 4] w) => (float[n, 4] y) { [fc] y = MatMul (x, w) }",
            {},
            "'fc'.*computed at run time",
        ),
        (
            "g (float[n, 8] x) => (float[n, 8] y, float[n, 8] z) { y = Relu (x)\n z = Tanh (x) }",
            {},
            "one float32 output.*'y', 'z'",
        ),
        (
            "g (float[n, 4, 1, 1] x) => (float[n, 4, 1, 1] y) { [gc] y = Conv <group = 2> (x, w) }",
            {"w": (4, 2, 1, 1)},
            "'gc' .* has groups, .*; expected one weight for each class",
        ),
    ],
)
def test_refuses_a_graph_without_a_head(text, numbers, reason):
    model = graphs.graph(text, {n: graphs.feed(*s) for n, s in numbers.items()})
    with pytest.raises(PassError, match=f"no head found.*{reason}"):
        find_head(model)


def image(body: str, output: str) -> ir.Model:
    """A convolution of 4 classes at 2 x 2 places, and what follows it."""
    text = f"""g (float[n, 3, 4, 4] x) => (float[{output}] y) {{
        [fc] c = Conv <strides = [2, 2]> (x, w)
        {body}
    }}"""
    shapes = {"flat": [-1, 4], "places": [0, 4, 4], "axes": [1], "both": [2, 3]}
    given = {name: np.array(numbers) for name, numbers in shapes.items()}
    model = graphs.graph(text, {"w": graphs.weight(4, 3, 1, 1)} | given)
    return Cleanup().run(model, graphs.context(model)).model  # with the shapes in between


@pytest.mark.parametrize(
    ("body", "output"),
    [
        ("[cut] y = Flatten (c)", "n, 16"),
        ("[cut] y = Reshape (c, flat)", "m, 4"),  # rows of places, not of classes
        ("[cut] f = Flatten (c)\n y = Softmax (f)", "n, 16"),
        ("[cut] y = ReduceMean <keepdims = 0> (c, axes)", "n, 2, 2"),
    ],
)
def test_refuses_a_head_whose_classes_are_mixed_with_places(body, output):
    with pytest.raises(PassError, match=r"no head found: .* 'cut' .* 4 classes of node 'fc'"):
        find_head(image(body, output))


@pytest.mark.parametrize(
    ("body", "output", "shape"),
    [
        ("y = Identity (c)", "n, 4, 2, 2", (3, 7, 2, 2)),
        ("y = Reshape (c, places)", "n, 4, 4", (3, 7, 4)),
        ("y = ReduceMean <keepdims = 0> (c, both)", "n, 4", (3, 7)),
        ("p = GlobalAveragePool (c)\n y = Squeeze (p, both)", "n, 4", (3, 7)),
    ],
)
def test_a_head_whose_classes_stay_apart_is_taken_and_replaced(body, output, shape):
    model = image(body, output)
    assert find_head(model).classes == 4
    replace_head(model, 7, "grow", seed=0)
    assert graphs.run(model, x=graphs.feed(3, 3, 4, 4))[0].shape == shape


def test_refuses_a_rank_larger_than_a_layer_and_layers_that_are_none():
    model, _ = graphs.cnn()
    reason = "adapt: node 'fc': rank 11 is larger than its weight, 32 -> 10, expected at most 10; "
    with pytest.raises(PassError, match=f"{reason}choose rank and layers"):
        branches(model, 11, layers=("fc",))
    with pytest.raises(PassError, match="adapt: no layer .* of rank 99.*'conv1'.*a lower rank"):
        branches(model, 99)
    with pytest.raises(
        PassError, match="'fcc', no node of the model, did you mean 'fc'.; give names"
    ):
        branches(model, 2, layers=("fcc",))
    _, skipped = branches(model, 11)
    assert {s.node for s in skipped} == {"depthwise", "fc"}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "hed"}, "no method 'hed', did you mean 'head'"),
        ({"head": "gro"}, "no head 'gro', did you mean 'grow'"),
        ({"steps": 0}, "steps is 0, expected above 0"),
        ({"rank": 0}, "rank is 0"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"keep_weight": -1.0}, "keep_weight is -1.0, expected 0 or more"),
        ({"replay": 1.0}, "replay is 1.0, expected from 0 to below 1"),
        ({"ewc_weight": 1.0}, "ewc_weight needs a memory"),
        ({"head": "grow"}, "head='grow' needs classes"),
    ],
)
def test_refuses_settings_that_make_no_sense(settings, reason):
    with pytest.raises(PassError, match=reason):
        Adapt(**settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rank": 4}, "rank is 4, which only method 'lora' uses, and method is 'full'; leave rank"),
        ({"alpha": 2.0, "method": "head"}, "alpha is 2.0.*method is 'head'.*or set method"),
        ({"head": "new"}, "head is 'new', which only a head of another size.*or set classes"),
        ({"replay": 0.5}, "replay is 0.5, which only a memory uses.*or set memory"),
        ({"temperature": 2.0}, "temperature is 2.0, which only keep_weight above 0 uses"),
    ],
)
def test_refuses_a_setting_that_would_have_no_effect_even_at_its_default(settings, reason):
    with pytest.raises(PassError, match=f"adapt: {reason}"):
        check_used(Adapt(**settings), tuple(settings))


def test_settings_that_have_an_effect_are_taken():
    for settings in (
        {"method": "lora", "rank": 2, "alpha": 4.0},
        {"classes": 3, "head": "grow", "keep_weight": 1.0, "temperature": 3.0},
        {"memory": "m.npz", "replay": 0.25, "batch": 8},
    ):
        check_used(Adapt(**settings), tuple(settings))


def test_refuses_to_shrink_a_head_that_is_to_grow():
    model, _ = graphs.cnn()
    with pytest.raises(PassError, match="10 classes and cannot grow to 4"):
        Adapt(classes=4, head="grow").run(model, context(model))
