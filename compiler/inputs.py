"""The data of one build, opened and kept apart: calibration, validation, judgement.

The three are disjoint by content. What the final judgement stands on is said in words:
the user's evaluation data, a held-out part of the calibration data, the example inputs of
the source, or, with nothing given, synthetic inputs that prove no accuracy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from edgec.data import Dataset, Sample, open_data
from edgec.errors import DataError
from edgec.export import Exported, input_specs, synthetic_feeds
from edgec.passes import Feeds
from edgec.source import Source

VALIDATION_SHARE = 0.25  # of the calibration samples
_MAX_CHECKS = 8


@dataclass(frozen=True)
class Inputs:
    """The data of a build.

    calibration, validation: for passes; None where the user gave none.
    evaluation: for the judgement; None where there is no data set for it.
    checks: a few feeds, real where there are any, on which passes are checked.
    judged_on: which data the figures come from. real: False if they are synthetic.
    """

    calibration: Dataset | None
    validation: Dataset | None
    evaluation: Dataset | None
    checks: tuple[Feeds, ...]
    judged_on: str
    real: bool
    findings: tuple[str, ...] = ()

    def judged(self) -> Iterator[Sample]:
        """The samples of the final judgement."""
        if self.evaluation is not None:
            yield from self.evaluation.samples()
        else:
            yield from (Sample(feeds, {}) for feeds in self.checks)

    @property
    def judged_count(self) -> int:
        """Number of samples of the final judgement."""
        return len(self.evaluation) if self.evaluation is not None else len(self.checks)


def open_inputs(source: Source, exported: Exported, seed: int) -> Inputs:
    """Open and check the data that a source names. Raises DataError."""
    specs = input_specs(exported.model)
    findings: list[str] = []
    calibration = evaluation = validation = None
    if source.evaluation is not None:
        evaluation = open_data(source.evaluation, specs, "evaluation")
    if source.calibration is not None:
        given = open_data(source.calibration, specs, "calibration")
        calibration = given
        if evaluation is not None:
            calibration = given.without(evaluation.kept_digests())
            shared = len(given) - len(calibration)
            if not len(calibration):
                raise DataError(
                    "calibration and evaluation hold the same samples; a model that is judged on "
                    "its calibration data looks better than it is. Give different data, or leave "
                    "--evaluation out: a part of the calibration data is then held out"
                )
            if shared:
                findings.append(
                    f"{shared} of {len(given)} calibration samples are also evaluation samples; "
                    "they were not used for calibration"
                )
        calibration, validation = calibration.split(VALIDATION_SHARE, seed)
        if not len(validation):
            validation = None
            findings.append("too few calibration samples to hold some out for validation")

    if evaluation is not None:
        judged, judged_on = evaluation, f"evaluation data, {len(evaluation)} samples"
    elif validation is not None:
        judged = validation
        judged_on = f"{len(validation)} calibration samples that were held out"
    else:
        judged, judged_on = None, ""
    checks = _checks(calibration or judged)
    real = True
    if not checks and exported.examples:
        checks = exported.examples
        judged_on = "the example inputs of the source"
    elif not checks:
        checks, real = synthetic_feeds(exported.model, seed, count=2), False
        judged_on = "synthetic random inputs (no data was given): numerics only, no accuracy"
        findings.append("no data was given: accuracy was not judged; give --evaluation")
    elif judged is None:
        judged_on = f"{len(checks)} calibration samples that were also used for calibration"
    return Inputs(calibration, validation, judged, checks, judged_on, real, tuple(findings))


def _checks(data: Dataset | None) -> tuple[Feeds, ...]:
    if data is None:
        return ()
    return tuple(itertools.islice(iter(data), _MAX_CHECKS))
