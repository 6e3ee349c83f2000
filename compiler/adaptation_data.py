"""The data of one adaptation: to learn from, to stop by, and to judge by, kept apart."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.data import LABEL, Dataset, Sample, labels_of, open_data
from edgec.errors import DataError
from edgec.inputs import VALIDATION_SHARE
from edgec.passes import Context
from edgec.passes.adapt import Adapt
from edgec.passes.continual import Memory, read_memory
from edgec.passes.head import Head, find_head
from edgec.shapes import input_specs
from edgec.source import Data

Array = np.ndarray[Any, Any]
Labelled = tuple[str, Mapping[str, Array], Array]  # where it is, feeds and classes of a sample
Run = Callable[[Mapping[str, Array]], Array]  # feeds -> class scores


@dataclass(frozen=True)
class Judged:
    """Accuracy on one set of samples, 0..1. on: which samples; samples: how many."""

    on: str
    samples: int
    before: float
    after: float

    def facts(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "judged_on": self.on,
            "samples": self.samples,
            "before": round(self.before, 4),
            "after": round(self.after, 4),
        }


@dataclass(frozen=True)
class Lessons:
    """The data of one adaptation: to learn from, to stop by, to judge by."""

    learned: Dataset
    held_out: Dataset
    new: Sequence[Labelled]
    old: Sequence[Labelled]
    new_on: str
    old_on: str
    head: Head

    @staticmethod
    def open(
        data: Data,
        evaluation: Data | None,
        old_evaluation: Data | None,
        form: ir.Model,
        chosen: Adapt,
        seed: int,
    ) -> Lessons:
        """Open and check all of it; what the memory holds is neither learned nor judged anew.

        Raises DataError, also for labels to judge by that are no classes of the adapted model,
        and PassError for a memory that is none.
        """
        head = find_head(form)
        classes = chosen.classes or head.classes
        specs = input_specs(form)
        memory = Memory()
        if chosen.memory:
            memory = read_memory(pathlib.Path(chosen.memory), form)
        given = open_data(data, specs, "adaptation")
        judged = None if evaluation is None else open_data(evaluation, specs, "evaluation")
        before = None
        if old_evaluation is not None:
            before = open_data(old_evaluation, specs, "old evaluation")
        for one in (judged, before):
            given = given if one is None else given.without(one.kept_digests())
        given = given.without(Sample(s.feeds, {}).digest for s in memory.all())
        if not len(given):
            raise DataError(
                "adaptation and evaluation or memory hold the same samples; give different data, "
                "or leave --evaluation out: a part of the data is then held out"
            )
        learned, held_out = given.split(VALIDATION_SHARE, seed)
        new, new_on = (held_out, "held-out samples") if judged is None else (judged, "evaluation")
        old: list[Labelled] = []
        old_on = ""
        if before is not None:
            old, old_on = _labelled(before, classes), "old evaluation"
        elif memory.held_out:
            old_on = "held-out samples of the memory"
            old = [("memory", s.feeds, s.labels[LABEL]) for s in memory.held_out]
        elif memory.learned:
            old_on = "the memory, which was learned from: it has no held-out samples"
            old = [("memory", s.feeds, s.labels[LABEL]) for s in memory.learned]
        if not len(new):
            new, new_on = learned, "the samples learned from: too few to hold some out"
        # the pass checks the data itself, with advice on a larger head
        told = _labelled(new, None if judged is None else classes)
        return Lessons(learned, held_out, told, old, new_on, old_on, head)

    def context(self, plain: Context) -> Context:
        """The context of the pass."""
        return replace(
            plain,
            calibration=self.learned,
            calibration_labels=labels_of(self.learned),
            validation=self.held_out,
            validation_labels=labels_of(self.held_out),
        )

    def accuracies(self, run: Run) -> tuple[float, float]:
        """Accuracy on new and old samples, 0..1; 0 where there are none.

        Raises DataError if a sample has more or fewer labels than rows of class scores.
        """
        return self._accuracy(run, self.new), self._accuracy(run, self.old)

    def judged(self, before: tuple[float, float], after: Run) -> tuple[Judged, Judged | None]:
        """How it turned out on new and old samples. before: ``accuracies``."""
        new, old = (
            Judged(on, len(side), earlier, later)
            for on, side, earlier, later in zip(
                (self.new_on, self.old_on),
                (self.new, self.old),
                before,
                self.accuracies(after),
                strict=True,
            )
        )
        return new, old if self.old else None

    def _accuracy(self, run: Run, samples: Sequence[Labelled]) -> float:
        """Share of rows whose largest score is the label's."""
        right = total = 0
        for where, feeds, truth in samples:
            scores = run(feeds)
            found = scores.argmax(self.head.class_axis(scores.ndim)).reshape(-1)
            if len(truth) != len(found):
                raise DataError(
                    f"{where}: {len(truth)} labels for {len(found)} rows of class scores; give one "
                    "label for each row of the output"
                )
            right += int((found == truth).sum())
            total += len(found)
        return right / total if total else 0.0


def _labelled(data: Dataset, classes: int | None) -> list[Labelled]:
    """The samples with their labels. Raises DataError, before anything is trained, without.

    classes: how many the labels may tell apart; None: anything is taken.
    """
    found: list[Labelled] = []
    for sample in data.samples():
        if LABEL not in sample.labels:
            raise DataError(f"{sample.where}: no labels; add an array named '{LABEL}'")
        labels = np.asarray(sample.labels[LABEL]).reshape(-1)
        if classes is not None and labels.dtype.kind not in "iu":
            raise DataError(
                f"{sample.where}: labels are {labels.dtype}, expected integers: the numbers of "
                "classes; convert them"
            )
        if classes is not None and (outside := labels[(labels < 0) | (labels >= classes)]).size:
            raise DataError(
                f"{sample.where}: label {outside[0]} is no class: the adapted model tells "
                f"{classes} apart, 0 to {classes - 1}; mend the label, or leave the sample out"
            )
        found.append((sample.where, sample.feeds, labels))
    return found
