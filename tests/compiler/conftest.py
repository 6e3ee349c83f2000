"""One small model and one built bundle, shared by the compiler's tests."""

from __future__ import annotations

import pathlib

import graphs
import numpy as np
import onnx_ir as ir
import pytest

import edgec

CNN = """cnn (float[1, 3, 12, 12] image) => (float[1, 10] logits) {
    [conv1] c1 = Conv <pads = [1, 1, 1, 1]> (image, k1, b1)
    r1 = Relu (c1)
    [depthwise] c2 = Conv <group = 16, pads = [1, 1, 1, 1]> (r1, k2)
    r2 = Clip (c2, zero, six)
    [conv3] c3 = Conv (r2, k3)
    r3 = Relu (c3)
    p = GlobalAveragePool (r3)
    f = Flatten (p)
    [fc] logits = Gemm <transB = 1> (f, w, b)
}"""


@pytest.fixture(scope="session")
def cnn_onnx(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A small CNN as .onnx: image float32 [1, 3, 12, 12] -> logits float32 [1, 10]."""
    weights = {
        "k1": graphs.weight(16, 3, 3, 3),
        "b1": graphs.feed(16, seed=1),
        "k2": graphs.weight(16, 1, 3, 3, seed=2) * 3,
        "zero": np.float32(0),
        "six": np.float32(6),
        "k3": graphs.weight(32, 16, 1, 1, seed=5),
        "w": graphs.weight(10, 32, seed=3) * 4,
        "b": graphs.feed(10, seed=4) / 9,
    }
    path = tmp_path_factory.mktemp("model") / "cnn.onnx"
    ir.save(graphs.graph(CNN, {k: np.asarray(v) for k, v in weights.items()}), path)
    return path


@pytest.fixture(scope="session")
def cnn_bundle(cnn_onnx: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A float32 bundle of the small CNN for x86-64, with what a build leaves beside it."""
    path = tmp_path_factory.mktemp("bundle") / "cnn.x86-64.edgec"
    edgec.build(cnn_onnx, target="x86-64", output=path, recipe="cleanup,fuse")
    return path
