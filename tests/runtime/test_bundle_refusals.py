"""One error for every way a bundle can be wrong."""

from __future__ import annotations

import json
import os
import pathlib
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
from bundle_samples import WEIGHT, chain_graph, external_tensor, forge, onnx_bytes, write_sample
from onnx import helper

from edgec_runtime import bundle, container
from edgec_runtime.errors import BundleError


def refusal(path: pathlib.Path) -> str:
    with pytest.raises(BundleError) as caught:
        bundle.read_bundle(path)
    assert str(caught.value).startswith(f"bundle {path}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file(tmp_path: pathlib.Path) -> None:
    assert "there is no such file" in refusal(tmp_path / "a.edgec")


def test_a_directory(tmp_path: pathlib.Path) -> None:
    assert "it is a directory" in refusal(tmp_path)


def test_an_empty_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").touch()
    assert "it is empty" in refusal(tmp_path / "a")


def test_a_loop_of_links(tmp_path: pathlib.Path) -> None:
    os.symlink("b", tmp_path / "a")
    os.symlink("a", tmp_path / "b")
    assert "cannot be read" in refusal(tmp_path / "a")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: pathlib.Path) -> None:
    path = write_sample(tmp_path / "a")
    path.chmod(0)
    assert "Permission denied" in refusal(path)


@pytest.mark.parametrize("data", [b"P", b"hello", b"\x08\x07" * 100, b"\0" * 70000])
def test_another_kind_of_file(tmp_path: pathlib.Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    assert "it is not a bundle" in refusal(tmp_path / "a")


def test_a_truncated_file(tmp_path: pathlib.Path) -> None:
    path = write_sample(tmp_path / "a")
    path.write_bytes(path.read_bytes()[:-100])
    assert "it is truncated" in refusal(path)


def test_a_zip_of_another_tool(tmp_path: pathlib.Path) -> None:
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        archive.writestr("weights.bin", b"123")
    assert "reaches outside of the file" in refusal(tmp_path / "a")


def test_a_compressed_entry(tmp_path: pathlib.Path) -> None:
    with zipfile.ZipFile(tmp_path / "a", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights.bin", b"1" * 1000)
    assert "'weights.bin' is compressed" in refusal(tmp_path / "a")


def test_an_encrypted_entry(tmp_path: pathlib.Path) -> None:
    path = write_sample(tmp_path / "a")
    data = path.read_bytes()
    path.write_bytes(_edited_directory(data, lambda records: records[0].update(flags=1)))
    assert "its directory is altered" in refusal(path)


def test_too_many_entries(tmp_path: pathlib.Path) -> None:
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        for i in range(container.MAX_MEMBERS + 1):
            archive.writestr(str(i), b"")
    assert "lists 4097 entries, at most 4096" in refusal(tmp_path / "a")


def test_a_zip_without_entries(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").write_bytes(b"PK\x03\x04" + struct.pack("<IHHHHIIH", 0x06054B50, *[0] * 7))
    assert "its directory does not lie inside the file" in refusal(tmp_path / "a")


@pytest.mark.parametrize(
    "name", ["../a", "/etc/passwd", "a/../b", "C:/a", "a\\b", ".hidden", "a//b", "a/", "ä", ""]
)
def test_a_name_that_is_no_plain_path(tmp_path: pathlib.Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"123")
    assert "is not allowed: expected a relative path" in refusal(tmp_path / "a")


def test_duplicate_names(tmp_path: pathlib.Path) -> None:
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        archive.writestr("weights.bin", bytes(70000))
        with pytest.warns(UserWarning):
            archive.writestr("weights.bin", b"456")
    assert "'weights.bin' is listed twice" in refusal(tmp_path / "a")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r[1].update(size=10**9, packed=10**9), "'graph.onnx' reaches outside"),
        (lambda r: r[1].update(header=10**9), "'graph.onnx' reaches outside"),
        (lambda r: r[1].update(header=65536), "'graph.onnx' overlaps"),
        (lambda r: r[2].update(header=r[1]["header"]), "'manifest.json' overlaps"),
        (lambda r: r[0].update(size=64, packed=64), "unknown bytes stand before .*'graph.onnx'"),
        (lambda r: r.pop(1), "unknown bytes stand before the entry 'manifest.json'"),
        (lambda r: r.pop(2), "unknown bytes stand before its directory"),
        (lambda r: r[1].update(crc=1), "header or padding of the entry 'graph.onnx' is altered"),
    ],
)
def test_a_directory_that_lies(
    tmp_path: pathlib.Path, edit: Callable[[Any], Any], message: str
) -> None:
    path = write_sample(tmp_path / "a")
    path.write_bytes(_edited_directory(path.read_bytes(), edit))
    with pytest.raises(BundleError, match=message):
        bundle.read_bundle(path)


