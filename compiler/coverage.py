"""Which kernels ONNX Runtime really runs, and how much of the time they take.

The model runs under ONNX Runtime's own profiler, with the target's session options; what
is counted are the nodes that were executed after all of its rewrites. A kernel is integer
if it computes on integers inside (QLinear..., ...Integer, MatMulNBits, ...) or if it moves
8-bit data. QuantizeLinear and DequantizeLinear are neither: they are the price.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir as ir

from edgec.passes import Feeds
from edgec.passes.execution import open_session, run_feeds
from edgec.report import Coverage, KernelTime
from edgec.targets import Session

_RUNS = 12
_WARM_UP = 2  # first runs, which are left out: they touch memory for the first time
_INTEGER_NAMES = frozenset(
    {"DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "GatherBlockQuantized", "MatMulNBits"}
    | {"MatMulIntegerToFloat", "QAttention", "QGemm"}
)
_CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_CONTAINERS = frozenset({"If", "Loop", "Scan"})  # what they run has events of its own
_EIGHT_BITS = frozenset({"int8", "uint8"})


def measure_coverage(model: ir.Model, feeds: Feeds, settings: Session, threads: int) -> Coverage:
    """Integer-kernel coverage of a model on this machine, by executed node and by time."""
    with tempfile.TemporaryDirectory(prefix="edgec-") as folder:
        prefix = pathlib.Path(folder) / "profile"
        session = open_session(model, settings=settings, threads=threads, profile=str(prefix))
        for _ in range(_RUNS):
            run_feeds(session, feeds)
        events = json.loads(pathlib.Path(session.end_profiling()).read_text(encoding="utf-8"))
    return coverage_of(events)


def coverage_of(events: Iterable[Mapping[str, Any]]) -> Coverage:
    """The coverage that the events of ONNX Runtime's profiler tell of.

    Expects the kernel events of some identical runs, in order. A node's time is its median: one
    run that another program interrupted would else be most of a small model's time.
    """
    times: dict[tuple[str, str], list[float]] = {}
    integer: dict[tuple[str, str], bool] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        arguments = event["args"]
        if arguments["op_name"] in _CONTAINERS:
            continue
        key = (name.removesuffix("_kernel_time"), str(arguments["op_name"]))
        times.setdefault(key, []).append(float(event["dur"]))
        integer[key] = _is_integer(key[1], arguments)
    steady = {key: durations[_WARM_UP:] for key, durations in times.items()}
    spent = {key: len(d) * statistics.median(d) if d else 0.0 for key, d in steady.items()}
    whole = sum(spent.values()) or 1.0
    kernels: dict[str, list[tuple[str, str]]] = {}
    for key in spent:
        kernels.setdefault(key[1], []).append(key)
    return Coverage(
        nodes=len(spent),
        integer_nodes=sum(integer.values()),
        conversion_nodes=sum(op in _CONVERSIONS for _, op in spent),
        integer_time_share=_share(spent, whole, lambda key: integer[key]),
        conversion_time_share=_share(spent, whole, lambda key: key[1] in _CONVERSIONS),
        kernels=tuple(
            sorted(
                (
                    KernelTime(
                        op=op,
                        nodes=len(keys),
                        integer=all(integer[key] for key in keys),
                        time_share=round(sum(spent[key] for key in keys) / whole, 4),
                    )
                    for op, keys in kernels.items()
                ),
                key=lambda kernel: (-kernel.time_share, kernel.op),
            )
        ),
    )


def _share(spent: Mapping[tuple[str, str], float], whole: float, wanted: Any) -> float:
    return round(sum(time for key, time in spent.items() if wanted(key)) / whole, 4)


def _is_integer(op: str, arguments: Mapping[str, Any]) -> bool:
    if op in _CONVERSIONS:
        return False
    if op in _INTEGER_NAMES or op.startswith("QLinear") or op.endswith("Integer"):
        return True
    types = {kind for shape in arguments.get("output_type_shape", ()) for kind in shape}
    return bool(types) and types <= _EIGHT_BITS
