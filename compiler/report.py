"""What a build measured, as data: the report, its JSON form and nothing else.

``report_terminal`` and ``report_html`` draw it for people. The JSON is schema-versioned:
a field is added freely, a field that changes its meaning raises ``SCHEMA_VERSION``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgec.report_plans import DepthPlan, PruningPlan

SCHEMA_VERSION = 1
BOTH = "reference and bundle"  # whose gradients the attacks followed


@dataclass(frozen=True)
class Side:
    """One side of a comparison: the reference or the bundle.

    latency_ms: median of one inference; None where it was not measured.
    """

    size_bytes: int
    latency_ms: float | None = None


@dataclass(frozen=True)
class Measurement:
    """How the latencies were taken: interleaved runs of both sides in one process."""

    cpu: str
    arch: str
    threads: int
    runs: int
    is_target: bool  # False: this machine is not of the target's kind, ratios are a hint


@dataclass(frozen=True)
class Metric:
    """The user's task metric on the evaluation data; higher is better.

    drop: reference - bundle, in the metric's own unit.
    """

    name: str
    reference: float
    bundle: float
    drop: float


@dataclass(frozen=True)
class Slice:
    """The metric on the samples that share one value of the slice column.

    value: empty where the row stands for ``pooled`` slices that are too small alone.
    reference, bundle, drop: NaN where so few samples have no metric. error: standard error of
    the drop, None where it cannot be told. judged: False below the least number of samples.
    """

    value: str
    samples: int
    reference: float
    bundle: float
    drop: float
    error: float | None
    judged: bool
    pooled: int = 0


@dataclass(frozen=True)
class Slices:
    """The evaluation data by the values of one label column.

    metric: the task metric, or "agreement". rows: judged slices first, the largest drop on top.
    """

    column: str
    metric: str
    least_samples: int
    rows: tuple[Slice, ...]

    @property
    def worst(self) -> Slice | None:
        """The judged slice with the largest drop."""
        return self.rows[0] if self.rows and self.rows[0].judged else None

    def title(self, row: Slice) -> str:
        """``group = night``, or what stands for many small slices."""
        if row.pooled:
            return f"{row.pooled} small slices of {self.column} together"
        return f"{self.column} = {row.value}"


@dataclass(frozen=True)
class Disturbance:
    """The metric on inputs that were disturbed in one way.

    kind: "none", "fgsm", "pgd", "noise", "blur" or "contrast"; a corruption's figures are the
    means over its severities. error: standard error of the drop.
    """

    kind: str
    reference: float
    bundle: float
    drop: float
    error: float | None

    @property
    def by_attack(self) -> bool:
        """True if gradients made it."""
        return self.kind in ("fgsm", "pgd")


@dataclass(frozen=True)
class Robustness:
    """Reference and bundle on disturbed inputs.

    epsilon: largest change of a value by an attack, as a share of the valid range. low, high:
    that range, over all channels. range_from: what it was taken from. gradients: whose the
    attacks followed. floor: what a bundle that is always wrong gets; None if not known.
    """

    metric: str
    samples: int
    input: str
    epsilon: float
    low: float
    high: float
    range_from: str
    gradients: str
    floor: float | None
    rows: tuple[Disturbance, ...]

    @property
    def on_bundle(self) -> bool:
        """True if the attacks also followed the bundle's own gradients."""
        return self.gradients == BOTH

    @property
    def worst(self) -> Disturbance:
        """The disturbance with the largest drop; undisturbed inputs are none."""
        return max((r for r in self.rows if r.kind != "none"), key=lambda row: row.drop)


@dataclass(frozen=True)
class Confidence:
    """Expected calibration error of a classifier (0..1), and what it is made of.

    rows: of class scores with a label. confidence: mean of the largest probability.
    """

    bins: int
    rows: int
    reference_error: float
    bundle_error: float
    reference_confidence: float
    bundle_confidence: float
    reference_accuracy: float
    bundle_accuracy: float


@dataclass(frozen=True)
class Parity:
    """The reference against the source (eager torch); None in the report where there is none.

    max_abs_error: largest difference of any output on ``samples`` real inputs.
    """

    max_abs_error: float
    sqnr_db: float
    samples: int


