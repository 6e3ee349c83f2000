"""The runtime stands alone: no torch, no onnx, nothing of the compiler; lazy and silent."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest
from bundle_samples import write_sample

_FORBIDDEN = ("torch", "onnx", "onnx_ir", "onnxscript", "edgec", "click", "ml_dtypes")
_REPORT = "; import sys, os, json; print(json.dumps([sorted(sys.modules), dict(os.environ)]))"


def modules_after(code: str) -> tuple[set[str], dict[str, str]]:
    result = subprocess.run(
        [sys.executable, "-c", code + _REPORT], capture_output=True, check=True, text=True
    )
    names, environment = json.loads(result.stdout)
    return {name.split(".")[0] for name in names}, environment


def test_importing_costs_neither_numpy_nor_onnxruntime() -> None:
    modules, environment = modules_after(
        "import edgec_runtime; edgec_runtime.BundleError; edgec_runtime.__version__"
    )
    assert not modules & {*_FORBIDDEN, "numpy", "onnxruntime"}
    assert environment["ORT_DISABLE_TELEMETRY"] == "1"


def test_running_a_bundle_imports_nothing_of_the_compiler(tmp_path: pathlib.Path) -> None:
    path = write_sample(tmp_path / "a.edgec")
    modules, environment = modules_after(
        f"import edgec_runtime, numpy; m = edgec_runtime.load({str(path)!r}, check='full'); "
        "m(x=numpy.zeros((1, 8), 'float32'))"
    )
    assert {"numpy", "onnxruntime"} <= modules
    assert not modules & set(_FORBIDDEN)
    assert environment["ORT_DISABLE_TELEMETRY"] == "1"


def test_the_user_may_turn_telemetry_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    _, environment = modules_after("import edgec_runtime")
    assert environment["ORT_DISABLE_TELEMETRY"] == "0"


def test_an_unknown_name_is_an_attribute_error() -> None:
    import edgec_runtime

    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        edgec_runtime.laod  # noqa: B018
    assert all(getattr(edgec_runtime, name) for name in edgec_runtime.__all__)
