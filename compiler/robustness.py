"""Reference and bundle on disturbed inputs: two attacks, and common corruptions of images.

An attack follows gradients (`edgec.attacks`). They are taken of the reference, and of the
bundle's own graph before it was lowered, where torch can run it; each side then meets, sample
by sample, whichever of the attacked inputs hurts it more. Where only the reference has
gradients, the bundle is attacked by transfer, and the result says so. What is scored are the
reference in ONNX Runtime and the emitted bundle, never the twins.

Nothing leaves the valid range of the input: that of the preprocessing, if the source states
one, else the least and the largest value in the data, channel by channel for images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec import corruptions
from edgec.answers import (
    Outputs,
    Score,
    class_labels,
    class_rows,
    mean_score,
    metric_score,
    standard_error,
)
from edgec.attacks import KINDS, Attacker, Ball
from edgec.data import InputSpec, Sample
from edgec.errors import DataError, PassError
from edgec.metrics import METRICS, TaskMetric
from edgec.report import BOTH, Disturbance, Robustness
from edgec.source import ImageSpec
from edgec_runtime.manifest import Image

Array = np.ndarray[Any, Any]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
Progress = Callable[[str, int, int], None]

_ROUNDING = 1e-3  # of the valid range: how far a sample's values may be outside
_TWIN = 1e-2  # of the scores' size: how far the twin may be from ONNX Runtime
_IMAGE_CHANNELS = (1, 3)


@dataclass(frozen=True)
class ValidRange:
    """The values that an input may have: low and high broadcast to it. origin: in words.

    image_axes: those of height and width; None if the input is no image.
    """

    input: str
    low: Array
    high: Array
    origin: str
    image_axes: tuple[int, int] | None


@dataclass(frozen=True)
class RobustnessPlan:
    """Everything that is settled before the passes run.

    epsilon: share of the valid range. output: class scores. samples: those that are disturbed.
    """

    epsilon: float
    output: str
    valid: ValidRange
    metric: TaskMetric
    samples: tuple[Sample, ...]
    classes: tuple[Array, ...] = field(repr=False)

    @property
    def ball(self) -> Ball:
        """What the attacks may do."""
        low, high = self.valid.low, self.valid.high
        return Ball(self.valid.input, self.epsilon * (high - low), low, high)


def plan_robustness(
    epsilon: float,
    samples: Iterable[Sample],
    *,
    count: int,
    most: int,
    reference: ir.Model,
    run_reference: Run,
    output: str | None,
    inputs: Sequence[InputSpec],
    image: ImageSpec | Image | None,
    metric: TaskMetric | None,
    besides: str | None = None,
) -> RobustnessPlan:
    """Check that robustness can be judged, and how.

    samples: of the judgement, ``count`` of them; ``most`` of them, evenly spaced, are disturbed
    and kept in memory. output: the class scores, None if the model is no classifier. besides:
    a label column of slices. Raises DataError or PassError with what is missing.
    """
    if output is None:
        raise DataError(
            "robustness is judged on classifiers, and this model is not known to be one; state "
            "class names or a top1 metric if it is, else leave the robustness options out"
        )
    valid, chosen = _read(samples, count, most, inputs, image)
    classes = []
    for sample in chosen:
        found = class_labels(sample.labels, sole=metric is not None, besides=besides)
        if found is None:
            raise DataError(
                f"{sample.where}: robustness needs the true class of each sample; add an integer "
                "array named 'label' to the evaluation data"
            )
        classes.append(found)
    plan = RobustnessPlan(
        epsilon=epsilon,
        output=output,
        valid=valid,
        metric=metric or _top1(output),
        samples=tuple(chosen),
        classes=tuple(classes),
    )
    _try(plan, reference, run_reference)
    return plan


def measure_robustness(
    plan: RobustnessPlan,
    *,
    reference: ir.Model,
    bundle: ir.Model | None,
    run_reference: Run,
    run_bundle: Run,
    seed: int,
    progress: Progress = lambda what, done, total: None,
) -> Robustness:
    """The metric of both sides on undisturbed, attacked and corrupted inputs.

    bundle: its graph in standard ONNX, for its gradients; None if there is none.
    """
    runs = (run_reference, run_bundle)
    attackers = [Attacker(reference, plan.output, plan.ball)]
    gradients = BOTH
    try:
        if bundle is None:
            raise PassError("its graph before lowering is not at hand")
        own = Attacker(bundle, plan.output, plan.ball)
        own.disturb("fgsm", _feeds(plan.samples[:1]), plan.classes[:1], seed=seed)
        attackers.append(own)
    except (PassError, DataError) as error:
        gradients = f"reference alone (transfer to the bundle): {error}"
    clean = [[run(s.feeds) for s in plan.samples] for run in runs]
    rows = [_row("none", _score(plan, clean), len(plan.samples))]
    for kind in KINDS:
        met: list[list[Outputs]] = [[], []]
        margins: list[list[float]] = [[], []]
        for attacker in attackers:
            made = attacker.disturb(
                kind,
                _feeds(plan.samples),
                plan.classes,
                seed=seed,
                progress=functools.partial(_tell, progress, kind, len(plan.samples)),
            )
            for side, run in enumerate(runs):
                _keep_worse(plan, met[side], margins[side], _answers(plan, made, run))
        rows.append(_row(kind, _score(plan, met), len(plan.samples)))
    if plan.valid.image_axes is not None:
        for number, name in enumerate(corruptions.KINDS):
            scores = []
            for severity in corruptions.SEVERITIES:
                progress(name, severity - 1, len(corruptions.SEVERITIES))
                made = _corrupted(plan, name, severity, [seed, number, severity])
                scores.append(_score(plan, [_answers(plan, made, run) for run in runs]))
            progress(name, len(scores), len(scores))
            rows.append(_row(name, mean_score(scores), len(plan.samples)))
    return Robustness(
        metric=plan.metric.name,
        samples=len(plan.samples),
        input=plan.valid.input,
        epsilon=plan.epsilon,
        low=float(plan.valid.low.min()),
        high=float(plan.valid.high.max()),
        range_from=plan.valid.origin,
        gradients=gradients,
        floor=0.0 if plan.metric.name in ("top1", "top5") else None,
        rows=tuple(rows),
    )


def _tell(progress: Progress, what: str, total: int, done: int) -> None:
    progress(what, done, total)


def _top1(output: str) -> TaskMetric:
    def metric(outputs: Mapping[str, Any], labels: Any) -> float:
        return METRICS["top1"].function({output: outputs[output]}, labels)

    return replace(METRICS["top1"], function=metric)


def _try(plan: RobustnessPlan, reference: ir.Model, run_reference: Run) -> None:
    """Attack one sample, and compare the twin with ONNX Runtime there."""
    first = plan.samples[:1]
    try:
        attacker = Attacker(reference, plan.output, plan.ball)
        twin = attacker.logits(first[0].feeds)
    except PassError as error:
        raise PassError(f"robustness cannot be judged: {error}") from error
    rows = class_rows(run_reference(first[0].feeds)[plan.output])
    if twin.shape != rows.shape or len(plan.classes[0]) != len(rows):
        raise DataError(
            f"{first[0].where}: {len(plan.classes[0])} class labels for {len(rows)} rows of "
            f"class scores in '{plan.output}'; robustness needs one for each"
        )
    for sample, classes in zip(plan.samples, plan.classes, strict=True):
        if classes.min() < 0 or classes.max() >= rows.shape[1]:
            raise DataError(
                f"{sample.where}: class {classes.max() if classes.min() >= 0 else classes.min()} "
                f"is outside of the model's {rows.shape[1]} classes"
            )
    if not _same_scores(twin, rows):
        raise PassError(
            "robustness cannot be judged: the graph in torch gives other scores than in ONNX "
            f"Runtime on {first[0].where or 'the first sample'}"
        )
    attacker.disturb("fgsm", _feeds(first), plan.classes[:1], seed=0)


def _same_scores(logits: Array, rows: Array) -> bool:
    """True if the twin's logits are the scores, or their softmax is."""
    logits = logits.astype(np.float64)
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    return any(
        float(np.abs(own - rows).max()) <= _TWIN * max(float(np.abs(rows).max()), 1e-30)
        for own in (logits, exponents / exponents.sum(1, keepdims=True))
    )


