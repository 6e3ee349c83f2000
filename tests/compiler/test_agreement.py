"""Which rule a model is judged by, and what each rule calls the same answer."""

from __future__ import annotations

import pathlib
from types import SimpleNamespace
from typing import Any

import bundle_samples
import graphs
import numpy as np
import onnx_ir as ir
import pytest

import edgec
from edgec.agreement import AgreementRule, Same
from edgec.data import Sample
from edgec.devices.check import Samples, verify_on
from edgec.passes import Cleanup
from edgec.promise import Limits
from edgec.targets import load_target
from edgec.trial import Judge
from edgec.verify import verify_bundle
from edgec_runtime.manifest import Graph, Value

HEAD = {"w": graphs.weight(8, 5), "b": graphs.feed(5)}
CLOSE = AgreementRule()
ARGMAX = AgreementRule(Same.ARGMAX, "y")
DECISIONS = AgreementRule(Same.DECISIONS, "y")


def ends_in(nodes: str, outputs: str = "float[batch, 5] y") -> ir.Model:
    return graphs.graph(f"g (float[batch, 8] x) => ({outputs}) {{ {nodes} }}", HEAD)


@pytest.mark.parametrize(
    ("nodes", "recognised"),
    [
        ("y = Gemm (x, w, b)", True),
        ("m = MatMul (x, w) y = Add (m, b)", True),
        ("m = MatMul (x, w) y = Softmax (m)", True),
        ("m = MatMul (x, w) s = Softmax (m) y = Identity (s)", True),
        ("m = MatMul (x, w) s = Softmax <axis = 0> (m) y = Transpose (s)", False),
        ("m = MatMul (x, w) y = Relu (m)", False),
        ("m = MatMul (x, w) y = Tanh (m)", False),
        ("m = MatMul (x, w) y = LpNormalization (m)", False),  # an embedding
    ],
)
def test_logits_are_recognised_by_their_last_node(nodes: str, recognised: bool) -> None:
    model = ends_in(nodes)
    assert AgreementRule.of_model(model, declared=False) == (ARGMAX if recognised else CLOSE)
    assert AgreementRule.of_model(model, declared=True) == ARGMAX


@pytest.mark.parametrize(
    "nodes",
    [
        "y = Sigmoid (m)",
        "y = HardSigmoid <alpha = 0.2> (m)",
        "s = Sigmoid (m) y = Identity (s)",
        "s = Sigmoid (m) y = Cast <to = 1> (s)",
        "s = Sigmoid (m) t = Transpose (s) y = Transpose (t)",
        "s = Sigmoid (m) y = Squeeze (s)",
    ],
)
def test_an_output_that_ends_in_a_sigmoid_is_judged_by_its_decisions(nodes: str) -> None:
    model = ends_in(f"m = MatMul (x, w) {nodes}")
    assert AgreementRule.of_model(model, declared=False) == DECISIONS
    assert AgreementRule.of_model(model, declared=True) == ARGMAX  # the user's word comes first


@pytest.mark.parametrize(
    "nodes",
    [
        "s = Sigmoid (m) y = Mul (s, m)",  # SiLU
        "s = Sigmoid (m) y = Concat <axis = 0> (s, m)",  # a detector's boxes beside its scores
        "s = Sigmoid (m) y = Softplus (s)",
    ],
)
def test_a_sigmoid_that_is_not_the_answer_decides_nothing(nodes: str) -> None:
    assert AgreementRule.of_model(ends_in(f"m = MatMul (x, w) {nodes}"), declared=False) == CLOSE


def test_one_probability_a_row_is_a_decision_even_with_labels() -> None:
    text = "g (float[batch, 8] x) => (float[batch, 1] y) { m = MatMul (x, w) y = Sigmoid (m) }"
    model = graphs.graph(text, {"w": graphs.weight(8, 1)})
    assert AgreementRule.of_model(model, declared=True) == DECISIONS


@pytest.mark.parametrize(("axis", "recognised"), [(-1, True), (3, True), (1, False), (2, False)])
def test_classes_along_another_axis_than_the_last_are_not_taken_for_class_scores(
    axis: int, recognised: bool
) -> None:
    nodes = f"y = Softmax <axis = {axis}> (x)"
    model = graphs.graph(f"g (float[n, 3, 8, 8] x) => (float[n, 3, 8, 8] y) {{ {nodes} }}", {})
    assert (AgreementRule.of_model(model, declared=False).class_scores == "y") is recognised


def test_one_number_or_two_outputs_are_no_classifier() -> None:
    text = "g (float[batch, 8] x) => (float[batch, 1] y) { y = MatMul (x, w) }"
    narrow = graphs.graph(text, {"w": graphs.weight(8, 1)})
    assert AgreementRule.of_model(narrow, declared=True) == CLOSE
    model, _ = graphs.lstm()
    assert AgreementRule.of_model(model, declared=True) == CLOSE


def test_decisions_need_the_only_float_output() -> None:
    nodes = "m = MatMul (x, w) y = Sigmoid (m) "
    two = ends_in(nodes + "z = Identity (m)", "float[batch, 5] y, float[batch, 5] z")
    assert AgreementRule.of_model(two, declared=False) == CLOSE
    beside = ends_in(nodes + "z = ArgMax <axis = 1> (m)", "float[batch, 5] y, int64[batch, 1] z")
    assert AgreementRule.of_model(beside, declared=False) == DECISIONS


def test_only_argmax_has_class_scores() -> None:
    assert [r.class_scores for r in (ARGMAX, DECISIONS, CLOSE)] == ["y", None, None]


def agreement(rule: AgreementRule, expected: Any, actual: Any) -> float:
    return rule.agreement(
        {"y": np.asarray(expected, np.float32)}, {"y": np.asarray(actual, np.float32)}
    )


