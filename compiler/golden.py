"""Makes the golden sample of a bundle: one input, and what the emitted graph gives for it.

The input is what a fiftieth of the bundle can hold of a real sample
(``edgec_runtime.golden`` defines the encoding); the outputs come from the lowered graph in
ONNX Runtime. How far a correct device may be off is measured: the same graph with and
without ONNX Runtime's optimizations, which round integers differently, as CPUs do. Where
activations become integers at run time that shows too little: another CPU's float noise in front
of the rounding moves some of them by a step (45 dB in a MiniLM of dynamic int8 on Haswell, 21 on
Nehalem).
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from edgec.errors import LockError
from edgec.passes import Feeds
from edgec.passes.execution import open_session, run_feeds, sqnr_db
from edgec.passes.lower_weights import rounds_activations
from edgec.passes.weights import constant
from edgec.targets import Target
from edgec_runtime import golden as format_
from edgec_runtime import manifest as parts
from edgec_runtime.bundle import GOLDEN_SHARE
from edgec_runtime.integer_cache import METADATA

_FILE_HEADER_BYTES = 65536 + 4096  # of a bundle, before any weight
_MARGIN_DB = 10.0  # between the measured rounding noise and the limit
_OTHER_MARGIN_DB = 15.0  # chosen on one text recogniser, which OpenVINO rounds elsewhere: 13 dB
_LIMIT_DB = (10.0, 60.0)  # a wrong kernel gives less than the first, float noise 80 and more
_ROUNDED_DB = 15.0  # where activations are rounded; chosen below a MiniLM without FMA: 21
_OTHER_ENGINE_DB = 30.0  # instead of 60: other engines compute in half precision (39 in MiniLM)
_CPU = ("CPUExecutionProvider",)


@dataclass(frozen=True)
class GoldenSample:
    """The manifest's part of the sample, and its files in the bundle."""

    manifest: parts.Golden
    files: Mapping[str, bytes]

    def to_plain(self) -> dict[str, Any]:
        """JSON data for the lock file."""
        files = {name: base64.b64encode(data).decode("ascii") for name, data in self.files.items()}
        return {"manifest": dataclasses.asdict(self.manifest), "files": files}


def make_golden(
    model: ir.Model, target: Target, feeds: Feeds, size_bytes: int, seed: int
) -> GoldenSample:
    """The sample of a bundle whose graph and weights have ``size_bytes``."""
    budget = int((size_bytes + _FILE_HEADER_BYTES) * GOLDEN_SHARE)
    inputs = format_.encode_inputs(feeds, budget_bytes=budget * 3 // 4)
    decoded = format_.decode_inputs(inputs.parts, inputs.data)
    session = open_session(model, settings=target.session)
    names = [output.name for output in session.get_outputs()]
    outputs = run_feeds(session, decoded)
    plain = run_feeds(open_session(model, optimized=False), decoded)
    noise_db = min(
        (sqnr_db(a, b) for a, b in zip(plain, outputs, strict=True) if a.dtype.kind == "f"),
        default=format_.SQNR_CAP_DB,
    )
    own = target.session.providers == _CPU
    highest = _LIMIT_DB[1] if own else _OTHER_ENGINE_DB
    if _rounds_activations(model):
        highest = _ROUNDED_DB
    margin = _MARGIN_DB if own else _OTHER_MARGIN_DB
    limit = min(max(noise_db - margin, _LIMIT_DB[0]), highest)
    encoded = format_.encode_outputs(
        dict(zip(names, outputs, strict=True)),
        budget_bytes=max(budget - len(inputs.data), budget // 4),
        seed=seed,
    )
    golden, files = format_.make_golden("main", inputs, encoded, min_sqnr_db=round(limit, 1))
    return GoldenSample(golden, files)


def _rounds_activations(model: ir.Model) -> bool:
    """True if activations or what is cached of them become integers at run time."""
    if METADATA in model.metadata_props:
        return True
    nodes = (node for graph in model.graphs() for node in graph)
    return any(
        node.op_type.startswith("Dynamic")
        or (node.op_type == "QuantizeLinear" and constant(node.inputs[0]) is None)
        or rounds_activations(node)
        for node in nodes
    )


def restore_golden(plain: Mapping[str, Any], where: str) -> GoldenSample:
    """The sample that a lock file holds. Raises LockError, with ``where``, if it is none."""
    try:
        table = plain["manifest"]
        golden = parts.Golden(
            **{
                **table,
                "inputs": tuple(parts.GoldenInput(**_tuples(i)) for i in table["inputs"]),
                "outputs": tuple(parts.GoldenOutput(**_tuples(o)) for o in table["outputs"]),
            }
        )
        files = {name: base64.b64decode(text) for name, text in plain["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LockError(f"{where}: its golden sample is damaged: {error}") from error
    return GoldenSample(golden, files)


def _tuples(table: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
