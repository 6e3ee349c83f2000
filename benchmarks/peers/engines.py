"""Opens a file in its runtime, one thread: the same small interface over five runtimes.

``prepare`` turns numpy feeds into what the runtime takes and is not timed; ``run`` is one
inference and is; ``outputs`` turns its result into numpy arrays.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

os.environ["ORT_DISABLE_TELEMETRY"] = "1"


class Engine(Protocol):
    """A model in a runtime. names: its outputs, in order, as far as the runtime knows them."""

    names: Sequence[str]

    def prepare(self, feeds: Mapping[str, Any]) -> Any:
        """Feeds of one inference in the runtime's own form."""

    def run(self, prepared: Any) -> Any:
        """One inference."""

    def outputs(self, result: Any) -> list[Any]:
        """The result of ``run`` as numpy arrays, in the order of the model's outputs."""


class OnnxRuntime:
    """An .onnx file in ONNX Runtime's CPU provider, options at their defaults."""

    def __init__(self, path: pathlib.Path) -> None:
        """Open the file; arrays not among its inputs are dropped."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self._inputs = {i.name for i in self._session.get_inputs()}
        self.names = [o.name for o in self._session.get_outputs()]

    def prepare(self, feeds: Mapping[str, Any]) -> Any:
        """The feeds that are inputs."""
        return {name: array for name, array in feeds.items() if name in self._inputs}

    def run(self, prepared: Any) -> Any:
        """Session.run."""
        return self._session.run(None, prepared)

    def outputs(self, result: Any) -> list[Any]:
        """They are arrays already."""
        return list(result)


class Edgec:
    """A bundle in edgec's runtime."""

    def __init__(self, path: pathlib.Path) -> None:
        """Open the bundle."""
        import edgec_runtime

        self._model = edgec_runtime.load(path, threads=1)
        self.names = [value.name for value in self._model.outputs]

    def prepare(self, feeds: Mapping[str, Any]) -> Any:
        """The feeds as they are."""
        return dict(feeds)

    def run(self, prepared: Any) -> Any:
        """``Model.run``: what a call does after its checks."""
        return self._model.run(prepared)

    def outputs(self, result: Any) -> list[Any]:
        """In the order of the manifest."""
        return [result[name] for name in self.names]


class OpenVino:
    """An .xml file in OpenVINO's CPU plugin, tuned for latency, precision at its default."""

    def __init__(self, path: pathlib.Path) -> None:
        """Compile the file for one thread."""
        import openvino

        compiled = openvino.Core().compile_model(
            str(path), "CPU", {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
        )
        self._inputs = {name for port in compiled.inputs for name in port.names}
        self._request = compiled.create_infer_request()
        self._ports = compiled.outputs
        self.names = [min(port.names, default="") for port in self._ports]

    def prepare(self, feeds: Mapping[str, Any]) -> Any:
        """The feeds that are inputs."""
        return {name: array for name, array in feeds.items() if name in self._inputs}

    def run(self, prepared: Any) -> Any:
        """InferRequest.infer without copies."""
        return self._request.infer(prepared, share_inputs=True, share_outputs=True)

    def outputs(self, result: Any) -> list[Any]:
        """Copies, since the request reuses its memory."""
        return [np.array(result[port]) for port in self._ports]


class LiteRt:
    """A .tflite file in LiteRT with its default XNNPACK delegate."""

    def __init__(self, path: pathlib.Path) -> None:
        """Open the file; its inputs are args_0, args_1, ... in the program's order."""
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(model_path=str(path), num_threads=1)
        keys = list(self._interpreter.get_signature_list())
        details = self._interpreter.get_input_details()
        self._inputs = sorted(details, key=lambda d: int(d["name"].split("args_")[-1][0]))
        self._interpreter.allocate_tensors()
        signature = self._interpreter.get_signature_runner(keys[0])
        by_name = signature.get_output_details()
        order = sorted(by_name, key=lambda n: int(n.rsplit("_", 1)[-1]))
        self._outputs = [by_name[name] for name in order]
        self.names = order

    def prepare(self, feeds: Mapping[str, Any]) -> Any:
        """By position; a file with integer inputs gets integers."""
        return [
            (detail["index"], _quantized(array, detail))
            for detail, array in zip(self._inputs, feeds.values(), strict=True)
        ]

    def run(self, prepared: Any) -> Any:
        """Copy the inputs in, and invoke."""
        for index, array in prepared:
            self._interpreter.set_tensor(index, array)
        self._interpreter.invoke()
        return self._interpreter

    def outputs(self, result: Any) -> list[Any]:
        """Copies of the output tensors, integers as the numbers that they stand for."""
        return [_dequantized(result.get_tensor(d["index"]), d) for d in self._outputs]


def _quantized(array: Any, detail: Mapping[str, Any]) -> Any:
    """A float array in the type that LiteRT says an input has."""
    dtype = np.dtype(detail["dtype"])
    scale, zero_point = detail["quantization"]
    if not scale or np.asarray(array).dtype.kind != "f":
        return np.asarray(array, dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(array / scale) + zero_point, limits.min, limits.max).astype(dtype)


def _dequantized(array: Any, detail: Mapping[str, Any]) -> Any:
    scale, zero_point = detail["quantization"]
    if not scale or array.dtype.kind == "f":
        return array
    return ((array.astype(np.float32) - zero_point) * scale).astype(np.float32)


class ExecuTorch:
    """A .pte file in ExecuTorch with what its delegate takes in XNNPACK."""

    def __init__(self, path: pathlib.Path) -> None:
        """Load the method ``forward``."""
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        portable_lib._unsafe_reset_threadpool(1)  # the only way to set the number of threads
        self._method = Runtime.get().load_program(str(path)).load_method("forward")
        self.names: Sequence[str] = ()

    def prepare(self, feeds: Mapping[str, Any]) -> Any:
        """Tensors by position."""
        import torch

        return [torch.from_numpy(np.ascontiguousarray(array)) for array in feeds.values()]

    def run(self, prepared: Any) -> Any:
        """Method.execute."""
        return self._method.execute(prepared)

    def outputs(self, result: Any) -> list[Any]:
        """Copies of the tensors."""
        return [tensor.numpy().copy() for tensor in result]


ENGINES: Mapping[str, Callable[[pathlib.Path], Engine]] = {
    "onnxruntime": OnnxRuntime,
    "edgec": Edgec,
    "openvino": OpenVino,
    "litert": LiteRt,
    "executorch": ExecuTorch,
}
