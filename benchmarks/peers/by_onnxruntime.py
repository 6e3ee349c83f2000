"""onnxruntime.quantization, at the settings that suit x86-64 with VNNI.

quantize_static twice, since no setting is best in both: every operator (fastest where
residual additions stay integer), or only those that do the work (more accurate). Per
channel, uint8 activations, int8 weights, min-max: its percentiles keep every activation of
every sample in memory. quantize_dynamic: matrix products and LSTM, never Conv, which has
only a slow dynamic kernel.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

from peers import cases


def static(folder: pathlib.Path, out: pathlib.Path, limit: int | None) -> None:
    """QDQ around every operator that the tool knows."""
    _static(folder, out, limit, None)


def static_linear(folder: pathlib.Path, out: pathlib.Path, limit: int | None) -> None:
    """QDQ around Conv, MatMul and Gemm only."""
    _static(folder, out, limit, ["Conv", "MatMul", "Gemm"])


def dynamic(folder: pathlib.Path, out: pathlib.Path, limit: int | None) -> None:
    """Ranges at run time; needs no samples."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as scratch:
        quantize_dynamic(
            _prepared(folder, pathlib.Path(scratch)),
            out,
            op_types_to_quantize=["MatMul", "Gemm", "LSTM", "Attention", "Gather"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )


def _static(
    folder: pathlib.Path, out: pathlib.Path, limit: int | None, ops: Sequence[str] | None
) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    with tempfile.TemporaryDirectory() as scratch:
        quantize_static(
            _prepared(folder, pathlib.Path(scratch)),
            out,
            _reader(folder, limit),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=ops,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def _reader(folder: pathlib.Path, limit: int | None) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        """One sample after the other, as quantize_static wants them."""

        samples = cases.feeds(folder, "calibration", limit)

        def get_next(self) -> Any:
            """The next feeds, or None at the end."""
            return next(self.samples, None)

    return Reader()


def _prepared(folder: pathlib.Path, scratch: pathlib.Path) -> pathlib.Path:
    """The model after quant_pre_process, which ONNX Runtime asks for before quantizing."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    made = scratch / "prepared.onnx"
    quant_pre_process(folder / "model.onnx", made, skip_symbolic_shape=True)
    return made