@dataclass(frozen=True)
class Step:
    """One pass of the recipe.

    changed: places changed. size_bytes, latency_ms: of the model after the step.
    sqnr_db: of the model's outputs against the reference after the step. plan: of a pass that
    cut units or blocks, None of others.
    """

    name: str
    parameters: Mapping[str, Any]
    lossless: bool
    seconds: float
    changed: int
    size_bytes: int
    sqnr_db: float | None = None
    latency_ms: float | None = None
    findings: tuple[str, ...] = ()
    plan: PruningPlan | DepthPlan | None = None


@dataclass(frozen=True)
class Skipped:
    """A node that a pass looked at and left alone."""

    step: str
    node: str
    reason: str


@dataclass(frozen=True)
class Layer:
    """Noise at the output of one layer that a lossy pass touched."""

    name: str
    op: str
    sqnr_db: float


@dataclass(frozen=True)
class Promise:
    """A limit that the user set, and what became of it.

    value: None where it could not be judged; a promise that is not judged is not kept.
    """

    name: str
    limit: float
    value: float | None
    kept: bool
    reason: str = ""


@dataclass(frozen=True)
class Trial:
    """One recipe that the search for the promise tried, judged on held-out calibration data.

    kept_float: layers left in float for accuracy. drop: of the metric or the agreement; it and
    sqnr_db are None where no data was held out. speedup, latency_ms: None on a machine that is
    not of the target's kind. reasons: the promises that it breaks, in words; empty if it keeps
    them all. ratio: share of the units that was pruned; None where nothing was to be pruned.
    untrained: passes that train were left out, so speed and size alone were judged. size_bytes:
    of the bundle without its golden sample.
    """

    recipe: tuple[str, ...]
    kept_float: int
    size_bytes: int
    speedup: float | None
    drop: float | None
    sqnr_db: float | None = None
    reasons: tuple[str, ...] = ()
    chosen: bool = False
    latency_ms: float | None = None
    ratio: float | None = None
    untrained: bool = False

    @property
    def kept(self) -> bool:
        """True if it keeps every promise."""
        return not self.reasons


@dataclass(frozen=True)
class KernelTime:
    """All executed nodes of one operator: their number and their share of the time, 0..1."""

    op: str
    nodes: int
    integer: bool
    time_share: float


@dataclass(frozen=True)
class Coverage:
    """What ONNX Runtime executes in integers, by node and by share of the time (0..1).

    conversion: QuantizeLinear and DequantizeLinear, which are neither integer nor float.
    kernels: by operator, the largest share first.
    """

    nodes: int
    integer_nodes: int
    conversion_nodes: int
    integer_time_share: float
    conversion_time_share: float
    kernels: tuple[KernelTime, ...] = ()


@dataclass(frozen=True)
class OnDeviceResult:
    """What a run on a device gave, beside the same run on this machine.

    instructions: executed in one warm call, by class; None where they are not counted.
    """

    device: str
    status: str
    reason: str
    samples: int
    agreement: float | None
    sqnr_db: float | None
    sqnr_here_db: float | None
    instructions: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Report:
    """Everything that a build measured and decided.

    agreement: how far bundle and reference agree, 0..1, mean over the samples.
    judged_on: which data the figures come from, in words.
    """

    name: str
    target: str
    source: str
    edgec_version: str
    size_bytes: int
    reference: Side
    bundle: Side
    judged_on: str
    samples: int
    agreement: float | None = None
    agreement_rule: str = ""
    sqnr_db: float | None = None
    speedup: float | None = None
    metric: Metric | None = None
    slices: Slices | None = None
    robustness: Robustness | None = None
    confidence: Confidence | None = None
    parity: Parity | None = None
    measured_on: Measurement | None = None
    steps: tuple[Step, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    layers: tuple[Layer, ...] = ()
    trials: tuple[Trial, ...] = ()
    coverage: Coverage | None = None
    devices: tuple[OnDeviceResult, ...] = ()
    promises: tuple[Promise, ...] = ()
    findings: tuple[str, ...] = ()
    bundle_path: str = ""
    bundle_sha256: str = ""
    build_seconds: float = 0.0
    schema_version: int = field(default=SCHEMA_VERSION)

    @property
    def kept(self) -> bool:
        """True if every promise is kept."""
        return all(promise.kept for promise in self.promises)

    def to_json(self) -> str:
        """The report as indented JSON with sorted keys; a NaN or infinity becomes null."""
        return json.dumps(plain(dataclasses.asdict(self)), indent=2, sort_keys=True) + "\n"


def plain(value: Any) -> Any:
    """JSON data of nested dataclass dicts; a NaN or infinity becomes None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
