"""Keeps the keys and values of past tokens as int8: a quarter of the memory that a step reads.

    GroupQueryAttention(past float32, ...)  ->  GroupQueryAttention(past int8, ..., scales)

One scale for each channel of a head, symmetric: the largest magnitude that the channel has in the
calibration data and a tenth more, over 127. Some channels of keys are far larger than the others
(KIVI, Liu et al. 2024, arXiv:2402.02750, section 3). The kernel rounds what is new and multiplies
while it reads; what is larger later is cut off. Inputs and outputs of the graph become int8; its
metadata says the scales, by which callers see float32 (``edgec_runtime.integer_cache``).

It stands behind ``lower``, which makes the kernel. Left out: 4 bits, caches that no kernel reads
alone, scales that follow the text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, PassError, Result, Skip, Stage
from edgec.passes.decode_trials import MASK
from edgec.passes.emit_decoder import KERNEL
from edgec.passes.execution import run_values
from edgec.passes.lower_decoder import can_share_cache
from edgec.passes.matching import add_initializer
from edgec.passes.weights import Array, label
from edgec_runtime.integer_cache import METADATA, scales_of, scales_text

INTEGER_KERNEL = f"{KERNEL}.int8"  # what a target's kernels name if the kernel reads int8
_PAST, _K_SCALE = 3, 12  # first of two inputs each
_LARGEST, _MARGIN = 127, 1.1  # what comes later may be larger
_LEAST_SHARE = 1e-3  # of a tensor's largest scale: a channel that was silent may speak later


@dataclass(frozen=True)
class QuantizeCache:
    """Store the key-value cache of a decoder in 8 bits. Needs calibration data."""

    name: ClassVar[str] = "quantize-cache"
    stage: ClassVar[Stage] = Stage.LOWER
    lossless: ClassVar[bool] = False
    version: ClassVar[int] = 1

    samples: int = 16  # of the calibration data, at most, from which the scales are taken

    def __post_init__(self) -> None:
        """Check the parameters."""
        if not self.samples > 0:
            raise PassError(f"quantize-cache: samples is {self.samples}, expected above 0")

    def run(self, model: ir.Model, context: Context) -> Result:
        """Change all caches or none; ``changed`` counts the attentions."""
        nodes = [node for node in model.graph if node.op_type == KERNEL]
        if not nodes:
            return Result(model, 0)
        reason = _reason(model, nodes, context)
        if reason:
            return Result(model, 0, tuple(Skip(label(node), reason) for node in nodes))
        if "scales" in context.lock:
            scales = scales_of(context.lock["scales"])
        else:
            scales = dict(self._measured(model, nodes, context))
        for node in nodes:
            _change(model, node, scales)
        text = scales_text(scales)
        model.metadata_props[METADATA] = text
        finding = f"{2 * len(nodes)} caches are int8, a quarter of their size in float32"
        return Result(model, len(nodes), decisions={"scales": text}, findings=(finding,))

    def _measured(
        self, model: ir.Model, nodes: list[ir.Node], context: Context
    ) -> Iterator[tuple[str, Array]]:
        """Pairs of an input's or output's name and its scales, float32 [1, heads, 1, size]."""
        if context.calibration is None or not len(context.calibration):
            raise PassError(
                "quantize-cache needs calibration data, from which it takes the range of each "
                "channel: give some typical texts"
            )
        pairs = {str(present.name): str(past.name) for n in nodes for past, present in _caches(n)}
        largest: dict[str, Array] = {}
        samples = list(itertools.islice(context.calibration, self.samples))
        for done, values in enumerate(run_values(model, list(pairs), samples, optimized=True), 1):
            for name, array in values.items():
                found = _magnitudes(array, samples[done - 1])
                if not np.isfinite(found).all():
                    raise PassError(
                        f"calibration sample {done - 1}: '{name}' holds NaN or infinity: check "
                        "the sample, or the model's weights"
                    )
                largest[name] = np.maximum(largest.get(name, 0.0), found)
            context.progress("measuring caches", done, len(samples))
        for present, past in pairs.items():
            scale = largest[present] * (_MARGIN / _LARGEST)
            least = max(float(scale.max()) * _LEAST_SHARE, float(np.finfo(np.float32).tiny))
            scale = np.maximum(scale, least).astype(np.float32)
            yield past, scale
            yield present, scale


def _reason(model: ir.Model, nodes: list[ir.Node], context: Context) -> str:
    """Why the caches stay as they are; "" if they need not."""
    if INTEGER_KERNEL not in context.target.kernels:
        return f"target {context.target.name} has no {KERNEL} that reads int8"
    if not can_share_cache(model):
        return "a cache is read by something else than the kernel"
    if any(past.dtype != ir.DataType.FLOAT for n in nodes for past, _ in _caches(n)):
        return "its cache is not float32"
    return ""


def _caches(node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    """Past and present of keys, and of values."""
    found = []
    for i in range(2):
        past = node.inputs[_PAST + i]
        assert past is not None  # ``can_share_cache`` and the emission saw to it
        found.append((past, node.outputs[1 + i]))
    return found


def _magnitudes(array: Array, feeds: Mapping[str, Array]) -> Array:
    """The largest magnitude of each channel over the positions that the mask shows.

    array: [batch, heads, positions, size]. Returns [1, heads, 1, size].
    """
    shown = feeds.get(MASK)
    if shown is not None and shown.shape == (array.shape[0], array.shape[2]):
        array = np.where(shown[:, None, :, None] == 1, array, 0.0)
    return np.asarray(np.abs(array).max(axis=(0, 2), keepdims=True, initial=0.0))


def _change(model: ir.Model, node: ir.Node, scales: Mapping[str, Array]) -> None:
    """Let one attention read and give integers."""
    graph = model.graph
    node.resize_inputs(_K_SCALE + 2)
    for i, (past, present) in enumerate(_caches(node)):
        scale = scales[str(past.name)]
        node.replace_input_with(_K_SCALE + i, add_initializer(graph, f"{past.name}_scale", scale))
        for value in (past, present):
            value.type = ir.TensorType(ir.DataType.INT8)
    for name in ("k_quant_type", "v_quant_type"):
        node.attributes.add(ir.AttrString(name, "PER_CHANNEL"))
    node.attributes.add(ir.AttrInt64("kv_cache_bit_width", 8))
