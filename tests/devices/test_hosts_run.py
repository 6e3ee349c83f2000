"""The host in C runs jobs: it computes what Python computes, and refuses what cannot be run."""

from __future__ import annotations

import pathlib
import re
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bundle_samples import forge, onnx_bytes, write_sample
from devices import bundles, host_programs
from onnx import helper

import edgec_runtime
from edgec.devices import guest
from edgec.devices.connect import open_device
from edgec.devices.install import installed_folder, missing
from edgec.devices.job import Job, Outcome, read_outcome, write_job
from edgec.devices.local import clean_environment, open_native
from edgec.devices.wine import HOSTS, SOURCES
from edgec.errors import DeviceError
from edgec.targets import load_profile
from edgec_runtime import manifest
from edgec_runtime.machine import this_machine


@pytest.fixture
def runner(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return host_programs.run_bundle(tmp_path_factory.getbasetemp())


def run(program: pathlib.Path, job: Job, folder: pathlib.Path) -> Outcome:
    """The job's outcome; ``folder`` may hold files of it already."""
    folder.mkdir(exist_ok=True)
    if not (folder / guest.JOB).exists():
        write_job(job, folder)
    command = [str(program), str(folder)]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    return read_outcome(job, folder, open_native().profile, done.stderr)


def test_the_session_options_are_those_of_the_runtime() -> None:
    text = (HOSTS / "edgec_model.c").read_text()
    listed = text[text.index("SESSION_CONFIG[] = {") : text.index("};")]
    assert tuple(re.findall(r'"([^"]+)"', listed)) == manifest.SESSION_CONFIG


def test_outputs_equal_python_bit_for_bit(runner: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """An int8 model whose target disables optimizers and sets options."""
    path = bundles.build("x86-64", tmp_path)
    job = Job(path, bundles.samples(), repeats=2, count=True)
    there, here = run(runner, job, tmp_path / "job"), open_native().run(job)
    for mine, expected in zip(there.outputs, here.outputs, strict=True):
        assert mine.keys() == expected.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], expected[name], strict=True)
    assert (there.onnxruntime, there.arch, there.os) == (here.onnxruntime, here.arch, here.os)
    assert there.features == here.features
    assert len(there.latency_ms) == 2 and there.load_ms > 0


def test_two_samples_are_run_where_the_time_allows_no_more(
    runner: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    path, feeds = write_sample(tmp_path / "a"), [{"x": np.full((1, 8), i, "f")} for i in range(5)]
    there = run(runner, Job(path, feeds, repeats=1, count=True, seconds=0.0), tmp_path / "short")
    for given, output in zip(feeds[:2], there.outputs, strict=True):
        np.testing.assert_array_equal(output["y"], edgec_runtime.load(path)(**given)["y"])
    enough = run(runner, Job(path, feeds, seconds=600.0), tmp_path / "long")
    assert len(enough.outputs) == 5


@pytest.mark.slow
def test_outputs_equal_python_on_an_emulated_arm64_cpu(tmp_path: pathlib.Path) -> None:
    profile = load_profile("cortex-a76")
    reason = missing(profile)
    if reason is not None:
        pytest.skip(reason)
    environment = installed_folder(profile)
    [library] = environment.glob("site/onnxruntime/capi/libonnxruntime.so.*")
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)
    command = ["aarch64-linux-gnu-gcc", "-std=c11", "-O1", f"-L{tmp_path}"]
    command += ["-isystem", str(host_programs.include_folder())]
    command += [str(HOSTS / name) for name in SOURCES]
    command += ["-l:libonnxruntime.so.1", "-Wl,--unresolved-symbols=ignore-in-shared-libs"]
    program = host_programs.compile_program(command, tmp_path / "run_bundle")
    job = Job(bundles.build("arm64-dotprod", tmp_path), bundles.samples(1))
    folder = tmp_path / "job"
    folder.mkdir()
    write_job(job, folder)
    libraries = ":".join(map(str, environment.glob("host/usr/lib/*-linux-gnu")))
    emulator = [str(environment / "host/usr/bin/qemu-aarch64"), "-cpu", profile.cpu]
    emulator += ["-L", str(environment / "root"), "-E", f"LD_LIBRARY_PATH={tmp_path}"]
    subprocess.run(
        [*emulator, str(program), str(folder)],
        env={**clean_environment(), "LD_LIBRARY_PATH": libraries},
        check=True,
    )
    there = read_outcome(job, folder, profile)
    with open_device("cortex-a76") as device:
        python = device.run(job)
    np.testing.assert_array_equal(there.outputs[0]["y"], python.outputs[0]["y"], strict=True)
    assert (there.arch, there.features) == ("arm64", python.features)


