"""What static quantization decides from data, and its JSON form in a lock.

A lock may know more values and layers than a later run needs: with more nodes in ``skip``
the same decisions replay for those that are left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgec.passes import placement
from edgec.passes.contract import PassError
from edgec.passes.placement import Placement
from edgec.passes.ranges import Range

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Decisions:
    """ranges: by value. shifts: what is added to biases, float32 [channels] by layer output.

    sensitivity: SQNR in dB of each layer's own error, by node.
    """

    ranges: Mapping[str, Range]
    shifts: Mapping[str, Array] = field(default_factory=dict)
    sensitivity: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data; floats in hexadecimal, exact to the last bit."""
        return {
            "ranges": {name: [r.low.hex(), r.high.hex()] for name, r in self.ranges.items()},
            "bias": {
                name: shift.astype("<f4").tobytes().hex() for name, shift in self.shifts.items()
            },
            "sensitivity": dict(self.sensitivity),
        }


def replayed(lock: Mapping[str, Any], plan: Placement, *, bias_correction: bool) -> Decisions:
    """The decisions of an earlier run.

    Raises PassError if that was made for another graph or with other parameters.
    """
    ranges = {
        name: Range(float.fromhex(low), float.fromhex(high))
        for name, (low, high) in lock.get("ranges", {}).items()
    }
    shifts = {
        name: np.frombuffer(bytes.fromhex(text), "<f4").astype(np.float32)
        for name, text in lock.get("bias", {}).items()
    }
    missing = [str(v.name) for v in plan.calibrated if v.name not in ranges]
    if bias_correction:
        sites = {
            str(u.node.outputs[0].name): placement.channels(u.node) for u in plan.units if u.bias
        }
        known = {name: shift.size for name, shift in shifts.items()}
        missing += [name for name, size in sites.items() if known.get(name) != size]
    elif shifts:
        raise PassError("the lock holds bias corrections, but bias_correction is off: rebuild it")
    if missing:
        raise PassError(
            f"the lock knows nothing about value '{missing[0]}': it was made for another model "
            "or target; build without it"
        )
    return Decisions(ranges, shifts, lock.get("sensitivity", {}))
