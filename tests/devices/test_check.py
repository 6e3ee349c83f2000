"""``edgec verify --on``: what passes on a device, what is refused there and why."""

from __future__ import annotations

import json
import pathlib
from dataclasses import replace

import bundle_samples
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from devices import bundles
from onnx import helper

import edgec
from edgec import builder
from edgec.cli import main
from edgec.devices import check
from edgec.devices.check import OnDevice, Samples, evenly, verify_on
from edgec.devices.install import missing
from edgec.errors import BundleError, SourceError, TargetError, TargetMismatchError
from edgec.lint import lint_bundle
from edgec.targets import load_profile, load_target
from edgec_runtime.bundle import read_bundle


def require(device: str) -> None:
    reason = missing(load_profile(device))
    if reason is not None:
        pytest.skip(f"{device}: {reason}")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return bundles.build("x86-64", tmp_path_factory.mktemp("x86-64"))


@pytest.fixture(scope="module")
def exact(bundle: pathlib.Path) -> OnDevice:
    """What this machine makes of the bundle."""
    [verdict] = verify_on(bundle, ["native"])
    return verdict


def test_this_machine_passes_and_gives_what_the_runtime_gives(bundle: pathlib.Path) -> None:
    given = Samples(tuple(bundles.samples()), 3)
    [verdict] = verify_on(bundle, ["native"], given)
    assert verdict.status == "passed"
    assert verdict.judgement == verdict.here  # the same CPU, so the same figures
    assert verdict.outcome is not None
    expected = edgec_outputs(bundle)
    for given_outputs, outputs in zip(verdict.outcome.outputs[1:], expected, strict=True):
        np.testing.assert_array_equal(given_outputs["y"], outputs)


def edgec_outputs(bundle: pathlib.Path) -> list[np.ndarray]:
    import edgec_runtime

    model = edgec_runtime.load(bundle, threads=1)
    return [model(**feeds)["y"] for feeds in bundles.samples()]


def test_the_command_prints_one_row_per_device_and_json(bundle: pathlib.Path) -> None:
    arguments = ["verify", str(bundle), "--on", "native"]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0
    assert "native" in shown.stdout and "passed" in shown.stdout
    facts = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert facts[0]["status"] == "passed" and facts[0]["sqnr_db"] > 20


def test_a_bundle_for_another_target_is_refused(tmp_path: pathlib.Path) -> None:
    bundle = bundles.build("arm64", tmp_path)
    [verdict] = verify_on(bundle, ["native"])
    assert verdict.status == "refused"
    assert "built for arm64" in verdict.reason and "--any-target" in verdict.reason
    [allowed] = verify_on(bundle, ["native"], any_target=True)
    assert allowed.status == "passed"


def test_a_cpu_that_lacks_a_feature_is_refused_unless_the_bundle_provides_for_it(
    bundle: pathlib.Path,
) -> None:
    from edgec.devices.check import check_fits

    opened = read_bundle(bundle)
    check_fits(opened, load_profile("haswell"))  # lacks VNNI, and session.without says what then
    with pytest.raises(TargetMismatchError, match="nehalem lacks avx2, fma"):
        check_fits(opened, load_profile("nehalem"))


def test_a_device_that_is_there_for_its_execution_provider_takes_no_other_bundle(
    bundle: pathlib.Path,
) -> None:
    from edgec.devices.check import check_fits

    with pytest.raises(TargetMismatchError, match="openvino has OpenVINOExecutionProvider"):
        check_fits(read_bundle(bundle), load_profile("openvino"))


@pytest.mark.slow
def test_what_saturates_without_vnni_fails_and_the_reason_says_so(tmp_path: pathlib.Path) -> None:
    require("haswell")
    bundle = bundles.build(bundles.saturating_target(), tmp_path)
    [verdict] = verify_on(bundle, ["haswell"], Samples(tuple(bundles.samples()), 3))
    assert verdict.status == "failed"
    assert "saturate without VNNI" in verdict.reason and "reduce_range" in verdict.reason


