"""The command line: light to start, documented, and every command speaks JSON."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import resource
import subprocess
import sys
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from small_models import save_feeds

import edgec
from edgec.cli import main

ROOT = pathlib.Path(__file__).parents[2]


def invoke(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, (result.stderr, result.exc_info)
    return result.stdout


def invoke_json(*arguments: object, code: int = 0) -> Any:
    return json.loads(invoke(*arguments, "--json", code=code))


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['edgec', '--help']\n"
        "from edgec.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr)"
    )
    seconds, loaded = [], ""
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        loaded = done.stderr
        assert "Commands:" in done.stdout
    heavy = {"torch", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "numpy", "rich", "matplotlib"}
    assert not heavy & set(loaded.split())
    assert min(seconds) < 0.3  # CPU; the least of three, others use this machine too


def test_every_command_and_option_is_explained() -> None:
    for name, command in main.commands.items():
        assert command.help, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (name, parameter.name)


def test_every_command_that_prints_results_has_json() -> None:
    for name, command in main.commands.items():
        assert any("--json" in p.opts for p in command.params), name


def test_the_page_of_the_command_line_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs/make_cli.py")
    assert spec is not None and spec.loader is not None
    make_cli = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_cli)
    assert make_cli.PAGE.read_text(encoding="utf-8") == make_cli.page(), "run docs/make_cli.py"


def test_the_function_build_is_not_hidden_by_a_module() -> None:
    import edgec.builder
    import edgec.project  # imports what the command needs

    assert callable(edgec.build) and edgec.build is edgec.builder.build
    for name in edgec.__all__:
        assert getattr(edgec, name) is not None
        assert not (ROOT / "compiler" / f"{name}.py").exists(), "it would hide the name"


def test_version_and_traceback(cnn_bundle: pathlib.Path) -> None:
    assert invoke("--version").strip().endswith(edgec.__version__)
    result = CliRunner().invoke(main, ["--traceback", "inspect", "nothing.edgec"])
    assert type(result.exception).__name__ == "BundleError"  # and not SystemExit


def test_targets_and_passes_are_listed_and_shown() -> None:
    names = {t["name"] for t in invoke_json("targets")}
    assert {"x86-64", "x86-64-avx2", "arm64", "arm64-dotprod", "web", "android"} <= names
    assert all(name in invoke("targets") for name in names)
    one = invoke_json("targets", "web")
    assert one["arch"] == "wasm32" and "wasm32" in invoke("targets", "web")
    passes = invoke_json("passes")
    assert [p["name"] for p in passes][:2] == ["cleanup", "fuse"]
    assert all(p["summary"] and p["description"] for p in passes)
    prune = invoke_json("passes", "prune-magnitude")
    assert "sparsity" in [p["name"] for p in prune["parameters"]]
    assert "sparsity" in invoke("passes", "prune-magnitude")


def test_inspect_tells_what_the_bundle_holds(cnn_bundle: pathlib.Path) -> None:
    facts = invoke_json("inspect", cnn_bundle)
    assert facts["inputs"] == [{"name": "image", "dtype": "float32", "shape": [1, 3, 12, 12]}]
    assert facts["target"]["name"] == "x86-64" and facts["golden"]
    assert "weights.bin" in [e["name"] for e in facts["entries"]]
    assert facts["sha256"][:8] in invoke("inspect", cnn_bundle)


def test_verify_compares_with_the_reference_beside_the_bundle(
    cnn_bundle: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    data = save_feeds(tmp_path / "data", 4)
    assert invoke_json("verify", cnn_bundle)["self_test"]["passed"]
    facts = invoke_json("verify", cnn_bundle, "--evaluation", data, "--max-drop", "0")
    assert facts["samples"] == 4 and facts["agreement"] == 1.0
    assert facts["promises"] == [{"name": "max_drop", "limit": 0.0, "value": 0.0, "kept": True}]
    assert "agreement" in invoke("verify", cnn_bundle, "--evaluation", data)


def test_verify_against_another_model_finds_the_drop(
    cnn_bundle: pathlib.Path, cnn_onnx: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    import onnx_ir as ir

    model = ir.load(cnn_onnx)
    head = model.graph.initializers["w"]
    head.const_value = ir.tensor(-head.const_value.numpy(), name="w")
    ir.save(model, tmp_path / "other.onnx")
    data = save_feeds(tmp_path / "data", 4)
    against = ("--against", tmp_path / "other.onnx", "--evaluation", data)
    facts = invoke_json("verify", cnn_bundle, *against, "--max-drop", "0.1", code=3)
    assert facts["agreement"] < 0.5 and not facts["promises"][0]["kept"]


def test_bench_times_bundle_and_reference_side_by_side(
    cnn_bundle: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    short = ("--seconds", "0.1")
    facts = invoke_json("bench", cnn_bundle, *short)
    assert facts["bundle"]["latency_ms"] > 0 and facts["reference"]["latency_ms"] > 0
    ratio = facts["reference"]["latency_ms"] / facts["bundle"]["latency_ms"]
    assert facts["speedup"] == pytest.approx(ratio) and facts["runs"] >= 11
    data = save_feeds(tmp_path / "data", 2)
    more = ("--data", data, "--threads", "2", "--against", cnn_bundle, "--min-speedup", "1000")
    broken = invoke_json("bench", cnn_bundle, *short, *more, code=3)
    assert broken["threads"] == 2 and "first sample" in broken["inputs"]
    assert [t["name"] for t in broken["timings"]] == [cnn_bundle.name] * 2
    assert "median" in invoke("bench", cnn_bundle, *short)


@pytest.mark.parametrize(("limit", "code"), [("0.000001", 3), ("1000000", 0)])
def test_bench_judges_the_latency_without_a_reference(
    cnn_bundle: pathlib.Path, tmp_path: pathlib.Path, limit: str, code: int
) -> None:
    alone = tmp_path / "alone.edgec"
    alone.write_bytes(cnn_bundle.read_bytes())
    asked = ("--seconds", "0.1", "--max-latency-ms", limit)
    (promise,) = invoke_json("bench", alone, *asked, code=code)["promises"]
    assert promise["name"] == "max_latency_ms" and promise["kept"] is (code == 0)


def test_run_prints_and_writes_the_outputs(
    cnn_bundle: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    golden = invoke_json("run", cnn_bundle)
    assert golden["samples"] == 1 and golden["outputs"][0]["logits"]["shape"] == [1, 10]
    data, output = save_feeds(tmp_path / "data", 3), tmp_path / "out.npz"
    facts = invoke_json(
        "run", cnn_bundle, "--input", data, "-o", output, "--threads", "2", "--any-target"
    )
    assert facts["threads"] == 2 and facts["samples"] == 3
    logits = np.load(output)["logits"]
    assert logits.shape == (3, 10)
    shown = [o["logits"]["first_values"] for o in facts["outputs"]]
    np.testing.assert_allclose(logits[:, :8], shown, rtol=1e-6)
    assert "logits" in invoke("run", cnn_bundle)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "out.npz"]


def test_a_picture_goes_through_the_bundles_preprocessing(
    cnn_onnx: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    image = pytest.importorskip("PIL.Image")
    source = edgec.Source(
        module=cnn_onnx,
        image=edgec.ImageSpec(size=(12, 12), input="image"),
        labels=tuple(f"class {i}" for i in range(10)),
    )
    bundle = tmp_path / "m.edgec"
    edgec.build(source, target="x86-64", output=bundle, recipe="cleanup", keep_reference=False)
    image.new("RGB", (40, 30), (200, 30, 90)).save(tmp_path / "p.png")
    facts = invoke_json("run", bundle, "--image", tmp_path / "p.png")
    top = facts["outputs"][0]["logits"]["top"]
    assert len(top) == 5 and top[0]["score"] >= top[1]["score"] and "class" in top[0]["label"]


def test_doctor_finds_this_machine_in_order() -> None:
    facts = invoke_json("doctor")
    assert "edgec devices install haswell" in facts["devices"]["haswell"]
    assert facts["telemetry_off"] and "CPUExecutionProvider" in facts["providers"]
    assert set(facts["targets"]) >= {"x86-64", "web"}
    assert "python" in invoke("doctor")


def test_options_of_build_reach_the_bundle(cnn_onnx: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    report = invoke_json(
        *("build", cnn_onnx, "-t", "x86-64", "-o", out, "--no-reference", "--release", "7"),
        *("--seed", "3", "--threads", "2", "--recipe", "cleanup,quantize-weights"),
        *("--set", "quantize-weights.block_size=16"),
    )
    assert report["measured_on"]["threads"] == 2
    assert report["steps"][1]["parameters"]["block_size"] == 16
    facts = invoke_json("inspect", report["bundle_path"])
    assert facts["version"] == 7 and facts["provenance"]["seed"] == 3
    assert not list(out.glob("*.onnx"))
    text = invoke("build", cnn_onnx, "-t", "x86-64", "-o", out, "--recipe", "cleanup")
    assert "agreement" in text and "sha256" in text
