"""Containers above 4 GiB, as sparse files."""

from __future__ import annotations

import os
import pathlib
import zipfile

import pytest

from edgec_runtime import container
from edgec_runtime.errors import BundleError

SIZE = (4 << 30) + 5


@pytest.mark.skipif(os.name == "nt", reason="needs sparse files")
def test_entries_above_four_gibibytes(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "large"
    with open(path, "w+b") as stream:
        writer = container.ContainerWriter(stream)
        # only the header is written: the data is a hole in the file
        writer._write_header(container.Member("weights.bin", SIZE, 0, 0, 65536))
        small = writer.add("a.txt", b"hello")
        writer.close()
        assert small.member.header == 65536 + SIZE
        size = stream.tell()
        members = container.read_members(stream, size)
        assert [(m.name, m.size, m.offset) for m in members] == [
            ("weights.bin", SIZE, 65536),
            ("a.txt", 5, small.member.offset),
        ]
        assert b"".join(container.read_chunks(stream, members[1])) == b"hello"
        with zipfile.ZipFile(stream) as archive:  # an independent reader agrees
            assert archive.getinfo("weights.bin").file_size == SIZE
            assert archive.read("a.txt") == b"hello"
        stream.seek(65536 - 1)
        stream.write(b"\1")
        with pytest.raises(BundleError, match="'weights.bin' is altered"):
            container.read_members(stream, size)