@pytest.mark.parametrize(
    ("arch", "features", "advice"),
    [
        ("x86_64", ("avx2", "fma"), "saturate without VNNI?); build with int8.reduce_range"),
        ("x86_64", ("avx2", "fma", "vnni"), "build with --recipe cleanup,fuse,lower"),
        ("wasm32", ("wasm_simd",), "build with --recipe cleanup,fuse,lower"),
    ],
)
def test_wrong_answers_are_told_with_advice_for_the_cpu_that_gave_them(
    arch: str, features: tuple[str, ...], advice: str, exact: OnDevice
) -> None:
    assert exact.outcome and exact.judgement and exact.here and exact.self_test
    outcome = replace(exact.outcome, arch=arch, features=features)
    noisy = replace(exact.judgement, sqnr_db=exact.least_db - 0.1)
    said = check._wrong(outcome, exact.self_test, noisy, exact.here, exact.least_db)
    assert said.startswith("SQNR") and advice in said
    [output] = exact.self_test.outputs
    failed = replace(
        exact.self_test, passed=False, outputs=(replace(output, passed=False, reason="3 dB"),)
    )
    said = check._wrong(outcome, failed, exact.judgement, exact.here, exact.least_db)
    assert said.startswith("the self-test failed: output 'y': 3 dB") and advice in said


@pytest.mark.slow
@pytest.mark.parametrize("target", ["x86-64", "x86-64-avx2"])
def test_shipped_targets_do_not_saturate_without_vnni(target: str, tmp_path: pathlib.Path) -> None:
    require("haswell")
    bundle = bundles.build(target, tmp_path)
    [verdict] = verify_on(bundle, ["haswell"], Samples(tuple(bundles.samples()), 3))
    assert verdict.status == "passed", verdict.reason
    assert verdict.judgement is not None and verdict.here is not None
    assert verdict.judgement.sqnr_db > verdict.here.sqnr_db - 1.0


@pytest.mark.slow
def test_a_build_breaks_its_promise_where_the_device_computes_something_else(
    tmp_path: pathlib.Path,
) -> None:
    require("haswell")
    target = replace(bundles.saturating_target(), devices=("haswell",))
    (tmp_path / "good").mkdir(), (tmp_path / "bad").mkdir()
    bundles.build(replace(load_target("x86-64"), devices=("haswell",)), tmp_path / "good")
    source, output = tmp_path / "good" / "mlp.onnx", tmp_path / "bad" / "mlp.edgec"
    report = edgec.build(
        source, target=target, output=output, recipe=bundles.RECIPE, evaluation=bundles.samples
    )
    [promise] = [p for p in report.promises if p.name == "min_sqnr_db on haswell"]
    assert not promise.kept and not report.kept
    assert report.devices[0].status == "failed"


