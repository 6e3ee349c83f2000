"""When the bundle answers a sample as the reference does: the rule of a model, and its measure.

A classifier answers with its largest score, a language model with the token that it would go on
with, at every position. A model whose output ends in a sigmoid (a mask, a probability of speech,
scores of several labels) answers with what lies above 0.5: there the noise of a map that is 0
nearly everywhere says little. Of any other model all values count.

Sources: intersection over union of two sets is the coefficient of community of Jaccard 1912 (The
distribution of the flora in the alpine zone, New Phytologist 11); as the accuracy of a mask:
Everingham et al. 2010 (The PASCAL Visual Object Classes Challenge, IJCV 88).

Left out on purpose: other thresholds than 0.5, and sigmoids in several outputs; whoever needs
them gives a metric. A sigmoid that is spelled out with Exp is not recognised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.decoder import LOGITS, is_decoder_graph
from edgec_runtime.manifest import Manifest

Array = np.ndarray[Any, Any]

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
_SAME_VALUES = {"Reshape", "Squeeze", "Identity", "Cast"}
_THRESHOLD = 0.5
_CLOSE = 0.05  # relative error (L2) up to which two outputs agree


class Same(StrEnum):
    """What "the same answer" means, in the words that reports and manifests carry."""

    ARGMAX = "same argmax"
    NEXT_TOKEN = "same next token"
    DECISIONS = "same decisions at 0.5 (IoU)"
    CLOSE = "relative error under 5 %"


@dataclass(frozen=True)
class AgreementRule:
    """What "the same answer" means for a model, and the output that holds the answer.

    output: None for CLOSE, which looks at all outputs; else a floating-point output, the only
    one of the model unless it is a language model.
    """

    same: Same = Same.CLOSE
    output: str | None = None

    @classmethod
    def of_model(cls, model: ir.Model, declared: bool) -> AgreementRule:
        """The rule for a reference.

        declared: the user gave class names or a top-k metric. Otherwise a single float output
        is recognised as class scores if it ends in a softmax, or if it is a linear layer's
        [N, C] that nothing normalises; as probabilities of decisions if it ends in a sigmoid.
        A decoder with past answers with its logits.
        """
        if is_decoder_graph(model):
            return cls(Same.NEXT_TOKEN, LOGITS)
        floats = [v for v in model.graph.outputs if v.dtype in _FLOATS]
        if len(floats) != 1:
            return cls()
        [value] = floats
        opset = model.opset_imports.get("", 0)
        if _may_be_class_scores(value) and (declared or _ends_in_class_scores(value, opset)):
            return cls(Same.ARGMAX, value.name)
        last = _producer(value, through=_SAME_VALUES | {"Transpose"})
        if last is not None and last.op_type in {"Sigmoid", "HardSigmoid"}:
            return cls(Same.DECISIONS, value.name)
        return cls()

    @classmethod
    def of_bundle(cls, manifest: Manifest) -> AgreementRule:
        """The rule that a bundle was judged by when it was built; CLOSE if it says none."""
        words = manifest.results.get("agreement_rule")
        floats = [v.name for v in manifest.outputs if v.dtype.startswith("float")]
        if words == Same.NEXT_TOKEN and LOGITS in floats:
            return cls(Same.NEXT_TOKEN, LOGITS)
        for same in (Same.ARGMAX, Same.DECISIONS):
            if words == same and len(floats) == 1:
                return cls(same, floats[0])
        return cls()

    @property
    def class_scores(self) -> str | None:
        """The output with class scores; None if the model is no classifier."""
        return self.output if self.same is Same.ARGMAX else None

    def agreement(self, expected: Mapping[str, Array], actual: Mapping[str, Array]) -> float:
        """How far two answers to one sample are the same, 0..1.

        expected, actual: outputs by name. ARGMAX and NEXT_TOKEN: share of the rows with the
        same largest score. DECISIONS: intersection over union of the positions above 0.5, 1
        where neither has any. CLOSE: 1 if all floats together are within 5 % and all others
        equal, else 0.
        Another shape, or NaN where the reference has none, is 0.
        """
        if self.output is None:
            return _close(expected, actual)
        e, a = expected[self.output], actual[self.output]
        if e.shape != a.shape or np.isnan(a).any() > np.isnan(e).any():
            return 0.0
        if self.same is not Same.DECISIONS:
            return float((e.argmax(-1) == a.argmax(-1)).mean())
        return _intersection_over_union(e > _THRESHOLD, a > _THRESHOLD)


def power(reference: Array, actual: Array) -> tuple[float, float]:
    """Energy of the reference and of the difference; equal infinities do not count."""
    if reference.shape != actual.shape:
        return float(np.square(reference.astype(np.float64)).sum()), float("inf")
    r, a = reference.astype(np.float64), actual.astype(np.float64)
    same = (r == a) | (np.isnan(r) & np.isnan(a))
    r, a = np.where(same & ~np.isfinite(r), 0.0, r), np.where(same & ~np.isfinite(r), 0.0, a)
    return float((r * r).sum()), float(np.square(r - a).sum())


def _may_be_class_scores(value: ir.Value) -> bool:
    """False for one number a row, and where nothing is known of the shape."""
    if value.shape is None or not len(value.shape):
        return False
    classes = value.shape[-1]
    return not isinstance(classes, int) or classes > 1


def _ends_in_class_scores(value: ir.Value, opset: int) -> bool:
    node = _producer(value, through=_SAME_VALUES)
    if node is None:
        return False
    if node.op_type in {"Softmax", "LogSoftmax"}:
        # a segmentation net's classes lie along the channels: argmax and errors are of the last
        axis = node.attributes.get_int("axis", -1 if opset >= 13 else 1)
        shape = node.outputs[0].shape
        return axis == -1 or (shape is not None and axis == len(shape) - 1)
    if value.shape is None or len(value.shape) != 2:
        return False
    biased = node.op_type == "Add" and any(
        i is not None and (p := i.producer()) is not None and p.op_type == "MatMul"
        for i in node.inputs
    )
    return biased or node.op_type in {"Gemm", "MatMul"}


def _producer(value: ir.Value, *, through: set[str]) -> ir.Node | None:
    """The node that computes the values, past operators that only carry them."""
    node = value.producer()
    while node is not None and node.op_type in through:
        first = node.inputs[0]
        node = first.producer() if first is not None else None
    return node


def _intersection_over_union(expected: Array, actual: Array) -> float:
    union = np.count_nonzero(expected | actual)
    return np.count_nonzero(expected & actual) / union if union else 1.0


def _close(expected: Mapping[str, Array], actual: Mapping[str, Array]) -> float:
    signal = noise = 0.0
    for name, value in expected.items():
        if value.dtype.kind != "f":
            if not np.array_equal(value, actual[name]):
                return 0.0
            continue
        s, n = power(value, actual[name])
        signal, noise = signal + s, noise + n
    return float(np.isfinite(noise) and noise <= _CLOSE**2 * signal)
