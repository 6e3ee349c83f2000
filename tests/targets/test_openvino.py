"""The target that OpenVINO runs inside ONNX Runtime.

The package onnxruntime-openvino replaces onnxruntime, so it lives in an environment of its
own: .peers/ort-openvino, or below $EDGEC_PEERS (benchmarks/peers/install.py makes it).
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

import numpy as np
import pytest
import torch

import edgec
import edgec_runtime
from edgec_runtime import EdgecError

ROOT = pathlib.Path(__file__).parents[2]
PEERS = pathlib.Path(os.environ.get("EDGEC_PEERS") or ROOT / ".peers")
PROVIDER = "OpenVINOExecutionProvider"
RUN = """
import json, sys
import numpy as np
import edgec_runtime
model = edgec_runtime.load(sys.argv[1], threads=1)
with np.load(sys.argv[2]) as archive:
    outputs = model(x=archive["x"])
np.savez(sys.argv[3], **outputs)
print(json.dumps(model.providers))
"""


def feeds(seed: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((1, 3, 16, 16), np.float32)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[edgec.Report, pathlib.Path]:
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 10),
    )
    folder = tmp_path_factory.mktemp("openvino")
    torch.onnx.export(
        module.eval(),
        (torch.from_numpy(feeds(0)["x"]),),
        folder / "model.onnx",
        input_names=["x"],
        output_names=["y"],
        external_data=False,
        verbose=False,
    )
    path = folder / "model.edgec"
    report = edgec.build(
        folder / "model.onnx",
        target="x86-64-openvino",
        output=path,
        calibration=lambda: [feeds(seed) for seed in range(1, 17)],
        recipe=["cleanup", "fuse", "quantize-static", "lower"],
    )
    return report, path


def test_without_the_provider_a_build_says_what_it_was_judged_on(
    built: tuple[edgec.Report, pathlib.Path],
) -> None:
    report, _ = built
    assert any(f"no {PROVIDER}" in finding for finding in report.findings)
    assert report.measured_on is not None and not report.measured_on.is_target


def test_without_the_provider_a_bundle_is_refused(
    built: tuple[edgec.Report, pathlib.Path],
) -> None:
    _, path = built
    with pytest.raises(EdgecError, match=f"needs the execution provider '{PROVIDER}'"):
        edgec_runtime.load(path)
    assert edgec_runtime.load(path, any_target=True).providers == ("CPUExecutionProvider",)


def test_the_graph_holds_nothing_but_standard_operators(
    built: tuple[edgec.Report, pathlib.Path],
) -> None:
    _, path = built
    ops = edgec_runtime.load(path, any_target=True).manifest.ops
    assert not [op for op in ops if "microsoft" in op]
    assert any("QuantizeLinear" in op for op in ops)


def test_openvino_runs_the_bundle(
    built: tuple[edgec.Report, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    python = PEERS / "ort-openvino" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {python}; run: python benchmarks/peers/install.py ort-openvino")
    _, path = built
    np.savez(tmp_path / "in.npz", **feeds(99))
    ran = subprocess.run(
        [python, "-c", RUN, path, tmp_path / "in.npz", tmp_path / "out.npz"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "runtime"), "ORT_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)[0] == PROVIDER
    expected = edgec_runtime.load(path, any_target=True)(**feeds(99))["y"]
    with np.load(tmp_path / "out.npz") as archive:
        # two engines round differently: single steps of 8-bit activations, some 1 %
        noise = np.linalg.norm(archive["y"] - expected) / np.linalg.norm(expected)
    assert noise < 0.05
