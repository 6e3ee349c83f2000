"""The host in C reads what edgec_runtime reads, refuses what it refuses, computes the same."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import random
import re
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bundle_samples import (
    WEIGHT,
    chain_graph,
    external_tensor,
    forge,
    onnx_bytes,
    sample_manifest,
    write_sample,
)
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
from edgec_runtime import bundle, container, manifest
from edgec_runtime.errors import BundleError
from edgec_runtime.machine import this_machine


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Opens bundles under the sanitizers, which end the program at the first wrong access."""
    goal = tmp_path_factory.mktemp("reader") / "open_bundles"
    source = pathlib.Path(__file__).with_name("open_bundles.c")
    command = ["cc", *host_programs.STRICT, *host_programs.SANITIZED, f"-I{HOSTS}", str(source)]
    program = host_programs.compile_program([*command, *host_programs.READER], goal)

    def read(mode: str, *paths: pathlib.Path) -> list[str]:
        done = subprocess.run([program, mode, *paths], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    return read


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


def graph_line(path: pathlib.Path) -> str:
    """What the reader prints for a bundle that edgec_runtime accepts."""
    return f"ok {hashlib.sha256(bundle.read_bundle(path).graph()).hexdigest()}"


@pytest.mark.parametrize("name", ["a.edgec", "größe.edgec", "x" * 255, "x" * 254])
def test_the_graph_is_the_one_that_python_reads(
    reader: Callable[..., list[str]], tmp_path: pathlib.Path, name: str
) -> None:
    path = write_sample(tmp_path / name)
    assert reader("read", path) == [graph_line(path)]


def test_a_link_is_followed(reader: Callable[..., list[str]], tmp_path: pathlib.Path) -> None:
    path = write_sample(tmp_path / "a.edgec")
    (tmp_path / "link").symlink_to(path)
    assert reader("read", tmp_path / "link") == [graph_line(path)]


@pytest.mark.slow
def test_every_flipped_bit_and_every_truncation_is_refused(
    reader: Callable[..., list[str]], tmp_path: pathlib.Path
) -> None:
    path = write_sample(tmp_path / "a")
    for mode in ("flip", "cut"):
        [line] = reader(mode, path)
        refused, tried = re.fullmatch(r"(\d+) of (\d+) refused", line).groups()  # type: ignore[union-attr]
        assert refused == tried and int(tried) > 1500
    assert reader("read", path) == [graph_line(path)]


@pytest.mark.parametrize(
    ("signature", "at", "size", "value"),
    [
        ("PK\1\2", 28, 2, 199),  # length of the last name
        ("PK\1\2", 28, 2, 0),
        ("PK\1\2", 28, 2, 65535),
        ("PK\1\2", 30, 2, 28),  # length of the zip64 field
        ("PK\1\2", 30, 2, 65535),
        ("PK\1\2", 10, 2, 8),  # compressed
        ("PK\1\2", 20, 8, 2**64 - 1),  # sizes
        ("PK\1\2", 42, 4, 2**32 - 1),  # place of the header
        ("PK\1\2", 42, 4, 0),
        ("PK\5\6", 8, 4, 2**32 - 1),  # numbers of entries
        ("PK\5\6", 8, 4, 0),
        ("PK\5\6", 16, 4, 2**32 - 1),  # place of the directory
        ("PK\5\6", 16, 4, 0),
        ("PK\5\6", 20, 2, 1),  # length of a comment
    ],
)
def test_a_directory_that_lies_is_refused(
    reader: Callable[..., list[str]],
    tmp_path: pathlib.Path,
    signature: str,
    at: int,
    size: int,
    value: int,
) -> None:
    path = write_sample(tmp_path / "a")
    data = bytearray(path.read_bytes())
    start = data.rindex(signature.encode()) + at
    data[start : start + size] = value.to_bytes(size, "little")
    path.write_bytes(data)
    [line] = reader("read", path)
    assert line.startswith(f"bundle {path}: ")
    with pytest.raises(BundleError):
        bundle.read_bundle(path)


def _entries(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda table: change(table["entries"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(format_version=2), "another format version"),
        (lambda t: t.update(format_version="1"), "another format version"),
        (lambda t: t.pop("entries"), "lists other entries"),
        (lambda t: t.update(aaa=1), "not valid JSON: a key that is given twice or is not sorted"),
        (lambda t: t.update(graphs={}), "it has no graph 'main'"),
        (lambda t: t["graphs"]["main"].update(file="weights.bin"), "it has no graph 'main'"),
        (lambda t: t["graphs"]["main"].update(file="other"), "it has no entry 'other'"),
        (lambda t: t["graphs"]["main"].update(file=3), "it has no graph 'main'"),
        (_entries(lambda e: e.pop()), "lists other entries"),
        (_entries(lambda e: e.reverse()), "differs from what manifest.json says"),
        (_entries(lambda e: e[0].update(size=1)), "'weights.bin' differs"),
        (_entries(lambda e: e[0].update(size=-1)), "'weights.bin' differs"),
        (_entries(lambda e: e[1].update(offset=1.0)), "'graph.onnx' differs"),
        (_entries(lambda e: e[1].update(offset=10**30)), "'graph.onnx' differs"),
        (_entries(lambda e: e[1].update(sha256="0" * 64)), "'graph.onnx' is altered"),
        (_entries(lambda e: e[1].update(sha256="0" * 65)), "'graph.onnx' differs"),
        (_entries(lambda e: e.__setitem__(0, [])), "'weights.bin' differs"),
        (lambda t: b"{}", "another format version"),
        (lambda t: b"[" * 100_000, "nested too deeply"),
        (lambda t: b"[" + b"1," * 2_000_000, "more than 1048576 values"),
        (lambda t: b"", "not valid JSON"),
        (lambda t: b'{"a":"\xff"}', "bytes that are no UTF-8"),
    ],
)
def test_a_manifest_that_lies_is_refused(
    reader: Callable[..., list[str]],
    tmp_path: pathlib.Path,
    change: Callable[[Any], Any],
    message: str,
) -> None:
    path = forge(tmp_path / "a", change)
    [line] = reader("read", path)
    assert line.startswith(f"bundle {path}: "[:200]) and message in line
    with pytest.raises(BundleError):
        if "sorted" in message:  # an unknown key: Python says so
            bundle.read_bundle(path)
        else:
            bundle.read_bundle(path).graph()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"location": "/etc/passwd"}, "lies in another file"),
        ({"location": "./" * 125 + "Weights"}, "lies in another file"),
        ({"location": ""}, "lies in another file"),
        ({"offset": 65536 + 1, "length": 64}, "does not lie in the weights at a multiple of 64"),
        ({"offset": 0}, "does not lie in the weights"),
        ({"offset": 65536 + 128}, "does not lie in the weights"),
        ({"length": 10**17}, "does not lie in the weights"),
        ({"length": 2**63}, "does not lie in the weights"),
        ({"length": -1}, "does not lie in the weights"),
        ({"offset": ""}, "does not lie in the weights"),
    ],
)
def test_a_tensor_that_is_not_in_the_weights_is_refused(
    reader: Callable[..., list[str]], tmp_path: pathlib.Path, tensor: Any, message: str
) -> None:
    path = forge(tmp_path / "a", graph=chain_graph([WEIGHT.shape], **tensor))
    [line] = reader("read", path)
    assert message in line
    with pytest.raises(BundleError):
        bundle.read_bundle(path).graph()


