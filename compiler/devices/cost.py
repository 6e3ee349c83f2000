"""What one inference of a bundle costs on a device, beside its float32 reference.

An emulated CPU gives executed instructions by class, which repeat within 1 % and need no
device; a real one gives latencies. ``edgec bench --on`` prints both, and what was recorded on
a real device (``edgec.devices.record``) turns the counts into an estimate of milliseconds.
The models run one after the other, each in a process of its own, on one thread.
"""

from __future__ import annotations

import hashlib
import itertools
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgec.data import open_data
from edgec.devices.connect import open_device
from edgec.devices.cost_model import CostModel, fit
from edgec.devices.job import Device, Job
from edgec.devices.record import DeviceRecords, Record, read_records
from edgec.emit import emit, graph_entry, lay_out, operators
from edgec.errors import DataError, DeviceError
from edgec.export_onnx import load_onnx
from edgec.runners import bundle_input_specs, reference_beside
from edgec_runtime import golden
from edgec_runtime.bundle import Bundle, read_bundle

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]

_REPEATS = 21  # timed calls on a real device
_AS_DEAR = 0.97  # share of float32's instructions above which integers do not pay
_SOME = 0.01  # share of the instructions from which a class is worth a word


@dataclass(frozen=True)
class ModelCost:
    """One inference of one model.

    sha256: of its bundle. counts: executed instructions by class; latency_ms: median on a real
    device; estimate_ms: from the counts. None where there is none.
    """

    name: str
    sha256: str
    size_bytes: int
    counts: Mapping[str, int] | None = None
    latency_ms: float | None = None
    estimate_ms: float | None = None

    def facts(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "name": self.name,
            "size_bytes": self.size_bytes,
            "instructions": None if self.counts is None else dict(self.counts),
            "latency_ms": self.latency_ms,
            "estimate_ms": self.estimate_ms,
        }


@dataclass(frozen=True)
class DeviceCost:
    """Models on one device, the bundle first. notes: what the figures mean, in words."""

    device: str
    is_real: bool
    models: tuple[ModelCost, ...]
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float | None:
        """The bundle's instructions, or its latency, over those of the first comparison."""
        bundle, *others = self.models
        if not others:
            return None
        if bundle.counts is not None and others[0].counts is not None:
            return bundle.counts["total"] / others[0].counts["total"]
        if bundle.latency_ms is not None and others[0].latency_ms is not None:
            return bundle.latency_ms / others[0].latency_ms
        return None

    def facts(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "device": self.device,
            "models": [model.facts() for model in self.models],
            "ratio": self.ratio,
            "notes": list(self.notes),
        }


