"""The rows of the table: who quantizes, in which environment, and which runtime executes.

An environment is a folder made by ``install.py``; "" is the Python that runs the benchmark,
which has edgec and plain onnxruntime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Tool:
    """One row. quantizer: a key of quantize.QUANTIZERS; made_in, run_in: environments."""

    title: str
    quantizer: str
    made_in: str
    engine: str
    run_in: str
    suffix: str


TOOLS: Mapping[str, Tool] = {
    "fp32": Tool("ONNX Runtime, float32", "none", "", "onnxruntime", "", ".onnx"),
    "edgec": Tool("edgec x86-64", "edgec", "", "edgec", "", ".x86-64.edgec"),
    "edgec-openvino": Tool(
        "edgec x86-64-openvino",
        "edgec-openvino",
        "",
        "edgec",
        "ort-openvino",
        ".x86-64-openvino.edgec",
    ),
    "ort-static": Tool(
        "ORT quantize_static, all ops", "ort-static", "", "onnxruntime", "", ".onnx"
    ),
    "ort-linear": Tool(
        "ORT quantize_static, Conv/MatMul/Gemm", "ort-linear", "", "onnxruntime", "", ".onnx"
    ),
    "ort-dynamic": Tool("ORT quantize_dynamic", "ort-dynamic", "", "onnxruntime", "", ".onnx"),
    "nncf": Tool("NNCF, run by ORT", "nncf", "openvino", "onnxruntime", "", ".onnx"),
    "aimet": Tool("AIMET-onnx, run by ORT", "aimet", "aimet", "onnxruntime", "", ".onnx"),
    "openvino": Tool("OpenVINO int8", "openvino", "openvino", "openvino", "openvino", ".xml"),
    "litert": Tool("LiteRT int8", "litert", "litert", "litert", "litert", ".tflite"),
    "executorch": Tool(
        "ExecuTorch XNNPACK int8", "executorch", "executorch", "executorch", "executorch", ".pte"
    ),
}
PEER_RUNTIMES = ("openvino", "litert", "executorch")
