"""The host in C reads the bundles that edgec_runtime reads, and refuses those that it refuses."""

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
from devices import host_programs
from onnx import helper

from edgec.devices.wine import HOSTS
from edgec_runtime import bundle, container, manifest
from edgec_runtime.errors import BundleError


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