def _read(
    samples: Iterable[Sample],
    count: int,
    most: int,
    inputs: Sequence[InputSpec],
    image: ImageSpec | Image | None,
) -> tuple[ValidRange, list[Sample]]:
    """The valid range, in which all samples lie, and the samples to disturb."""
    spec = _disturbed_input(inputs, image)
    channel, axes = _image_axes(spec, image)
    others = tuple(i for i in range(len(spec.dims)) if i != channel)
    stated = None if image is None else _stated_range(image, len(spec.dims), channel)
    wanted = {i * count // min(most, count) for i in range(min(most, count))}
    chosen, lows, highs = [], [], []
    for index, sample in enumerate(samples):
        array = sample.feeds[spec.name]
        lows.append(array.min(axis=others, keepdims=True))
        highs.append(array.max(axis=others, keepdims=True))
        if stated is not None:
            _check_inside(stated, lows[-1], highs[-1], f"{sample.where}: input '{spec.name}'")
        if index in wanted:
            chosen.append(sample)
    if stated is not None:
        return ValidRange(spec.name, *stated, "the image preprocessing", axes), chosen
    low, high = np.min(lows, axis=0), np.max(highs, axis=0)
    if not (high > low).any():
        raise DataError(
            f"input '{spec.name}' has the same value in all evaluation data, which gives no "
            "valid range to judge robustness in; give other samples"
        )
    return ValidRange(spec.name, low, high, "the values in the data", axes), chosen


def _stated_range(image: ImageSpec | Image, rank: int, channel: int) -> tuple[Array, Array]:
    """What black and white become by the preprocessing, channel by channel."""
    shape = [1] * rank
    shape[channel] = -1
    mean, std = (np.array(v, np.float64).reshape(shape) for v in (image.mean, image.std))
    low, high = (((v - mean) / std).astype(np.float32) for v in (0.0, 255.0))
    return low, high


def _check_inside(stated: tuple[Array, Array], least: Array, largest: Array, where: str) -> None:
    low, high = stated
    slack = _ROUNDING * (high - low)
    if (least < low - slack).any() or (largest > high + slack).any():
        raise DataError(
            f"{where} has values from {least.min():.4g} to {largest.max():.4g}, the source's "
            f"image preprocessing gives {low.min():.4g} to {high.max():.4g}; prepare the data as "
            "the image spec says, or correct the spec"
        )


def _disturbed_input(inputs: Sequence[InputSpec], image: ImageSpec | Image | None) -> InputSpec:
    floats = [spec for spec in inputs if spec.dtype == np.float32]
    if image is not None and image.input:
        floats = [spec for spec in floats if spec.name == image.input]
    if len(floats) != 1:
        has = ", ".join(f"{spec.name} ({spec.dtype})" for spec in inputs)
        raise DataError(
            "robustness is judged on one float32 input, and this model has "
            f"{len(floats) or 'none'} to choose from: {has}; name one in the source's image spec"
        )
    return floats[0]


def _image_axes(
    spec: InputSpec, image: ImageSpec | Image | None
) -> tuple[int, tuple[int, int] | None]:
    """The channel axis (-1: none) and those of height and width (None: no image)."""
    if len(spec.dims) != 4:
        if image is not None:
            raise DataError(
                f"input '{spec.name}' has {len(spec.dims)} dimensions, the source's image spec "
                "stands for 4; correct its input"
            )
        return -1, None
    layout = image.layout if image is not None else None
    if layout == "NCHW" or (layout is None and spec.dims[1] in _IMAGE_CHANNELS):
        return 1, (2, 3)
    if layout == "NHWC" or spec.dims[3] in _IMAGE_CHANNELS:
        return 3, (1, 2)
    return -1, None


def _feeds(samples: Sequence[Sample]) -> list[Mapping[str, Array]]:
    return [sample.feeds for sample in samples]


def _answers(plan: RobustnessPlan, made: Sequence[Array], run: Run) -> list[Mapping[str, Array]]:
    return [
        run({**sample.feeds, plan.valid.input: array})
        for sample, array in zip(plan.samples, made, strict=True)
    ]


def _keep_worse(
    plan: RobustnessPlan,
    kept: list[Outputs],
    margins: list[float],
    answers: Sequence[Outputs],
) -> None:
    """Of what was kept and the new answers, those that are further on the wrong side."""
    for i, outputs in enumerate(answers):
        margin = _margin(outputs[plan.output], plan.classes[i])
        if i == len(kept):
            kept.append(outputs)
            margins.append(margin)
        elif margin > margins[i]:
            kept[i], margins[i] = outputs, margin


def _margin(scores: Array, classes: Array) -> float:
    """The best wrong score minus the true class's, over all rows; above 0 is a mistake."""
    rows = class_rows(scores).copy()
    every = np.arange(len(rows))
    true = rows[every, classes]
    rows[every, classes] = -np.inf
    return float(np.nan_to_num(rows.max(1) - true, nan=np.inf).max())


def _corrupted(
    plan: RobustnessPlan, kind: corruptions.Kind, severity: int, seed: list[int]
) -> list[Array]:
    valid = plan.valid
    assert valid.image_axes is not None
    width = np.where(valid.high > valid.low, valid.high - valid.low, 1.0)  # a constant channel
    made = []
    for index, sample in enumerate(plan.samples):
        image = np.clip((sample.feeds[valid.input] - valid.low) / width, 0.0, 1.0)
        random = np.random.default_rng([*seed, index])
        changed = corruptions.corrupt(image, kind, severity, axes=valid.image_axes, random=random)
        restored = np.asarray(changed * width + valid.low, np.float32)
        made.append(np.clip(restored, valid.low, valid.high))
    return made


def _score(plan: RobustnessPlan, sides: Sequence[Sequence[Outputs]]) -> Score:
    labels = [sample.labels for sample in plan.samples]
    return metric_score(plan.metric, sides[0], sides[1], labels)


def _row(kind: str, score: Score, count: int) -> Disturbance:
    found = score(range(count))
    error = standard_error(score, range(count))
    return Disturbance(kind, found.reference, found.bundle, found.drop, error)