def test_a_device_that_is_not_installed_is_skipped_never_passed(
    bundle: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("EDGEC_DEVICES", str(tmp_path / "nothing"))
    [verdict] = verify_on(bundle, ["haswell"])
    assert verdict.status == "skipped"
    assert "edgec devices install haswell" in verdict.reason
    result = CliRunner().invoke(main, ["verify", str(bundle), "--on", "haswell"])
    assert result.exit_code == 1 and "skipped" in result.output


def test_a_build_told_to_verify_needs_a_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("EDGEC_DEVICES", str(tmp_path / "nothing"))
    with pytest.raises(edgec.errors.DeviceMissingError, match="edgec devices install haswell"):
        bundles.build("x86-64", tmp_path, verify=True)
    assert not (tmp_path / "mlp.edgec").exists()


def test_a_bundle_with_a_layout_of_one_kind_of_cpu_is_refused(tmp_path: pathlib.Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        helper.make_node("ReorderOutput", ["h"], ["y"], domain="com.microsoft.nchwc"),
    ]
    values = [helper.make_tensor_value_info(name, 1, ["batch", 8]) for name in "xy"]
    graph = bundle_samples.onnx_bytes(nodes, values[:1], values[1:], [])
    made = bundle_samples.forge(tmp_path / "planted.edgec", graph=graph)
    with pytest.raises(BundleError, match="one kind of CPU"):
        lint_bundle(read_bundle(made))
    result = CliRunner().invoke(main, ["verify", str(made), "--on", "native"])
    assert result.exit_code == 1 and "one kind of CPU" in result.output


def test_a_model_that_onnxruntime_optimized_for_this_cpu_is_no_source(
    tmp_path: pathlib.Path,
) -> None:
    import onnxruntime

    x = helper.make_tensor_value_info("x", 1, [1, 16, 8, 8])
    y = helper.make_tensor_value_info("y", 1, [1, 16, 8, 8])
    weight = np.ones((16, 16, 3, 3), np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
        *("g", [x], [y], [onnx.numpy_helper.from_array(weight, "w")]),
    )
    opset = [helper.make_opsetid("", 21)]
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    given = helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    with pytest.raises(SourceError, match="ORT_ENABLE_EXTENDED"):
        edgec.build(tmp_path / "optimized.onnx", target="x86-64", output=tmp_path / "out")


def test_a_device_without_time_runs_the_golden_sample_and_one_more(bundle: pathlib.Path) -> None:
    given = Samples(tuple(bundles.samples()), 3)
    [verdict] = verify_on(bundle, ["native"], given, seconds=0.0)
    assert verdict.status == "passed"
    assert verdict.outcome is not None and len(verdict.outcome.outputs) == 2
    assert verdict.judgement == verdict.here  # over the same samples
    assert verdict.judgement is not None and verdict.judgement.samples == 1
    assert verdict.reason.startswith("1 of 3 samples were run there")
    assert "longer than 0 s" in verdict.reason and "--verify-seconds" in verdict.reason


def test_verify_runs_as_many_samples_as_it_is_told(bundle: pathlib.Path) -> None:
    given = Samples(tuple(bundles.samples(12)), 12)
    [verdict] = verify_on(bundle, ["native"], given)
    assert verdict.judgement is not None and verdict.judgement.samples == 12
    assert verdict.reason == ""


def test_a_bundle_has_the_same_bytes_however_long_its_device_took(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(builder, "devices_to_verify_on", lambda target, verify: (("native",), ""))
    made, reports = [], []
    for name, seconds in (("short", 0.0), ("long", 600.0)):
        (tmp_path / name).mkdir()
        source, output = tmp_path / "mlp.onnx", tmp_path / name / "mlp.edgec"
        ir.save(bundles.model(), source)
        given = {"recipe": bundles.RECIPE, "evaluation": bundles.samples}
        report = edgec.build(
            source, target="x86-64", output=output, verify_seconds=seconds, **given
        )
        files = sorted(output.parent.iterdir())
        made.append({f.name: f.read_bytes() for f in files if "report" not in f.name})
        reports.append(report)
    assert made[0] == made[1] and len(made[0]) >= 3  # bundle, lock, reference
    short, long = (report.devices[0] for report in reports)
    assert (short.samples, long.samples) == (1, 3)
    assert "1 of 3 samples" in short.reason and long.reason == ""
    assert reports[0].promises[-1].reason == short.reason


def test_the_command_line_sets_the_time_of_a_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(builder, "devices_to_verify_on", lambda target, verify: (("native",), ""))
    ir.save(bundles.model(), tmp_path / "mlp.onnx")
    (tmp_path / "data.py").write_text("from devices.bundles import samples\n")
    arguments = ["build", str(tmp_path / "mlp.onnx"), "--target", "x86-64", "--json"]
    arguments += ["--recipe", bundles.RECIPE, "--evaluation", f"{tmp_path}/data.py:samples"]
    arguments += ["-o", str(tmp_path / "out"), "--verify-seconds", "0"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    [device] = json.loads(result.stdout)["devices"]
    assert device["samples"] == 1 and "1 of 3 samples were run there" in device["reason"]


def test_samples_are_taken_evenly() -> None:
    feeds = [{"x": np.full(1, i)} for i in range(10)]
    assert [int(f["x"][0]) for f in evenly(feeds, 10, 4).feeds] == [0, 2, 5, 7]
    assert len(evenly(feeds, 10, 40).feeds) == 10


def test_every_name_is_looked_up_before_anything_runs(bundle: pathlib.Path) -> None:
    with pytest.raises(TargetError, match="cortex-a27"):
        verify_on(bundle, ["native", "cortex-a27"])


def test_answers_in_integers_are_judged_by_agreement(
    bundle: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check._Expected, "in_floats", False)
    exact = verify_on(bundle, ["native"])[0].judgement
    assert exact is not None
    worse = replace(exact, agreement=exact.agreement - 0.5)
    answers = iter([worse, exact])
    monkeypatch.setattr(check._Expected, "judged", lambda self, outputs: next(answers))
    [verdict] = verify_on(bundle, ["native"])
    assert verdict.status == "failed" and "give the model a float output" in verdict.reason


def test_installed_devices_that_the_bundle_does_not_fit_are_left_out(
    bundle: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgec.devices.install.installed_names", lambda: ("cortex-a72",))
    told = CliRunner().invoke(main, ["verify", str(bundle), "--on", "installed"])
    assert told.exit_code == 1 and "fits none of the installed devices" in told.stderr
