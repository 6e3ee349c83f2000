"""How far a student's answers are from its teacher's: what ``recover`` lessens, and judges by.

A weighted sum. Response: KL divergence or squared error of the outputs
(`edgec.passes.responses`). Feature: squared error over the teacher's mean square at layer
outputs that both graphs name alike, through a learned projection where their widths differ
(FitNets, Romero et al. 2015, arXiv:1412.6550, section 2.2). Relation: distances and angles
between the samples of a stack at what the last layer reads (`edgec.passes.relations`).
Labels: cross-entropy. The held-out measure is another one, which no single answer dominates.

Left out: attention maps, hints chosen by hand, projections over more than one axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Feeds, PassError
from edgec.passes.curriculum import LABEL, UNKNOWN, Example
from edgec.passes.decode_trials import decoder_of
from edgec.passes.execution import open_session, run_feeds
from edgec.passes.head import find_head
from edgec.passes.relations import last_layer_inputs, relation_errors
from edgec.passes.responses import (
    Kind,
    distance_of,
    kind_of,
    log_probabilities,
    probabilities,
    response_error,
    squared_error,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from edgec.passes.recover import Recover
    from edgec.passes.stacks import Values

LAYERS = frozenset({"Add", "Conv", "ConvTranspose", "Gemm", "LayerNormalization", "MatMul"})
PROJECTION_RATE = 0.003  # Adam's, of learned projections
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
_RELATED = 3  # samples that an angle needs


@dataclass(frozen=True)
class _Shared:
    """A layer output that both graphs name alike.

    axis: the one along which student and teacher are of different width; None if they are not.
    """

    name: str
    axis: int | None
    student_width: int = 0
    teacher_width: int = 0


class Losses:
    """What one training lessens.

    features, student_features: names of the inner values to keep of the teacher's and of the
    student's graph for ``loss``, besides the outputs, which both name alike.
    """

    def __init__(
        self, model: ir.Model, reference: ir.Model, settings: Recover, seed: int, example: Example
    ) -> None:
        """model: the student. reference: the teacher. example: any sample of the data.

        Both run once on the example, for their shapes. Raises PassError for a teacher whose
        answers are of another shape, and for a loss that has nothing to work on.
        """
        self._settings = settings
        self._causal = not isinstance(decoder_of(model), str)
        self._kinds = _kinds(model, example if settings.label_weight else Example({}))
        self._related = None
        if settings.distance_weight or settings.angle_weight:
            self._related = _related(model, reference)
        names = _shared_names(model, reference) if settings.feature_weight else ()
        ours, theirs = self._related or (None, None)
        student, teacher = (
            _shapes(graph, [*self._kinds, *names, *([own] if own else [])], example.feeds)
            for graph, own in ((model, ours), (reference, theirs))
        )
        _check_answers(tuple(self._kinds), student, teacher)
        labelled = settings.label_weight and not self._causal
        if labelled:
            self._kinds |= _labelled_head((model, reference), self._kinds, student, example)
        shared = [_shared(name, student[name], teacher[name]) for name in names]
        self._shared = _spread([s for s in shared if s is not None], settings.features)
        if settings.teacher and settings.features and settings.feature_weight and not self._shared:
            raise PassError(
                f"recover: teacher {settings.teacher} has no inner value of a name that the model "
                "has too and of the same shape but for one width, so there are no features to "
                "match; set recover.feature_weight=0"
            )
        self._label = self._class_labels(example) if labelled else None
        if not (self._teaches() or self._label):
            raise PassError(
                "recover: only label_weight is above 0, but the calibration data has no class "
                "labels (integers named 'label' or like the output) for an output of classes; "
                "give labels, or weigh response, features or relations"
            )
        matched = [s.name for s in self._shared]
        self.student_features = tuple(dict.fromkeys([*matched, *([ours] if ours else [])]))
        self.features = tuple(dict.fromkeys([*matched, *([theirs] if theirs else [])]))
        self._projections = _projections(self._shared, seed)

    @property
    def matched(self) -> int:
        """How many inner values are compared with the teacher's."""
        return len(self._shared)

    def parameters(self) -> list[Parameter]:
        """Learned projections: trained beside the student, never shipped."""
        return list(self._projections.values())

    def check_rows(self, rows: int) -> None:
        """Raise PassError if relations need more samples on top of each other than there are."""
        if self._related is not None and rows < _RELATED:
            raise PassError(
                f"recover: relations need {_RELATED} samples at once, a step sees {rows} of them: "
                "raise recover.batch, give a model with an open batch, or set "
                "recover.distance_weight=0 and recover.angle_weight=0"
            )

    def doubt(self, answers: Values) -> float:
        """How unsure the teacher is: 1 less the probability of its likeliest class, 0..1.

        Mean over rows and outputs. Raises PassError if no output is of classes.
        """
        doubts = [
            1.0 - float(probabilities(kind, answers[name]).amax(-1).mean())
            for name, kind in self._kinds.items()
            if kind != "numbers"
        ]
        if not doubts:
            raise PassError(
                "recover: order is easy-first, but no output is of classes (Softmax, or a matrix "
                "product of rank 2), so the teacher has no confidence; leave order random"
            )
        return sum(doubts) / len(doubts)

    def loss(self, values: Values, answers: Values, labels: Values) -> Tensor:
        """What a training step lessens, the mean over the samples of a stack.

        values: the student's outputs and ``student_features``. answers: the teacher's outputs
        and ``features``. labels: int64 [rows] by name; empty where there are none.
        """
        import torch

        chosen = self._settings
        terms = []
        if chosen.response_weight:
            responses = [
                response_error(kind, values[name], answers[name], chosen.temperature)
                for name, kind in self._kinds.items()
            ]
            terms.append(chosen.response_weight * torch.stack(responses).sum())
        if self._shared:
            errors = [
                squared_error(self._projected(s, values[s.name]), answers[s.name])
                for s in self._shared
            ]
            terms.append(chosen.feature_weight * torch.stack(errors).mean())
        if self._related is not None:
            student, teacher = values[self._related[0]], answers[self._related[1]]
            if len(student) >= _RELATED:  # the rest of an uneven batch may be smaller
                distance, angle = relation_errors(student, teacher)
                terms += [chosen.distance_weight * distance, chosen.angle_weight * angle]
        if self._label is not None:
            terms.append(chosen.label_weight * self._label_loss(values, labels))
        return torch.stack(terms).sum() if terms else torch.zeros((), requires_grad=True)

    def distance(self, values: Values, answers: Values, labels: Values) -> Tensor:
        """How far the outputs alone are apart: what the user will notice.

        With labels, their cross-entropy counts beside the teacher's answers as it does in
        the loss.
        """
        import torch

        chosen = self._settings
        apart = torch.stack(
            [distance_of(kind, values[n], answers[n]) for n, kind in self._kinds.items()]
        ).sum()
        if self._label is None or self._label[1] not in labels:
            return apart
        wrong = self._label_loss(values, labels)
        return chosen.response_weight * apart + chosen.label_weight * wrong

    @property
    def of_classes(self) -> bool:
        """True if an output is of classes."""
        return any(kind != "numbers" for kind in self._kinds.values())

    @property
    def labels(self) -> str:
        """The name of the class labels that count; empty if there are none."""
        return "" if self._label is None else self._label[1]

    def _teaches(self) -> bool:
        return bool(self._settings.response_weight or self._shared or self._related)

    def unused(self, name: str, dtype: np.dtype[Any]) -> str:
        """Why labels of that name do not count; empty if they do. dtype: theirs."""
        outputs = self._outputs_of_classes()
        if name == self.labels:
            return ""
        if self._causal:
            return "a language model learns the teacher's probabilities of the next token"
        if dtype.kind not in "iu":
            return f"'{name}' is {dtype}, and classes are integers"
        if self.labels:
            return f"'{self.labels}' counts, and '{name}' not beside it"
        if name == LABEL and len(outputs) > 1:
            names = ", ".join(f"'{output}'" for output in outputs)
            return f"outputs {names} are of classes; name '{LABEL}' like the one that it is for"
        return (
            "no output is of classes (a Softmax or LogSoftmax over the last axis, a matrix product "
            "of rank 2, or a head with one label for each row of scores)"
        )

    def _outputs_of_classes(self) -> list[str]:
        return [name for name, kind in self._kinds.items() if kind != "numbers"]

    def _class_labels(self, example: Example) -> tuple[str, str] | None:
        """The output of classes and the key of its labels; None where there is no such pair."""
        outputs = self._outputs_of_classes()
        for name in outputs:
            if name in example.labels:
                return name, name
        # any other column may be something else: a camera, a group
        return (outputs[0], LABEL) if len(outputs) == 1 and LABEL in example.labels else None

    def _label_loss(self, values: Values, labels: Values) -> Tensor:
        """Cross-entropy of the rows whose class is known. Raises PassError for no classes."""
        import torch
        import torch.nn.functional as functional

        assert self._label is not None
        output, key = self._label
        if key not in labels:
            return torch.zeros((), requires_grad=True)
        log = log_probabilities(self._kinds[output], values[output], 1.0)
        rows, classes = log.reshape(-1, log.shape[-1]), labels[key]
        if len(classes) != len(rows) or not _are_classes(classes, rows.shape[-1]):
            raise PassError(
                f"recover: label '{key}' is no class of output '{output}': {len(classes)} integers "
                f"from {int(classes.min())} to {int(classes.max())} for {len(rows)} rows of "
                f"{rows.shape[-1]} classes; set recover.label_weight=0 to learn without labels"
            )
        known = classes != UNKNOWN
        if not bool(known.any()):
            return torch.zeros((), requires_grad=True)
        return functional.nll_loss(rows[known], classes[known])

    def _projected(self, shared: _Shared, value: Tensor) -> Tensor:
        """The student's value in the teacher's width."""
        import torch

        if shared.axis is None:
            return value
        wide: Tensor = torch.tensordot(
            value, self._projections[shared.name], dims=([shared.axis], [1])
        ).movedim(-1, shared.axis)
        return wide