def test_a_location_is_found_in_subgraphs_and_given_once(
    reader: Callable[..., list[str]], tmp_path: pathlib.Path
) -> None:
    tensor = external_tensor("w", WEIGHT.shape, 65536, 128, location="elsewhere")
    inner = helper.make_graph([], "inner", [], [], [tensor])
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    twice = external_tensor("w", WEIGHT.shape, 65536, 128)
    twice.external_data.add(key="location", value="elsewhere")
    nested = forge(tmp_path / "a", graph=onnx_bytes([node], [], [], []))
    double = forge(tmp_path / "b", graph=onnx_bytes([], [], [], [twice]))
    lines = reader("read", nested, double)
    assert "lies in another file" in lines[0] and "twice" in lines[1]


def test_a_graph_that_is_nested_too_deeply_is_refused(
    reader: Callable[..., list[str]], tmp_path: pathlib.Path
) -> None:
    def field(number: int, data: bytes) -> bytes:
        length, size = len(data), b""
        while length > 127:
            size, length = size + bytes([length & 127 | 128]), length >> 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + data

    tensor = external_tensor("w", WEIGHT.shape, 65536, 128).SerializeToString()
    graph = field(5, tensor)
    for _ in range(10_000):  # graph in attribute in node in graph
        graph = field(1, field(5, field(6, graph)))
    path = forge(tmp_path / "a", graph=field(7, graph))
    [line] = reader("read", path)
    assert "its graph is nested too deeply" in line
    with pytest.raises(BundleError, match="nested too deeply"):
        bundle.read_bundle(path)


def test_damaged_graphs_and_manifests_are_read_without_a_wrong_access(
    reader: Callable[..., list[str]], tmp_path: pathlib.Path
) -> None:
    """Well-formed containers, so that what is damaged gets past the digests."""
    chosen = random.Random(0)
    graph, paths = chain_graph([(8, 4), (4, 4)], offset=65536, length=64), []

    def damaged(data: bytes) -> bytes:
        copy = bytearray(data)
        for _ in range(chosen.choice([1, 2, 8])):
            at = chosen.randrange(len(copy))
            copy[at] = chosen.choice([0, 0x7F, 0x80, 0xFF, chosen.randrange(256)])
        return bytes(copy[: chosen.choice([len(copy), chosen.randrange(len(copy))])])

    for i in range(150):
        paths.append(forge(tmp_path / f"g{i}", graph=damaged(graph)))
        paths.append(forge(tmp_path / f"m{i}", lambda table: damaged(json.dumps(table).encode())))
    lines = reader("read", *paths)
    assert len(lines) == len(paths)
    for path, line in zip(paths, lines, strict=True):
        if line.startswith("ok ") and path.name.startswith("g"):
            assert line == graph_line(path)
        else:
            assert line.startswith(("ok ", "bundle "))


