"""One exported model and one built bundle, shared by the compiler's tests."""

from __future__ import annotations

import pathlib

import pytest

import edgec


@pytest.fixture(scope="session")
def cnn_onnx(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The small CNN as .onnx, image float32 [1, 3, 12, 12] -> logits [1, 10]."""
    from small_models import export_cnn

    return export_cnn(tmp_path_factory.mktemp("model") / "cnn.onnx")


@pytest.fixture(scope="session")
def cnn_bundle(cnn_onnx: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A float32 bundle of the small CNN for x86-64, with what a build leaves beside it."""
    path = tmp_path_factory.mktemp("bundle") / "cnn.x86-64.edgec"
    edgec.build(cnn_onnx, target="x86-64", output=path, recipe="cleanup,fuse")
    return path