def _kinds(model: ir.Model, example: Example) -> dict[str, Kind]:
    """How each output is compared. Of several, labels of its name say that one is of classes.

    A decoder's logits are, one class a word; its caches are no answers of their own.
    """
    outputs = model.graph.outputs
    if not isinstance(decoder_of(model), str):
        return {str(outputs[0].name): "logits"}
    sole = sum(v.dtype in _FLOATS for v in outputs) == 1
    return {str(v.name): kind_of(v, sole=sole or v.name in example.labels) for v in outputs}


def _labelled_head(
    graphs: Sequence[ir.Model],
    kinds: Mapping[str, Kind],
    shapes: Mapping[str, tuple[int, ...]],
    example: Example,
) -> dict[str, Kind]:
    """The output of a head with one label for each row of scores, if it passes for numbers.

    graphs: the student, and the teacher, whose head is the same where a quantized one is hidden.
    """
    for graph in graphs:
        try:
            head = find_head(graph)
        except PassError:
            continue
        if kinds.get(head.output) != "numbers":
            continue
        shape = shapes[head.output]
        labels = example.labels.get(head.output, example.labels.get(LABEL))
        classes_last = head.class_axis(len(shape)) == len(shape) - 1
        if labels is None or not classes_last or shape[-1] != head.classes or shape[-1] < 2:
            continue
        if labels.size == math.prod(shape[:-1]):
            return {head.output: head.kind}
    return {}


