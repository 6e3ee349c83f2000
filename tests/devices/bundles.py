"""Bundles for the tests of devices: a small int8 model, and what went wrong with it."""

from __future__ import annotations

import pathlib
from dataclasses import replace

import graphs
import numpy as np
import onnx_ir as ir

import edgec
from edgec.targets import Target, load_target

_TEXT = """mlp (float[4, 256] x) => (float[4, 64] y) {
    [a] m = MatMul (x, k1)
    r = Relu (m)
    [b] y = MatMul (r, k2)
}"""
RECIPE = "cleanup,fuse,quantize-dynamic,lower"


def samples(count: int = 3) -> list[dict[str, np.ndarray]]:
    """Inputs that drive sums of products far: all positive, nearly all large."""
    rng = np.random.default_rng(1)
    return [{"x": rng.uniform(0.5, 1.0, (4, 256)).astype(np.float32)} for _ in range(count)]


def model() -> ir.Model:
    """Two matrix products whose weights are nearly all as large as the largest."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        signs = rng.choice([-1.0, 1.0], shape, p=[0.3, 0.7])
        return (signs * rng.uniform(0.7, 1.0, shape) / 16).astype(np.float32)

    return graphs.graph(_TEXT, {"k1": weight(256, 256), "k2": weight(256, 64)})


def build(target: str | Target, folder: pathlib.Path, **options: object) -> pathlib.Path:
    """An int8 bundle for a target, its float32 reference beside it."""
    source, bundle = folder / "mlp.onnx", folder / "mlp.edgec"
    ir.save(model(), source)
    given = {"recipe": RECIPE, "evaluation": samples, "verify": False}
    edgec.build(source, target=target, output=bundle, **{**given, **options})
    return bundle


def saturating_target() -> Target:
    """x86-64 without the session option that keeps AVX2 from saturating."""
    target = load_target("x86-64")
    return replace(target, session=replace(target.session, without={}), features=("avx2", "fma"))