def test_a_checksum_of_the_zip_that_differs_from_the_data(tmp_path: pathlib.Path) -> None:
    path = write_sample(tmp_path / "a")
    data = bytearray(path.read_bytes())
    crc = data[14:18]  # of weights.bin: in its header, and again in the directory
    start = data.rindex(crc, 0, data.rindex(b"weights.bin"))
    data[14:18] = data[start : start + 4] = b"1234"
    path.write_bytes(data)
    assert "the entry 'weights.bin' is altered: its checksum differs" in refusal(path)


def test_bytes_hidden_in_the_padding(tmp_path: pathlib.Path) -> None:
    path = write_sample(tmp_path / "a")
    data = bytearray(path.read_bytes())
    data[30000] = 1
    path.write_bytes(data)
    assert "header or padding of the entry 'weights.bin' is altered" in refusal(path)


def test_the_manifest_is_not_last(tmp_path: pathlib.Path) -> None:
    with open(tmp_path / "a", "w+b") as stream:
        writer = container.ContainerWriter(stream)
        writer.add_first("weights.bin", [b"123"])
        writer.close()
    assert "its last entry is 'weights.bin', expected manifest.json" in refusal(tmp_path / "a")


def test_a_manifest_that_is_too_large(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "MAX_MANIFEST_BYTES", 100)
    assert "at most 100 are allowed" in refusal(forge(tmp_path / "a"))


def _set(*keys: Any, value: Any) -> Callable[[Any], None]:
    def change(table: Any) -> None:
        for key in keys[:-1]:
            table = table[key]
        table[keys[-1]] = value

    return change


def _other_order(table: Any) -> None:
    table["entries"].reverse()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: b"{", "manifest.json is not valid JSON"),
        (lambda t: b"\xff", "manifest.json is not valid JSON"),
        (lambda t: b"[" * 100_000, "manifest.json is not valid JSON"),
        (lambda t: b'{"a":1,"a":2}', "not valid JSON: a key is given twice"),
        (lambda t: b'{"a":NaN}', "not valid JSON: NaN is not a JSON number"),
        (lambda t: b'{"a":' + b"1" * 5000 + b"}", "manifest.json is not valid JSON"),
        (lambda t: b"[1]", "manifest.json must be a JSON object"),
        (_set("format_version", value=2), "format version 2, this runtime reads 1; upgrade"),
        (_set("format_version", value=True), "format version True"),
        (lambda t: t.pop("format_version"), "format version None"),
        (_set("colour", value=1), "unknown key 'colour'"),
        (_set("session", "thread", value=1), "unknown key 'thread', did you mean 'threads'"),
        (lambda t: t.pop("opset"), "missing key 'opset'"),
        (_set("version", value="1"), "version is '1', expected int"),
        (_set("version", value=True), "version is True, expected int"),
        (_set("labels", value="cat"), "labels is 'cat', expected a list"),
        (_set("labels", value=[1]), r"labels\[0\] is 1, expected str"),
        (_set("target", value=[]), "target must be an object"),
        (_set("results", value=[]), "results must be an object"),
        (_set("graphs", value={}), "graphs is empty"),
        (_set("graphs", "main", "inputs", 0, "dtype", value="f4"), "'x' has dtype 'f4'; known"),
        (_set("graphs", "main", "inputs", 0, "shape", value=[-1]), "negative shape"),
        (_set("graphs", "main", "inputs", 0, "shape", value=[1.5]), "expected a number or a name"),
        (_set("session", "threads", value=-1), "session.threads is -1"),
        (
            _set("session", "config", value={"session.x64quantprecison": "1"}),
            "'session.x64quantprecison' is not allowed, did you mean 'session.x64quantprecision'",
        ),
        (
            _set("session", "without", value={"vnni": {"session.optimized_model_filepath": "/x"}}),
            "'session.optimized_model_filepath' is not allowed",
        ),
        (_set("image", value={"input": "x"}), "missing key 'size'"),
        (_set("entries", 1, "size", value=7), "'graph.onnx' has .* manifest.json says 7"),
        (_set("entries", 1, "offset", value=7), "'graph.onnx' starts at .* manifest.json says 7"),
        (_set("entries", 1, "sha256", value="00"), "'graph.onnx' is altered"),
        (_set("entries", 0, "sha256", value="00"), "'weights.bin' is altered"),
        (_set("entries", 1, "name", value="b"), "'graph.onnx' is not listed"),
        (lambda t: t["entries"].append(t["entries"][0]), "lists an entry twice"),
        (lambda t: t["entries"].append(t["entries"][0] | {"name": "b"}), "'b' of .* is missing"),
        (_other_order, "in another order than the file"),
        (_set("graphs", "main", "file", value="no.onnx"), "file 'no.onnx' .* is missing"),
        (_set("graphs", "main", "file", value="weights.bin"), "file 'weights.bin' .* is missing"),
    ],
)
def test_a_manifest_that_is_wrong(
    tmp_path: pathlib.Path, change: Callable[[Any], Any], message: str
) -> None:
    path = forge(tmp_path / "a", change)
    with pytest.raises(BundleError, match=message):
        bundle.read_bundle(path)


