"""What a build found, put together as its report and as the results in the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import edgec
from edgec import recipe as recipes
from edgec.bench import Timing, speedup_of
from edgec.drift import Drift
from edgec.evaluate import Judgement
from edgec.export import Exported
from edgec.hunt import Found
from edgec.inputs import Inputs
from edgec.machine import absent_providers
from edgec.passes import PruneBlocks, PruneStructured
from edgec.pipeline import Step
from edgec.report import (
    Layer,
    Measurement,
    Parity,
    Report,
    Robustness,
    Side,
    Skipped,
    Slices,
)
from edgec.report import Step as StepReport
from edgec.report_plans import DepthPlan, PrunedGroup, PruningPlan, ResidualBlock
from edgec.source import Source
from edgec.targets import Target


def results_of(judgement: Judgement, inputs: Inputs, drift: Drift | None) -> dict[str, Any]:
    """What the manifest says about the bundle's quality; rounded, no timings."""
    results: dict[str, Any] = {
        "judged_on": inputs.judged_on,
        "samples": judgement.samples,
        "sqnr_db": round(judgement.sqnr_db, 1),
        "agreement": round(judgement.agreement, 4),
        "agreement_rule": judgement.rule,
    }
    if judgement.metric is not None:
        metric = judgement.metric
        results["metric"] = {
            "name": metric.name,
            "reference": round(metric.reference, 4),
            "bundle": round(metric.bundle, 4),
        }
    if drift is not None:
        results["stream"] = drift.results
    return results


def report_of(
    source: Source,
    target: Target,
    found: Found,
    layers: Sequence[Layer],
    judgement: Judgement,
    inputs: Inputs,
    parity: Parity | None,
    exported: Exported,
    robustness: Robustness | None,
    drift: Drift | None,
) -> Report:
    """The report without latencies, sizes and promises."""
    return Report(
        name=source.name,
        target=target.name,
        source=source.kind,
        edgec_version=edgec.__version__,
        size_bytes=0,
        reference=Side(0),
        bundle=Side(0),
        judged_on=inputs.judged_on,
        samples=judgement.samples,
        agreement=judgement.agreement,
        agreement_rule=judgement.rule,
        sqnr_db=judgement.sqnr_db,
        metric=judgement.metric,
        slices=judgement.slices,
        robustness=robustness,
        confidence=judgement.confidence,
        parity=parity,
        steps=tuple(
            StepReport(
                name=step.pass_.name,
                parameters=recipes.parameters_of(step.pass_),
                lossless=step.pass_.lossless,
                seconds=round(step.seconds, 3),
                changed=step.result.changed,
                size_bytes=step.size_bytes,
                sqnr_db=step.sqnr_db,
                findings=step.result.findings,
                plan=_plan(step),
            )
            for step in found.steps
        ),
        skipped=tuple(
            Skipped(step.pass_.name, skip.node, skip.reason)
            for step in found.steps
            for skip in step.result.skipped
        ),
        layers=tuple(layers),
        trials=found.trials if len(found.trials) > 1 else (),
        findings=exported.findings
        + inputs.findings
        + found.findings
        + _stand_in(target)
        + (drift.findings if drift is not None else ())
        + _not_judged(judgement.slices, robustness),
    )


def _plan(step: Step) -> PruningPlan | DepthPlan | None:
    """What a step that prunes units or blocks has cut."""
    decisions = step.result.decisions
    if isinstance(step.pass_, PruneStructured):
        return PruningPlan(
            tuple(
                PrunedGroup(group["name"], group["kind"], group["units"], tuple(group["kept"]))
                for group in decisions["groups"]
            )
        )
    if isinstance(step.pass_, PruneBlocks):
        return DepthPlan(
            tuple(
                ResidualBlock(
                    block["name"],
                    block["result"],
                    block["shortcut"],
                    nodes=block["nodes"],
                    weights=block["weights"],
                    importance=block.get("importance"),
                    removed=block["removed"],
                )
                for block in decisions["blocks"]
            )
        )
    return None


def _stand_in(target: Target) -> tuple[str, ...]:
    """What the figures of a target are worth whose execution provider is not here."""
    return tuple(
        f"this onnxruntime has no {name}: the bundle was judged and timed without it, on "
        f"{' and '.join(p for p in target.session.providers if p != name)}"
        for name in absent_providers(target.session.providers)
    )


def _not_judged(slices: Slices | None, robustness: Robustness | None) -> tuple[str, ...]:
    """Where slices and robustness could only be judged in part."""
    findings = []
    small = [row for row in slices.rows if not row.judged] if slices is not None else []
    if slices is not None and small and not any(row.pooled for row in slices.rows):
        findings.append(
            f"{len(small)} slices of column '{slices.column}' have fewer than "
            f"{slices.least_samples} samples, {sum(row.samples for row in small)} together: they "
            "are listed and not judged"
        )
    if robustness is not None and not robustness.on_bundle:
        findings.append(f"attacks followed the gradients of the {robustness.gradients}")
    return tuple(findings)


def with_latency(report: Report, timings: Mapping[str, Timing], machine: Measurement) -> Report:
    """The report with latencies, and a warning where the bundle is slower than float32."""
    reference, bundle = timings["reference"].median_ms, timings["bundle"].median_ms
    speedup = reference / bundle
    findings = report.findings
    if speedup_of(timings["reference"], timings["bundle"]).is_below(1.0):
        where = "the target" if machine.is_target else f"this {machine.arch} machine"
        advice = (
            "leave quantization out (--recipe cleanup,fuse,lower) unless the size is what counts"
            if any(step.changed and not step.lossless for step in report.steps)
            else "nothing was quantized, so both compute the same: look for noise on this machine"
        )
        findings += (
            f"the bundle is SLOWER than the float32 reference on {where}: "
            f"{bundle:.3g} ms against {reference:.3g} ms; {advice}",
        )
    steps = tuple(
        replace(step, latency_ms=timings[key].median_ms) if key in timings else step
        for key, step in ((f"{i} {s.name}", s) for i, s in enumerate(report.steps))
    )
    return replace(
        report,
        reference=replace(report.reference, latency_ms=reference),
        bundle=replace(report.bundle, latency_ms=bundle),
        speedup=speedup,
        measured_on=machine,
        steps=steps,
        findings=findings,
    )