@pytest.mark.parametrize(
    "text",
    ['{"a": [1, -2.5e3, true, null, "x"]}', "[]", ' "\\ud83d\\ude00\\n" ', "0", "[[[]]]", "-0.1E-2",
     '"\\ud83d"', '"\\u00"', '"\\x"', '"\t"', '"', "01", "1.", "+1", "[1,]", "{1: 2}", "[1] 2",
     "nul", "tru", "", "{", '{"a"}', '{"a":}', "-", "1e", "\ufeff1", "NaN", "'a'"],
)  # fmt: skip
def test_json_is_accepted_where_python_accepts_it(
    reader: Callable[..., list[str]], tmp_path: pathlib.Path, text: str
) -> None:
    (tmp_path / "a").write_text(text, encoding="utf-8")
    [line] = reader("json", tmp_path / "a")
    accepted = text != '"\\ud83d"'  # Python takes half a character; no UTF-8 can hold it
    try:
        json.loads(text, parse_constant=lambda name: int(name))
    except ValueError:
        accepted = False
    assert line.startswith("ok") == accepted, line


@pytest.mark.skipif(os.name == "nt", reason="needs sparse files")
def test_a_bundle_above_four_gibibytes_is_read(
    reader: Callable[..., list[str]], tmp_path: pathlib.Path
) -> None:
    path, size = tmp_path / "large", (4 << 30) + 64
    graph = chain_graph([WEIGHT.shape], offset=65536 + (4 << 30) - 64)
    with open(path, "w+b") as stream:
        writer = container.ContainerWriter(stream)
        weights = container.Member("weights.bin", size, 0, 0, 65536)
        writer._write_header(weights)  # the data is a hole in the file
        member = writer.add("graph.onnx", graph)
        entries = (
            manifest.Entry("weights.bin", size, "0" * 64, 65536),
            manifest.Entry("graph.onnx", len(graph), member.sha256, member.member.offset),
        )
        writer.add("manifest.json", sample_manifest(entries=entries).to_json())
        writer.close()
    assert reader("read", path) == [graph_line(path)]


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


def _colours(path: pathlib.Path, **changes: Any) -> pathlib.Path:
    """A classifier of pictures by their mean colour."""
    image = helper.make_tensor_value_info("image", 1, [1, 3, 24, 32])
    logits = helper.make_tensor_value_info("logits", 1, [1, 3])
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["logits"]),
    ]
    graph = manifest.Graph(
        "graph.onnx",
        (manifest.Value("image", "float32", (1, 3, 24, 32)),),
        (manifest.Value("logits", "float32", (1, 3)),),
    )
    means, deviations = (120.5, 110.0, 100.0), (58.5, 57.0, 57.25)
    return write_sample(
        path,
        {"graph.onnx": onnx_bytes(nodes, [image], [logits], [])},
        **{
            "graphs": {"main": graph},
            "image": manifest.Image("image", (24, 32), 0.875, means, deviations),
            "labels": ("red", "grün", 'blue "deep"'),
            **changes,
        },
    )


def _example(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """examples/cpp/classify.cpp, compiled in ``folder`` and run."""
    example = pathlib.Path(__file__).parents[2] / "examples" / "cpp"
    objects = [str(HOSTS / f"edgec_{name}.c") for name in ("machine", "model")]
    include = ["-isystem", str(host_programs.include_folder()), f"-I{HOSTS}"]
    reader = folder / "reader.o"
    host_programs.compile_program(
        ["cc", "-std=c11", "-O1", "-r", *include, *host_programs.READER, *objects], reader
    )
    command = ["c++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *include]
    command += [str(example / "classify.cpp"), str(reader)]
    command += host_programs.library_options(folder)
    program = host_programs.compile_program(command, folder / "classify")
    return subprocess.run([program, *arguments], capture_output=True, text=True)


def test_the_example_in_cpp_names_what_python_names(tmp_path: pathlib.Path) -> None:
    path, picture = _colours(tmp_path / "a.edgec"), tmp_path / "a.ppm"
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    picture.write_bytes(b"P6\n60 50\n255\n" + pixels.tobytes())
    done = _example(tmp_path, str(path), str(picture))
    model = edgec_runtime.load(path)
    logits = model(**model.prepare_image(pixels))["logits"][0]
    shares = np.exp(logits) / np.exp(logits).sum()
    best = sorted(range(3), key=lambda i: -shares[i])
    expected = ", ".join(f"{model.labels[i]} {shares[i]:.0%}" for i in best)  # type: ignore[index]
    assert done.stdout == f"a.ppm: {expected}\n", done.stderr


def test_the_example_in_cpp_refuses_a_bundle_of_another_device(tmp_path: pathlib.Path) -> None:
    path = _colours(tmp_path / "a", target=manifest.Target("pi4", "armhf", ("linux",)))
    done = _example(tmp_path, str(path), "none.ppm")
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"classify: bundle .*: built for pi4, this is .* on .*\n", done.stderr)