def cost_on(
    path: pathlib.Path,
    devices: Sequence[str],
    *,
    against: Sequence[str] = (),
    data: str | None = None,
    estimate: pathlib.Path | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[DeviceCost, ...]:
    """Run the bundle and its comparisons on every device, and say what they cost.

    against: .onnx files or bundles; by default the reference beside the bundle, if any.
    data: the first sample is run; the golden sample otherwise. estimate: recorded latencies.
    Raises EdgecError if a file is damaged, DeviceError if a device cannot run a model.
    """
    bundle = read_bundle(path, check="full")
    model = None if estimate is None else fit(read_records(estimate).measured())
    others = [pathlib.Path(p) for p in against]
    if not others:
        beside = reference_beside(path)
        others = [beside] if beside is not None else []
    feeds = _feeds(bundle, data)
    costs = []
    with tempfile.TemporaryDirectory(prefix="edgec-") as folder:
        files = [(path.name, path)]
        for number, other in enumerate(others):
            place = pathlib.Path(folder, f"{number}.edgec")
            file = other if other.suffix == ".edgec" else wrap(other, bundle, place)
            files.append((other.name, file))
        for name in devices:
            progress(f"bench on {name}", 0, 1)
            with open_device(name) as device:
                costs.append(_cost(device, files, feeds, bundle, model))
            progress(f"bench on {name}", 1, 1)
    return tuple(costs)


def wrap(source: pathlib.Path, like: Bundle, path: pathlib.Path) -> pathlib.Path:
    """An .onnx file as a bundle with the session settings of another one, without golden sample.

    Raises SourceError if the file is no model.
    """
    model = load_onnx(source)
    manifest = replace(
        like.manifest,
        name=source.stem,
        opset=model.opset_imports.get("", 1),
        ops=operators(model),
        graphs={"main": graph_entry(model)},
        golden=(),
        results={},
    )
    emit(lay_out(model), manifest, path, {})
    return path


def records_of(costs: Sequence[DeviceCost]) -> DeviceRecords:
    """Latencies of the one real device and counts of the one counting profile, as records.

    Raises DataError unless there is exactly one real device or one profile that counts, and
    no more of either.
    """
    real = [cost for cost in costs if cost.is_real]
    counting = [cost for cost in costs if cost.models[0].counts is not None]
    if len(real) > 1 or len(counting) > 1 or not (real or counting):
        raise DataError(
            f"--record takes one real device (native, ssh://, adb:) and one profile that counts "
            f"instructions; given are {len(real)} and {len(counting)}"
        )
    records = DeviceRecords()
    for cost in real:
        made = tuple(Record(m.name, m.sha256, milliseconds=m.latency_ms) for m in cost.models)
        records = records.extended(DeviceRecords(device=cost.device, models=made))
    for cost in counting:
        made = tuple(Record(m.name, m.sha256, instructions=m.counts) for m in cost.models)
        records = records.extended(DeviceRecords(counted_on=cost.device, models=made))
    return records


def kernels_in_words(counts: Mapping[str, int], ratio: float | None = None) -> str:
    """Which kind of kernel did the work, and what follows for int8 on this CPU.

    ratio: to the instructions of float32.
    """
    total, products = counts["total"], counts["dot"] + counts["i8mm"]
    scalable = counts["sve"] + counts["sme"]
    if products > _SOME * total:
        said = (
            f"{_millions(counts['dot'])} dot-product and {_millions(counts['i8mm'])} i8mm "
            "instructions: int8 runs by kernels made for it"
        )
    elif scalable > _SOME * total:
        said = f"{_millions(scalable)} SVE and SME instructions, whose kinds are not told apart"
    elif counts["widening"] > _SOME * total:
        said = (
            f"{products} dot-product instructions: int8 runs by "
            f"{_millions(counts['widening'])} widening multiplications"
        )
    else:
        return f"{products} dot-product instructions: the work is done in floating point"
    if ratio is None:
        return said
    if ratio > _AS_DEAR:
        return f"{said}; it will not pay on this CPU"
    return said


def _cost(
    device: Device,
    files: Sequence[tuple[str, pathlib.Path]],
    feeds: Feeds,
    bundle: Bundle,
    model: CostModel | None,
) -> DeviceCost:
    profile = device.profile
    is_real = profile.runner == "native"
    if not is_real and not profile.counts:
        raise DeviceError(
            f"device {profile.name}: instructions are not counted there and its time means "
            "nothing; give a device that counts, e.g. cortex-a72, or a real one"
        )
    costs, notes = [], []
    for name, file in files:
        job = Job(file, [feeds], repeats=_REPEATS if is_real else 0, count=profile.counts)
        outcome = device.run(job)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        latency = statistics.median(outcome.latency_ms) if is_real else None
        costs.append(ModelCost(name, digest, file.stat().st_size, outcome.counts, latency))
        notes += [outcome.uncounted] if outcome.uncounted else []
    lacking = sorted(set(bundle.manifest.target.features) - {*profile.features})
    if profile.arch != bundle.manifest.target.arch or lacking:
        notes.append(
            f"the bundle is built for {bundle.manifest.target.name}, of another kind than "
            f"{profile.name}: take the figures as a hint"
        )
    cost = DeviceCost(profile.name, is_real, tuple(costs), tuple(dict.fromkeys(notes)))
    if costs[0].counts is None:
        unknown = "not estimated: no instructions were counted"
        return cost if model is None else replace(cost, notes=(*cost.notes, unknown))
    cost = replace(cost, notes=(kernels_in_words(costs[0].counts, cost.ratio), *cost.notes))
    return cost if model is None else _estimated(cost, model)


def _estimated(cost: DeviceCost, model: CostModel) -> DeviceCost:
    """With the milliseconds that the counts stand for, and how far off they may be."""
    models, notes = [], []
    for one in cost.models:
        estimate = None
        try:
            estimate = None if one.counts is None else model.milliseconds(one.counts)
        except DataError as reason:
            notes.append(f"{one.name} is not estimated: {reason}")
        models.append(replace(one, estimate_ms=estimate))
    error = (
        f"a left-out model is estimated {model.error:.0%} off on average"
        if model.error is not None
        else "too few models to say how far off; record three or more"
    )
    notes.append(f"estimated from {model.models} recorded models by {model.way}: {error}")
    return replace(cost, models=tuple(models), notes=(*cost.notes, *notes))


def _feeds(bundle: Bundle, data: str | None) -> Feeds:
    if data is not None:
        dataset = open_data(data, bundle_input_specs(bundle.manifest), "bench")
        return next(iter(itertools.islice(dataset, 1)))
    return golden.golden_inputs(bundle)


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f} million"
