"""What the outcome of a training depends on, as one thing: to name, to send and to compare.

A checkpoint belongs to one task (`digests`); other processes get it as files (`write`,
`read`): ONNX with weights beside it, numpy arrays without pickle, JSON.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context
from edgec.passes.curriculum import Example, examples
from edgec.passes.training_settings import TrainingSettings

if TYPE_CHECKING:
    from edgec.passes.recover import Recover

_NO_MATTER = ("save_every",)  # settings that the outcome does not depend on


@dataclass(frozen=True)
class Task:
    """A student's graph, its teacher's, what is learned from and what is judged on."""

    model: ir.Model
    reference: ir.Model
    samples: Sequence[Example]
    held_out: Sequence[Example]
    settings: Recover
    seed: int

    @staticmethod
    def of(model: ir.Model, context: Context, settings: Recover) -> Task:
        """The task of a pass; the context has calibration data."""
        assert context.calibration is not None
        samples = held_out = examples(context.calibration, context.calibration_labels)
        if context.validation is not None and len(context.validation):
            held_out = examples(context.validation, context.validation_labels)
        return Task(model, context.reference, samples, held_out, settings, context.seed)

    def digests(self) -> dict[str, str]:
        """sha256 of each part by a name for people."""
        data = (*self.samples, *self.held_out)
        return task_digests(self.model, self.reference, data, self.settings, self.seed)

    def write(self, folder: pathlib.Path) -> None:
        """Write the task into an empty folder."""
        for name, model in (("model", self.model), ("reference", self.reference)):
            ir.save(model.clone(), folder / f"{name}.onnx", external_data=f"{name}.data")
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        names: dict[str, list[list[list[str]]]] = {}
        for what, samples in (("samples", self.samples), ("held_out", self.held_out)):
            names[what] = []
            for i, sample in enumerate(samples):
                names[what].append([list(sample.feeds), list(sample.labels)])
                both = (*sample.feeds.values(), *sample.labels.values())
                arrays |= {f"{what}.{i}.{k}": array for k, array in enumerate(both)}
        np.savez(folder / "samples.npz", **arrays)  # type: ignore[arg-type]
        table = {"settings": _named(self.settings), "seed": self.seed, "names": names}
        (folder / "task.json").write_text(json.dumps(table), encoding="utf-8")

    @staticmethod
    def read(folder: pathlib.Path) -> Task:
        """The task that ``write`` left in a folder."""
        from edgec.passes import PASSES

        table = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        data: dict[str, list[Example]] = {}
        with np.load(folder / "samples.npz", allow_pickle=False) as arrays:
            for what, samples in table["names"].items():
                data[what] = []
                for i, (feeds, labels) in enumerate(samples):
                    loaded = [arrays[f"{what}.{i}.{k}"] for k in range(len(feeds) + len(labels))]
                    given = dict(zip((*feeds, *labels), loaded, strict=True))
                    data[what].append(
                        Example({n: given[n] for n in feeds}, {n: given[n] for n in labels})
                    )
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in table["settings"].items()}
        name = settings.pop("pass")
        kind: Any = next(pass_ for pass_ in PASSES if pass_.name == name)
        return Task(
            model=_loaded(folder / "model.onnx"),
            reference=_loaded(folder / "reference.onnx"),
            samples=data["samples"],
            held_out=data["held_out"],
            settings=kind(**settings),
            seed=table["seed"],
        )


def task_digests(
    model: ir.Model,
    reference: ir.Model,
    data: Iterable[Example],
    settings: TrainingSettings,
    seed: int,
) -> dict[str, str]:
    """sha256 of each part of a task by a name for people. data: all samples, in a fixed order."""
    import torch

    chosen = {k: v for k, v in _named(settings).items() if k not in _NO_MATTER}
    return {
        "model": _model_digest(model),
        "reference": _model_digest(reference),
        "data": _data_digest(data),
        "settings": _text_digest(f"{chosen}"),
        "seed": _text_digest(f"{seed}"),
        "software": _text_digest(f"{torch.__version__} {settings.version}"),
    }


def _named(settings: TrainingSettings) -> dict[str, Any]:
    return {"pass": settings.name, **dataclasses.asdict(settings)}


def _loaded(path: pathlib.Path) -> ir.Model:
    """The model of a file, its weights in memory."""
    return ir.external_data.load_to_model(ir.load(path))


def _model_digest(model: ir.Model) -> str:
    """sha256 of nodes, signature and weights, tensor by tensor."""
    digest = hashlib.sha256()
    for value in (*model.graph.inputs, *model.graph.outputs):
        digest.update(f"{value.name} {value.dtype} {value.shape}\0".encode())
    for node in model.graph:
        digest.update(ir.to_proto(node).SerializeToString(deterministic=True))
    for name, value in sorted(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None:
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\0".encode())
            digest.update(tensor.tobytes())
    return digest.hexdigest()


def _data_digest(samples: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        for name, array in (*sorted(sample.feeds.items()), *sorted(sample.labels.items())):
            digest.update(f"{name} {array.dtype} {array.shape}\0".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
