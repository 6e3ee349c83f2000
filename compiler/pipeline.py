"""Runs the passes of a recipe over the reference, checks each and records what it did.

After every pass the signature is compared; a lossless pass must also give the outputs of
the model before it. Nothing is judged here: that is done on the emitted file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.errors import PassError
from edgec.passes import Context, Feeds, Pass, Result, Stage
from edgec.passes.execution import (
    open_session,
    run_feeds,
    run_values,
    sqnr_db,
    weights_size_bytes,
)
from edgec.passes.lower_weights import with_float_products
from edgec.report import Layer
from edgec.rounds import in_rounds
from edgec.targets import Session
from edgec_runtime.integer_cache import METADATA, scales_of

# A lossless pass reorders float32 operations; 60 dB leaves room for that and for nothing else.
_LOSSLESS_DB = 60.0
# Lowering a quantized graph changes single least significant bits, which a deep integer
# network amplifies (measured: 33-40 dB between correct kernels); a wrong kernel gives < 10 dB.
_LOWERED_DB = 20.0
# Weight-only products that round activations to int8 may cost a decoder more (measured: 19.7 dB
# for 211 of them in a row, on random tokens), without anything being wrong.
_ROUNDED_DB = 10.0
# By itself, ONNX Runtime rounds the activations of DequantizeLinear -> MatMul, the form before.
_FLOAT = Session(config={"session.qdq_matmulnbits_accuracy_level": "0"})


@dataclass(frozen=True)
class Step:
    """One pass that ran. model: a snapshot after it, sharing weights with the others.

    sqnr_db: outputs against the reference on the check samples.
    """

    pass_: Pass
    result: Result
    model: ir.Model
    seconds: float
    size_bytes: int
    sqnr_db: float


def run_passes(
    passes: Sequence[Pass],
    context: Context,
    checks: Sequence[Feeds],
    locked: Sequence[Mapping[str, Any]] = (),
    announce: Callable[[str], None] = lambda name: None,
) -> tuple[Step, ...]:
    """Run the passes in order on a clone of ``context.reference``, each round as a step.

    checks: a few feeds on which the model is compared before and after.
    locked: decisions to replay, one mapping per step, or nothing.
    Raises PassError naming the pass that broke the signature or, being lossless, the outputs.
    """
    model = context.reference.clone()
    expected = _outputs(model, checks)
    before = expected
    signature = _signature(model)
    steps: list[Step] = []
    unquantized: ir.Model | None = None
    for index, pass_ in enumerate(in_rounds(passes)):
        announce(pass_.name)
        decisions = locked[index] if locked else {}
        started = time.perf_counter()
        if pass_.stage is Stage.QUANTIZE and not pass_.lossless:
            unquantized = unquantized or model
        given = replace(context, lock=decisions, unquantized=unquantized)
        result = pass_.run(model.clone(), given)
        seconds = time.perf_counter() - started
        if not locked and _did_nothing(pass_, result):
            result = replace(result, findings=(_nothing_found(pass_),))
        if _signature(result.model) != signature:
            raise PassError(
                f"pass '{pass_.name}' changed the model's signature from {signature} to "
                f"{_signature(result.model)}; this is a defect of the pass"
            )
        after = _outputs(result.model, checks) if result.changed else before
        if pass_.lossless and result.changed:
            lowered = pass_.stage is Stage.LOWER and any(not step.pass_.lossless for step in steps)
            limit = _LOWERED_DB if lowered else _LOSSLESS_DB
            lost = _worst_sqnr_db(before, after)
            if lowered and lost < limit:
                exact = with_float_products(result.model)
                if exact is not None and lost >= _ROUNDED_DB:
                    told = f"products that round activations to int8 leave {lost:.1f} dB of SQNR"
                    result = replace(result, findings=(*result.findings, told))
                if exact is None or lost >= _ROUNDED_DB:
                    plain = (
                        _outputs(one, checks, _FLOAT) for one in (model, exact or result.model)
                    )
                    lost = _worst_sqnr_db(*plain)
            if lost < limit:
                raise PassError(
                    f"pass '{pass_.name}' is lossless but changed the outputs (SQNR {lost:.1f} dB, "
                    f"at least {limit:.0f} expected); leave it out of the recipe and report it"
                )
        model, before = result.model, after
        steps.append(
            Step(
                pass_=pass_,
                result=result,
                model=model,
                seconds=seconds,
                size_bytes=weights_size_bytes(model),
                sqnr_db=_worst_sqnr_db(expected, after),
            )
        )
    return tuple(steps)


def _did_nothing(pass_: Pass, result: Result) -> bool:
    """True if a pass that was asked for left the model alone and said nothing about it."""
    silent = not (result.changed or result.findings or result.skipped)
    return silent and pass_.stage not in (Stage.CLEAN, Stage.LOWER)


def _nothing_found(pass_: Pass) -> str:
    return (
        "it found no place in this model and changed nothing; "
        f"`edgec passes {pass_.name}` says what it needs"
    )


def layer_noise(
    reference: ir.Model, steps: Sequence[Step], checks: Sequence[Feeds]
) -> tuple[Layer, ...]:
    """SQNR of every value that lossy passes touched, in graph order.

    The model before the first lossy pass is compared with the model after the last one, those
    of stage LOWER aside, both without ONNX Runtime's optimizations, so that values have the same
    names.
    """
    lossy = [
        i
        for i, step in enumerate(steps)
        if not step.pass_.lossless and step.result.changed and step.pass_.stage is not Stage.LOWER
    ]
    if not lossy or not checks:
        return ()
    clean = steps[lossy[0] - 1].model if lossy[0] else reference
    noisy = steps[lossy[-1]].model
    touched = {name for i in lossy for name in steps[i].result.touched}
    producers = {
        v.name: node for node in clean.graph for v in node.outputs if v.dtype == ir.DataType.FLOAT
    }
    present = {v.name for node in noisy.graph for v in node.outputs}
    names = [str(n) for n in producers if n in touched and n in present]
    if not names:
        return ()
    signal = dict.fromkeys(names, 0.0)
    noise = dict.fromkeys(names, 0.0)
    pairs = zip(run_values(clean, names, checks), run_values(noisy, names, checks), strict=True)
    for expected, actual in pairs:
        for name in names:
            r, a = expected[name].astype(np.float64), actual[name].astype(np.float64)
            if r.shape == a.shape:
                finite = np.isfinite(r)  # masked scores are not
                signal[name] += float(np.square(r[finite]).sum())
                differs = ~(r == a)
                noise[name] += float(np.square(r[differs] - a[differs]).sum())
    return tuple(
        Layer(name, producers[name].op_type, _db(signal[name], noise[name])) for name in names
    )


def _db(signal: float, noise: float) -> float:
    if noise == 0.0 or signal == 0.0:
        return 200.0 if noise == 0.0 else -200.0
    return round(float(np.clip(10 * np.log10(signal / noise), -200, 200)), 2)


def _outputs(
    model: ir.Model, checks: Sequence[Feeds], settings: Session | None = None
) -> list[list[np.ndarray[Any, Any]]]:
    session = open_session(model, settings=settings)
    return [run_feeds(session, feeds) for feeds in checks]


def _worst_sqnr_db(
    reference: Sequence[Sequence[np.ndarray[Any, Any]]],
    actual: Sequence[Sequence[np.ndarray[Any, Any]]],
) -> float:
    """The lowest SQNR of any output of any sample.

    Integers count only in a model without floating-point outputs: an argmax flips on a tie.
    """
    worst = 200.0
    for r_sample, a_sample in zip(reference, actual, strict=True):
        floats = any(r.dtype.kind == "f" for r in r_sample)
        for r, a in zip(r_sample, a_sample, strict=True):
            if r.shape != a.shape:
                worst = -200.0
            elif r.dtype.kind == "f" or (not floats and r.dtype.kind in "iub"):
                both = ~((r == a) | (np.isnan(r) & np.isnan(a))) | np.isfinite(r)
                worst = min(worst, sqnr_db(r[both], a[both]))
    return round(worst, 2)


def _signature(model: ir.Model) -> str:
    """Of the model as it is called: caches of integers are float32 to a caller."""
    scales = model.metadata_props.get(METADATA)
    floats = scales_of(scales) if scales else {}

    def one(value: ir.Value) -> str:
        shape = "?" if value.shape is None else ",".join(str(d) for d in value.shape)
        dtype = ir.DataType.FLOAT if value.name in floats else value.dtype
        return f"{value.name}:{dtype}[{shape}]"

    graph = model.graph
    return f"({'; '.join(map(one, graph.inputs))}) -> ({'; '.join(map(one, graph.outputs))})"
