"""Recover with a teacher of its own, with labels, and after pruning."""

import dataclasses
from types import SimpleNamespace

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from edgec.passes import PassError, PruneMagnitude, QuantizeStatic, Recover
from edgec_runtime.bundle import read_bundle


def two_layers(width: int, seed: int) -> ir.Model:
    text = """net (float[n, 16] x) => (float[n, 6] y) {
        [one] h = Gemm (x, w1, b1)
        a = Relu (h)
        [two] y = Gemm (a, w2, b2)
    }"""
    weights = {
        "w1": graphs.weight(16, width, seed=seed),
        "b1": graphs.feed(width, seed=seed + 1) / 4,
        "w2": 3 * graphs.weight(width, 6, seed=seed + 2),
        "b2": graphs.feed(6, seed=seed + 3) / 4,
    }
    return graphs.graph(text, weights)


def rows(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    return [{"x": graphs.feed(8, 16, seed=seed + i)} for i in range(count)]


def agreement(model: ir.Model, other: ir.Model) -> float:
    """Share of samples that training never saw to which both give the same class."""
    x = graphs.feed(500, 16, seed=77)
    classes = [graphs.run(m, x=x)[0].argmax(1) for m in (model, other)]
    return float((classes[0] == classes[1]).mean())


@pytest.mark.parametrize(
    "weights",
    [
        {"feature_weight": 0.0, "temperature": 2.0},
        {"feature_weight": 1.0},
        {"feature_weight": 0.0, "distance_weight": 1.0, "angle_weight": 2.0},
    ],
    ids=["response", "feature", "relation"],
)
def test_a_smaller_student_learns_from_a_teacher_file(tmp_path, weights):
    teacher, student = two_layers(32, 0), two_layers(12, 50)
    ir.save(teacher, tmp_path / "teacher.onnx")
    context = graphs.context(student, calibration=rows(32, 0), validation=rows(8, 300))
    chosen = Recover(
        teacher=str(tmp_path / "teacher.onnx"), steps=150, rate=2.0, bias_rate=0.05, **weights
    )
    before = agreement(student, teacher)
    result = chosen.run(student.clone(), context)
    assert agreement(result.model, teacher) > before + 0.3
    # what was learned beside the student is not shipped
    assert list(result.model.graph.initializers) == list(student.graph.initializers)


def test_labels_alone_teach_too(tmp_path):
    teacher, student = two_layers(32, 0), two_layers(12, 50)

    def labels(data):
        return [{"label": graphs.run(teacher, **feeds)[0].argmax(1)} for feeds in data]

    data, held_out = rows(32, 0), rows(8, 300)
    context = graphs.context(
        student,
        calibration=data,
        validation=held_out,
        calibration_labels=labels(data),
        validation_labels=labels(held_out),
    )
    chosen = Recover(
        response_weight=0, feature_weight=0, label_weight=1, steps=150, rate=2.0, bias_rate=0.05
    )
    result = chosen.run(student.clone(), context)
    assert agreement(result.model, teacher) > agreement(student, teacher) + 0.3


def test_relations_of_single_samples_are_refused():
    model = two_layers(12, 50)
    context = graphs.context(model, calibration=[{"x": graphs.feed(1, 16)}])
    with pytest.raises(PassError, match="relations need 3 samples at once"):
        Recover(distance_weight=1.0).run(model, context)


@pytest.mark.parametrize("quantize", [False, True], ids=["float", "int8"])
def test_pruned_weights_stay_zero(quantize):
    reference = two_layers(32, 0)
    context = graphs.context(reference, calibration=rows(16, 0), validation=rows(4, 300))
    pruned = PruneMagnitude(sparsity=0.6, min_weights=10).run(reference.clone(), context).model
    model = pruned
    if quantize:
        chosen = QuantizeStatic(rounding="nearest")
        model = chosen.run(pruned.clone(), context).model
        context = dataclasses.replace(context, unquantized=pruned)

    def zeros(of: ir.Model) -> np.ndarray:
        values = [v for n, v in of.graph.initializers.items() if n in names]
        return np.concatenate([v.const_value.numpy().ravel() == 0 for v in values])

    names = ("w1_quantized", "w2_quantized") if quantize else ("w1", "w2")
    was_pruned = np.concatenate(
        [pruned.graph.initializers[n].const_value.numpy().ravel() == 0 for n in ("w1", "w2")]
    )
    result = Recover(steps=40, rate=2.0, bias_rate=0.01).run(model.clone(), context)
    assert result.changed
    assert zeros(result.model)[was_pruned].all()
    assert f"{was_pruned.sum()} pruned weights stayed zero" in result.findings


def test_pruned_weights_are_refused_where_several_processes_train():
    model = two_layers(32, 0)
    context = graphs.context(model, calibration=rows(4, 0), workers=SimpleNamespace(size=2))
    pruned = PruneMagnitude(min_weights=10).run(model, context).model
    with pytest.raises(PassError, match="352 weights are pruned, and several processes"):
        Recover(rate=1.0).run(pruned, context)


def test_a_build_takes_teacher_and_labels(tmp_path):
    import edgec

    teacher, student = two_layers(32, 0), two_layers(12, 50)
    for name, model in (("teacher", teacher), ("student", student)):
        ir.save(model, tmp_path / f"{name}.onnx")

    def data(count: int, seed: int):
        def feeds():
            for sample in rows(count, seed):
                yield sample | {"label": graphs.run(teacher, **sample)[0].argmax(1)}

        return feeds

    report = edgec.build(
        str(tmp_path / "student.onnx"),
        target="x86-64",
        output=str(tmp_path / "out"),
        calibration=data(32, 0),
        evaluation=data(16, 700),
        metric="top1",
        recipe="cleanup,fuse,recover,lower",
        settings=[
            f"recover.teacher={tmp_path / 'teacher.onnx'}",
            *("recover.steps=150", "recover.rate=2.0", "recover.bias_rate=0.05"),
            *("recover.label_weight=1.0", "recover.temperature=2.0"),
        ],
        verify=False,
    )
    assert report.metric.bundle > report.metric.reference + 0.3
    [bundle] = (tmp_path / "out").glob("*.edgec")
    manifest = read_bundle(bundle).manifest
    assert 'teacher = "teacher.onnx"' in manifest.provenance["recipe"]  # no folder of this machine
