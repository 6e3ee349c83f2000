"""Verifies a bundle: every byte, the self-test, and its answers on data."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir

import edgec_runtime
from edgec.agreement import AgreementRule, Same
from edgec.drift import Drift, measure_drift
from edgec.errors import DataError, SourceError
from edgec.evaluate import Judgement, judge_outputs
from edgec.export_onnx import load_onnx
from edgec.lint import lint_bundle
from edgec.metrics import METRICS, load_metric
from edgec.promise import Limits, judge
from edgec.report import Promise, Robustness, plain
from edgec.robustness import measure_robustness
from edgec.runners import bundle_input_specs, open_bundle_data, open_runner, reference_beside
from edgec.scrutiny import Scrutiny, check_asked, examine
from edgec_runtime.bundle import read_bundle
from edgec_runtime.golden import SelfTest


@dataclass(frozen=True)
class Verdict:
    """The outcome. judgement: None without data. reason: why it did not pass."""

    path: pathlib.Path
    self_test: SelfTest
    judgement: Judgement | None
    promises: tuple[Promise, ...]
    robustness: Robustness | None = None
    drift: Drift | None = None

    @property
    def passed(self) -> bool:
        """True if the bytes are intact and the self-test passed."""
        return self.self_test.passed

    @property
    def kept(self) -> bool:
        """True if every promise is kept."""
        return all(promise.kept for promise in self.promises)

    @property
    def reason(self) -> str:
        """What the self-test found wrong."""
        failed = [f"output '{v.name}': {v.reason}" for v in self.self_test.outputs if not v.passed]
        return f"bundle {self.path}: the self-test failed on this machine: {'; '.join(failed)}"

    def facts(self) -> dict[str, Any]:
        """JSON data."""
        facts: dict[str, Any] = {
            "bundle": str(self.path),
            "integrity": "every byte checked",
            "self_test": {
                "passed": self.self_test.passed,
                "sqnr_db": round(self.self_test.sqnr_db, 1),
                "min_sqnr_db": self.self_test.min_sqnr_db,
            },
            "promises": [
                {"name": p.name, "limit": p.limit, "value": p.value, "kept": p.kept}
                for p in self.promises
            ],
        }
        if self.judgement is not None:
            facts["samples"] = self.judgement.samples
            facts["agreement"] = self.judgement.agreement
            facts["agreement_rule"] = self.judgement.rule
            facts["sqnr_db"] = round(self.judgement.sqnr_db, 2)
            if self.judgement.metric is not None:
                metric = self.judgement.metric
                facts["metric"] = {
                    "name": metric.name,
                    "reference": metric.reference,
                    "bundle": metric.bundle,
                    "drop": metric.drop,
                }
            for name in ("slices", "confidence"):
                if getattr(self.judgement, name) is not None:
                    facts[name] = plain(asdict(getattr(self.judgement, name)))
        if self.robustness is not None:
            facts["robustness"] = plain(asdict(self.robustness))
        if self.drift is not None:
            facts["stream"] = self.drift.results
        return facts


def verify_bundle(
    path: pathlib.Path,
    *,
    against: str | None = None,
    evaluation: str | None = None,
    metric: str | None = None,
    max_drop: float | None = None,
    max_slice_drop: float | None = None,
    max_robustness_drop: float | None = None,
    scrutiny: Scrutiny | None = None,
    any_target: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Verdict:
    """Hash every byte, run the self-test, compare with the reference on data if given.

    against: an .onnx file or a bundle; by default the reference that the build left beside
    the bundle. scrutiny: what to judge besides the mean; attacks follow the gradients of the
    reference alone here, since a bundle is lowered.
    Raises EdgecError if the file is damaged, DataError for wrong data.
    """
    limits = Limits(
        max_drop=max_drop, max_slice_drop=max_slice_drop, max_robustness_drop=max_robustness_drop
    )
    asked = scrutiny or Scrutiny()
    check_asked(asked, limits)
    task_metric = load_metric(metric) if metric is not None else None
    compared = (metric, max_drop, against, asked.slice, asked.robustness_epsilon)
    if evaluation is None and any(value is not None for value in compared):
        raise DataError("there is nothing to compare on; give --evaluation DATA")
    model = edgec_runtime.load(path, check="full", any_target=any_target)
    lint_bundle(read_bundle(path))
    tested = model.self_test()
    judgement = robustness = drift = None
    if evaluation is not None:
        beside = pathlib.Path(against) if against is not None else reference_beside(path)
        if beside is None:
            raise SourceError(
                f"no reference beside {path}; give one with --against (an .onnx file or a bundle)"
            )
        reference: pathlib.Path = beside
        data = open_bundle_data(evaluation, path, "evaluation")
        rule = AgreementRule.of_bundle(model.manifest)
        if metric is None and rule.same is Same.NEXT_TOKEN and data.has_label():
            task_metric = METRICS["perplexity"]
        run_reference = open_runner(reference, model.manifest, threads=0)
        examined = examine(
            asked,
            data.samples,
            count=len(data),
            where=data.where,
            metric=task_metric,
            classifier=rule.class_scores,
            reference=lambda: (_graph(reference), run_reference),
            inputs=bundle_input_specs(model.manifest),
            image=model.manifest.image,
        )
        judgement = judge_outputs(
            run_reference,
            lambda feeds: model(**feeds),
            data.samples(),
            rule=rule,
            metric=task_metric,
            slices=examined.slices,
            progress=lambda done: progress("evaluate", done, len(data)),
        )
        if model.manifest.state is not None:
            state = {pair.input: pair.output for pair in model.manifest.state}
            drift = measure_drift(state, run_reference, model, iter(data))
        if examined.robustness is not None:
            robustness = measure_robustness(
                examined.robustness,
                reference=_graph(reference),
                bundle=None,
                run_reference=run_reference,
                run_bundle=lambda feeds: model(**feeds),
                seed=0,
                progress=progress,
            )
    promises = judge(
        limits,
        size_bytes=path.stat().st_size,
        metric=judgement.metric if judgement is not None else None,
        agreement=judgement.agreement if judgement is not None else None,
        speedup=None,
        measured_on=None,
        real_data=True,
        slices=judgement.slices if judgement is not None else None,
        robustness=robustness,
    )
    return Verdict(path, tested, judgement, promises, robustness, drift)


def _graph(reference: pathlib.Path) -> ir.Model:
    """The graph whose gradients the attacks follow. Raises SourceError for a bundle."""
    if reference.suffix == ".edgec":
        raise SourceError(
            f"robustness needs the gradients of the reference, which {reference} has no more; "
            "give the .onnx file with --against"
        )
    return load_onnx(reference)
