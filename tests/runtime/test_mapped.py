"""A mapped load takes neither the time nor the memory of the weights."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest
from bundle_samples import chain_graph, sample_manifest

from edgec_runtime import bundle, manifest

SHAPES = [(4096, 4096)] * 8  # 8 x 64 MiB of float32

_MEASURE = """
import json, os, re, sys, time
import numpy, onnxruntime, edgec_runtime
from edgec_runtime import session

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

numpy.zeros((1, 4096), "float32")
memory, times = anonymous(), []
for _ in range(3):
    start = time.perf_counter()
    model = edgec_runtime.load(sys.argv[1], mapped=True, threads=1)
    times.append(time.perf_counter() - start)
loaded = anonymous()
y = model(numpy.ones((1, 4096), "float32"))["y"]
error = float(abs(y - 4096.0**8).max())
print(json.dumps([min(times), loaded - memory, loaded, anonymous(), error]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_512_mib_load_in_a_fifth_of_a_second_with_80_mb(tmp_path: pathlib.Path) -> None:
    import numpy as np

    path = tmp_path / "large.edgec"
    weight = np.ones(SHAPES[0], np.float32)
    graph = manifest.Graph(
        "graph.onnx",
        (manifest.Value("x", "float32", ("batch", 4096)),),
        (manifest.Value("y", "float32", ("batch", 4096)),),
    )
    bundle.write_bundle(
        path,
        sample_manifest(graphs={"main": graph}),
        weights=bundle.weight_chunks(weight.data for _ in SHAPES),
        files={"graph.onnx": chain_graph(SHAPES)},
    )
    assert path.stat().st_size > 512 << 20
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path)], capture_output=True, check=True, text=True
    )
    seconds, grown, loaded, after_run, error = json.loads(result.stdout)
    path.unlink()
    assert error == 0.0  # powers of two: exact in float32
    assert seconds < 0.2
    assert loaded < 80  # MB of anonymous memory of the whole process
    assert grown < 30 and after_run < 110
