"""NNCF, once into an .onnx file for ONNX Runtime, once into OpenVINO's own format.

The MIXED preset (asymmetric activations) is the more accurate one on every model tried; the
file for OpenVINO keeps NNCF's default, which OpenVINO runs fastest.
"""

from __future__ import annotations

import pathlib
from typing import Any

from peers import cases


def for_onnxruntime(folder: pathlib.Path, out: pathlib.Path, limit: int | None) -> None:
    """Quantize the .onnx file itself."""
    import nncf
    import onnx

    model = onnx.load(folder / "model.onnx")
    made = nncf.quantize(
        model,
        _dataset(folder, limit),
        preset=nncf.QuantizationPreset.MIXED,
        **_options(folder),
    )
    onnx.save(made, out)


def for_openvino(folder: pathlib.Path, out: pathlib.Path, limit: int | None) -> None:
    """Convert, quantize and save an .xml with its .bin."""
    import nncf
    import openvino

    model = openvino.convert_model(folder / "model.onnx")
    made = nncf.quantize(model, _dataset(folder, limit), **_options(folder))
    openvino.save_model(made, out, compress_to_fp16=False)


def _dataset(folder: pathlib.Path, limit: int | None) -> Any:
    import nncf

    return nncf.Dataset(list(cases.feeds(folder, "calibration", limit)))


def _options(folder: pathlib.Path) -> dict[str, Any]:
    import nncf

    transformer = cases.read_case(folder).kind == "transformer"
    return {
        "subset_size": len(list((folder / "calibration").iterdir())),
        "target_device": nncf.TargetDevice.CPU,
        "model_type": nncf.ModelType.TRANSFORMER if transformer else None,
    }
