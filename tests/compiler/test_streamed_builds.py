"""Recurrent models through the whole build, and their bundles streamed beside them."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
from bundle_samples import onnx_bytes
from click.testing import CliRunner
from onnx import helper, numpy_helper

import edgec
import edgec_runtime
from edgec.cli import main
from edgec.errors import SourceError
from edgec.inspect_bundle import inspect_bundle
from edgec.passes.execution import sqnr_db
from edgec_runtime.state import StatePair

INT8 = "cleanup,fuse,quantize-dynamic,lower"
FLOAT = "cleanup,fuse,lower"
STEPS = np.random.default_rng(7).standard_normal((40, 2, 3, 40)).astype(np.float32)
SHAPE = (1, "batch", 128)


def chunks() -> Iterator[dict[str, Any]]:
    """Two recordings without their state."""
    random = np.random.default_rng(1)
    for number in range(24):
        x = random.standard_normal((2, 1, 40)).astype(np.float32)
        yield {"x": x, "restart": number % 12 == 0}


@pytest.fixture(scope="module")
def lstm(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An .onnx file: x [2, batch, 40], h0, c0 [1, batch, 128] -> y [2, 1, batch, 128], hn, cn."""
    bias = graphs.feed(1, 1024, seed=2) / 4
    bias[:, 256:384] += 2  # the forget gate's: the state lasts for some steps
    weights = {"w": graphs.weight(1, 512, 40), "r": graphs.weight(1, 512, 128, seed=1), "b": bias}
    inputs = ["x", *weights, "", "h0", "c0"]
    node = helper.make_node("LSTM", inputs, ["y", "hn", "cn"], name="lstm", hidden_size=128)
    data = onnx_bytes(
        [node],
        [_info("x", (2, "batch", 40)), _info("h0", SHAPE), _info("c0", SHAPE)],
        [_info("y", (2, 1, "batch", 128)), _info("hn", SHAPE), _info("cn", SHAPE)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    path = tmp_path_factory.mktemp("model") / "lstm.onnx"
    path.write_bytes(data)
    return path


def _info(name: str, shape: tuple[int | str, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)


@pytest.fixture(scope="module")
def built(lstm: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> edgec.Report:
    """The LSTM in int8, built on chunks without their state."""
    path = tmp_path_factory.mktemp("lstm") / "lstm.edgec"
    return edgec.build(lstm, target="x86-64", output=path, recipe=INT8, calibration=chunks)


def opened(report: edgec.Report) -> edgec_runtime.Model:
    return edgec_runtime.load(report.bundle_path, any_target=True)


def by_hand(path: pathlib.Path) -> np.ndarray:
    """The outputs of the float model, its state carried by this loop."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    h = c = np.zeros((1, 3, 128), np.float32)
    outputs = []
    for x in STEPS:
        y, h, c = session.run(["y", "hn", "cn"], {"x": x, "h0": h, "c0": c})
        outputs.append(y)
    return np.stack(outputs)


def test_the_bundle_of_an_int8_lstm_states_and_keeps_its_state(
    lstm: pathlib.Path, built: edgec.Report
) -> None:
    model, expected = opened(built), by_hand(lstm)
    assert model.manifest.state == (
        StatePair("h0", "hn", "float32", SHAPE),
        StatePair("c0", "cn", "float32", SHAPE),
    )
    assert "com.microsoft::DynamicQuantizeLSTM" in model.manifest.ops
    facts = inspect_bundle(pathlib.Path(built.bundle_path))
    assert facts["state"] == {"h0": "hn", "c0": "cn"}
    stream = model.stream(batch=3)
    actual = np.stack([stream(x)["y"] for x in STEPS])
    # int8 weights and inputs leave some 40 dB, in the last steps as in the first
    assert sqnr_db(expected, actual) > 30
    assert sqnr_db(expected[-5:], actual[-5:]) > 30
    zeros = np.zeros((1, 3, 128), np.float32)
    without = np.stack([model(x=x, h0=zeros, c0=zeros)["y"] for x in STEPS])
    assert sqnr_db(expected, without) < 10  # these steps do need the state


def test_the_report_and_the_manifest_state_the_drift(built: edgec.Report) -> None:
    [found] = [text for text in built.findings if text.startswith("recurrent state")]
    assert "h0=hn, c0=cn" in found
    [streamed] = [text for text in built.findings if text.startswith("streamed over 64 steps")]
    assert "SQNR up to step 1, 2, 4, 8, 16, 32, 64: of the outputs " in streamed
    assert not any("GROWS" in text for text in built.findings)
    results = opened(built).manifest.results["stream"]
    assert results["steps"] == 64 and len(results["outputs_sqnr_db"]) == 7
    figures = [*results["outputs_sqnr_db"], *results["state_sqnr_db"]]
    assert min(figures) > 30 and max(figures) < 80  # int8 noise, and not none at all


def test_verify_streams_the_bundle_too(built: edgec.Report, tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.stack([sample["x"] for sample in chunks()]))
    given = ["verify", built.bundle_path, "--evaluation", str(tmp_path / "data.npz"), "--json"]
    result = CliRunner().invoke(main, [*given, "--any-target"])
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["samples"] == 24
    assert min(facts["stream"]["state_sqnr_db"]) > 30


def test_run_carries_the_state_through_the_samples(
    lstm: pathlib.Path, built: edgec.Report, tmp_path: pathlib.Path
) -> None:
    np.savez(tmp_path / "data.npz", x=STEPS)
    given = ["run", built.bundle_path, "--input", str(tmp_path / "data.npz"), "--any-target"]
    result = CliRunner().invoke(main, [*given, "-o", str(tmp_path / "out.npz"), "--json"])
    assert result.exit_code == 0, result.stderr
    with np.load(tmp_path / "out.npz") as outputs:
        stream = opened(built).stream(batch=3)
        expected = np.concatenate([stream(x)["y"] for x in STEPS])
        np.testing.assert_array_equal(outputs["y"], expected)


def test_the_same_build_gives_the_same_bytes(
    lstm: pathlib.Path, built: edgec.Report, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "lstm.edgec"
    again = edgec.build(lstm, target="x86-64", output=path, recipe=INT8, calibration=chunks)
    assert again.bundle_sha256 == built.bundle_sha256


def test_the_command_line_states_the_pairs_or_that_there_are_none(
    lstm: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for options, state in ((["--state", "c0=cn"], ["c0"]), (["--state", "none"], None)):
        path = tmp_path / "out.edgec"
        given = ["build", str(lstm), "-t", "x86-64", "-o", str(path), "--recipe", FLOAT, "--json"]
        result = CliRunner().invoke(main, [*given, *options])
        assert result.exit_code == 0, result.stderr
        stated = edgec_runtime.load(path, any_target=True).manifest.state
        assert (None if stated is None else [pair.input for pair in stated]) == state


def test_a_wrong_name_stops_the_build_before_the_passes(
    lstm: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(SourceError, match="state h0=hm: the model has no output 'hm'"):
        edgec.build(lstm, target="x86-64", output=tmp_path / "a", state={"h0": "hm"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_torch_lstm_in_float_streams_as_torch_does(tmp_path: pathlib.Path) -> None:
    """Its examples are one tensor for both states, which torch.export takes for one input."""
    import torch
    from torch import nn

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lstm, self.head = nn.LSTM(40, 64, batch_first=True), nn.Linear(64, 6)

        def forward(self, x: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor) -> Any:
            y, (hn, cn) = self.lstm(x, (h0, c0))
            return self.head(y), hn, cn

    zeros = torch.zeros(1, 2, 64)
    source = edgec.Source(
        module=Step(),
        example_inputs=(torch.zeros(2, 2, 40), zeros, zeros),
        output_names=("y", "hn", "cn"),
        dynamic={"x": {0: "batch"}, "h0": {1: "batch"}, "c0": {1: "batch"}},
    )
    report = edgec.build(source, target="x86-64", output=tmp_path / "a.edgec", recipe=FLOAT)
    stream, module = opened(report).stream(batch=3), Step().eval()
    state = [torch.zeros(1, 3, 64)] * 2
    for x in STEPS.transpose(0, 2, 1, 3):
        with torch.no_grad():
            y, *state = module(torch.from_numpy(np.ascontiguousarray(x)), *state)
        # float32 sums in another order, over 40 steps
        np.testing.assert_allclose(stream(x)["y"], y.numpy(), atol=1e-5)


@pytest.mark.slow
def test_a_torch_gru_in_int8_streams_close_to_torch(tmp_path: pathlib.Path) -> None:
    import torch
    from torch import nn

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.cell, self.head = nn.GRUCell(40, 128), nn.Linear(128, 6)

        def forward(self, x: torch.Tensor, memory: torch.Tensor) -> Any:
            after = self.cell(x, memory)
            return self.head(after), after

    source = edgec.Source(
        module=Step(),
        example_inputs=(torch.zeros(2, 40), torch.zeros(2, 128)),
        output_names=("y", "after"),
        dynamic={"x": {0: "batch"}, "memory": {0: "batch"}},
        state={"memory": "after"},
        calibration=lambda: ({"x": chunk["x"][0]} for chunk in chunks()),
    )
    report = edgec.build(source, target="x86-64", output=tmp_path / "a.edgec", recipe=INT8)
    assert not any("GROWS" in text for text in report.findings)
    stream, module = opened(report).stream(batch=3), Step().eval()
    state, expected, actual = [torch.zeros(3, 128)], [], []
    for x in STEPS[:, 0]:
        with torch.no_grad():
            y, *state = module(torch.from_numpy(x), *state)
        expected.append(y.numpy())
        actual.append(stream(x=x)["y"])
    # int8 weights and inputs leave some 40 dB, in the last steps as in the first
    assert sqnr_db(np.stack(expected), np.stack(actual)) > 30
    assert sqnr_db(np.stack(expected[-5:]), np.stack(actual[-5:])) > 30
