"""The main job: every kind of source becomes a bundle that computes what the model does."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from click.testing import CliRunner
from small_models import images, save_feeds

import edgec
import edgec_runtime
from edgec.cli import main
from edgec.errors import ExportError, SourceError
from edgec.export import check_parity, export
from edgec.source import load_source
from edgec.targets import load_target
from edgec_runtime.bundle import read_bundle

LOSSLESS = "cleanup,fuse,lower"
FLOAT_NOISE = 1e-4  # float32 sums in another order, outputs of the order of one
MODEL_PY = """
import edgec
import small_models
from small_models import torch


def cnn():
    return small_models.cnn(), (small_models.image(),)


def named():
    return edgec.Source(
        module=small_models.cnn(),
        example_inputs=(small_models.image(),),
        input_names=("image",),
        output_names=("logits",),
        calibration=calibration,
    )


def calibration():
    for array in small_models.images(12):
        yield {"image": array}


def labelled():
    for i, array in enumerate(small_models.images(12, seed=7)):
        yield {"image": array, "label": i % 10}


def score(outputs, labels):
    assert outputs["logits"].shape == (12, 10) and labels.shape == (12,)
    return float((outputs["logits"].argmax(1) == labels).mean())
"""


@pytest.fixture
def work(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A user's folder with model.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL_PY)
    return tmp_path


@pytest.fixture(scope="module")
def block_onnx(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The transformer block as .onnx, batch and length open."""
    path = tmp_path_factory.mktemp("block") / "block.onnx"
    torch.onnx.export(
        small_models.Block().eval(),
        (torch.arange(14).reshape(2, 7),),
        path,
        input_names=["ids"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch", 1: "length"},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    return path


def edgec_build(*arguments: object, code: int = 0) -> dict[str, Any]:
    """``edgec build ... --json``; returns the report."""
    result = CliRunner().invoke(main, ["build", *map(str, arguments), "--json"])
    assert result.exit_code == code, (result.stderr, result.exc_info)
    return json.loads(result.stdout)


def run(report: dict[str, Any], **feeds: np.ndarray) -> dict[str, np.ndarray]:
    return edgec_runtime.load(report["bundle_path"], any_target=True)(**feeds)


# --- sources -------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["model.py:cnn", "model:cnn"])
def test_a_function_of_a_file_or_module_is_built(
    source: str, work: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(work))
    sys.modules.pop("model", None)
    report = edgec_build(source, "-t", "x86-64", "-o", "out", "--recipe", LOSSLESS)
    assert report["source"] == "module" and report["name"] == "model"
    x = small_models.image()
    (actual,) = run(report, input=x.numpy()).values()
    with torch.no_grad():
        np.testing.assert_allclose(actual, small_models.cnn()(x), atol=FLOAT_NOISE)
    assert report["parity"]["sqnr_db"] > 100 and report["agreement"] == 1.0
    assert sorted(p.name for p in (work / "out").iterdir()) == [
        "model.x86-64.edgec",
        "model.x86-64.lock.json",
        "model.x86-64.reference.onnx",
        "report.html",
        "report.json",
    ]
    assert not (work / "__pycache__").exists()


def test_an_exported_program_is_built(work: pathlib.Path) -> None:
    program = torch.export.export(
        small_models.Recurrent().eval(), (torch.randn(2, 6, 24),)
    )  # two outputs
    torch.export.save(program, work / "rnn.pt2")
    report = edgec_build("rnn.pt2", "-t", "x86-64", "-o", "out", "--recipe", LOSSLESS)
    assert report["source"] == "exported"
    x = torch.randn(2, 6, 24)
    (name,) = (v.name for v in edgec_runtime.load(report["bundle_path"]).inputs)
    actual = list(run(report, **{name: x.numpy()}).values())
    with torch.no_grad():
        for a, e in zip(actual, small_models.Recurrent()(x), strict=True):
            np.testing.assert_allclose(a, e, atol=FLOAT_NOISE)


def test_an_exported_program_with_keyword_inputs_is_built(work: pathlib.Path) -> None:
    class Sum(torch.nn.Module):
        def forward(self, a: torch.Tensor, *, b: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": a.relu() + b, "negative": -a}

    rows = torch.export.Dim("rows")
    program = torch.export.export(
        Sum(),
        (torch.randn(2, 8),),
        kwargs={"b": torch.randn(2, 8)},
        dynamic_shapes={"a": {0: rows}, "b": {0: rows}},
    )
    torch.export.save(program, work / "sum.pt2")
    report = edgec_build("sum.pt2", "-t", "x86-64", "-o", "out", "--recipe", LOSSLESS)
    a = np.linspace(-1, 1, 24, dtype=np.float32).reshape(3, 8)
    actual = list(run(report, a=a, b=2 * a).values())
    np.testing.assert_allclose(actual[0], np.maximum(a, 0) + 2 * a, atol=FLOAT_NOISE)
    np.testing.assert_array_equal(actual[1], -a)


def test_an_onnx_file_is_built(cnn_onnx: pathlib.Path, work: pathlib.Path) -> None:
    report = edgec_build(cnn_onnx, "-t", "x86-64", "-o", "out/net.edgec", "--recipe", LOSSLESS)
    assert report["source"] == "onnx" and report["parity"] is None
    (x,) = images(1)
    expected = reference_of(report)(image=x)["logits"]
    np.testing.assert_allclose(run(report, image=x)["logits"], expected, atol=FLOAT_NOISE)
    assert "net.report.json" in os.listdir("out")


def reference_of(report: dict[str, Any]) -> Any:
    """The reference beside a bundle, in plain ONNX Runtime."""
    import onnxruntime

    path = pathlib.Path(report["bundle_path"])
    session = onnxruntime.InferenceSession(str(path.with_name(f"{path.stem}.reference.onnx")))
    names = [o.name for o in session.get_outputs()]
    return lambda **feeds: dict(zip(names, session.run(None, feeds), strict=True))


def test_a_hugging_face_directory_is_built_the_same_every_time(work: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(work / "bert")
    reports = [edgec_build("bert", "-t", "x86-64", "-o", out, "--recipe", LOSSLESS) for out in "ab"]
    assert reports[0]["source"] == "huggingface" and reports[0]["parity"]["sqnr_db"] > 80
    assert reports[0]["bundle_sha256"] == reports[1]["bundle_sha256"]
    ids = np.arange(12).reshape(2, 6)
    feeds = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    feeds["attention_mask"][1, 4:] = 0
    with torch.no_grad():
        expected = model(**{k: torch.from_numpy(v) for k, v in feeds.items()}).logits
    np.testing.assert_allclose(run(reports[0], **feeds)["logits"], expected, atol=FLOAT_NOISE)


# --- what a module may be ------------------------------------------------------------------


def exported(module: torch.nn.Module, examples: Any, **rest: Any) -> Any:
    source = load_source(edgec.Source(module=module, example_inputs=examples, **rest))
    return export(source, load_target("x86-64"))


def test_a_module_in_training_mode_is_switched_and_said() -> None:
    made = exported(small_models.cnn().train(), (small_models.image(),))
    assert "training mode" in made.findings[0]
    parity = check_parity(made, made.examples)
    assert parity is not None and parity.sqnr_db > 100  # float noise


def test_inputs_by_name_may_be_integers() -> None:
    examples = {"ids": torch.tensor([[1, 2, 3]]), "scale": torch.ones(1, 8)}
    made = exported(small_models.Scaled(), examples)
    assert [(v.name, str(v.dtype)) for v in made.model.graph.inputs] == [
        ("ids", "INT64"),
        ("scale", "FLOAT"),
    ]
    assert check_parity(made, made.examples) is not None


@pytest.mark.parametrize("batch", [1])
def test_a_dynamic_dimension_stays_open_whatever_the_example_is(batch: int) -> None:
    made = exported(
        small_models.cnn(),
        (small_models.image(batch),),
        input_names=("image",),
        dynamic={"image": {0: "batch"}},
    )
    assert str(made.model.graph.inputs[0].shape[0]) == "batch"
    feeds = [{"image": small_models.image(n).numpy()} for n in (1, 2, 5)]
    assert check_parity(made, feeds).samples == 3


def test_a_dynamic_dimension_of_an_unknown_argument_is_refused() -> None:
    with pytest.raises(SourceError, match="dynamic names an argument 'imag'"):
        exported(small_models.cnn(), (small_models.image(),), dynamic={"imag": {0: "batch"}})


def test_a_module_without_examples_is_refused() -> None:
    with pytest.raises(SourceError, match="no example_inputs"):
        exported(small_models.cnn(), ())


def test_half_precision_parameters_are_refused_with_the_way_out() -> None:
    with pytest.raises(SourceError, match=r"module\.float\(\)"):
        exported(small_models.cnn().bfloat16(), (small_models.image().bfloat16(),))


def test_an_export_that_computes_something_else_is_refused_at_its_node() -> None:
    import onnx_ir as ir

    made = exported(small_models.Block().eval(), (torch.arange(7).reshape(1, 7),))
    node = next(n for n in made.model.graph if n.op_type == "Gelu" or n.op_type == "Erf")
    weight = next(
        value
        for n in made.model.graph
        for value in n.inputs
        if value.const_value is not None and sorted(value.const_value.shape.numpy()) == [48, 192]
    )
    array = weight.const_value.numpy().copy()
    array[3] *= 2.0  # as a wrong translation would do
    weight.const_value = ir.tensor(array, name=weight.name)
    with pytest.raises(ExportError, match="first node to diverge is") as caught:
        check_parity(made, made.examples)
    consumer = weight.consumers()[0]
    order = [n.name for n in made.model.graph]
    named = next(n for n in order if f"'{n}'" in str(caught.value))
    assert order.index(consumer.name) <= order.index(named) <= order.index(node.name)


class Drawing(torch.nn.Module):
    """Its output depends on a number that Python draws."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * random.uniform(1, 9)


def test_a_module_that_tracing_froze_is_refused_with_the_reason() -> None:
    made = exported(Drawing(), (torch.ones(1, 4),))
    with pytest.raises(ExportError, match="tracing froze"):
        check_parity(made, made.examples)


# --- data, metric, promises, report --------------------------------------------------------

FIELDS = (
    "schema_version target size_bytes reference bundle speedup agreement sqnr_db steps skipped"
    " promises"
).split()


def test_the_report_has_the_promised_fields_and_a_broken_promise_is_exit_3(
    cnn_onnx: pathlib.Path, work: pathlib.Path
) -> None:
    # a target of another instruction set: no recipe is given up for its speed on this machine
    arguments = (cnn_onnx, "-t", "arm64", "-o", "out", "--calibration", "model.py:calibration")
    report = edgec_build(*arguments, "--max-size-mb", "0.01", "--max-drop", "0.5", code=3)
    assert json.loads(pathlib.Path("out/report.json").read_text()) == report
    assert set(FIELDS) <= set(report)
    assert report["schema_version"] == 1 and report["target"] == "arm64"
    assert report["reference"]["latency_ms"] > 0 and report["bundle"]["latency_ms"] > 0
    ratio = report["reference"]["latency_ms"] / report["bundle"]["latency_ms"]
    assert report["speedup"] == pytest.approx(ratio)
    assert [s["name"] for s in report["steps"]] == ["cleanup", "fuse", "quantize-static", "lower"]
    assert report["size_bytes"] == os.path.getsize(report["bundle_path"])
    kept = {p["name"]: p["kept"] for p in report["promises"]}
    assert kept == {"max_drop": True, "max_size_mb": False}
    html = pathlib.Path("out/report.html").read_text()
    assert "<svg" in html and "://" not in html.replace("http://www.w3.org", "")
    assert report["sqnr_db"] > 25 and "QLinearConv" not in json.dumps(report["skipped"])
    assert edgec_runtime.load(report["bundle_path"], any_target=True).self_test().passed


@pytest.mark.parametrize("metric", ["top1", "model.py:score"])
def test_a_metric_is_taken_of_reference_and_bundle(
    metric: str, cnn_onnx: pathlib.Path, work: pathlib.Path
) -> None:
    evaluation = ("--evaluation", "model.py:labelled", "--metric", metric)
    report = edgec_build(
        cnn_onnx, "-t", "x86-64", "-o", "out", "--recipe", "cleanup", *evaluation, "--max-drop", "0"
    )
    logits = [reference_of(report)(image=x)["logits"][0] for x in images(12, seed=7)]
    expected = float(np.mean([row.argmax() == i % 10 for i, row in enumerate(logits)]))
    assert report["metric"]["reference"] == report["metric"]["bundle"] == pytest.approx(expected)
    assert report["metric"]["drop"] == 0 and report["samples"] == 12
    assert report["promises"][0]["reason"] == metric.rpartition(":")[2]


def test_without_data_a_promised_drop_is_not_kept(
    cnn_onnx: pathlib.Path, work: pathlib.Path
) -> None:
    arguments = (cnn_onnx, "-t", "x86-64", "-o", "out", "--recipe", "cleanup", "--max-drop", "0.9")
    report = edgec_build(*arguments, code=3)
    assert "not judged" in report["promises"][0]["reason"]


def test_a_build_without_calibration_data_says_what_that_cost(
    cnn_onnx: pathlib.Path, work: pathlib.Path
) -> None:
    def findings(*options: str) -> list[str]:
        report = edgec_build(cnn_onnx, "-t", "arm64", "-o", "out", *options)
        return [text for text in report["findings"] if "no calibration data" in text]

    data = ("--evaluation", "model.py:labelled")
    assert "in place of cleanup, fuse, quantize-static" in findings(*data)[0]
    assert findings(*data, "--recipe", "cleanup") == []
    assert findings(*data, "--calibration", "model.py:calibration") == []


def test_every_form_of_calibration_data_gives_the_same_bundle(
    cnn_onnx: pathlib.Path, work: pathlib.Path
) -> None:
    save_feeds(work / "folder", 12)
    whole = np.concatenate(images(12))
    np.savez(work / "one.npz", image=whole)
    np.savez_compressed(work / "any_key.npz", pixels=whole)
    np.save(work / "one.npy", whole)
    forms = ["folder", "one.npz", "any_key.npz", "one.npy", "model.py:calibration"]
    digests = {
        form: edgec_build(
            cnn_onnx, "-t", "arm64", "-o", f"out/{i}", "--calibration", form, "--no-reference"
        )["bundle_sha256"]
        for i, form in enumerate(forms)
    }
    assert len(set(digests.values())) == 1, digests


# --- determinism ---------------------------------------------------------------------------


@pytest.mark.slow
def test_two_builds_of_a_torch_model_give_the_same_bytes(work: pathlib.Path) -> None:
    digests = []
    for seed in ("1", "2"):
        folder = work / seed
        folder.mkdir()
        (folder / "model.py").write_text(MODEL_PY)
        # not this machine's kind of target: what is chosen by its speed goes into the lock, and
        # a network of 0.03 ms is as fast in int8 as in float32
        command = [sys.executable, "-m", "edgec.cli", "build", "model.py:named", "-t", "arm64"]
        tests = str(pathlib.Path(small_models.__file__).parent)
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": tests}
        subprocess.run(
            [*command, "-o", "out"], cwd=folder, env=environment, check=True, capture_output=True
        )
        (bundle,) = (folder / "out").glob("*.edgec")
        digests.append(hashlib.sha256(bundle.read_bytes()).hexdigest())
        assert str(folder).encode() not in bundle.read_bytes()  # no path of the builder
    assert digests[0] == digests[1]


@pytest.mark.parametrize("data", [(), ("--calibration", "other")], ids=["absent", "different"])
def test_a_lock_replays_the_build_without_its_data(
    data: tuple[str, ...], cnn_onnx: pathlib.Path, work: pathlib.Path
) -> None:
    save_feeds(work / "other", 6, seed=99)
    arguments = (cnn_onnx, "-t", "arm64")
    first = edgec_build(
        *arguments, "-o", "a", "--calibration", "model.py:calibration", "--seed", "5", "--release",
        "3", "--set", "quantize-static.bias_correction=false",
    )  # fmt: skip
    again = edgec_build(*arguments, "-o", "b", "--lock", "a/cnn.arm64.lock.json", *data)
    assert again["bundle_sha256"] == first["bundle_sha256"]
    assert [s["name"] for s in again["steps"]][2] == "quantize-static"
    locks = [pathlib.Path(f"{d}/cnn.arm64.lock.json").read_text() for d in "ab"]
    assert locks[0] == locks[1]


# --- targets -------------------------------------------------------------------------------

TARGETS = ("x86-64", "x86-64-avx2", "arm64", "arm64-dotprod", "web", "android")


def test_the_targets_give_different_graphs(
    cnn_onnx: pathlib.Path, block_onnx: pathlib.Path, work: pathlib.Path
) -> None:
    np.savez(work / "ids.npz", ids=np.random.default_rng(0).integers(0, 100, (8, 7)))
    graphs: dict[str, set[str]] = {}
    bundles = set()
    for target in TARGETS:
        parts = []
        for model, data in ((cnn_onnx, "model.py:calibration"), (block_onnx, "ids.npz")):
            out = f"out/{target}"
            arguments = (model, "-t", target, "-o", out, "--calibration", data)
            # the target's own recipe, also where a model this small is faster in float32
            report = edgec_build(*arguments, "--search-minutes", "0")
            bundles.add(report["bundle_sha256"])
            bundle = read_bundle(report["bundle_path"])
            assert bundle.manifest.target.name == target
            parts.append(bundle.read("graph.onnx") + bundle.read("weights.bin"))
            assert report["sqnr_db"] > 15 and report["agreement"] > 0.7, (target, model)
        graphs[target] = set(parts)
    assert len(bundles) == 2 * len(TARGETS)
    # VNNI or not, dot product or not and the browser each change what the device executes
    for a, b in (("x86-64", "x86-64-avx2"), ("arm64", "arm64-dotprod"), ("web", "x86-64")):
        assert graphs[a] != graphs[b], (a, b)
    # fixed shapes: android's transformer has no open dimension
    manifest = read_bundle(next(pathlib.Path("out/android").glob("block*.edgec"))).manifest
    assert manifest.graphs["main"].inputs[0].shape == (1, 7)


def test_a_project_file_builds_all_its_targets(cnn_onnx: pathlib.Path, work: pathlib.Path) -> None:
    (work / "project").mkdir()
    (work / "project/cnn.onnx").write_bytes(cnn_onnx.read_bytes())
    (work / "project/arm64").mkdir()  # a folder that has a target's name is no target file
    (work / "project/edgec.toml").write_text(
        'model = "cnn.onnx"\ntargets = ["arm64", "web"]\noutput = "bundles"\n'
        'recipe = "cleanup,fuse"\n[promises]\nmax_size_mb = 1\n'
    )
    reports = edgec_build("--config", "project/edgec.toml")
    assert [r["target"] for r in reports] == ["arm64", "web"]
    assert all(p["kept"] for r in reports for p in r["promises"])
    assert (work / "project/bundles/arm64/cnn.arm64.edgec").is_file()
    assert (work / "project/bundles/web/cnn.web.edgec").is_file()


def test_a_rebuild_without_reference_removes_the_old_one(
    cnn_onnx: pathlib.Path, work: pathlib.Path
) -> None:
    arguments = (cnn_onnx, "-t", "x86-64", "-o", "out", "--recipe", "cleanup")
    edgec_build(*arguments)
    assert pathlib.Path("out/cnn.x86-64.reference.onnx").is_file()
    edgec_build(*arguments, "--no-reference")
    assert not pathlib.Path("out/cnn.x86-64.reference.onnx").exists()


def test_a_model_above_the_limit_of_protobuf_is_built(
    cnn_onnx: pathlib.Path, work: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgec.emit._PROTOBUF_LIMIT", 1000)
    monkeypatch.setattr("edgec.passes.execution._PROTOBUF_LIMIT", 1000)
    monkeypatch.setattr("edgec.passes.execution._FILES_ABOVE", 1000)
    report = edgec_build(cnn_onnx, "-t", "x86-64", "-o", "out", "--recipe", "cleanup")
    assert pathlib.Path("out/cnn.x86-64.reference.onnx.data").is_file()
    (x,) = images(1)
    expected = reference_of(report)(image=x)["logits"]
    np.testing.assert_allclose(run(report, image=x)["logits"], expected, atol=FLOAT_NOISE)


@pytest.mark.slow
def test_a_graph_of_more_than_2_gb_is_built(work: pathlib.Path) -> None:
    (work / "big.py").write_text(
        "import torch\n\ndef build():\n"
        "    layer = torch.nn.Linear(24000, 24000, bias=False)\n"
        "    torch.nn.init.normal_(layer.weight, std=0.01)\n"
        "    return layer.eval(), (torch.randn(1, 24000),)\n"
    )
    code = (
        "import resource, sys; from edgec.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "build", "big.py:build", "-t", "x86-64", "-o", "out"]
    done = subprocess.run(
        [*command, "--recipe", "cleanup", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["size_bytes"] > 2.3e9 and report["agreement"] == 1.0
    assert int(done.stderr.split()[-1]) < 14e6  # KiB
