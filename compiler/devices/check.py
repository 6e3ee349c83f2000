"""Runs a bundle on devices and judges it there: against the reference, and against itself here.

By metric and not by bits: CPUs round integers differently (33 to 40 dB between x86 and ARM),
while a kernel that saturates or a layout of another CPU costs far more. So a bundle passes
on a device if its self-test passes there and if it is not noisier against the float32
reference than on this machine, by more than ``MAX_LOSS_DB``.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

import edgec_runtime
from edgec.agreement import AgreementRule
from edgec.data import Sample, open_data
from edgec.devices.connect import check_name, open_device
from edgec.devices.job import Job, Outcome
from edgec.errors import DeviceError, DeviceMissingError, TargetMismatchError
from edgec.evaluate import Judgement, judge_outputs
from edgec.lint import lint_bundle
from edgec.runners import bundle_input_specs, open_runner, reference_beside
from edgec.targets import Profile, load_profile
from edgec_runtime import golden
from edgec_runtime.bundle import Bundle, read_bundle

Array = np.ndarray[Any, Any]
Progress = Callable[[str, int, int], None]

MAX_LOSS_DB = 3.0  # more than rounding costs, less than half of what saturation does
_FALLBACK = "CPUExecutionProvider"  # takes whatever the others leave


@dataclass(frozen=True)
class OnDevice:
    """What became of a bundle on one device.

    status: "skipped" if the device cannot be used on this machine, "refused" if the bundle is
    not for it or does not run there, "failed" if its answers are wrong, "checked" if nothing
    runs on this device (``Outcome.checked``). reason: why, what was checked, or why its
    instructions are not counted, and how many samples were run if the time was short.
    judgement: against the reference on the device's outputs; here: on this machine's.
    """

    device: str
    status: Literal["passed", "failed", "refused", "skipped", "checked"]
    reason: str = ""
    self_test: golden.SelfTest | None = None
    judgement: Judgement | None = None
    here: Judgement | None = None
    of_samples: int = 0  # size of the set that the samples were taken from
    outcome: Outcome | None = None
    least_db: float = 0.0  # the SQNR that the device had to reach

    def facts(self) -> dict[str, Any]:
        """JSON data."""
        facts: dict[str, Any] = {"device": self.device, "status": self.status}
        if self.reason:
            facts["reason"] = self.reason
        if self.self_test is not None:
            facts["self_test"] = {
                "passed": self.self_test.passed,
                "sqnr_db": round(self.self_test.sqnr_db, 1),
                "min_sqnr_db": self.self_test.min_sqnr_db,
            }
        if self.judgement is not None and self.here is not None:
            facts |= {
                "samples": self.judgement.samples,
                "of_samples": self.of_samples,
                "agreement": self.judgement.agreement,
                "agreement_here": self.here.agreement,
                "agreement_rule": self.judgement.rule,
                "sqnr_db": round(self.judgement.sqnr_db, 2),
                "sqnr_here_db": round(self.here.sqnr_db, 2),
            }
        if self.outcome is not None:
            facts |= {"onnxruntime": self.outcome.onnxruntime, "features": self.outcome.features}
            if self.outcome.nodes:
                facts["nodes"] = dict(self.outcome.nodes)
            if self.outcome.counts is not None:
                facts["instructions"] = dict(self.outcome.counts)
        return facts


@dataclass(frozen=True)
class Samples:
    """Feeds to run on a device. of: the size of the set that they were taken from."""

    feeds: tuple[Mapping[str, Array], ...]
    of: int


def open_samples(path: pathlib.Path, evaluation: Any | None, count: int) -> Samples | None:
    """Samples of evaluation data for a bundle, evenly spaced; None without data."""
    if evaluation is None:
        return None
    specs = bundle_input_specs(read_bundle(path).manifest)
    data = open_data(evaluation, specs, "evaluation")
    return evenly(data, len(data), count)


def evenly(feeds: Iterable[Mapping[str, Array]], total: int, count: int) -> Samples:
    """``count`` of ``total`` feeds, evenly spaced; all where there are fewer."""
    fewer = min(count, total)
    wanted = {i * total // fewer for i in range(fewer)}
    return Samples(tuple(given for i, given in enumerate(feeds) if i in wanted), total)


def verify_on(
    path: pathlib.Path,
    devices: Sequence[str],
    samples: Samples | None = None,
    *,
    against: str | os.PathLike[str] | None = None,
    any_target: bool = False,
    seconds: float = math.inf,
    progress: Progress = lambda what, done, total: None,
) -> tuple[OnDevice, ...]:
    """Run a bundle on every device and judge it there.

    samples: what to run besides the bundle's golden sample. against: an .onnx file or a
    bundle; by default the reference that the build left beside the bundle; without one, the
    device is compared with this machine. any_target: also run a bundle that was built for
    other devices. seconds: per device; the golden sample and the first of ``samples`` are run
    in any case, each further one only while the time is likely to stay below it.
    Raises EdgecError if the bundle is damaged; what goes wrong on a device is in its verdict.
    """
    bundle = read_bundle(path, check="full")
    lint_bundle(bundle)
    for name in devices:
        check_name(name)  # before the minutes of a run
    given = samples or Samples((), 1)
    expected = _Expected.compute(bundle, given.feeds, against)
    verdicts = []
    for name in devices:
        progress(f"verify on {name}", 0, 1)
        verdicts.append(_verify_one(bundle, name, expected, given.of, any_target, seconds))
        progress(f"verify on {name}", 1, 1)
    return tuple(verdicts)


@dataclass(frozen=True)
class _Expected:
    """The feeds, golden inputs first, and what the reference and this machine give for them."""

    feeds: tuple[Mapping[str, Array], ...]
    reference: tuple[Mapping[str, Array], ...]
    here: tuple[Mapping[str, Array], ...]
    rule: AgreementRule

    @property
    def in_floats(self) -> bool:
        """True if an output is a float: SQNR tells how far the answers are off."""
        return any(array.dtype.kind == "f" for array in self.here[0].values())

    @classmethod
    def compute(
        cls,
        bundle: Bundle,
        feeds: Sequence[Mapping[str, Array]],
        against: str | os.PathLike[str] | None,
    ) -> _Expected:
        model = edgec_runtime.load(bundle.path, threads=1, any_target=True)
        every = (model.golden_inputs(), *feeds)
        here = tuple(model(**given) for given in every)
        beside = pathlib.Path(against) if against is not None else reference_beside(bundle.path)
        reference: tuple[Mapping[str, Array], ...] = here
        if beside is not None:
            run = open_runner(beside, bundle.manifest, threads=1)
            reference = tuple(run(given) for given in every)
        return cls(every, reference, here, AgreementRule.of_bundle(bundle.manifest))

    def judged(self, outputs: Sequence[Mapping[str, Array]]) -> Judgement:
        """Outputs for the first feeds against the reference; the golden one only if it is alone."""
        first = 1 if len(self.feeds) > 1 else 0
        expected, actual = iter(self.reference[first:]), iter(outputs[first:])
        return judge_outputs(
            lambda feeds: next(expected),
            lambda feeds: next(actual),
            [Sample(given, {}) for given in self.feeds[first : len(outputs)]],
            rule=self.rule,
        )


def _verify_one(
    bundle: Bundle,
    name: str,
    expected: _Expected,
    of_samples: int,
    any_target: bool,
    seconds: float,
) -> OnDevice:
    try:
        with open_device(name) as device:
            if not any_target:
                check_fits(bundle, device.profile)
            counts = device.profile.counts
            outcome = device.run(Job(bundle.path, expected.feeds, count=counts, seconds=seconds))
            if not any_target:
                _check_providers(bundle, device.profile, outcome)
    except DeviceMissingError as error:
        return OnDevice(name, "skipped", str(error))
    except (TargetMismatchError, DeviceError) as error:
        return OnDevice(name, "refused", str(error))
    if outcome.checked:
        return OnDevice(name, "checked", outcome.checked, outcome=outcome)
    [entry, *_] = bundle.manifest.golden
    tested = golden.judge(entry, bundle.read(entry.outputs_file), outcome.outputs[0])
    judgement = expected.judged(outcome.outputs)
    here = expected.judged(expected.here[: len(outcome.outputs)])
    least_db = least_sqnr_db(here, device.profile)
    reason = _wrong(outcome, tested, judgement, here, least_db)
    reason = f"device {name}: {reason}" if reason else ""
    if not reason and not expected.in_floats and judgement.agreement < here.agreement:
        reason = (
            f"device {name}: {judgement.agreement:.1%} of the answers agree with the reference, "
            f"{here.agreement:.1%} on this machine; the device computes something else; give the "
            "model a float output (its scores) to see by how much"
        )
    status: Literal["passed", "failed"] = "failed" if reason else "passed"
    few = _too_slow(outcome, len(expected.feeds), seconds)
    reason = "; ".join(text for text in (reason, few, outcome.uncounted) if text)
    return OnDevice(name, status, reason, tested, judgement, here, of_samples, outcome, least_db)


def _too_slow(outcome: Outcome, feeds: int, seconds: float) -> str:
    """How many samples were run if not all were, and why; feeds: the golden sample and all."""
    ran = len(outcome.outputs)
    if ran == feeds:
        return ""
    return (
        f"{ran - 1} of {feeds - 1} samples were run there: with one more, the runs were likely to "
        f"take longer than {seconds:g} s (--verify-seconds)"
    )


def check_fits(bundle: Bundle, profile: Profile) -> None:
    """Raise TargetMismatchError if the bundle was built for other devices than this one.

    A CPU feature that the device lacks is no mismatch where the bundle says what changes
    without it (``session.without``).
    """
    target = bundle.manifest.target
    if target.arch != profile.arch or not set(target.os) & set(profile.os):
        raise TargetMismatchError(
            f"bundle {bundle.path}: built for {target.name} ({target.arch}; "
            f"{', '.join(target.os)}), device {profile.name} is {profile.arch} on "
            f"{', '.join(profile.os)}; build it for that device, or give --any-target"
        )
    there = [name for name in profile.providers if name != _FALLBACK]
    wanted = [name for name in bundle.manifest.session.providers if name != _FALLBACK]
    needs_one = profile.runner in ("provider", "convert")  # else web engines take any bundle
    if (needs_one or wanted) and not set(there) & set(wanted):
        raise TargetMismatchError(
            f"bundle {bundle.path}: built for {', '.join(wanted) or _FALLBACK}, device "
            f"{profile.name} has {', '.join(there) or _FALLBACK}; build it for that device, or "
            "give --any-target"
        )
    provided = {*profile.features, *bundle.manifest.session.without}
    lacking = sorted(set(target.features) - provided)
    if lacking:
        raise TargetMismatchError(
            f"bundle {bundle.path}: built for {target.name}, whose CPUs have "
            f"{', '.join(target.features)}; device {profile.name} lacks {', '.join(lacking)}; "
            "build it for a target without, or give --any-target to run it slower"
        )


def fits(bundle: Bundle, device: str) -> bool:
    """Whether the bundle was built for devices like this profile."""
    try:
        check_fits(bundle, load_profile(device))
    except TargetMismatchError:
        return False
    return True


def _check_providers(bundle: Bundle, profile: Profile, outcome: Outcome) -> None:
    """Raise TargetMismatchError if an execution provider of the bundle took no part."""
    for provider in bundle.manifest.session.providers:
        took = not outcome.nodes or outcome.nodes.get(provider, 0) > 0
        if provider != _FALLBACK and not (provider in outcome.providers and took):
            raise TargetMismatchError(
                f"bundle {bundle.path}: built for {provider}, which took no node of it on device "
                f"{profile.name}; build it for that device, or give --any-target to run it on "
                f"{_FALLBACK}"
            )


def least_sqnr_db(here: Judgement, profile: Profile) -> float:
    """The SQNR that a device must reach, given that on this machine."""
    return min(here.sqnr_db - MAX_LOSS_DB, profile.enough_db)


def _wrong(
    outcome: Outcome,
    tested: golden.SelfTest,
    judgement: Judgement,
    here: Judgement,
    least_db: float,
) -> str:
    """Why the answers of a device do not pass, and what to do; empty if they do."""
    if not tested.passed:
        failed = [f"output '{v.name}': {v.reason}" for v in tested.outputs if not v.passed]
        said = f"the self-test failed: {'; '.join(failed)}"
    elif judgement.sqnr_db < least_db:
        said = (
            f"SQNR {judgement.sqnr_db:.1f} dB against {here.sqnr_db:.1f} dB on this machine; the "
            "device computes something else"
        )
    else:
        return ""
    if outcome.arch == "x86_64" and "vnni" not in outcome.features:
        return (
            f"{said} (int8 sums that saturate without VNNI?); build with int8.reduce_range or "
            "uint8 weights, e.g. for a target of that CPU"
        )
    return (
        f"{said}; build with --recipe cleanup,fuse,lower to see whether quantization is the cause"
    )
