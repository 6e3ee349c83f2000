"""The losses of recover, each against a computation of its own, and what they refuse."""

import dataclasses
import itertools

import graphs
import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgec.passes import PassError, Recover
from edgec.passes.curriculum import UNKNOWN, Example, examples, joined, judged, lessons
from edgec.passes.losses import Losses
from edgec.passes.relations import last_layer_inputs, relation_errors
from edgec.passes.responses import distance_of, response_error
from edgec.passes.teacher import load_teacher

OFF = Recover(response_weight=0, feature_weight=0, label_weight=0, distance_weight=1)


def only(**weights: float) -> Recover:
    return dataclasses.replace(OFF, **({"distance_weight": 0.0} | weights))


def classifier(width: int = 12, outputs: int = 5, last: str = "h") -> ir.Model:
    text = f"""net (float[n, 6] x) => (float[n, {outputs}] y) {{
        [one] {last} = Gemm (x, w1, b1)
        a = Relu ({last})
        [two] y = Gemm (a, w2, b2)
    }}"""
    weights = {
        "w1": graphs.weight(6, width, seed=width),
        "b1": graphs.feed(width, seed=1),
        "w2": graphs.weight(width, outputs, seed=width + 1),
        "b2": graphs.feed(outputs, seed=3),
    }
    return graphs.graph(text, weights)


def losses(settings: Recover, student: ir.Model, teacher: ir.Model, **labels: object) -> Losses:
    example = Example({"x": graphs.feed(4, 6)}, {k: np.asarray(v) for k, v in labels.items()})
    return Losses(student, teacher, settings, 0, example)


def tensors(**arrays: np.ndarray) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(a)) for name, a in arrays.items()}


