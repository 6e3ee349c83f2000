"""Bundles on other execution providers, each in an environment of its own."""

from __future__ import annotations

import json
import pathlib
import sys
import types

import bundle_samples
import graphs
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from devices import bundles

import edgec
import edgec_runtime
from edgec.devices.check import Samples, verify_on
from edgec.devices.install import missing
from edgec.devices.provider import open_provider
from edgec.targets import Target, load_profile
from edgec_runtime import EdgecError, manifest, plugins

_CNN = """cnn (float[1, 3, 16, 16] x) => (float[1, 10] y) {
    [a] c = Conv <pads = [1, 1, 1, 1]> (x, k1, b1)
    r = Relu (c)
    h = HardSwish (r)
    m = Mul (factor, h)
    g = Add (m, offset)
    [b] d = Conv <pads = [1, 1, 1, 1]> (g, k2, b2)
    s = Add (d, r)
    p = GlobalAveragePool (s)
    f = Flatten (p)
    [c] y = Gemm (f, k3, b3)
}"""
QNN = "QNNExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
RECIPE = ["cleanup", "fuse", "quantize-static", "lower"]


def require(device: str) -> None:
    reason = missing(load_profile(device))
    if reason is not None:
        pytest.skip(f"{device}: {reason}")


def feeds(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((1, 3, 16, 16), np.float32)} for _ in range(count)]


def build(target: str | Target, folder: pathlib.Path) -> pathlib.Path:
    rng = np.random.default_rng(0)
    shapes = {"k1": (16, 3, 3, 3), "k2": (16, 16, 3, 3), "k3": (16, 10)}
    weights = {name: rng.normal(0, 0.2, shape) for name, shape in shapes.items()}
    biases = {"b1": rng.normal(0, 0.1, 16), "b2": rng.normal(0, 0.1, 16), "b3": np.ones(10)}
    affine = {"factor": np.array(0.2), "offset": np.array(0.5)}  # before padding
    given = {**weights, **biases, **affine}
    constants = {name: value.astype(np.float32) for name, value in given.items()}
    source, bundle = folder / "cnn.onnx", folder / "cnn.edgec"
    ir.save(graphs.graph(_CNN, constants), source)
    edgec.build(
        source,
        target=target,
        output=bundle,
        recipe=RECIPE,
        calibration=lambda: feeds(16, seed=1),
        verify=False,
    )
    return bundle


