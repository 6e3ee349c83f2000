"""Which outputs are of classes, and which labels count."""

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from edgec.agreement import AgreementRule
from edgec.passes import QuantizeStatic, Recover
from edgec.passes.curriculum import Example
from edgec.passes.losses import Losses
from edgec.passes.responses import kind_of

X = "net (float[n, 6] x) => (float[n, 3] y)"
IMAGE = "net (float[n, 6, 4, 4] x) => (float[n, 3] y)"


@pytest.mark.parametrize(
    ("text", "numbers", "kind"),
    [
        (X + " { y = Gemm (x, w) }", {"w": (6, 3)}, "logits"),
        (X + " { m = MatMul (x, w)\n y = Add (m, b) }", {"w": (6, 3), "b": (3,)}, "logits"),
        (X + " { m = MatMul (x, w)\n y = Softmax (m) }", {"w": (6, 3)}, "probabilities"),
        (X + " { m = MatMul (x, w)\n y = LogSoftmax (m) }", {"w": (6, 3)}, "logits"),
        (X + " { m = MatMul (x, w)\n y = Softmax <axis = 1> (m) }", {"w": (6, 3)}, "probabilities"),
        (X + " { m = MatMul (x, w)\n y = Softmax <axis = 0> (m) }", {"w": (6, 3)}, "numbers"),
        ("net (float[n, 6] x) => (float[n, 1] y) { y = Gemm (x, w) }", {"w": (6, 1)}, "numbers"),
        (X + " { s = MatMul (x, w)\n r = Relu (s)\n y = Add (r, r) }", {"w": (6, 3)}, "numbers"),
        (
            "net (float[n, 6] x) => (float[n, 3] y, float[n, 3] z) "
            "{ y = Gemm (x, w)\n z = Gemm (x, w) }",
            {"w": (6, 3)},
            "numbers",
        ),
        (
            "net (float[n, 6, 4, 4] x) => (float[n, 3, 4, 4] y) "
            "{ c = Conv (x, w)\n y = Softmax <axis = 1> (c) }",
            {"w": (3, 6, 1, 1)},
            "numbers",
        ),
    ],
)
def test_outputs_of_classes_are_told_from_numbers(text, numbers, kind):
    model = graphs.graph(text, {n: graphs.weight(*shape) for n, shape in numbers.items()})
    sole = len(model.graph.outputs) == 1
    assert kind_of(model.graph.outputs[0], sole=sole) == kind
    if kind != "numbers":  # as the build judges
        assert AgreementRule.of_model(model, declared=False).class_scores == "y"


@pytest.mark.parametrize("make", [graphs.mlp, graphs.cnn])
def test_the_kind_of_a_classifier_stays_when_it_is_quantized(make):
    reference, feeds = make()
    context = graphs.context(reference, calibration=[feeds])
    model = QuantizeStatic().run(reference.clone(), context).model
    assert "QuantizeLinear" in graphs.operators(model)
    assert kind_of(model.graph.outputs[0]) == "logits"


def test_a_product_of_integers_with_a_bias_gives_logits():
    text = f"""{X} {{
        q, s, z = DynamicQuantizeLinear (x)
        i = MatMulInteger (q, w, z)
        f = Cast <to = 1> (i)
        m = Mul (f, s)
        y = Add (m, b)
    }}"""
    weights = {"w": np.ones((6, 3), np.int8), "b": graphs.feed(3)}
    assert kind_of(graphs.graph(text, weights).graph.outputs[0]) == "logits"


def pooled() -> ir.Model:
    """A classifier that ends in a convolution, pooling and Flatten."""
    text = f"{IMAGE} {{ c = Conv (x, w)\n p = GlobalAveragePool (c)\n y = Flatten (p) }}"
    return graphs.graph(text, {"w": graphs.weight(3, 6, 1, 1)})


def found(model: ir.Model, settings: Recover, shape: tuple[int, ...], **labels: object) -> Losses:
    given = {k: np.asarray(v) for k, v in labels.items()}
    return Losses(model, model, settings, 0, Example({"x": graphs.feed(*shape)}, given))


def test_labels_make_classes_of_a_head_that_passes_for_numbers():
    used = found(pooled(), Recover(), (4, 6, 4, 4), label=[0, 1, 2, 0])
    assert used.labels == "label" and used.of_classes
    assert used.unused("label", np.dtype("int64")) == ""
    tokens = graphs.graph(
        "net (float[n, 5, 6] x) => (float[n, 5, 3] y) { y = MatMul (x, w) }",
        {"w": graphs.weight(6, 3)},
    )
    assert found(tokens, Recover(), (1, 5, 6), label=[0, 1, 2, 0, 1]).labels == "label"
    for model, settings, shape, labels in (
        (pooled(), Recover(), (4, 6, 4, 4), {}),
        (pooled(), Recover(label_weight=0), (4, 6, 4, 4), {"label": [0, 1, 2, 0]}),
        (pooled(), Recover(), (4, 6, 4, 4), {"label": [0, 1]}),  # not one for each row
        (tokens, Recover(), (1, 5, 6), {"label": [1]}),
    ):
        left = found(model, settings, shape, **labels)
        assert left.labels == "" and not left.of_classes


def test_of_several_outputs_labels_of_its_name_make_one_a_classifier():
    model = graphs.graph(
        "net (float[n, 6] x) => (float[n, 3] y, float[n, 3] z) "
        "{ y = Gemm (x, w)\n z = Gemm (x, w) }",
        {"w": graphs.weight(6, 3)},
    )
    assert found(model, Recover(), (4, 6), z=[0, 1, 2, 0]).labels == "z"
    assert not found(model, Recover(), (4, 6), label=[0, 1, 2, 0]).of_classes


def test_why_labels_do_not_count_is_told():
    numbers = graphs.graph("net (float[n, 6] x) => (float[n, 6] y) { y = Relu (x) }", {})
    made = found(numbers, Recover(), (4, 6), label=[0, 1, 2, 0])
    assert "no output is of classes" in made.unused("label", np.dtype("int64"))
    assert "'label' is float64" in made.unused("label", np.dtype("float64"))
    two = graphs.graph(
        "net (float[n, 6] x) => (float[n, 6] y, float[n, 6] z) "
        "{ y = Softmax (x)\n z = Softmax (x) }",
        {},
    )
    made = found(two, Recover(), (4, 6), label=[0, 1, 2, 0])
    assert "outputs 'y', 'z' are of classes" in made.unused("label", np.dtype("int64"))
