"""The reader in Java reads what edgec_runtime reads and refuses what it refuses.

ONNX Runtime's own classes come from Maven and Android's from its SDK; small ones stand for them
here, which keep what they are given. ONNX Runtime's have the signatures of its Java API 1.17
and later.
"""

from __future__ import annotations

import hashlib
import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from bundle_samples import WEIGHT, chain_graph, forge, write_sample

from edgec_runtime import manifest
from edgec_runtime.bundle import read_bundle
from edgec_runtime.machine import this_machine

ROOT = pathlib.Path(__file__).parents[2]
SOURCE = ROOT / "examples" / "android" / "EdgecBundle.java"
STANDS_IN = pathlib.Path(__file__).with_name("java")
Reader = Callable[..., list[str]]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    if shutil.which("javac") is None or shutil.which("java") is None:
        pytest.skip("there is no javac on this machine")
    classes, machine = tmp_path_factory.mktemp("classes"), this_machine()
    sources = [*map(str, STANDS_IN.rglob("*.java")), str(SOURCE)]
    command = ["javac", "-encoding", "UTF-8", "-Xlint:all,-serial", "-Werror", "-d", str(classes)]
    done = subprocess.run([*command, *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def read(*paths: pathlib.Path, os: str = machine.os) -> list[str]:
        run = ["java", "-XX:TieredStopAtLevel=1", "-cp", str(classes), "OpenBundles"]
        done = subprocess.run([*run, machine.arch, os, *paths], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return read


def test_the_graph_and_the_options_are_those_of_python(
    reader: Reader, tmp_path: pathlib.Path
) -> None:
    session = manifest.Session(
        threads=3,
        prepacking=False,
        disabled_optimizers=("A", "B"),
        config={"session.x64quantprecision": "0"},
        without={"vnni": {"session.x64quantprecision": "1"}},
    )
    paths = [
        write_sample(tmp_path / "a.edgec", session=session, labels=('ä"', "\u2028")),
        write_sample(tmp_path / ("x" * 254)),
        write_sample(tmp_path / ("x" * 255)),
    ]
    lines = reader(*paths)
    for path, line in zip(paths, lines, strict=True):
        digest = hashlib.sha256(read_bundle(path).graph()).hexdigest()
        assert line.startswith(f"ok {digest} ")
    for setting in (
        "threads=3",
        "session.disable_prepacking=1",
        "optimization.disable_specified_optimizers=A;B",
        "session.x64quantprecision=1",
        f"session.model_external_initializers_file_folder_path={tmp_path}",
    ):
        assert setting in lines[0]


def test_a_damaged_bundle_is_refused(reader: Reader, tmp_path: pathlib.Path) -> None:
    data = write_sample(tmp_path / "a").read_bytes()
    paths = []
    for i in [0, *range(65536, len(data), 40)]:  # the headers of the zip are not compared
        paths.append(tmp_path / f"f{i}")
        paths[-1].write_bytes(data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :])
    cut = [tmp_path / f"c{length}" for length in (0, 21, 22, 65536, *range(65600, len(data), 99))]
    for path in cut:
        path.write_bytes(data[: int(path.name[1:])])
    for path, line in zip([*paths, *cut], reader(*paths, *cut), strict=True):
        accepted = line.startswith("ok ")
        assert accepted or line.startswith(f"bundle {path}: ")
        if accepted:  # a header that an app does not need
            at = int(path.name[1:])
            entries = read_bundle(tmp_path / "a").manifest.entries
            assert not any(e.offset <= at < e.offset + e.size for e in entries)
            assert path not in cut


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(format_version=2), "another format version"),
        (lambda t: t.update(graphs={}), "damaged"),
        (lambda t: t["graphs"]["main"].update(file="weights.bin"), "no graph 'main'"),
        (lambda t: t["entries"][0].update(size=-1), "at a wrong place"),
        (lambda t: t["entries"][1].update(offset=10**17), "at a wrong place"),
        (lambda t: t["entries"][1].update(size=10**17), "at a wrong place"),
        (lambda t: t["entries"][1].update(sha256="0" * 64), "'graph.onnx' is altered"),
        (lambda t: t["session"].update(config={"session.profiling": "/tmp/x"}), "not allowed"),
        (lambda t: t["session"].update(threads="1"), "damaged"),
        (lambda t: b"[" * 100_000, "not valid"),
        (lambda t: b"", "not valid"),
        (lambda t: b'{"a":1,"a":2}', "not valid"),
        (lambda t: b"[]", "damaged"),
    ],
)
def test_a_manifest_that_lies_is_refused(
    reader: Reader, tmp_path: pathlib.Path, change: Callable[[Any], Any], message: str
) -> None:
    [line] = reader(forge(tmp_path / "a", change))
    assert line.startswith(f"bundle {tmp_path / 'a'}: ") and message in line


def test_a_tensor_that_is_not_in_the_weights_is_refused(
    reader: Reader, tmp_path: pathlib.Path
) -> None:
    wrong: list[Any] = [
        {"location": "/etc/passwd"}, {"offset": 65537}, {"length": 10**18}, {"offset": ""}
    ]  # fmt: skip
    paths = [
        forge(tmp_path / str(i), graph=chain_graph([WEIGHT.shape], **tensor))
        for i, tensor in enumerate(wrong)
    ]
    paths.append(forge(tmp_path / "damaged", graph=b"\x0a\xff\xff\xff\x7f"))
    lines = reader(*paths)
    assert "lies in another file" in lines[0] and "no protobuf" in lines[-1]
    assert all("does not lie in the weights" in line for line in lines[1:-1])


def test_a_bundle_of_another_device_is_refused(reader: Reader, tmp_path: pathlib.Path) -> None:
    [line] = reader(write_sample(tmp_path / "a"), os="android")
    assert re.search(r"built for here, this is \S+ on android", line)


@pytest.mark.slow
def test_the_example_in_kotlin_compiles(tmp_path: pathlib.Path) -> None:
    compiler = shutil.which("kotlinc")
    if compiler is None:
        pytest.skip("there is no kotlinc on this machine")
    # where AutoCloseable.use is before Kotlin 1.8; Gradle adds it by itself
    library = pathlib.Path(compiler).resolve().parents[1] / "lib" / "kotlin-stdlib-jdk7.jar"
    sources = [SOURCE.with_name("Classifier.kt"), SOURCE, *STANDS_IN.rglob("*.java")]
    command = ["kotlinc", "-Werror", "-cp", str(library), "-d", str(tmp_path)]
    command += map(str, sources)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "edgec" / "Classifier.class").is_file()


def test_the_session_options_are_those_of_the_runtime() -> None:
    text = SOURCE.read_text(encoding="utf-8")
    listed = text[text.index("SESSION_CONFIG = List.of(") : text.index("private final Path path")]
    assert tuple(re.findall(r'"([^"]+)"', listed)) == manifest.SESSION_CONFIG