def softmax(x: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    e = np.exp(x.astype(np.float64) / temperature)
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_response_is_the_softened_divergence_times_the_square_of_the_temperature(kind, temperature):
    a, b = graphs.feed(7, 5, seed=1), graphs.feed(7, 5, seed=2)
    p, q = softmax(b, temperature), softmax(a, temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(-1).mean()
    given = (a, b) if kind == "logits" else (softmax(a), softmax(b))
    found = response_error(kind, *(torch.from_numpy(v).double() for v in given), temperature)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_response_to_numbers_is_the_squared_error_over_the_teachers_mean_square():
    a, b = graphs.feed(3, 4, 2, seed=1), graphs.feed(3, 4, 2, seed=2)
    found = response_error("numbers", torch.from_numpy(a), torch.from_numpy(b), 4.0)
    assert float(found) == pytest.approx(((a - b) ** 2).mean() / (b**2).mean(), rel=1e-5)


def test_held_out_distance_of_classes_is_half_the_sum_of_the_differences():
    p, q = np.float32([[0.5, 0.5], [1.0, 0.0]]), np.float32([[0.5, 0.5], [0.0, 1.0]])
    assert float(distance_of("probabilities", *map(torch.from_numpy, (p, q)))) == 0.5


def test_distances_and_angles_are_those_of_the_paper():
    a, b = graphs.feed(5, 3, seed=1), graphs.feed(5, 2, 4, seed=2)

    def relations(x: np.ndarray) -> tuple[list[float], list[float]]:
        x = x.reshape(len(x), -1).astype(np.float64)
        pairs = [np.linalg.norm(x[i] - x[j]) for i, j in itertools.permutations(range(5), 2)]
        cosines = []
        for j in range(5):
            for i, k in itertools.product([v for v in range(5) if v != j], repeat=2):
                one, two = x[i] - x[j], x[k] - x[j]
                cosines.append(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
        return [d / np.mean(pairs) for d in pairs], cosines

    def huber(one: list[float], two: list[float]) -> float:
        error = np.abs(np.subtract(one, two))
        return float(np.where(error < 1, error**2 / 2, error - 0.5).mean())

    expected = [huber(*both) for both in zip(relations(a), relations(b), strict=True)]
    found = relation_errors(torch.from_numpy(a), torch.from_numpy(b))
    assert [float(v) for v in found] == pytest.approx(expected, rel=1e-4)


def test_equal_samples_give_finite_gradients():
    x = torch.ones(4, 3, requires_grad=True)
    distance, angle = relation_errors(x, torch.from_numpy(graphs.feed(4, 3)))
    (distance + angle).backward()
    assert torch.isfinite(x.grad).all()


def test_relations_are_blind_to_turns_and_sizes():
    x = torch.from_numpy(graphs.feed(6, 4))
    turned = 3.0 * x @ torch.linalg.qr(torch.from_numpy(graphs.feed(4, 4, seed=1)))[0] + 2.0
    assert max(float(e) for e in relation_errors(turned, x)) < 1e-8


def test_features_of_equal_width_are_compared_as_they_are():
    student, teacher = classifier(), classifier()
    made = losses(only(feature_weight=2.0), student, teacher)
    assert made.features == made.student_features == ("h",)
    assert made.parameters() == []
    a, b = graphs.feed(4, 12, seed=1), graphs.feed(4, 12, seed=2)
    found = made.loss(tensors(h=a), tensors(h=b), {})
    assert float(found) == pytest.approx(2 * ((a - b) ** 2).mean() / (b**2).mean(), rel=1e-5)


def test_features_of_another_width_go_through_a_learned_projection():
    made = losses(only(feature_weight=1.0), classifier(12), classifier(20))
    (projection,) = made.parameters()
    assert projection.shape == (20, 12)
    again = losses(only(feature_weight=1.0), classifier(12), classifier(20)).parameters()
    assert torch.equal(projection, again[0])  # the seed's
    a, b = graphs.feed(4, 12, seed=1), graphs.feed(4, 20, seed=2)
    found = made.loss(tensors(h=a), tensors(h=b), {})
    found.backward()
    wide = a @ projection.detach().numpy().T
    expected = ((wide - b) ** 2).mean() / (b**2).mean()
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    assert projection.grad.abs().sum() > 0


def test_a_projection_works_along_channels_of_images():
    made = losses(only(feature_weight=1.0), images(4), images(8))
    (projection,) = made.parameters()
    a, b = graphs.feed(2, 4, 5, 5, seed=1), graphs.feed(2, 8, 5, 5, seed=2)
    found = made.loss(tensors(c=a), tensors(c=b), {})
    wide = np.einsum("nchw,tc->nthw", a, projection.detach().numpy())
    assert float(found.detach()) == pytest.approx(((wide - b) ** 2).mean() / (b**2).mean())


def images(width: int) -> ir.Model:
    text = """net (float[n, 6] x) => (float[n] y) {
        i = Reshape (x, image)
        c = Conv <pads = [2, 2, 2, 2]> (i, k)
        y = ReduceMean <keepdims = 0> (c, inner)
    }"""
    shapes = {"image": np.array([-1, 6, 1, 1]), "inner": np.array([1, 2, 3])}
    return graphs.graph(text, shapes | {"k": graphs.weight(width, 6, 1, 1)})


def test_relations_are_taken_where_the_last_layer_reads():
    assert last_layer_inputs(classifier()) == ("a",)
    made = losses(only(angle_weight=3.0), classifier(12), classifier(20))
    assert made.features == made.student_features == ("a",)
    a, b = graphs.feed(4, 12, seed=1), graphs.feed(4, 20, seed=2)
    expected = 3 * relation_errors(*(torch.from_numpy(v) for v in (a, b)))[1]
    assert float(made.loss(tensors(a=a), tensors(a=b), {})) == pytest.approx(float(expected))


def test_labels_count_where_the_class_is_known():
    made = losses(only(label_weight=2.0), classifier(), classifier(), label=[0, 1, 2, 3])
    y = graphs.feed(4, 5)
    labels = tensors(label=np.array([3, UNKNOWN, 0, UNKNOWN]))
    expected = -np.log(softmax(y)[[0, 2], [3, 0]]).mean()
    assert float(made.loss(tensors(y=y), {}, labels)) == pytest.approx(2 * expected, rel=1e-5)
    unknown = tensors(label=np.full(4, UNKNOWN))
    assert float(made.loss(tensors(y=y), {}, unknown)) == 0.0


def test_another_column_of_integers_is_no_class_label():
    made = losses(
        only(response_weight=1.0, label_weight=1.0), classifier(), classifier(), camera=[0]
    )
    assert made.labels == ""


def test_labels_count_in_the_held_out_distance_as_in_the_loss():
    y, z = graphs.feed(4, 5, seed=1), graphs.feed(4, 5, seed=2)
    labels = {"label": np.array([0, 1, 2, 3])}
    settings = only(label_weight=0.5, response_weight=2.0)
    made = losses(settings, classifier(), classifier(), **labels)
    apart = np.abs(softmax(y) - softmax(z)).sum(-1).mean() / 2
    wrong = -np.log(softmax(y)[range(4), range(4)]).mean()
    found = made.distance(tensors(y=y), tensors(y=z), tensors(**labels))
    assert float(found) == pytest.approx(2 * apart + 0.5 * wrong, rel=1e-5)
    assert float(made.distance(tensors(y=y), tensors(y=z), {})) == pytest.approx(apart, rel=1e-5)


def test_labels_that_are_no_classes_of_the_output_are_refused():
    made = losses(only(label_weight=1.0), classifier(), classifier(), label=[0, 1, 2, 3])
    y = tensors(y=graphs.feed(4, 5))
    with pytest.raises(PassError, match="no class of output 'y': 4 integers from 0 to 9"):
        made.loss(y, {}, tensors(label=np.array([0, 1, 9, 3])))
    with pytest.raises(PassError, match="6 integers .* for 4 rows"):
        made.loss(y, {}, tensors(label=np.array([0, 1, 1, 3, 2, 2])))


def test_labels_alone_without_labels_are_refused():
    with pytest.raises(PassError, match="only label_weight is above 0"):
        losses(only(label_weight=1.0), classifier(), classifier())


def test_relations_need_three_samples_at_once():
    made = losses(only(distance_weight=1.0), classifier(), classifier())
    made.check_rows(3)
    with pytest.raises(PassError, match="relations need 3 samples at once, a step sees 2"):
        made.check_rows(2)
    losses(only(response_weight=1.0), classifier(), classifier()).check_rows(1)


def test_relations_need_a_last_layer():
    model = graphs.graph("net (float[n, 6] x) => (float[n, 6] y) { y = Relu (x) }", {})
    with pytest.raises(PassError, match="none lies before output 'y'"):
        losses(only(distance_weight=1.0), model, model)


def test_a_teacher_that_answers_in_another_shape_is_refused():
    with pytest.raises(PassError, match=r"'y' has shape \[4, 5\], the teacher's has \[4, 7\]"):
        losses(Recover(), classifier(), classifier(outputs=7))


def test_a_teacher_without_shared_names_is_refused_where_features_are_asked_for():
    stranger = classifier(last="other")
    with pytest.raises(PassError, match="teacher t.onnx has no inner value .*feature_weight=0"):
        losses(Recover(teacher="t.onnx"), classifier(), stranger)
    made = losses(Recover(teacher="t.onnx", feature_weight=0), classifier(), stranger)
    assert made.features == ()


def test_doubt_is_what_the_likeliest_class_lacks():
    made = losses(Recover(), classifier(), classifier())
    y = np.log(np.float32([[0.9, 0.025, 0.025, 0.025, 0.025], [0.2, 0.2, 0.2, 0.2, 0.2]]))
    assert made.doubt(tensors(y=y)) == pytest.approx((0.1 + 0.8) / 2, rel=1e-5)
    numbers = graphs.graph("net (float[n, 6] x) => (float[n, 6] y) { y = Relu (x) }", {})
    with pytest.raises(PassError, match="no output is of classes"):
        losses(Recover(), numbers, numbers).doubt({})


def numbered(count: int) -> list[Example]:
    return [Example({"x": np.full((1, 2), i, np.float32)}) for i in range(count)]


def drawn(settings: Recover, doubts: list[float], steps: int) -> list[list[int]]:
    taught = lessons(numbered(8), settings, np.random.default_rng(0), doubts)
    return [[int(e.feeds["x"][0, 0]) for e in next(taught)] for _ in range(steps)]


def test_easy_samples_come_first_and_all_after_half_of_the_steps():
    doubts = [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    taught = drawn(Recover(steps=8, batch=4, splice=False), doubts, 8)
    assert set(taught[0]) == {6, 7}
    assert set().union(*taught[4:]) == set(range(8))
    known = [len(set().union(*taught[: i + 1])) for i in range(8)]
    assert known == sorted(known) and known[1] < 8


def test_without_doubts_every_sample_comes_as_often_as_any():
    taught = drawn(Recover(steps=4, batch=4, splice=False), [], 4)
    assert sorted(sum(taught, [])) == sorted([*range(8)] * 2)


def test_held_out_samples_of_a_sorted_folder_are_judged_in_all_their_classes():
    held = [
        Example({"x": np.zeros((1, 2), np.float32)}, {"label": np.array([i // 20])})
        for i in range(200)
    ]
    chosen = judged(held, Recover(), 0)
    counts = np.bincount([int(one.labels["label"][0]) for one in chosen], minlength=10)
    assert len(chosen) == 48 and counts.min() >= 4 and counts.max() <= 5
    few = numbered(7)
    assert judged(few, Recover(splice=False), 0) == few


def test_labels_that_are_no_integers_are_left_out_and_joined_samples_have_none():
    feeds = [{"x": graphs.feed(1, 2, 6)}, {"x": graphs.feed(1, 2, 6, seed=1)}]
    labels = [{"label": np.array(i), "text": np.array("a")} for i in range(2)]
    both = examples(feeds, labels)
    assert [set(example.labels) for example in both] == [{"label"}, {"label"}]
    assert joined(*both, 0.5).labels["label"] == UNKNOWN
    assert [example.labels for example in examples(feeds, None)] == [{}, {}]


def test_a_teacher_takes_over_the_names_of_its_student(tmp_path):
    teacher = classifier(20)
    values = {v.name: v for v in (*teacher.graph.inputs, *teacher.graph.outputs)}
    inner = teacher.graph[0].outputs[0]
    inner.name = "y"  # stands in the way
    values["y"].name, values["x"].name = "scores", "pixels"
    ir.save(teacher, tmp_path / "t.onnx", external_data="weights.bin")
    student = classifier()
    loaded = load_teacher(tmp_path / "t.onnx", student)
    x = graphs.feed(3, 6)
    assert np.array_equal(graphs.run(loaded, x=x)[0], graphs.run(teacher, pixels=x)[0])
    assert [v.name for v in loaded.graph.outputs] == ["y"]


def test_inputs_that_swap_their_names_keep_their_places(tmp_path):
    text = "net (float[n] {0}, float[n] {1}) => (float[n] y) {{ y = Sub ({0}, {1}) }}"
    ir.save(graphs.graph(text.format("b", "c"), {}), tmp_path / "t.onnx")
    student = graphs.graph(text.format("c", "d"), {})
    loaded = load_teacher(tmp_path / "t.onnx", student)
    found = graphs.run(loaded, c=np.float32([5]), d=np.float32([3]))
    assert found[0].tolist() == [2]


def test_a_file_that_is_no_teacher_is_refused(tmp_path):
    path = tmp_path / "t.onnx"
    with pytest.raises(PassError, match="no such file"):
        load_teacher(path, classifier())
    path.write_bytes(b"no model")
    with pytest.raises(PassError, match="not an ONNX file"):
        load_teacher(path, classifier())
    ir.save(graphs.graph("n (float[n] a, float[n] b) => (float[n] y) { y = Sub (a, b) }", {}), path)
    with pytest.raises(PassError, match="inputs are 2, the model has 1"):
        load_teacher(path, classifier())
    ir.save(graphs.graph("n (int64[n] x) => (int64[n] y) { y = Add (x, x) }", {}), path)
    with pytest.raises(PassError, match="'x' is INT64, the model's 'x' is FLOAT"):
        load_teacher(path, classifier())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", 0.0, "temperature is 0.0, expected above 0"),
        ("angle_weight", -1.0, "angle_weight is -1.0, expected 0 or more"),
        ("order", "easy-frist", "no order 'easy-frist', did you mean 'easy-first'"),
    ],
)
def test_settings_out_of_range_are_refused(field, value, message):
    with pytest.raises(PassError, match=message):
        Recover(**{field: value})


def test_no_loss_at_all_is_refused():
    with pytest.raises(PassError, match="nothing to learn from"):
        only()
