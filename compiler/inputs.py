"""The data of one build, opened and kept apart: calibration, validation, judgement.

The three are disjoint by content. What the final judgement stands on is said in words:
the user's evaluation data, a held-out part of the calibration data, the example inputs of
the source, or, with nothing given, synthetic inputs that prove no accuracy.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from edgec.data import LABEL, Dataset, InputSpec, Sample
from edgec.decoder import has_past, is_decoder_graph
from edgec.errors import DataError
from edgec.export import Exported
from edgec.metrics import METRICS, TaskMetric
from edgec.passes import Context, Feeds
from edgec.passes.attention_mask import shown_positions
from edgec.passes.equivalence import proof_feeds
from edgec.runners import reference_runner
from edgec.shapes import fix_shapes, has_open_dimensions, input_specs
from edgec.source import Data, Source
from edgec.stateful_data import open_stateful_data
from edgec.targets import Target

VALIDATION_SHARE = 0.25  # of the calibration samples
_MAX_CHECKS = 8


@dataclass(frozen=True)
class Inputs:
    """The data of a build.

    calibration, validation: for passes; None where the user gave none.
    evaluation: for the judgement; None where there is no data set for it.
    checks: a few feeds, real where there are any, on which passes are checked.
    judged_on: which data the figures come from. real: False if they are synthetic.
    metric: what a language model is judged by if the user names nothing; None for other models,
    and without data.
    """

    calibration: Dataset | None
    validation: Dataset | None
    evaluation: Dataset | None
    checks: tuple[Feeds, ...]
    judged_on: str
    real: bool
    findings: tuple[str, ...] = ()
    metric: TaskMetric | None = None

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


def open_inputs(source: Source, exported: Exported, target: Target, seed: int) -> Inputs:
    """Open and check the data that a source names. Raises DataError.

    Where the target needs fixed shapes, the open dimensions of the exported model get the
    sizes that the data has.
    """
    if target.static_shapes and has_open_dimensions(exported.model):
        fix_shapes(exported.model, _first_feeds(source, exported), target.name)
    specs = input_specs(exported.model)
    decoder = is_decoder_graph(exported.model)
    findings: list[str] = []
    calibration = evaluation = validation = None
    if source.evaluation is not None:
        evaluation = _open(source.evaluation, exported, specs, "evaluation")
    if source.calibration is not None:
        given = _open(source.calibration, exported, specs, "calibration")
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
        findings += _doubts(given)

    if evaluation is not None:
        judged, judged_on = evaluation, f"evaluation data, {_counted(evaluation, decoder)}"
    elif validation is not None:
        judged = validation
        judged_on = f"{_counted(validation, decoder, 'calibration ')} that were held out"
    else:
        judged, judged_on = None, ""
    if source.metric is not None:
        _require_labels(judged, source.metric)
    checks = _checks(calibration or judged)
    real = bool(checks)
    if real and decoder:
        checks = _with_steps(checks, exported.examples)
    if not real:
        checks = _made_up(exported, target, seed)
        judged_on = "example or random inputs (no data was given): numerics only, no accuracy"
        findings.append("no data was given: accuracy was not judged; give --evaluation")
    elif judged is None:
        judged_on = f"{len(checks)} calibration samples that were also used for calibration"
    asked = decoder and judged is not None and judged.has_label()
    metric = METRICS["perplexity"] if asked else None
    return Inputs(calibration, validation, judged, checks, judged_on, real, tuple(findings), metric)


def _open(given: Data, exported: Exported, specs: tuple[InputSpec, ...], what: str) -> Dataset:
    """The data set, with the reference's own state where samples of a recurrent model lack it."""
    run = functools.partial(reference_runner, exported.model)
    return open_stateful_data(given, specs, what, exported.state, run, exported.encode)


def _counted(data: Dataset, decoder: bool, kind: str = "") -> str:
    """The size of a data set in words: of a language model with the tokens that are judged."""
    if not decoder or not data.has_label():
        return f"{len(data)} {kind}samples"
    truths = [np.atleast_2d(sample.labels[LABEL]) for sample in data.samples()]
    judged = sum(int((truth[:, 1:] >= 0).sum()) for truth in truths)
    longest = max(truth.shape[1] for truth in truths)
    return f"{len(data)} {kind}windows of {longest} tokens, {judged} of them judged"


def _with_steps(checks: tuple[Feeds, ...], examples: tuple[Feeds, ...]) -> tuple[Feeds, ...]:
    """The checks of a language model: steps with a past, as the source's examples show them.

    The first is a step: the device spends its time on these, so it is timed and is the golden
    sample; the second a prompt.
    """
    steps = tuple(feeds for feeds in _comparable(examples) if has_past(feeds))
    return (*steps[:1], *checks[:1], *steps[1:], *checks[1:])[:_MAX_CHECKS]


def _comparable(examples: Iterable[Feeds]) -> tuple[Feeds, ...]:
    """The examples without steps of padded rows.

    Their past is made up, and a kernel that rotates keys by their place in the cache reads it
    otherwise than the reference. Padding is proven on caches that the model wrote itself
    (``decoder_parity``, ``lower_decoder``).
    """
    return tuple(f for f in examples if not has_past(f) or shown_positions(f) is None)


def _doubts(calibration: Dataset) -> list[str]:
    """What makes measured ranges worth little: samples that are all alike."""
    different = len(set(calibration.digests))
    if len(calibration) == 1 or different > 1:
        return []
    return [
        f"all {len(calibration)} calibration samples are equal: ranges measured on them fit this "
        "one input alone; give inputs that differ as the device's will"
    ]


def _first_feeds(source: Source, exported: Exported) -> Feeds | None:
    """A sample whose shapes are those that the device will see."""
    specs = input_specs(exported.model)
    for given, what in ((source.evaluation, "evaluation"), (source.calibration, "calibration")):
        if given is not None:
            return next(iter(_open(given, exported, specs, what)))
    return exported.examples[0] if exported.examples else None


def _require_labels(judged: Dataset | None, metric: object) -> None:
    """Refuse a metric without labels before the passes run, not after."""
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")
    if judged is None:
        raise DataError(f"metric {name} needs labelled data to judge on; give --evaluation DATA")
    if not next(iter(judged.samples())).labels:
        raise DataError(
            f"metric {name} needs labels, but {judged.where} has no array besides the inputs; "
            "add one named 'label'"
        )


def _made_up(exported: Exported, target: Target, seed: int) -> tuple[Feeds, ...]:
    """The source's examples; random feeds that the model accepts where they say too little."""
    model = exported.model
    specs = input_specs(model)
    examples = [
        feeds
        for feeds in _comparable(exported.examples)
        if all(
            d is None or d == n
            for spec in specs
            for d, n in zip(spec.dims, feeds[spec.name].shape, strict=True)
        )
    ]
    arrays = [array for feeds in examples for array in feeds.values() if array.size]
    if any(array.min() < array.max() for array in arrays):
        return tuple(examples)
    random = proof_feeds(model, Context(target=target, reference=model, seed=seed))
    if random is None and not examples:
        raise DataError(
            "no data was given, and no random inputs were found that the model accepts; give "
            "--calibration or --evaluation"
        )
    return (*examples, random) if random is not None else tuple(examples)


def _checks(data: Dataset | None) -> tuple[Feeds, ...]:
    if data is None:
        return ()
    return tuple(itertools.islice(iter(data), _MAX_CHECKS))
