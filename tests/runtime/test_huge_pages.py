"""Weights in huge pages: what is moved, what is left alone, and that answers stay the same."""

from __future__ import annotations

import json
import mmap
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from bundle_samples import chain_graph, sample_manifest

from edgec_runtime import bundle, manifest
from edgec_runtime.huge_pages import collapse, new_regions, private_memory

MIB = 1 << 20
SHAPES = [(1024, 1024)] * 8  # 8 x 4 MiB of float32

_MEASURE = """
import json, re, sys
import numpy, onnxruntime, edgec_runtime

def huge():
    return int(re.search(r"AnonHugePages:\\s+(\\d+) kB", open("/proc/self/smaps_rollup").read())[1])

before = huge()
model = edgec_runtime.load(sys.argv[1], threads=1, huge_pages=json.loads(sys.argv[2]))
moved = huge() - before
y = model(numpy.linspace(0, 1, 1024, dtype="float32")[None])["y"]
print(json.dumps([moved, y.tolist()]))
"""


def _collapses() -> bool:
    """Whether this kernel moves memory when it is asked to (Linux 6.1)."""
    before = private_memory()
    area = _area(8 * MIB)
    area.write(b"x" * len(area))
    return collapse(before) > 0


def _area(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _huge_kb(area: mmap.mmap) -> int:
    """Of the regions that hold it."""
    first = np.frombuffer(area, np.uint8).ctypes.data
    found, inside = 0, False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = int(header[1], 16), int(header[2], 16)
            inside = start < first + len(area) and end > first
        elif inside and line.startswith("AnonHugePages:"):
            found += int(line.split()[1])
    return found


linux = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux")


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        ([(0, 8)], [], [(0, 8)]),
        ([(0, 8)], [(0, 8)], []),
        ([(0, 8)], [(2, 4)], [(0, 2), (4, 8)]),
        ([(0, 8), (10, 20)], [(6, 12), (14, 15)], [(0, 6), (12, 14), (15, 20)]),
        ([(4, 8)], [(0, 5), (7, 9)], [(5, 7)]),
        ([(4, 8)], [(8, 9), (0, 4)], [(4, 8)]),
    ],
)
def test_new_regions(
    now: list[tuple[int, int]], before: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    assert new_regions(now, before) == expected


@linux
def test_new_memory_moves_and_keeps_its_content() -> None:
    if not _collapses():
        pytest.skip("this kernel does not move memory to huge pages")
    before, area = private_memory(), _area(16 * MIB)
    area.write(bytes(range(256)) * (16 * MIB // 256))
    collapse(private_memory())  # nothing is new
    assert _huge_kb(area) == 0
    assert collapse(before) >= 12 * MIB
    assert _huge_kb(area) >= 12 << 10
    assert area[:] == bytes(range(256)) * (16 * MIB // 256)


def test_systems_of_other_pages_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "PAGESIZE", 1 << 14)
    assert private_memory() == () and collapse([]) == 0


@linux
def test_memory_that_is_hardly_in_use_stays() -> None:
    before, area = private_memory(), _area(16 * MIB)
    for page in range(0, len(area), 64 << 10):  # one of sixteen pages
        area[page] = 1
    assert collapse(before) == 0


@linux
def test_a_bundle_moves_its_weights_and_answers_the_same(tmp_path: pathlib.Path) -> None:
    if not _collapses():
        pytest.skip("this kernel does not move memory to huge pages")
    path = tmp_path / "large.edgec"
    random = np.random.default_rng(0)  # equal weights would share their memory
    weights = [random.standard_normal(shape, np.float32) / 32 for shape in SHAPES]
    graph = manifest.Graph(
        "graph.onnx",
        (manifest.Value("x", "float32", ("batch", 1024)),),
        (manifest.Value("y", "float32", ("batch", 1024)),),
    )
    bundle.write_bundle(
        path,
        sample_manifest(graphs={"main": graph}),
        weights=bundle.weight_chunks(weight.data for weight in weights),
        files={"graph.onnx": chain_graph(SHAPES)},
    )
    found = {}
    for asked in ("true", "false"):
        command = [sys.executable, "-c", _MEASURE, str(path), asked]
        result = subprocess.run(command, capture_output=True, check=True, text=True)
        found[asked] = json.loads(result.stdout)
    assert found["true"][0] >= 20 << 10  # kB of the 32 MiB that ONNX Runtime has repacked
    assert found["false"][0] < 4 << 10
    assert found["true"][1] == found["false"][1]
