"""int8 bundles on an x86-64 CPU without VNNI compute what they compute on one with it.

AVX2 adds pairs of uint8 x int8 products in 16 bits, which saturate. The CPU is this one with
its newer instructions hidden, and a Haswell emulated by qemu where that is installed.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from fixtures import haswell
from fixtures.locate import FixtureMissing

import edgec
from edgec.targets import Target, load_target
from edgec_runtime.golden import sqnr_db

_RUNNER = pathlib.Path(__file__).with_name("fixtures") / "run_bundles.py"
_STATIC, _DYNAMIC = "cleanup,fuse,quantize-static,lower", "cleanup,fuse,quantize-dynamic,lower"
_CONVOLUTIONS = """cnn (float[1, 64, 8, 8] x) => (float[1, 64, 8, 8] y) {
    [a] c1 = Conv <pads = [1, 1, 1, 1]> (x, k1)
    r1 = Relu (c1)
    [b] c2 = Conv <pads = [1, 1, 1, 1]> (r1, k2)
    r2 = Relu (c2)
    [c] y = Conv (r2, k3)
}"""
_PRODUCTS = """mlp (float[4, 256] x) => (float[4, 64] y) {
    [a] m = MatMul (x, k1)
    r = Relu (m)
    [b] y = MatMul (r, k2)
}"""
_RECURRENT = """lstm (float[20, 1, 128] x) => (float[20, 1, 1, 128] y) {
    [a] y, h, c = LSTM <hidden_size = 128> (x, k1, k2)
}"""


def _weight(*shape: int, seed: int = 0) -> np.ndarray:
    """Most weights are as large as the largest: the worst case for 16-bit sums."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], shape, p=[0.3, 0.7])
    scale = 1.0 / np.sqrt(np.prod(shape[1:]))
    return (signs * rng.uniform(0.7, 1.0, shape) * scale).astype(np.float32)


MODELS = {
    "convolutions": (
        _CONVOLUTIONS,
        {"k1": (64, 64, 3, 3), "k2": (64, 64, 3, 3), "k3": (64, 64, 1, 1)},
        (1, 64, 8, 8),
        _STATIC,
    ),
    "products": (_PRODUCTS, {"k1": (256, 256), "k2": (256, 64)}, (4, 256), _DYNAMIC),
    "recurrent": (_RECURRENT, {"k1": (1, 512, 128), "k2": (1, 512, 128)}, (20, 1, 128), _DYNAMIC),
}


@pytest.fixture(params=[haswell.masked, haswell.emulated], scope="module")
def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> haswell.Machine:
    make: Callable[[pathlib.Path], haswell.Machine] = request.param
    try:
        return make(tmp_path_factory.mktemp("machine"))
    except FixtureMissing as missing:
        pytest.skip(str(missing))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_only_the_protected_sums_survive_a_cpu_without_vnni(
    name: str, machine: haswell.Machine, tmp_path: pathlib.Path
) -> None:
    x64, avx2 = load_target("x86-64"), load_target("x86-64-avx2")
    bare = replace(x64, session=replace(x64.session, without={}))
    native, there = _noise_db(name, (x64, avx2, bare), machine, tmp_path)
    # saturation costs 10 dB and more; kernels that differ in rounding alone 0.1
    assert there[0] > native[0] - 1.0
    assert there[1] > native[1] - 1.0
    assert there[2] < native[2] - 10.0


def _noise_db(
    name: str, targets: Sequence[Target], machine: haswell.Machine, folder: pathlib.Path
) -> tuple[list[float], list[float]]:
    """SQNR against float32 of the model's bundle for each target, here and on the machine."""
    text, shapes, shape, recipe = MODELS[name]
    weights = {k: _weight(*s, seed=i) for i, (k, s) in enumerate(shapes.items())}
    model = graphs.graph(text, weights)
    rng = np.random.default_rng(5)
    samples = [np.abs(rng.standard_normal(shape, np.float32)) for _ in range(12)]
    ir.save(model, folder / "model.onnx")
    bundles = [folder / f"{place}.edgec" for place in range(len(targets))]
    for target, bundle in zip(targets, bundles, strict=True):
        edgec.build(
            folder / "model.onnx",
            target=target,
            output=bundle,
            recipe=recipe,
            calibration=lambda: ({"x": sample} for sample in samples[4:]),
            evaluation=lambda: ({"x": sample} for sample in samples[:4]),
        )
    expected = np.stack([graphs.run(model, x=sample)[0] for sample in samples[:4]])
    feeds, outputs = folder / "feeds.npz", folder / "outputs.npz"
    np.savez(feeds, **{f"{i} x": sample for i, sample in enumerate(samples[:4])})
    found: tuple[list[float], list[float]] = ([], [])
    for where, noise in zip((haswell.native(), machine), found, strict=True):
        where.run([str(_RUNNER), str(feeds), str(outputs), "0", *map(str, bundles)], timeout_s=600)
        with np.load(outputs) as archive:
            for place in range(len(targets)):
                actual = np.stack([archive[f"{place} {i} y"] for i in range(4)])
                noise.append(sqnr_db(expected, actual))
    return found
