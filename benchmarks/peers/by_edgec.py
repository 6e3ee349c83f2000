"""edgec as a user calls it: the .onnx file, calibration samples, a target, nothing else.

A model with random weights is built without a search (``--search-minutes 0``): it comes out
below the noise that edgec delivers, by any tool, and layers would be left in float for that.

The cost of quantizing is that of the passes of the recipe that the build chose, taken in a
process of its own: what else a build does (trying recipes, judging the bundle, timing it,
the report) no other tool does. The whole build's CPU time is given beside it.
"""

from __future__ import annotations

import pathlib
from typing import Any

from peers import cases


def build_x86_64(folder: pathlib.Path, out: pathlib.Path, limit: int | None) -> dict[str, Any]:
    """``edgec build model.onnx --target x86-64 --calibration DIR``."""
    return _build(folder, out, limit, "x86-64")


def build_x86_64_openvino(
    folder: pathlib.Path, out: pathlib.Path, limit: int | None
) -> dict[str, Any]:
    """``edgec build model.onnx --target x86-64-openvino --calibration DIR``."""
    return _build(folder, out, limit, "x86-64-openvino")


def _build(
    folder: pathlib.Path, out: pathlib.Path, limit: int | None, target: str
) -> dict[str, Any]:
    import edgec

    report = edgec.build(
        folder / "model.onnx",
        target=target,
        output=out,
        calibration=lambda: cases.feeds(folder, "calibration", limit),
        search_minutes=10.0 if cases.read_case(folder).weights == "real" else 0.0,
    )
    return {
        "recipe": [step.name for step in report.steps],
        "findings": list(report.findings),
    }


def passes_only(folder: pathlib.Path, out: pathlib.Path, limit: int | None) -> None:
    """Import, recipe and emitted file for the bundle ``out``, from its lock's recipe.

    Nothing is replayed: every decision is measured again, from the samples.
    """
    import dataclasses

    from edgec.emit import lay_out
    from edgec.export import export
    from edgec.inputs import open_inputs
    from edgec.lock import read_lock
    from edgec.passes import Context
    from edgec.pipeline import run_passes
    from edgec.recipe import from_toml
    from edgec.source import load_source
    from edgec.targets import load_target

    lock = read_lock(out.with_suffix(".lock.json"))
    target = load_target(lock.target)
    source = dataclasses.replace(
        load_source(folder / "model.onnx"),
        calibration=lambda: cases.feeds(folder, "calibration", limit),
    )
    exported = export(source, target)
    inputs = open_inputs(source, exported, target, lock.seed)
    context = Context(
        target=target,
        reference=exported.model,
        calibration=inputs.calibration,
        validation=inputs.validation,
        seed=lock.seed,
        progress=lambda what, done, total: None,
    )
    steps = run_passes(from_toml(lock.recipe, str(out)), context, inputs.checks[:2])
    lay_out(steps[-1].model)
