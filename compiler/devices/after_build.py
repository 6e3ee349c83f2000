"""Verifies a bundle that was just built on the devices of its target, before it is delivered."""

from __future__ import annotations

import math
import pathlib
import tempfile
from collections.abc import Callable

import onnx_ir as ir

from edgec.devices.check import OnDevice, evenly, verify_on
from edgec.devices.install import missing
from edgec.emit import save_reference
from edgec.errors import DeviceMissingError
from edgec.inputs import Inputs
from edgec.report import OnDeviceResult, Promise
from edgec.targets import Target, load_profile

SAMPLES = 4  # an emulator takes seconds for each; fewer where it takes minutes


def devices_to_verify_on(target: Target, verify: bool | None) -> tuple[tuple[str, ...], str]:
    """The target's devices that can be used here, and a finding about those that cannot.

    verify: False for none; True if there must be one; None for those that are installed.
    Raises DeviceMissingError.
    """
    if verify is False:
        return (), ""
    lacking = {name: missing(load_profile(name)) for name in target.devices}
    ready = tuple(name for name, reason in lacking.items() if reason is None)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in lacking.items() if reason)
    if ready:
        some = f"the bundle was not run on every device of its target ({reasons})"
        return ready, some if reasons else ""
    if verify:
        why = reasons or f"target {target.name} names no device; give --no-verify"
        raise DeviceMissingError(f"there is no device to verify the bundle on; {why}")
    return (), f"the bundle was not run on a device of its target ({reasons})" if reasons else ""


def verify_built(
    bundle: pathlib.Path,
    reference: ir.Model,
    devices: tuple[str, ...],
    inputs: Inputs,
    seconds: float,
    progress: Callable[[str, int, int], None],
) -> tuple[tuple[OnDeviceResult, ...], tuple[Promise, ...]]:
    """Run the bundle on the devices; the results, and the promise that each that ran must keep.

    seconds: per device, as in ``verify_on``.
    """
    feeds = (sample.feeds for sample in inputs.judged())
    samples = evenly(feeds, inputs.judged_count, SAMPLES)
    with tempfile.TemporaryDirectory(prefix="edgec-") as folder:
        file = pathlib.Path(folder, "reference.onnx")
        save_reference(reference, file)
        verdicts = verify_on(
            bundle, devices, samples, against=file, seconds=seconds, progress=progress
        )
    return tuple(map(_result, verdicts)), tuple(
        _promise(v) for v in verdicts if v.status != "checked"
    )


def _result(verdict: OnDevice) -> OnDeviceResult:
    judgement, here, outcome = verdict.judgement, verdict.here, verdict.outcome
    return OnDeviceResult(
        device=verdict.device,
        status=verdict.status,
        reason=verdict.reason,
        samples=judgement.samples if judgement is not None else 0,
        agreement=judgement.agreement if judgement is not None else None,
        sqnr_db=judgement.sqnr_db if judgement is not None else None,
        sqnr_here_db=here.sqnr_db if here is not None else None,
        instructions=dict(outcome.counts) if outcome is not None and outcome.counts else None,
    )


def _promise(verdict: OnDevice) -> Promise:
    """That the bundle computes on the device what it computes here."""
    name = f"min_sqnr_db on {verdict.device}"
    if verdict.judgement is None or verdict.here is None:
        return Promise(name, math.nan, None, False, verdict.reason)
    limit, value = verdict.least_db, verdict.judgement.sqnr_db
    reason = verdict.reason or f"{verdict.judgement.samples} samples, run there"
    return Promise(name, round(limit, 1), round(value, 1), verdict.status == "passed", reason)