def _casting(path: pathlib.Path) -> pathlib.Path:
    """Inputs of several dtypes, one of them empty or a scalar, to outputs of several."""
    types = {"a": 7, "b": 9, "c": 10, "d": 3}  # int64, bool, float16, int8
    inputs = [
        helper.make_tensor_value_info(n, t, ["n"] if n != "d" else []) for n, t in types.items()
    ]
    outputs = [helper.make_tensor_value_info(f"{n}2", t, None) for n, t in types.items()]
    nodes = [helper.make_node("Identity", [n], [f"{n}2"]) for n in types]
    names = {"a": "int64", "b": "bool", "c": "float16", "d": "int8"}
    graph = manifest.Graph(
        "graph.onnx",
        tuple(manifest.Value(n, d, ("n",) if n != "d" else ()) for n, d in names.items()),
        tuple(manifest.Value(f"{n}2", d, ("n",) if n != "d" else ()) for n, d in names.items()),
    )
    return write_sample(
        path, {"graph.onnx": onnx_bytes(nodes, inputs, outputs, [])}, graphs={"main": graph}
    )


def test_every_dtype_and_empty_arrays_pass(runner: pathlib.Path, tmp_path: pathlib.Path) -> None:
    feeds = [
        {
            "a": np.arange(n, dtype=np.int64) - 2**40,
            "b": np.arange(n) % 2 == 0,
            "c": np.linspace(0, 1, n).astype(np.float16),
            "d": np.array(-7, np.int8),
        }
        for n in (3, 0)
    ]
    outcome = run(runner, Job(_casting(tmp_path / "a"), feeds), tmp_path / "job")
    for given, output in zip(feeds, outcome.outputs, strict=True):
        for name, array in given.items():
            np.testing.assert_array_equal(output[f"{name}2"], array, strict=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"onnxruntime": ">=9"}, "it needs onnxruntime >=9, this is"),
        ({"onnxruntime": "new"}, "no range of versions of ONNX Runtime: new"),
        ({"onnxruntime": ">=1.27,<1.28"}, "it needs onnxruntime >=1.27,<1.28"),
        (
            {"session": manifest.Session(providers=("QNNExecutionProvider",))},
            "does not run on the CPU execution provider",
        ),
        (
            {"graphs": {"main": manifest.Graph("graph.onnx", (), ())}},
            "another number of inputs or outputs",
        ),
        (
            {
                "graphs": {
                    "main": manifest.Graph(
                        "graph.onnx",
                        (manifest.Value("z", "float32", ("batch", 8)),),
                        (manifest.Value("y", "float32", ("batch", 4)),),
                    )
                }
            },
            "another input or output than its manifest: z",
        ),
    ],
)
def test_a_bundle_that_onnxruntime_cannot_run_is_refused(
    runner: pathlib.Path, tmp_path: pathlib.Path, changes: dict[str, Any], message: str
) -> None:
    path = write_sample(tmp_path / "a", **changes)
    feeds = [{"x": np.zeros((1, 8), np.float32)}]
    with pytest.raises(DeviceError, match=re.escape(message)):
        run(runner, Job(path, feeds), tmp_path / "job")


