"""Reference and bundle on disturbed inputs: what can be judged, and what the figures are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from digits_cnn import digits

import edgec
from edgec.data import Sample
from edgec.errors import DataError, EdgecError, PassError
from edgec.metrics import METRICS
from edgec.passes import PruneMagnitude, QuantizeStatic
from edgec.promise import Limits, judge
from edgec.report import Disturbance, Robustness
from edgec.robustness import RobustnessPlan, measure_robustness, plan_robustness
from edgec.runners import reference_runner
from edgec.scrutiny import Scrutiny, check_asked, examine, scrutiny_from
from edgec.shapes import input_specs


def samples(count: int = 40, **labels: Any) -> list[Sample]:
    data = digits()
    return [
        Sample(
            {"x": data.test[i : i + 1]},
            labels or {"label": data.labels[i : i + 1]},
            f"evaluation data, sample {i}",
        )
        for i in range(count)
    ]


def plan(model: ir.Model, given: list[Sample], **changes: Any) -> RobustnessPlan:
    options: dict[str, Any] = {
        "count": len(given),
        "most": 500,
        "reference": model,
        "output": "y",
        "inputs": input_specs(model),
        "image": None,
        "metric": None,
        **changes,
    }
    epsilon = options.pop("epsilon", 0.1)
    return plan_robustness(epsilon, given, run_reference=reference_runner(model), **options)


def measured(bundle: ir.Model, gradients: ir.Model | None, **changes: Any) -> Robustness:
    data = digits()
    return measure_robustness(
        plan(data.model, samples(60), **changes),
        reference=data.model,
        bundle=gradients,
        run_reference=reference_runner(data.model),
        run_bundle=reference_runner(bundle),
        seed=0,
    )


@pytest.fixture(scope="module")
def pruned() -> ir.Model:
    data = digits()
    context = graphs.context(data.model)
    return PruneMagnitude(sparsity=0.6).run(data.model.clone(), context).model


def test_a_bundle_that_computes_the_same_loses_nothing() -> None:
    data = digits()
    found = measured(data.model, data.model)
    kinds = ["none", "fgsm", "pgd", "noise", "blur", "contrast"]
    assert [row.kind for row in found.rows] == kinds
    assert all(row.drop == 0.0 for row in found.rows)
    clean, fgsm, pgd = (found.rows[i].reference for i in range(3))
    assert pgd <= fgsm < clean - 0.2  # the attacks bite
    assert (found.metric, found.samples, found.on_bundle) == ("top1", 60, True)
    assert (found.low, found.high, found.range_from) == (0.0, 1.0, "the values in the data")


@pytest.mark.slow
def test_a_bundle_meets_attacks_by_its_own_gradients_and_by_the_references(
    pruned: ir.Model,
) -> None:
    own, transfer = measured(pruned, pruned), measured(pruned, None)
    assert own.on_bundle and not transfer.on_bundle
    assert transfer.gradients.startswith("reference alone (transfer to the bundle): its graph")
    pgd, carried = own.rows[2], transfer.rows[2]
    assert pgd.bundle < carried.bundle - 0.02  # what transfer alone would have missed
    assert pgd.reference <= carried.reference
    assert own.rows[3:] == transfer.rows[3:]
    assert measured(pruned, pruned) == own  # the same again


def test_a_quantized_graph_has_gradients_through_its_rounding() -> None:
    data = digits()
    context = graphs.context(data.model, calibration=data.calibration)
    quantized = QuantizeStatic().run(data.model.clone(), context).model
    found = measured(quantized, quantized)
    assert found.on_bundle
    clean, _, pgd = found.rows[:3]
    assert pgd.bundle < clean.bundle - 0.2


def test_a_graph_that_torch_cannot_run_is_attacked_by_transfer() -> None:
    data = digits()
    lowered = data.model.clone()
    lowered.graph.node(0).domain = "com.example"
    found = measured(data.model, lowered)
    assert not found.on_bundle and "'stem'" in found.gradients


def test_other_inputs_than_images_are_attacked_and_not_corrupted() -> None:
    model, _ = graphs.mlp()
    given = [
        Sample({"x": graphs.feed(1, 96, seed=i)}, {"label": np.array([i % 40])}, "data")
        for i in range(12)
    ]
    run = reference_runner(model)
    chosen = plan(model, given, epsilon=0.02)
    found = measure_robustness(
        chosen, reference=model, bundle=model, run_reference=run, run_bundle=run, seed=0
    )
    assert [row.kind for row in found.rows] == ["none", "fgsm", "pgd"]


def test_samples_are_evenly_spaced() -> None:
    chosen = plan(digits().model, samples(40), most=4)
    assert [s.where.split()[-1] for s in chosen.samples] == ["0", "10", "20", "30"]


def test_the_preprocessing_states_the_range_channel_by_channel() -> None:
    text = """g (float[batch, 3, 4, 4] x) => (float[batch, 5] y) {
        f = Flatten (x) y = Gemm (f, w, b)
    }"""
    model = graphs.graph(text, {"w": graphs.weight(48, 5), "b": graphs.feed(5)})
    image = edgec.ImageSpec((4, 4), mean=(127.0, 100.0, 0.0), std=(128.0, 50.0, 255.0))
    given = [
        Sample({"x": np.full((1, 3, 4, 4), 0.25, np.float32)}, {"label": np.array([1])}, "data, 7")
    ] * 2
    chosen = plan(model, given, image=image, epsilon=0.5)
    np.testing.assert_allclose(chosen.valid.low.ravel(), [-127 / 128, -2.0, 0.0])
    np.testing.assert_allclose(chosen.valid.high.ravel(), [1.0, 155 / 50, 1.0])
    np.testing.assert_allclose(chosen.ball.radius.ravel(), [255 / 256, 2.55, 0.5], rtol=1e-6)
    assert chosen.valid.origin == "the image preprocessing"
    outside = [Sample({"x": np.full((1, 3, 4, 4), 200, np.float32)}, given[0].labels, "data, 7")]
    with pytest.raises(DataError, match="data, 7: input 'x' has values from 200 to 200"):
        plan(model, outside, image=image)


def linear(text: str) -> ir.Model:
    return graphs.graph(text, {"w": graphs.weight(4, 3), "b": graphs.feed(3)})


LINEAR = "g (float[batch, 4] x) => (float[batch, 3] y) { y = Gemm (x, w, b) }"
TWO = """g (float[batch, 4] x, float[batch, 4] z) => (float[batch, 3] y) {
    s = Add (x, z) y = Gemm (s, w, b)
}"""
BYTES = """g (uint8[batch, 4] x) => (float[batch, 3] y) {
    f = Cast <to = 1> (x) y = Gemm (f, w, b)
}"""
BRANCH = """g (float[batch, 4] x) => (float[batch, 3] y) {
    [branch] h = If (c) <
        then_branch = a () => (float[batch, 4] p) { p = Relu (x) },
        else_branch = e () => (float[batch, 4] q) { q = Neg (x) }
    >
    y = Gemm (h, w, b)
}"""


def rows(names: Iterable[str] = ("x",), dtype: Any = np.float32, **labels: Any) -> list[Sample]:
    feeds = [
        {name: (graphs.feed(1, 4, seed=i) * 9).astype(dtype) for name in names} for i in (1, 2)
    ]
    return [Sample(f, labels or {"label": np.array([1])}, "data, sample 3") for f in feeds]


@pytest.mark.parametrize(
    ("text", "given", "changes", "message"),
    [
        (LINEAR, rows(), {"output": None}, "judged on classifiers"),
        (LINEAR, rows(label=np.array([0.5])), {}, "sample 3: robustness needs the true class"),
        (LINEAR, rows(group=np.array([1])), {}, "needs the true class"),
        (
            LINEAR,
            rows(group=np.array([1])),
            {"metric": METRICS["top1"], "besides": "group"},
            "needs the true class",
        ),
        (LINEAR, rows(label=np.array([3])), {}, "sample 3: class 3 is outside of the model's 3"),
        (LINEAR, rows(label=np.array([-1])), {}, "class -1 is outside"),
        (LINEAR, rows(label=np.array([1, 1])), {}, "2 class labels for 1 rows"),
        (TWO, rows(("x", "z")), {}, "has 2 to choose from: x .float32., z"),
        (BYTES, rows(dtype=np.uint8), {}, "has none to choose from: x .uint8."),
        (
            LINEAR,
            [Sample({"x": np.ones((1, 4), np.float32)}, {"label": np.array([1])})],
            {},
            "same",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused(
    text: str, given: list[Sample], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        plan(linear(text), given, **changes)


def test_a_reference_that_torch_cannot_run_is_refused() -> None:
    model = graphs.graph(
        BRANCH, {"w": graphs.weight(4, 3), "b": graphs.feed(3), "c": np.array(True)}
    )
    with pytest.raises(PassError, match="robustness cannot be judged: .*'branch'"):
        plan(model, rows())


def robustness(*figures: tuple[str, float, float], floor: float | None = 0.0) -> Robustness:
    made = tuple(Disturbance(k, r, b, r - b, 0.01) for k, r, b in (("none", 0.9, 0.9), *figures))
    return Robustness(
        "top1",
        500,
        "x",
        0.03,
        0.0,
        1.0,
        "the values in the data",
        "reference and bundle",
        floor,
        made,
    )


def verdict(found: Robustness | None, limit: float) -> tuple[bool, float | None, str]:
    (promise,) = judge(
        Limits(max_robustness_drop=limit),
        size_bytes=1,
        metric=None,
        agreement=1.0,
        speedup=None,
        measured_on=None,
        real_data=True,
        robustness=found,
    )
    return promise.kept, promise.value, promise.reason


def test_the_worst_disturbance_decides_and_the_clean_figures_do_not() -> None:
    found = robustness(("pgd", 0.5, 0.45), ("blur", 0.8, 0.7))
    assert verdict(found, 0.1)[0]
    kept, value, reason = verdict(found, 0.05)
    assert not kept and value == pytest.approx(0.1)
    assert reason == "top1 under blur, 500 samples, +- 0.01"


def test_a_promise_that_any_bundle_would_keep_is_not_judged() -> None:
    broken_down = robustness(("pgd", 0.04, 0.03), ("blur", 0.8, 0.79))
    kept, value, reason = verdict(broken_down, 0.05)
    assert not kept and value is None
    assert "top1 0.04 under pgd, so any bundle would keep this; take a smaller" in reason
    assert verdict(broken_down, 0.03)[0]  # a bundle that is always wrong would break this
    assert verdict(robustness(("pgd", 0.04, 0.03), floor=None), 0.05)[0]
    assert not verdict(None, 0.05)[0]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(max_slice_drop=0.1), "max_slice_drop needs to know the slices; give --slice"),
        (Limits(max_robustness_drop=0.1), "max_robustness_drop needs .* --robustness-epsilon"),
    ],
)
def test_a_promise_without_its_setting_is_refused(limits: Limits, message: str) -> None:
    with pytest.raises(EdgecError, match=message):
        check_asked(Scrutiny(), limits)


@pytest.mark.parametrize(
    "settings",
    [
        {"robustness_epsilon": 0.0},
        {"robustness_epsilon": 1.5},
        {"robustness_epsilon": float("nan")},
        {"robustness_samples": 1},
        {"slice_min_samples": 0},
    ],
)
def test_settings_that_no_data_fits_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(EdgecError, match=f"{next(iter(settings))} is"):
        Scrutiny(**settings)


def test_a_table_of_settings_is_checked_key_by_key() -> None:
    given = {"slice": "group", "robustness_epsilon": 1, "slice_min_samples": 5}
    assert scrutiny_from(given, "t") == Scrutiny("group", 5, 1)
    with pytest.raises(EdgecError, match="t: unknown key 'slices', did you mean 'slice'"):
        scrutiny_from({"slices": "a"}, "t")
    for wrong in ({"slice": 1}, {"slice_min_samples": 2.5}, {"robustness_epsilon": True}):
        with pytest.raises(EdgecError, match=f"t: {next(iter(wrong))} is"):
            scrutiny_from(wrong, "t")


def test_without_data_nothing_is_examined() -> None:
    model = linear(LINEAR)
    with pytest.raises(DataError, match="--slice and --robustness-epsilon need labelled data"):
        examine(
            Scrutiny(slice="group", robustness_epsilon=0.1),
            list,
            count=0,
            where="",
            metric=None,
            classifier="y",
            reference=lambda: (model, reference_runner(model)),
            inputs=input_specs(model),
            image=None,
        )
