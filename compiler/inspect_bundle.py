"""What is in a bundle, as data."""

from __future__ import annotations

import pathlib
from typing import Any

from edgec.outputs import file_digest
from edgec_runtime.bundle import read_bundle


def inspect_bundle(path: pathlib.Path) -> dict[str, Any]:
    """Signature, target, operators, entries and results of a bundle; nothing is run."""
    bundle = read_bundle(path)
    manifest = bundle.manifest
    return {
        "name": manifest.name,
        "version": manifest.version,
        "sha256": file_digest(bundle.path),
        "size_bytes": bundle.size,
        "edgec": manifest.edgec,
        "format_version": manifest.format_version,
        "target": {
            "name": manifest.target.name,
            "arch": manifest.target.arch,
            "os": list(manifest.target.os),
            "features": list(manifest.target.features),
        },
        "onnxruntime": manifest.onnxruntime,
        "opset": manifest.opset,
        "inputs": [_value(value) for value in manifest.inputs],
        "outputs": [_value(value) for value in manifest.outputs],
        "session": {
            "threads": manifest.session.threads,
            "providers": list(manifest.session.providers),
            "prepacking": manifest.session.prepacking,
            "disabled_optimizers": list(manifest.session.disabled_optimizers),
            "config": dict(manifest.session.config),
            "without": {k: dict(v) for k, v in manifest.session.without.items()},
        },
        "ops": list(manifest.ops),
        "labels": len(manifest.labels) if manifest.labels is not None else None,
        "image": manifest.image is not None,
        "golden": bool(manifest.golden),
        "state": {pair.input: pair.output for pair in manifest.state or ()},
        "results": dict(manifest.results),
        "provenance": dict(manifest.provenance),
        "entries": [
            {"name": e.name, "size_bytes": e.size, "offset": e.offset, "sha256": e.sha256}
            for e in manifest.entries
        ],
    }


def _value(value: Any) -> dict[str, Any]:
    return {"name": value.name, "dtype": value.dtype, "shape": list(value.shape)}
