"""Opens the emitted bundle with the shipped runtime and measures it against the reference.

What is judged besides the mean is settled on the data here, before the passes run.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

import edgec_runtime
from edgec.agreement import AgreementRule
from edgec.bench import Timing, interleave
from edgec.evaluate import Judgement, judge_outputs
from edgec.inputs import Inputs
from edgec.machine import absent_providers, cpu_name, is_kind_of, this_machine
from edgec.metrics import METRICS, TaskMetric
from edgec.passes import Feeds, Stage
from edgec.passes.execution import open_session
from edgec.pipeline import Step
from edgec.report import Measurement, Robustness
from edgec.robustness import RobustnessPlan, measure_robustness
from edgec.runners import reference_runner
from edgec.scrutiny import Examination, Scrutiny, examine
from edgec.shapes import input_specs
from edgec.slices import SliceColumn
from edgec.source import Source
from edgec.targets import Target
from edgec_runtime.integer_cache import quantized, session_scales

_SNAPSHOT_BYTES = 400_000_000  # weights up to which every step's model is timed, all at once

Array = np.ndarray[Any, Any]


def settle(
    scrutiny: Scrutiny,
    reference: ir.Model,
    source: Source,
    inputs: Inputs,
    metric: TaskMetric | None,
) -> Examination:
    """What is judged besides the mean. Raises EdgecError if the data does not allow it."""
    return examine(
        scrutiny,
        inputs.judged,
        count=inputs.judged_count if inputs.evaluation is not None else 0,
        where=inputs.evaluation.where if inputs.evaluation is not None else "",
        metric=metric,
        classifier=_rule(reference, source, metric).class_scores,
        reference=lambda: (reference, reference_runner(reference)),
        inputs=input_specs(reference),
        image=source.image,
    )


def judge_bundle(
    reference: ir.Model,
    bundle: pathlib.Path,
    source: Source,
    inputs: Inputs,
    metric: TaskMetric | None,
    slices: SliceColumn | None,
    progress: Callable[[str, int, int], None],
) -> Judgement:
    """Agreement, SQNR, task metric and slices of the bundle file on the judgement's samples."""
    model = edgec_runtime.load(bundle, any_target=True)
    run_reference = reference_runner(reference)
    total = inputs.judged_count
    return judge_outputs(
        run_reference,
        lambda feeds: model(**feeds),
        inputs.judged(),
        rule=_rule(reference, source, metric),
        metric=metric if inputs.evaluation is not None else None,
        slices=slices,
        progress=lambda done: progress("evaluate", done, total),
    )


def judge_robustness(
    plan: RobustnessPlan | None,
    reference: ir.Model,
    steps: Sequence[Step],
    bundle: pathlib.Path,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> Robustness | None:
    """Reference and bundle file on disturbed inputs; None if that was not asked for.

    The bundle's gradients are those of the last step before it was lowered.
    """
    if plan is None:
        return None
    model = edgec_runtime.load(bundle, any_target=True)
    standard = [step.model for step in steps if step.pass_.stage is not Stage.LOWER]
    return measure_robustness(
        plan,
        reference=reference,
        bundle=standard[-1] if standard else reference,
        run_reference=reference_runner(reference),
        run_bundle=lambda feeds: model(**feeds),
        seed=seed,
        progress=progress,
    )


def time_all(
    reference: ir.Model,
    steps: Sequence[Step],
    bundle: pathlib.Path,
    target: Target,
    threads: int,
    feeds: Feeds,
) -> tuple[dict[str, Timing], Measurement]:
    """Latency of the reference, of the model after each step and of the bundle, in turns.

    All with the target's session options, so that the ratio is of the model alone. The
    timings are named "reference", "bundle" and "INDEX PASS"; steps are left out where the
    weights are too large to hold every step's session at once.
    """
    model = edgec_runtime.load(bundle, any_target=True, threads=threads)
    candidates: list[tuple[str, Callable[[], object]]] = []
    whole = [("reference", reference)]
    if sum(step.size_bytes for step in steps) <= _SNAPSHOT_BYTES:
        whole += [
            (f"{i} {step.pass_.name}", step.model)
            for i, step in enumerate(steps)
            if step.result.changed
        ]
    for name, graph in whole:
        session = open_session(graph, settings=target.session, threads=threads)
        call = _caller(session, feeds)
        candidates.append((name, call))
    candidates.append(("bundle", lambda: model.run(feeds)))  # feeds were checked before
    timings = interleave(candidates)
    machine = this_machine()
    measured = Measurement(
        cpu=cpu_name(),
        arch=machine.arch,
        threads=threads,
        runs=timings[0].runs,
        is_target=is_kind_of(machine, target) and not absent_providers(target.session.providers),
    )
    return {timing.name: timing for timing in timings}, measured


def _rule(reference: ir.Model, source: Source, metric: TaskMetric | None) -> AgreementRule:
    declared = source.labels is not None or metric in (METRICS["top1"], METRICS["top5"])
    return AgreementRule.of_model(reference, declared)


def _caller(session: Any, feeds: Feeds) -> Callable[[], object]:
    given = quantized(feeds, session_scales(session))
    return lambda: session.run(None, given)
