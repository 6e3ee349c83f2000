"""What static quantization decides from data, and its JSON form in a lock.

A lock may know more values and layers than a later run needs: with more nodes in ``skip``
the same decisions replay for those that are left.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.passes import placement
from edgec.passes.contract import PassError
from edgec.passes.placement import Placement
from edgec.passes.ranges import Range
from edgec.passes.weights import constant

Array = np.ndarray[Any, Any]

_EFFORT = 1  # of zlib: integers that are mostly 0 and 1 gain little from more
_STALE = (
    "the lock knows nothing about value '{}': it was made for another model or target, or with "
    "other parameters; build without it"
)


@dataclass(frozen=True)
class WeightChoice:
    """How a weight is rounded.

    shares: uint8 [channels], which of ``weight_rounding.SHARES`` of its largest weight each channel
    spans; None for the whole. steps: int8, shaped like the weight: how far its integers lie
    from the nearest ones; None for the nearest.
    """

    shares: Array | None = None
    steps: Array | None = None


@dataclass(frozen=True)
class Decisions:
    """ranges: by value. shifts: what is added to biases, float32 [channels] by layer output.

    weights: by ``weight_key``. sensitivity: SQNR in dB of each layer's own error, by node.
    """

    ranges: Mapping[str, Range]
    shifts: Mapping[str, Array] = field(default_factory=dict)
    weights: Mapping[str, WeightChoice] = field(default_factory=dict)
    sensitivity: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data; floats in hexadecimal, exact to the last bit."""
        return {
            "ranges": {name: [r.low.hex(), r.high.hex()] for name, r in self.ranges.items()},
            "bias": {
                name: shift.astype("<f4").tobytes().hex() for name, shift in self.shifts.items()
            },
            "clip": {
                key: _packed(choice.shares)
                for key, choice in self.weights.items()
                if choice.shares is not None and choice.shares.any()
            },
            "rounding": {
                key: _packed(choice.steps)
                for key, choice in self.weights.items()
                if choice.steps is not None
            },
            "sensitivity": dict(self.sensitivity),
        }


def weight_key(value: ir.Value, axis: int) -> str:
    """The name in the decisions of a weight whose output channels lie along an axis."""
    return f"{value.name}@{axis}"


def replayed(
    lock: Mapping[str, Any], plan: Placement, *, bias_correction: bool, rounded: bool
) -> Decisions:
    """The decisions of an earlier run. rounded: the lock must say how weights are rounded.

    Raises PassError if that was made for another graph or with other parameters.
    """
    try:
        ranges = {
            name: Range(float.fromhex(low), float.fromhex(high))
            for name, (low, high) in lock.get("ranges", {}).items()
        }
        shifts = {
            name: np.frombuffer(bytes.fromhex(text), "<f4").astype(np.float32)
            for name, text in lock.get("bias", {}).items()
        }
    except (TypeError, ValueError) as error:
        raise PassError(f"the lock is damaged: {error}; build without it") from error
    missing = [str(v.name) for v in plan.calibrated if v.name not in ranges]
    if bias_correction:
        sites = {
            str(u.node.outputs[0].name): placement.channels(u.node) for u in plan.units if u.bias
        }
        known = {name: shift.size for name, shift in shifts.items()}
        missing += [name for name, size in sites.items() if known.get(name) != size]
    elif shifts:
        raise PassError("the lock holds bias corrections, but bias_correction is off: rebuild it")
    choices: dict[str, WeightChoice] = {}
    for unit in plan.units:
        if not unit.computing:
            continue
        value, axis = unit.node.inputs[1], placement.channel_axis(unit.node)
        weight = constant(value)
        assert value is not None and weight is not None  # placement took no other
        key = weight_key(value, axis)
        shares, steps = lock.get("clip", {}).get(key), lock.get("rounding", {}).get(key)
        if rounded and steps is None:
            missing.append(str(value.name))
        choices[key] = WeightChoice(
            _unpacked(shares, np.uint8, (weight.shape[axis],), key),
            _unpacked(steps, np.int8, weight.shape, key),
        )
    if missing:
        raise PassError(_STALE.format(missing[0]))
    return Decisions(ranges, shifts, choices, lock.get("sensitivity", {}))


def _packed(array: Array) -> str:
    return base64.b64encode(zlib.compress(array.tobytes(), _EFFORT)).decode()


def _unpacked(text: str | None, dtype: type, shape: tuple[int, ...], key: str) -> Array | None:
    """Raises PassError if the text does not hold such an array."""
    if text is None:
        return None
    try:
        data = zlib.decompress(base64.b64decode(text, validate=True))
    except (ValueError, zlib.error) as error:
        raise PassError(
            f"the lock's entry '{key}' is damaged: {error}; build without it"
        ) from error
    if len(data) != math.prod(shape):
        raise PassError(_STALE.format(key))
    return np.frombuffer(data, dtype).reshape(shape)