def _check_answers(
    outputs: Sequence[str], student: Mapping[str, Any], teacher: Mapping[str, Any]
) -> None:
    """Raise PassError if an output of the two has not the same shape."""
    for name in outputs:
        if student[name] != teacher[name]:
            raise PassError(
                f"recover: output '{name}' has shape {list(student[name])}, the teacher's has "
                f"{list(teacher[name])}; a teacher answers in the form of its student"
            )


def _shapes(model: ir.Model, names: Sequence[str], feeds: Feeds) -> dict[str, tuple[int, ...]]:
    """Shapes of values of a graph on one sample."""
    wanted = list(dict.fromkeys(names))
    arrays = run_feeds(open_session(model, outputs=wanted), feeds)
    return {name: tuple(array.shape) for name, array in zip(wanted, arrays, strict=True)}


def _shared_names(model: ir.Model, reference: ir.Model) -> tuple[str, ...]:
    """Outputs of layers that both graphs name alike, in the student's order."""
    known = {v.name for node in reference.graph for v in node.outputs if node.op_type in LAYERS} - {
        v.name for v in reference.graph.outputs
    }
    return tuple(
        str(v.name)
        for node in model.graph
        if node.op_type in LAYERS
        for v in node.outputs
        if v.name in known
    )


def _shared(name: str, student: Sequence[int], teacher: Sequence[int]) -> _Shared | None:
    """What can be matched at a name; None if the two differ in more than one width."""
    if len(student) != len(teacher):
        return None
    axes = [i for i, (a, b) in enumerate(zip(student, teacher, strict=True)) if a != b]
    if not axes:
        return _Shared(name, None)
    if len(axes) > 1 or axes[0] == 0:
        return None
    return _Shared(name, axes[0], student[axes[0]], teacher[axes[0]])


def _spread(shared: Sequence[_Shared], count: int) -> tuple[_Shared, ...]:
    """``count`` of them, evenly spread."""
    if count >= len(shared):
        return tuple(shared)
    return tuple(shared[(2 * i + 1) * len(shared) // (2 * count)] for i in range(count))


def _related(model: ir.Model, reference: ir.Model) -> tuple[str, str]:
    """What the last layers of student and teacher read; by the same name where both have it.

    Raises PassError if one of them has no such layer.
    """
    ours, theirs = last_layer_inputs(model), last_layer_inputs(reference)
    if not ours or not theirs:
        raise PassError(
            "recover: relations are taken at what the last matrix product or convolution reads, "
            f"and none lies before output '{model.graph.outputs[0].name}'; set "
            "recover.distance_weight=0 and recover.angle_weight=0"
        )
    shared = next((name for name in ours if name in theirs), None)
    return (shared, shared) if shared else (ours[0], theirs[0])


def _projections(shared: Sequence[_Shared], seed: int) -> dict[str, Parameter]:
    """A matrix [teacher's width, student's width] for each value of different widths."""
    import torch

    random = torch.Generator().manual_seed(seed)
    return {
        s.name: torch.nn.Parameter(
            torch.randn(s.teacher_width, s.student_width, generator=random) / s.student_width**0.5
        )
        for s in shared
        if s.axis is not None
    }


def _are_classes(labels: Tensor, count: int) -> bool:
    return bool(((labels >= UNKNOWN) & (labels < count)).all())
