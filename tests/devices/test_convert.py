"""Core ML is checked and never said to have run."""

from __future__ import annotations

import json
import pathlib

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from devices.test_provider import feeds, require

import edgec
from edgec.cli import main
from edgec.devices import convert
from edgec.devices.after_build import verify_built
from edgec.devices.check import verify_on
from edgec.devices.coreml import widened, zeros
from edgec.devices.job import Job
from edgec.targets import load_profile, load_target
from edgec_runtime.bundle import read_bundle

_CNN = """cnn (float[1, 3, 16, 16] x) => (float[1, 64, 1, 1] y) {
    [a] c = Conv <pads = [1, 1, 1, 1]> (x, k1, b1)
    r = Relu (c)
    [b] d = Conv (r, k2, b2)
    e = Neg (d)
    y = GlobalAveragePool (e)
}"""


def source() -> ir.Model:
    rng = np.random.default_rng(0)
    shapes = {"k1": (64, 3, 3, 3), "b1": (64,), "k2": (64, 64, 1, 1), "b2": (64,)}
    weights = {k: rng.normal(0, 0.2, shape).astype(np.float32) for k, shape in shapes.items()}
    return graphs.graph(_CNN, weights)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("coreml")
    ir.save(source(), folder / "cnn.onnx")
    path = folder / "cnn.edgec"
    given = {"evaluation": lambda: feeds(2), "verify": False}
    edgec.build(folder / "cnn.onnx", target="apple-coreml", output=path, **given)
    return path


@pytest.fixture
def without_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the environment were there and PyTorch were not."""
    monkeypatch.setattr("edgec.devices.install.missing", lambda profile: None)
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None)


def test_bundles_for_core_ml_are_in_half_precision_and_not_quantized(bundle: pathlib.Path) -> None:
    ops = read_bundle(bundle).manifest.ops
    assert not [op for op in ops if "Quantize" in op or "microsoft" in op]
    assert any(op.endswith("Cast") for op in ops)


@pytest.mark.usefixtures("without_converter")
def test_nodes_are_counted_by_onnxruntimes_own_list(bundle: pathlib.Path) -> None:
    [verdict] = verify_on(bundle, ["coreml"])
    assert verdict.outcome is not None
    # Cast, Conv, Relu, Conv | Neg | GlobalAveragePool, Cast
    assert verdict.outcome.nodes == {"CoreMLExecutionProvider": 6, "CPUExecutionProvider": 1}
    assert "takes 6 of 7 nodes by their operators, in 2 parts, and not Neg" in verdict.reason


@pytest.mark.usefixtures("without_converter")
def test_what_is_checked_has_neither_passed_nor_failed(bundle: pathlib.Path) -> None:
    result = CliRunner().invoke(main, ["verify", str(bundle), "--on", "coreml", "--json"])
    [facts] = json.loads(result.stdout)
    assert result.exit_code == 0
    assert facts["status"] == "checked" and "sqnr_db" not in facts
    assert facts["reason"].startswith("not executed: ")
    assert "since PyTorch is not installed" in facts["reason"]


@pytest.mark.usefixtures("without_converter")
def test_a_build_promises_nothing_about_a_device_that_runs_nothing(bundle: pathlib.Path) -> None:
    class Given:
        judged_count = 0

        def judged(self) -> list[object]:
            return []

    given = Given()
    results, promises = verify_built(bundle, source(), ("coreml",), given, 60.0, lambda *_: None)  # type: ignore[arg-type]
    assert [r.status for r in results] == ["checked"] and promises == ()


@pytest.mark.usefixtures("without_converter")
def test_a_bundle_for_other_devices_is_refused(tmp_path: pathlib.Path) -> None:
    ir.save(source(), tmp_path / "cnn.onnx")
    given = {"evaluation": lambda: feeds(2), "recipe": ["cleanup", "fuse", "lower"]}
    path = tmp_path / "cnn.edgec"
    edgec.build(tmp_path / "cnn.onnx", target="web", output=path, verify=False, **given)
    [verdict] = verify_on(path, ["coreml"])
    assert verdict.status == "refused" and "built for web" in verdict.reason


def test_a_converter_that_dies_is_told(bundle: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "site" / "coremltools").mkdir(parents=True)
    (tmp_path / "site" / "coremltools" / "__init__.py").write_text("raise SystemExit('broken')")
    device = convert.open_converter(load_profile("coreml"), tmp_path)
    with pytest.raises(edgec.errors.DeviceError, match="no word of the converter: broken"):
        device.run(Job(bundle, []))


def test_what_the_converter_refuses_is_refused(
    bundle: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(command: list[str], *rest: object) -> str:
        told = json.dumps({"version": "9.0", "error": "no conversion of Neg"})
        pathlib.Path(command[-1]).write_text(told, encoding="utf-8")
        return ""

    monkeypatch.setattr(convert, "execute", refuse)
    device = convert.open_converter(load_profile("coreml"), tmp_path)
    with pytest.raises(edgec.errors.DeviceError, match="does not convert it: no conversion of Neg"):
        device.run(Job(bundle, []))


def test_half_precision_is_widened_everywhere() -> None:
    nodes = "h = Cast <to = 10> (x) m = Add (h, w) y = Cast <to = 1> (m)"
    text = f"g (float[1, 4] x) => (float[1, 4] y) {{ {nodes} }}"
    model = graphs.graph(text, {"w": np.ones(4, np.float16)})
    wide = widened(model)
    assert [n.attributes["to"].as_int() for n in wide.graph if n.op_type == "Cast"] == [1, 1]
    assert wide.graph.initializers["w"].const_value.dtype == ir.DataType.FLOAT


def test_inputs_without_a_fixed_shape_are_told() -> None:
    fixed = graphs.graph("g (float[1, 4] x) => (float[1, 4] y) { y = Relu (x) }", {})
    assert [array.shape for array in zeros(fixed)] == [(1, 4)]
    open_ = graphs.graph("g (float[n, 4] x) => (float[n, 4] y) { y = Relu (x) }", {})
    with pytest.raises(ValueError, match="input 'x' has no fixed shape"):
        zeros(open_)


def test_the_target_names_the_device() -> None:
    target = load_target("apple-coreml")
    assert target.devices == ("coreml",) and target.static_shapes and target.float16.compute
    assert target.int8.static_ops == ()


@pytest.mark.slow
def test_apples_converter_accepts_the_graph(bundle: pathlib.Path) -> None:
    require("coreml")
    [verdict] = verify_on(bundle, ["coreml"])
    assert verdict.status == "checked"
    assert "coremltools 9.0 converts it to" in verdict.reason, verdict.reason