@pytest.fixture(scope="module")
def for_openvino(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return build("x86-64-openvino", tmp_path_factory.mktemp("openvino"))


@pytest.fixture(scope="module")
def for_qualcomm(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return build("qualcomm-npu", tmp_path_factory.mktemp("qualcomm"))


def test_openvino_runs_a_bundle_with_an_onnxruntime_of_its_own(for_openvino: pathlib.Path) -> None:
    require("openvino")
    [verdict] = verify_on(for_openvino, ["openvino"], Samples(tuple(feeds(2)), 2))
    assert verdict.status == "passed", verdict.reason
    assert verdict.outcome is not None
    assert verdict.outcome.onnxruntime == "1.24.1" != onnxruntime.__version__
    assert verdict.outcome.nodes[OPENVINO] > 10
    assert verdict.facts()["nodes"][OPENVINO] > 10


def test_a_bundle_is_refused_where_its_provider_takes_no_part(for_openvino: pathlib.Path) -> None:
    [verdict] = verify_on(for_openvino, ["native"])
    assert verdict.status == "refused"
    assert f"built for {OPENVINO}" in verdict.reason and "--any-target" in verdict.reason
    [allowed] = verify_on(for_openvino, ["native"], any_target=True)
    assert allowed.status == "passed"


def test_a_bundle_for_a_newer_onnxruntime_is_refused(tmp_path: pathlib.Path) -> None:
    require("openvino")
    bundle = bundles.build("x86-64", tmp_path)
    [verdict] = verify_on(bundle, ["openvino"], any_target=True)
    assert verdict.status == "refused" and "installed is 1.24.1" in verdict.reason


def test_the_options_of_a_profile_reach_the_provider() -> None:
    profile = load_profile("qnn-htp")
    assert profile.provider_options["htp_arch"] == "75"
    [options] = open_provider(profile, pathlib.Path())._environment.values()
    assert json.loads(options) == {QNN: dict(profile.provider_options)}


@pytest.mark.slow
def test_the_emulated_npu_runs_16_bit_activations(for_qualcomm: pathlib.Path) -> None:
    require("qnn-htp")
    [verdict] = verify_on(for_qualcomm, ["qnn-htp"], Samples(tuple(feeds(2)), 2))
    assert verdict.status == "passed", verdict.reason
    assert verdict.outcome is not None and verdict.judgement is not None
    assert verdict.outcome.providers[0] == QNN
    assert verdict.outcome.nodes[QNN] > 10
    assert verdict.judgement.sqnr_db > 35  # 8-bit activations: below 35


def test_npu_bundles_hold_16_bit_activations_and_no_operator_of_ours(
    for_qualcomm: pathlib.Path,
) -> None:
    import onnx

    bundle = edgec_runtime.bundle.read_bundle(for_qualcomm)
    graph = onnx.load_from_string(bundle.graph("main")).graph
    zeros = {t.name: t.data_type for t in graph.initializer if t.name.endswith("zero_point")}
    quantizers = [n for n in graph.node if n.op_type == "QuantizeLinear"]
    assert quantizers
    assert {zeros[n.input[2]] for n in quantizers} == {onnx.TensorProto.UINT16}
    assert not [op for op in bundle.manifest.ops if "microsoft" in op]


def test_the_package_of_an_absent_plugin_is_named(tmp_path: pathlib.Path) -> None:
    settings = manifest.Session(providers=(QNN, "CPUExecutionProvider"))
    path = bundle_samples.write_sample(tmp_path / "a", session=settings)
    with pytest.raises(EdgecError, match="pip install onnxruntime-qnn"):
        edgec_runtime.load(path)


def test_a_plugin_is_registered_only_for_bundles_that_ask_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str]] = []
    module = types.SimpleNamespace(get_library_path=lambda: "here.so")
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", module)  # type: ignore[arg-type]
    monkeypatch.setattr(
        onnxruntime, "register_execution_provider_library", lambda *given: asked.append(given)
    )
    plugins.register(["CPUExecutionProvider", OPENVINO])
    assert asked == []
    plugins.register([QNN, "CPUExecutionProvider"])
    assert asked == [(QNN, "here.so")]


def test_a_plugin_gets_the_npu_and_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = onnxruntime.OrtHardwareDeviceType

    def device(name: str, kind: object) -> types.SimpleNamespace:
        return types.SimpleNamespace(ep_name=name, device=types.SimpleNamespace(type=kind))

    found = [device("CPUExecutionProvider", kinds.CPU), device(QNN, kinds.CPU)]
    found.append(device(QNN, kinds.NPU))
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: found)
    given: list[object] = []
    options = types.SimpleNamespace(add_provider_for_devices=lambda *args: given.extend(args))
    assert plugins.add(options, QNN, {"htp_arch": "75"})  # type: ignore[arg-type]
    assert given == [[found[2]], {"backend_type": "htp", "htp_arch": "75"}]
    assert not plugins.add(options, "CPUExecutionProvider", {})  # type: ignore[arg-type]


def test_options_of_a_provider_are_handed_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = "CoreMLExecutionProvider"
    wanted = (engine, "CPUExecutionProvider")
    settings = manifest.Session(providers=wanted)
    path = bundle_samples.write_sample(tmp_path / "a", session=settings)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(wanted))
    asked: list[object] = []

    def refuse(*_: object, providers: list[object], **rest: object) -> None:
        asked.extend(providers)
        raise RuntimeError("no session")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(EdgecError, match="no session"):
        edgec_runtime.load(path, provider_options={engine: {"MLComputeUnits": "CPUOnly"}})
    given = {"ModelFormat": "MLProgram", "MLComputeUnits": "CPUOnly"}
    assert asked == [(engine, given), (wanted[1], {})]
