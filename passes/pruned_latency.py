"""How fast a model gets by pruning: predicted from a table of operators, then measured.

The prediction chooses what goes (`unit_ranking.fastest`); whole models before and after take
turns in the end, and the error of the prediction is told. Where quantization follows, float
operators mislead, since integer kernels are sped up unevenly: operators and whole models can
be taken in the form that quantize-static gives them, with ranges from one sample.

Left out: dynamic quantization, whose operators count as float or as static int8.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from edgec.passes.contract import Context, Feeds, PassError
from edgec.passes.dimension_groups import Group
from edgec.passes.equivalence import proof_feeds
from edgec.passes.execution import open_session, run_feeds
from edgec.passes.latency_table import LatencyTable
from edgec.passes.placement import place
from edgec.passes.quantize_static import QuantizeStatic
from edgec.passes.timing import interleave, speedup_of
from edgec.passes.unit_ranking import Fastest, Ranked, fastest
from edgec.passes.width_latency import WidthLatency
from edgec.targets.machine import absent_providers, cpu_name, is_kind_of, this_machine

Costs = Literal["auto", "float32", "int8"]

_SECONDS = 0.5  # for the whole models
_CPU = "CPUExecutionProvider"
_KERNELS = ("uint8", "int8")  # activations that ONNX Runtime's own kernels take


@dataclass(frozen=True)
class Prediction:
    """What is to be cut, and everything that is needed to hold the prediction to account."""

    chosen: Fastest
    findings: tuple[str, ...]
    feeds: Feeds
    costs: Literal["float32", "int8"]


def predict(
    items: Sequence[Ranked],
    groups: Sequence[Group],
    model: ir.Model,
    context: Context,
    costs: Costs,
    *,
    ratio: float,
    max_ratio: float,
) -> Prediction:
    """Choose the cuts that save most time for what they cost, on this machine.

    ratio: share of the reference's predicted latency that is to go. costs: form of the
    operators. Raises PassError where no inputs are known, or where the target's integers are not
    those of ONNX Runtime's kernels.
    """
    scheme = context.target.int8
    form = _expected(model, context) if costs == "auto" else costs
    if form == "int8" and scheme.activation not in _KERNELS:
        raise PassError(
            f"prune-structured: costs 'int8' needs 8-bit activations, target "
            f"'{context.target.name}' has {scheme.activation}; choose float32"
        )
    feeds = proof_feeds(model, context)
    if feeds is None:
        raise PassError(
            "prune-structured: ranking 'latency' found no inputs that the model runs with: give "
            "calibration data, or choose another ranking"
        )
    folder = None if context.cache is None else context.cache / "latencies"
    table = LatencyTable(context.target.session, folder)
    integers = scheme if form == "int8" else None
    widths = WidthLatency(model, groups, feeds, table, integers)
    try:
        chosen = fastest(items, ratio, max_ratio, widths.milliseconds)
    finally:
        table.save()
    findings = list(table.findings)
    if not chosen.reached:
        findings.append(
            f"{1 - chosen.after_ms / max(chosen.before_ms, 1e-9):.1%} of the predicted latency go, "
            f"less than the share of {ratio:.1%} that was asked for: the rest lies in what may "
            "not be cut"
        )
    if widths.left_out:
        names = ", ".join(widths.left_out)
        findings.append(f"not counted, since they cannot be measured by themselves: {names}")
    lacking = absent_providers(context.target.session.providers)
    if lacking or not is_kind_of(this_machine(), context.target):
        findings.append(
            f"latencies were measured on {cpu_name()}, a proxy: it is not of the kind of "
            f"'{context.target.name}'"
        )
    return Prediction(chosen, tuple(findings), feeds, form)


def _expected(model: ir.Model, context: Context) -> Literal["float32", "int8"]:
    """The form that the target's own recipes give such a model: int8 needs calibration data."""
    scheme, target = context.target.int8, context.target
    static = QuantizeStatic.name in target.recipe.convolutional and scheme.activation in _KERNELS
    if context.calibration is None or not static:
        return "float32"
    units = place(model.graph, scheme, ()).units
    return "int8" if any(unit.node.op_type == "Conv" for unit in units) else "float32"


def held_to_account(
    prediction: Prediction, dense: ir.Model, pruned: ir.Model, context: Context
) -> str:
    """The finding that compares the prediction with both models, measured in turns."""
    settings = context.target.session
    calls = []
    for name, model in (("dense", dense), ("pruned", pruned)):
        quantized = prediction.costs == "int8"
        form = quickly_quantized(model, prediction.feeds, context) if quantized else model
        session = open_session(form, settings=settings, threads=settings.threads)
        calls.append((name, lambda session=session: run_feeds(session, prediction.feeds)))
    alone = settings.threads == 1 and set(settings.providers) == {_CPU}
    clock = time.thread_time if alone else time.perf_counter
    before, after = interleave(calls, seconds=_SECONDS, clock=clock)
    chosen = prediction.chosen
    predicted = chosen.before_ms / max(chosen.after_ms, 1e-9)
    off = chosen.after_ms / after.median_ms - 1
    return (
        f"latency in {prediction.costs} predicted {chosen.before_ms:.2f} -> {chosen.after_ms:.2f} "
        f"ms ({predicted:.2f}x), measured {before.median_ms:.2f} -> {after.median_ms:.2f} ms "
        f"({speedup_of(before, after)}x): what is left was predicted with an error of {off:+.1%}"
    )


def quickly_quantized(model: ir.Model, feeds: Feeds, context: Context) -> ir.Model:
    """The model as quantize-static makes it fast; its accuracy does not matter here."""
    quickly = QuantizeStatic(ranges="minmax", rounding="nearest", bias_correction=False)
    return quickly.run(model.clone(), replace(context, calibration=[feeds], lock={})).model


__all__ = ["Costs", "Prediction", "held_to_account", "predict", "quickly_quantized"]
