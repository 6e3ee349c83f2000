"""Judges a model during a search: on held-out calibration data, never on evaluation data.

A trial asks what the final judgement will ask: is the model within the promised drop, size
and latency, and is it no slower than the float32 reference? It looks at the model in memory
with the target's session options; the emitted bundle is judged once, at the end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from edgec.agreement import AgreementRule
from edgec.bench import Speedup, interleave, speedup_of
from edgec.emit import bundle_size_bytes
from edgec.evaluate import Run, judge_outputs
from edgec.inputs import Inputs
from edgec.machine import absent_providers, is_kind_of, this_machine
from edgec.metrics import METRICS, TaskMetric
from edgec.passes.contract import Stage
from edgec.passes.execution import open_session, run_feeds
from edgec.pipeline import Step
from edgec.promise import Limits
from edgec.report import Trial
from edgec.targets import Target

# Below it noise has more than a tenth of the signal's power: no promise has to say that this is
# too much. Good models lie above (a text recogniser that reads as well as in float32: 14 dB).
LEAST_SQNR_DB = 10.0
_CPU = "CPUExecutionProvider"
_SECONDS = (0.5, 2.0, 8.0)  # of measuring; longer where the shorter one does not settle it
_ERROR = 0.005  # of the limit: a standard error that is small enough


@dataclass(frozen=True)
class _Speed:
    """Of a model: how many times faster than the reference, and its median latency."""

    speedup: Speedup
    latency_ms: float


@dataclass(frozen=True)
class Judge:
    """What every trial of one build is held against.

    declared: the outputs are class scores because the user gave labels or a top-k metric.
    """

    reference: ir.Model
    target: Target
    inputs: Inputs
    limits: Limits
    metric: TaskMetric | None = None
    declared: bool = False
    threads: int = 1

    def __call__(self, recipe: Sequence[str], kept_float: int, steps: Sequence[Step]) -> Trial:
        """The trial of the model that the steps ended in.

        recipe: names of the passes. kept_float: layers that were left in float for accuracy.
        """
        model = steps[-1].model if steps else self.reference
        trial = self.size_and_speed(recipe, steps)
        drop, sqnr_db = self._loss(model)
        reasons = list(trial.reasons)
        promised = drop is not None and self.limits.max_drop is not None
        if drop is not None and self.limits.max_drop is not None and drop > self.limits.max_drop:
            reasons.append(f"drop above {self.limits.max_drop}")
        # a network that was pruned and trained computes something else as well as before
        pruned = any(step.pass_.stage is Stage.PRUNE and step.result.changed for step in steps)
        if sqnr_db is not None and sqnr_db < LEAST_SQNR_DB and not (pruned and promised):
            reasons.append(f"drowns in noise: {sqnr_db:.1f} dB")
        return replace(
            trial, kept_float=kept_float, drop=drop, sqnr_db=sqnr_db, reasons=tuple(reasons)
        )

    def size_and_speed(self, recipe: Sequence[str], steps: Sequence[Step]) -> Trial:
        """A trial without a look at the outputs: what training leaves as it is."""
        model = steps[-1].model if steps else self.reference
        limits, size_bytes = self.limits, bundle_size_bytes(model)
        reasons = []
        found = self._speed(model)
        if found is not None:
            if found.speedup.is_below(1.0):
                reasons.append("slower than float32")
            elif found.speedup.ratio < (limits.min_speedup or 0.0):
                reasons.append(f"below {limits.min_speedup}x")
            if limits.max_latency_ms is not None and found.latency_ms > limits.max_latency_ms:
                reasons.append(f"above {limits.max_latency_ms} ms")
        if limits.max_size_mb is not None and size_bytes > limits.max_size_mb * 1e6:
            reasons.append(f"bundle above {limits.max_size_mb} MB")
        return Trial(
            recipe=tuple(recipe),
            kept_float=0,
            size_bytes=size_bytes,
            speedup=None if found is None else round(found.speedup.ratio, 3),
            latency_ms=None if found is None else round(found.latency_ms, 4),
            drop=None,
            reasons=tuple(reasons),
        )

    def _speed(self, model: ir.Model) -> _Speed | None:
        """How fast the model is beside the reference; None on a machine of another kind.

        Measured until it is clearly above or below the promise, or known to half a percent.
        """
        lacking = absent_providers(self.target.session.providers)
        if lacking or not is_kind_of(this_machine(), self.target):
            return None
        feeds = self.inputs.checks[0]
        calls = []
        for name, graph in (("reference", self.reference), ("model", model)):
            session = open_session(graph, settings=self.target.session, threads=self.threads)
            calls.append((name, lambda session=session: run_feeds(session, feeds)))
        # on one thread CPU time, which other programs on the machine disturb less; only the
        # CPU provider computes on the thread that calls it
        alone = self.threads == 1 and set(self.target.session.providers) == {_CPU}
        clock = time.thread_time if alone else time.perf_counter
        found = _Speed(Speedup(0.0, 0.0), 0.0)
        for seconds in _SECONDS:
            dense, own = interleave(calls, seconds=seconds, max_runs=20_000, clock=clock)
            speedup = speedup_of(dense, own)
            found = _Speed(speedup, own.median_ms)
            limit = max(1.0, self.limits.min_speedup or 1.0)
            if self.limits.max_latency_ms is not None:
                limit = max(limit, dense.median_ms / self.limits.max_latency_ms)
            if speedup.is_above(limit) or speedup.is_below(limit):
                break
            if speedup.error < _ERROR * limit:
                break
        return found

    def _loss(self, model: ir.Model) -> tuple[float | None, float | None]:
        """Drop of the metric, or of the agreement, and SQNR on held-out calibration samples.

        None without held-out samples.
        """
        samples = self.inputs.validation
        if samples is None:
            return None, None
        runs = [
            _runner(open_session(self.reference, threads=self.threads)),
            _runner(open_session(model, settings=self.target.session, threads=self.threads)),
        ]
        labelled = self.metric is not None and bool(next(iter(samples.samples())).labels)
        top_k = self.metric in (METRICS["top1"], METRICS["top5"])
        judgement = judge_outputs(
            runs[0],
            runs[1],
            samples.samples(),
            rule=AgreementRule.of_model(self.reference, self.declared or top_k),
            metric=self.metric if labelled else None,
        )
        drop = 1.0 - judgement.agreement if judgement.metric is None else judgement.metric.drop
        return round(drop, 6), round(judgement.sqnr_db, 1)


def _runner(session: Any) -> Run:
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, run_feeds(session, feeds), strict=True))