def test_decisions_agree_by_intersection_over_union() -> None:
    # above 0.5 in the reference, in the bundle: 3, 2; in both 2, in either 3
    expected, actual = [[0.9, 0.6, 0.7, 0.1]], [[0.51, 0.4, 0.99, 0.49]]
    assert agreement(DECISIONS, expected, actual) == pytest.approx(2 / 3)
    assert agreement(DECISIONS, actual, expected) == pytest.approx(2 / 3)
    assert agreement(DECISIONS, [[0.9, 0.1]], [[0.1, 0.9]]) == 0.0
    assert agreement(DECISIONS, [[0.9]], [[0.9]]) == 1.0


def test_what_nobody_decides_for_is_agreed_on() -> None:
    assert agreement(DECISIONS, [[0.0, 0.5]], [[0.3, 0.2]]) == 1.0  # 0.5 itself is not above
    assert agreement(DECISIONS, [[0.0, 0.5]], [[0.3, 0.6]]) == 0.0


def test_the_noise_of_an_empty_map_is_no_disagreement() -> None:
    expected = np.full((1, 1, 8, 8), 0.01)
    expected[..., 2:4, 2:4] = 0.9
    noisy = expected + 0.1
    assert agreement(DECISIONS, expected, noisy) == 1.0
    assert agreement(CLOSE, expected, noisy) == 0.0


@pytest.mark.parametrize("rule", [ARGMAX, DECISIONS, CLOSE])
@pytest.mark.parametrize("answer", [[[np.nan, 0.9, 0.0]], [[0.2, 0.9]]])
def test_nan_and_another_shape_agree_with_nothing(rule: AgreementRule, answer: Any) -> None:
    assert agreement(rule, [[0.2, 0.9, 0.0]], answer) == 0.0
    assert agreement(rule, [[0.2, 0.9, 0.0]], [[0.2, 0.9, 0.0]]) == 1.0


@pytest.mark.parametrize(
    ("results", "outputs", "expected"),
    [
        ({"agreement_rule": "same argmax"}, "y", ARGMAX),
        ({"agreement_rule": "same decisions at 0.5 (IoU)"}, "y", DECISIONS),
        ({"agreement_rule": "relative error under 5 %"}, "y", CLOSE),
        ({"agreement_rule": "same argmax"}, "yz", CLOSE),
        ({"agreement_rule": "same decisions at 0.5 (IoU)"}, "yz", CLOSE),
        ({"agreement_rule": 5}, "y", CLOSE),
        ({}, "y", CLOSE),
    ],
)
def test_the_rule_is_read_from_the_words_in_a_bundle(
    results: Any, outputs: str, expected: AgreementRule
) -> None:
    values = (
        *(Value(n, "float32", ("batch", 4)) for n in outputs),
        Value("i", "int64", ("batch",)),
    )
    graph = Graph("graph.onnx", (Value("x", "float32", ("batch", 8)),), values)
    manifest = bundle_samples.sample_manifest(results=results, graphs={"main": graph})
    assert AgreementRule.of_bundle(manifest) == expected


def test_build_verify_and_devices_judge_a_mask_alike(tmp_path: pathlib.Path) -> None:
    text = """mask (float[4, 256] x) => (float[4, 64] y) {
        [a] m = MatMul (x, k1)
        r = Relu (m)
        [b] n = MatMul (r, k2)
        y = Sigmoid (n)
    }"""
    weights = {"k1": graphs.weight(256, 256), "k2": graphs.weight(256, 64, seed=1)}
    ir.save(graphs.graph(text, weights), tmp_path / "mask.onnx")
    feeds = [{"x": graphs.feed(4, 256, seed=i)} for i in range(6)]
    np.savez(tmp_path / "data.npz", x=np.stack([given["x"] for given in feeds]))
    bundle = tmp_path / "mask.edgec"
    report = edgec.build(
        tmp_path / "mask.onnx",
        target="x86-64",
        output=bundle,
        recipe="cleanup,fuse,quantize-dynamic,lower",
        evaluation=lambda: feeds,
        verify=False,
    )
    assert report.agreement_rule == "same decisions at 0.5 (IoU)"
    assert 0.9 < report.agreement < 1.0  # some of the 1536 decisions lie at the threshold
    verdict = verify_bundle(bundle, evaluation=str(tmp_path / "data.npz"))
    assert verdict.judgement.rule == report.agreement_rule
    assert verdict.judgement.agreement == pytest.approx(report.agreement)
    [there] = verify_on(bundle, ["native"], Samples(tuple(feeds), len(feeds)))
    assert there.judgement.rule == report.agreement_rule
    assert there.judgement.agreement == pytest.approx(report.agreement)


def test_a_trial_of_a_mask_is_judged_by_its_decisions() -> None:
    head = "g (float[4, 64] x) => (float[4, 64] y)"
    reference = graphs.graph(f"{head} {{ y = Sigmoid (x) }}", {})
    sharper = graphs.graph(f"{head} {{ m = Add (x, x) y = Sigmoid (m) }}", {})
    samples = [Sample({"x": graphs.feed(4, 64, seed=i)}, {}) for i in range(3)]
    validation = SimpleNamespace(samples=lambda: iter(samples))
    inputs: Any = SimpleNamespace(checks=[samples[0].feeds], validation=validation)
    judge = Judge(reference, load_target("arm64"), inputs, Limits())
    cleaned = SimpleNamespace(changed=1)
    steps: Any = [SimpleNamespace(model=sharper, size_bytes=0, pass_=Cleanup(), result=cleaned)]
    trial = judge(("cleanup",), 0, steps)
    assert trial.drop == 0.0 and trial.sqnr_db < 20.0  # an error of more than 10 %
