"""Opens what can be compared with a bundle: an .onnx file, another bundle, the reference."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

import edgec_runtime
from edgec.data import Dataset, InputSpec
from edgec.errors import DataError, SourceError
from edgec.language import bundle_encoder
from edgec.passes.execution import open_session, run_feeds
from edgec.stateful_data import open_stateful_data
from edgec.targets import Session
from edgec_runtime.bundle import read_bundle
from edgec_runtime.manifest import Manifest, Value

Array = np.ndarray[Any, Any]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


def open_runner(path: pathlib.Path, like: Manifest, threads: int) -> Run:
    """Feeds -> outputs by name of an .onnx file or a bundle, set up like the bundle ``like``.

    Raises SourceError if the file is neither or has another signature.
    """
    if path.suffix == ".edgec":
        model = edgec_runtime.load(path, threads=threads, any_target=True)
        _same_signature(path, [v.name for v in model.inputs], [v.name for v in model.outputs], like)
        return lambda feeds: model(**feeds)
    from edgec.export_onnx import load_onnx

    graph = load_onnx(path)
    settings = Session(
        disabled_optimizers=like.session.disabled_optimizers,
        config=like.session.config,
        prepacking=like.session.prepacking,
    )
    session = open_session(graph, settings=settings, threads=threads)
    names = [output.name for output in session.get_outputs()]
    _same_signature(path, [i.name for i in session.get_inputs()], names, like)
    return lambda feeds: dict(zip(names, run_feeds(session, feeds), strict=True))


def reference_runner(reference: ir.Model) -> Run:
    """Feeds -> outputs by name of the reference in plain ONNX Runtime."""
    session = open_session(reference, threads=0)
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, run_feeds(session, feeds), strict=True))


def reference_beside(bundle: pathlib.Path) -> pathlib.Path | None:
    """The float32 reference that a build left beside its bundle, if it is there."""
    file = bundle.with_name(f"{bundle.stem}.reference.onnx")
    return file if file.is_file() else None


def open_bundle_data(given: str, bundle: pathlib.Path, what: str) -> Dataset:
    """The data set that DATA stands for, for the inputs of a bundle; see ``open_data``.

    State that the samples leave out is the bundle's own (``edgec.stateful_data``).
    """
    opened = read_bundle(bundle)
    inputs, encode = bundle_input_specs(opened.manifest), bundle_encoder(opened)
    state = {pair.input: pair.output for pair in opened.manifest.state or ()}

    def run() -> Run:
        model = edgec_runtime.load(bundle, any_target=True)
        return lambda feeds: model(**feeds)

    return open_stateful_data(given, inputs, what, state, run, encode)


def bundle_input_specs(manifest: Manifest) -> tuple[InputSpec, ...]:
    """What the bundle's inputs accept, in the form of the data loader."""
    return tuple(
        InputSpec(
            value.name,
            _dtype(value),
            tuple(d if isinstance(d, int) else None for d in value.shape),
        )
        for value in manifest.inputs
    )


def _dtype(value: Value) -> np.dtype[Any]:
    try:
        return np.dtype(value.dtype)
    except TypeError as error:
        raise DataError(
            f"input '{value.name}' is {value.dtype}, which data files cannot hold; call the model "
            "through edgec_runtime.load()"
        ) from error


def _same_signature(
    path: pathlib.Path, inputs: Sequence[str], outputs: Sequence[str], like: Manifest
) -> None:
    def names(values: Sequence[Value]) -> list[str]:
        return [value.name for value in values]

    if sorted(inputs) != sorted(names(like.inputs)) or set(outputs) != set(names(like.outputs)):
        raise SourceError(
            f"{path}: its inputs and outputs ({', '.join(inputs)} -> {', '.join(outputs)}) are not "
            f"the bundle's ({', '.join(names(like.inputs))} -> "
            f"{', '.join(names(like.outputs))}); give the model that the bundle was built from"
        )
