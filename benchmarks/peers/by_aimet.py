"""AIMET-onnx: tf_enhanced ranges, per-channel int8 weights, 8-bit activations, QDQ out."""

from __future__ import annotations

import pathlib

from peers import cases


def quantize(folder: pathlib.Path, out: pathlib.Path, limit: int | None) -> None:
    """Simulate, take the ranges of the calibration samples, write an .onnx with QDQ nodes."""
    import aimet_onnx
    import onnx

    simulated = aimet_onnx.QuantizationSimModel(
        onnx.load(folder / "model.onnx"),
        quant_scheme="tf_enhanced",
        param_type=aimet_onnx.int8,
        activation_type=aimet_onnx.int8,
        config_file="default",
        providers=["CPUExecutionProvider"],
    )
    simulated.compute_encodings(list(cases.feeds(folder, "calibration", limit)))
    onnx.save(simulated.to_onnx_qdq(prequantize_constants=True), out)