def test_an_option_that_names_a_file_is_refused(
    runner: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    def change(table: Any) -> None:
        table["session"]["config"] = {"session.profiling_file": "/tmp/x"}

    path = forge(tmp_path / "a", change)
    with pytest.raises(DeviceError, match="this session option is not allowed"):
        run(runner, Job(path, [{"x": np.zeros((1, 8), np.float32)}]), tmp_path / "job")


def test_options_for_cpus_without_a_feature_are_set_where_it_is_absent(
    runner: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Seen by an option that is not allowed: it is refused where it would be set."""
    present = sorted(this_machine().features)
    if not present:
        pytest.skip("this machine does not tell about its CPU's features")

    def without(feature: str) -> Callable[[Any], None]:
        return lambda t: t["session"].update(without={feature: {"session.unknown": "1"}})

    feeds = [{"x": np.zeros((1, 8), np.float32)}]
    absent = forge(tmp_path / "absent", without("none"))
    with pytest.raises(DeviceError, match="option is not allowed: session.unknown"):
        run(runner, Job(absent, feeds), tmp_path / "job0")
    for i, feature in enumerate(present, 1):
        path = forge(tmp_path / feature, without(feature))
        assert run(runner, Job(path, feeds), tmp_path / f"job{i}").outputs


def test_wrong_feeds_give_one_clear_error(runner: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = write_sample(tmp_path / "a")
    for i, (feeds, message) in enumerate(
        [
            ([{"z": np.zeros((1, 8), np.float32)}], "there is no array '0 x'"),
            ([{"x": np.zeros((1, 8), np.int32)}], "dtype I32, which is another one"),
            ([{"x": np.zeros((1, 9), np.float32)}], "the model cannot run these inputs"),
        ]
    ):
        with pytest.raises(DeviceError, match=re.escape(message)):
            run(runner, Job(path, feeds), tmp_path / f"job{i}")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"0 x":{"dtype":"F32","shape":[1,8],"data_offsets":[0,33]}}', "does not lie"),
        (b'{"0 x":{"dtype":"F32","shape":[1,8],"data_offsets":[32,0]}}', "does not lie"),
        (b'{"0 x":{"dtype":"F32","shape":[1,8],"data_offsets":[8,40]}}', "does not lie"),
        (b'{"0 x":{"dtype":"F32","shape":[1,8],"data_offsets":[-1,31]}}', "does not lie"),
        (b'{"0 x":{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,0]}}', "shape"),
        (b'{"0 x":{"dtype":"F32","shape":[-1,8],"data_offsets":[0,32]}}', "wrong shape"),
        (b'{"0 x":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,8],'
         b'"data_offsets":[0,32]}}', "no array"),
        (b'{"0 x":', "not valid JSON"),
        (None, "it is truncated"),
    ],
)  # fmt: skip
def test_a_file_of_arrays_that_lies_is_refused(
    tmp_path: pathlib.Path, runner: pathlib.Path, header: bytes | None, message: str
) -> None:
    job = Job(write_sample(tmp_path / "a"), [{"x": np.zeros((1, 8), np.float32)}])
    folder = tmp_path / "job"
    folder.mkdir()
    write_job(job, folder)
    length = 2**63 if header is None else len(header)
    data = length.to_bytes(8, "little") + (header or b"") + bytes(32)
    (folder / guest.FEEDS).write_bytes(data)
    with pytest.raises(DeviceError, match=message):
        run(runner, job, folder)


def test_a_bundle_runs_from_a_link_with_another_name(
    runner: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    path = write_sample(tmp_path / "größe.edgec")
    job = Job(path, [{"x": np.ones((2, 8), np.float32)}])
    folder = tmp_path / "job"
    folder.mkdir()
    write_job(job, folder)
    (folder / "model.edgec").unlink()
    (folder / "model.edgec").symlink_to(path)
    [output] = run(runner, job, folder).outputs
    expected = edgec_runtime.load(path)(**job.feeds[0])["y"]
    np.testing.assert_array_equal(output["y"], expected)