def test_a_missing_golden_file(tmp_path: pathlib.Path) -> None:
    golden = {
        "graph": "main", "inputs_file": "golden/a", "outputs_file": "golden/b",
        "inputs": [], "outputs": [], "min_sqnr_db": 25,
    }  # fmt: skip
    path = forge(tmp_path / "a", _set("golden", value=[golden]))
    assert "the file 'golden/a' that manifest.json names is missing" in refusal(path)
    path = forge(tmp_path / "b", _set("golden", value=[golden | {"graph": "no"}]))
    assert "golden is of an unknown graph 'no'" in refusal(path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"offset": 0}, "has offset 0 and length 128"),
        ({"offset": 65535}, "has offset 65535"),
        ({"offset": 65536 + 4, "length": 124}, "expected a multiple of 64"),
        ({"offset": 65536 + 64}, "within the weights, 65536 to 65664"),
        ({"offset": 1 << 62}, "has offset 4611686018427387904"),
        ({"offset": "-64"}, "has offset -1"),
        ({"length": 129}, "and length 129"),
        ({"length": ""}, "and length -1"),
        ({"location": "../../etc/passwd"}, r"in another file \(../../etc/passwd\)"),
        ({"location": "*/_ORT_MEM_ADDR_/*"}, "in another file"),  # ONNX Runtime: a raw pointer
    ],
)
def test_weights_outside_of_the_weights(
    tmp_path: pathlib.Path, tensor: dict[str, Any], message: str
) -> None:
    path = forge(tmp_path / "a", graph=chain_graph([WEIGHT.shape], **tensor))
    with pytest.raises(BundleError, match=message):
        bundle.read_bundle(path)


def test_weights_outside_of_the_weights_in_a_subgraph(tmp_path: pathlib.Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["hidden"], ["out"])],
        "branch",
        [],
        [helper.make_tensor_value_info("out", 1, [2])],
        [external_tensor("hidden", [2], 0, 8, "/etc/passwd")],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    graph = onnx_bytes([node], [], [], [])
    assert "tensor 'hidden' lies in another file" in refusal(forge(tmp_path / "a", graph=graph))


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (b"\x3a\xff\x01location", "a field reaches outside of its message"),
        (b"\x0b\x00location", "no protobuf"),
        (b"\x08" + b"\xff" * 12 + b"location", "a number does not end"),
    ],
)
def test_a_graph_that_is_no_protobuf(tmp_path: pathlib.Path, tail: bytes, message: str) -> None:
    assert message in refusal(forge(tmp_path / "a", graph=tail))


def test_json_written_by_the_writer_is_canonical(tmp_path: pathlib.Path) -> None:
    path = write_sample(tmp_path / "a", labels=("Katze", "狗"))
    raw = bundle.read_bundle(path).manifest.to_json()
    assert "狗".encode() in raw and raw in path.read_bytes()
    assert (
        raw
        == json.dumps(
            json.loads(raw), sort_keys=True, separators=(",", ":"), ensure_ascii=False
        ).encode()
    )


def _edited_directory(data: bytes, edit: Callable[[list[dict[str, int]]], Any]) -> bytes:
    """The file with its central directory changed, all else as it was."""
    keys = [
        "signature", "made", "needed", "flags", "method", "time", "date", "crc", "packed", "size",
        "name", "extra", "comment", "disk", "internal", "external", "header",
    ]  # fmt: skip
    layout = struct.Struct("<IHHHHHHIIIHHHHHII")
    end = struct.unpack("<IHHHHIIH", data[-22:])
    position, records, names = end[6], [], {}
    for _ in range(end[4]):
        record = dict(zip(keys, layout.unpack_from(data, position), strict=True))
        position += layout.size
        names[record["crc"]] = data[position : position + record["name"]]
        record["key"] = record["crc"]
        position += record["name"]
        records.append(record)
    edit(records)
    raw = b"".join(layout.pack(*[r[k] for k in keys]) + names[r["key"]] for r in records)
    tail = struct.pack("<IHHHHIIH", *end[:3], len(records), len(records), len(raw), end[6], 0)
    return data[: end[6]] + raw + tail
