"""Writing and reading bundles: layout, determinism, integrity, nothing left behind."""

from __future__ import annotations

import os
import pathlib
import zipfile

import numpy as np
import onnx
import pytest
from bundle_samples import WEIGHT, chain_graph, sample_manifest, write_sample

from edgec_runtime import bundle
from edgec_runtime.errors import BundleError, EdgecError


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return write_sample(tmp_path / "sample.edgec", {"golden/a.bin": b"1234", "extra.txt": b"hello"})


def test_any_zip_tool_reads_it_in_the_stated_order(path: pathlib.Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        infos = archive.infolist()
    assert [i.filename for i in infos] == [
        "weights.bin", "graph.onnx", "golden/a.bin", "extra.txt", "manifest.json",
    ]  # fmt: skip
    assert all(i.compress_type == zipfile.ZIP_STORED for i in infos)
    assert {i.date_time for i in infos} == {(1980, 1, 1, 0, 0, 0)}


def test_entries_say_where_the_bytes_are(path: pathlib.Path) -> None:
    data = path.read_bytes()
    entries = bundle.read_bundle(path).manifest.entries
    assert entries[0].offset == 65536
    assert data[65536 : 65536 + WEIGHT.nbytes] == WEIGHT.tobytes()
    extra = entries[-1]
    assert data[extra.offset : extra.offset + extra.size] == b"hello"


def test_same_input_same_bytes(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    again = write_sample(tmp_path / "other.edgec", {"extra.txt": b"hello", "golden/a.bin": b"1234"})
    assert again.read_bytes() == path.read_bytes()


def test_tensors_lie_at_64_bytes_and_large_ones_at_pages() -> None:
    sizes = [10, 64, 1 << 20, 3, (1 << 20) - 1]
    offsets = bundle.weight_offsets(sizes)
    assert offsets == (0, 64, 4096, 4096 + (1 << 20), 4096 + (1 << 20) + 64)
    stream = b"".join(bytes(c) for c in bundle.weight_chunks(b"x" * s for s in sizes))
    for offset, size in zip(offsets, sizes, strict=True):
        assert stream[offset : offset + size] == b"x" * size
    assert len(stream) == offsets[-1] + sizes[-1]


def test_weights_may_be_arrays(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.edgec"
    files = {"graph.onnx": chain_graph([WEIGHT.shape])}
    bundle.write_bundle(path, sample_manifest(), weights=[WEIGHT.data], files=files)
    assert bundle.read_bundle(path).read("weights.bin") == WEIGHT.tobytes()


def test_the_graph_names_the_present_file(path: pathlib.Path) -> None:
    for name in ("a", "ab", "x" * 255, "é model.edgec", "x" * 254):
        renamed = path.with_name(name)
        os.rename(path, renamed)
        path = renamed
        model = onnx.load_from_string(bundle.read_bundle(path).graph())
        location = model.graph.initializer[0].external_data[0].value
        assert len(location.encode()) == bundle.LOCATION_BYTES == len(bundle.LOCATION)
        assert os.path.normpath(location) == name


@pytest.mark.skipif(os.name == "nt", reason="the name is not possible there")
def test_a_file_name_that_is_no_unicode_is_refused(path: pathlib.Path) -> None:
    renamed = path.with_name(os.fsdecode(b"a\xff.edgec"))
    os.rename(path, renamed)
    with pytest.raises(BundleError, match="not valid Unicode"):
        bundle.read_bundle(renamed).graph()


def test_every_flipped_bit_is_found_by_the_full_check(path: pathlib.Path) -> None:
    data = path.read_bytes()
    padding = range(60, 65536)  # zeros in front of the weights: a sample will do
    positions = [i for i in range(len(data)) if i not in padding or i % 61 == 0]
    found = 0
    for position in positions:
        with open(path, "r+b") as stream:
            stream.seek(position)
            stream.write(bytes([data[position] ^ 1 << position % 8]))
            stream.flush()
            try:
                bundle.read_bundle(path, "full")
            except BundleError:
                found += 1
            stream.seek(position)
            stream.write(data[position : position + 1])
    assert found == len(positions) > 2000


def test_every_truncation_is_found(path: pathlib.Path) -> None:
    data = path.read_bytes()
    for length in [1, 3, 4, 21, 22, 40, 65535, 65536, 65600, *range(65700, len(data), 7)]:
        path.write_bytes(data[:length])
        with pytest.raises(BundleError):
            bundle.read_bundle(path)


def test_appended_bytes_are_refused(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(BundleError, match="truncated or has bytes added"):
        bundle.read_bundle(path)


def test_auto_skips_only_the_weights_of_a_large_file(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "AUTO_FULL_BYTES", 1000)
    entries = {e.name: e for e in bundle.read_bundle(path).manifest.entries}
    data = path.read_bytes()
    for name, is_found in (("weights.bin", False), ("extra.txt", True), ("graph.onnx", True)):
        altered = bytearray(data)
        altered[entries[name].offset + 1] ^= 1
        path.write_bytes(altered)
        if is_found:
            with pytest.raises(BundleError, match=f"'{name}' is altered"):
                bundle.read_bundle(path)
        else:
            bundle.read_bundle(path)
        with pytest.raises(BundleError, match=f"'{name}' is altered"):
            bundle.read_bundle(path, "full")


def test_a_change_after_reading_is_found(path: pathlib.Path) -> None:
    opened = bundle.read_bundle(path)
    entry = next(e for e in opened.manifest.entries if e.name == "extra.txt")
    with open(path, "r+b") as stream:
        stream.seek(entry.offset)
        stream.write(b"J")
    with pytest.raises(BundleError, match=r"bundle .*sample\.edgec: the entry 'extra.txt'"):
        opened.read("extra.txt")


def test_unknown_entry_graph_and_check(path: pathlib.Path) -> None:
    opened = bundle.read_bundle(path)
    with pytest.raises(BundleError, match="no entry 'tokenizer.json'"):
        opened.read("tokenizer.json")
    with pytest.raises(BundleError, match="no graph 'decode'; it has main"):
        opened.graph("decode")
    with pytest.raises(EdgecError, match="check is 'fast', expected 'auto' or 'full'"):
        bundle.read_bundle(path, "fast")  # type: ignore[arg-type]


def _failing() -> object:
    yield WEIGHT.tobytes()
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"weights": _failing()}, KeyboardInterrupt),
        ({"files": {}}, BundleError),  # the graph is missing
        ({"files": {"graph.onnx": b"", "../a": b""}}, BundleError),
        ({"files": {"graph.onnx": b"", "manifest.json": b""}}, BundleError),
        ({"files": {"graph.onnx": chain_graph([(80, 40)])}}, BundleError),  # weights too short
    ],
)
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(
    path: pathlib.Path, changes: dict[str, object], error: type[BaseException]
) -> None:
    before = path.read_bytes()
    arguments = {"weights": [WEIGHT.tobytes()], "files": {"graph.onnx": b""}} | changes
    with pytest.raises(error):
        bundle.write_bundle(path, sample_manifest(), **arguments)  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("where", ["no/such/folder/a.edgec", "folder"])
def test_an_output_that_cannot_be_written_is_one_clear_error(
    tmp_path: pathlib.Path, where: str
) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(EdgecError, match="cannot write the bundle .*; choose a folder") as caught:
        write_sample(tmp_path / where)
    assert not isinstance(caught.value, BundleError)
    assert os.listdir(tmp_path) == ["folder"]


def test_a_full_disk_leaves_nothing(tmp_path: pathlib.Path) -> None:
    def chunks() -> object:
        yield np.zeros(10, np.uint8).data
        raise OSError(28, "No space left on device")

    with pytest.raises(EdgecError, match="No space left on device"):
        bundle.write_bundle(
            tmp_path / "a.edgec",
            sample_manifest(),
            weights=chunks(),  # type: ignore[arg-type]
            files={"graph.onnx": b""},
        )
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_the_file_has_ordinary_permissions(path: pathlib.Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
