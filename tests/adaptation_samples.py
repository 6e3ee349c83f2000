"""A small CNN, its bundles with and without slots, labelled samples of it, and a training."""

from __future__ import annotations

import pathlib
from typing import Any

import graphs
import numpy as np
import onnx_ir as ir
from labelled_samples import separable

import edgec
from edgec.adaptation import adapt


def save(path: pathlib.Path, count: int, seed: int, classes: int = 4) -> pathlib.Path:
    feeds, labels = separable(count, classes, seed)
    np.savez(
        path,
        x=np.stack([f["x"] for f in feeds]),
        label=np.stack([label["label"] for label in labels]),
    )
    return path


def fill(folder: pathlib.Path) -> pathlib.Path:
    """Write cnn.onnx, data.npz, test.npz, and bundles of it with and without slots."""
    model, _ = graphs.cnn()
    ir.save(model, folder / "cnn.onnx")
    save(folder / "data.npz", 64, 0)
    save(folder / "test.npz", 40, 1)
    for name, recipe in (
        ("slots", ["cleanup", "fuse", "quantize-static", "lower", "adapter-slots"]),
        ("plain", ["cleanup", "fuse", "lower"]),
    ):
        edgec.build(
            folder / "cnn.onnx",
            target="x86-64",
            output=folder / f"{name}.edgec",
            calibration=folder / "data.npz",
            recipe=recipe,
            settings=["adapter-slots.rank=2"] if name == "slots" else (),
            verify=False,
        )
    return folder


def teach(work: pathlib.Path, base: str, output: pathlib.Path, **rest: Any) -> Any:
    settings = {"steps": 60, "rate": 0.01, "evaluation": work / "test.npz"} | rest
    return adapt(work / base, settings.pop("data", work / "data.npz"), output, **settings)
