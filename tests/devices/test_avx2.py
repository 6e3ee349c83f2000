"""int8 bundles on an x86-64 CPU without VNNI compute what they compute on one with it.

AVX2 adds pairs of uint8 x int8 products in 16 bits, which saturate. The CPU is this one with
its newer instructions hidden, and the device profile haswell where that is installed.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from fixtures import haswell
from fixtures.locate import FixtureMissing

import edgec
import edgec_runtime
from edgec.devices.connect import open_device
from edgec.devices.install import missing
from edgec.devices.job import Job
from edgec.targets import Target, load_profile, load_target
from edgec_runtime.golden import sqnr_db

Feeds = Mapping[str, np.ndarray]
Run = Callable[[pathlib.Path, Sequence[Feeds]], list[np.ndarray]]

_RUNNER = pathlib.Path(__file__).parents[1] / "fixtures" / "run_bundles.py"
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


@pytest.fixture(params=["masked", "haswell"], scope="module")
def run_there(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
    """Runs a bundle on samples on a CPU without VNNI."""
    if request.param == "haswell":
        reason = missing(load_profile("haswell"))
        if reason is not None:
            pytest.skip(reason)
        with open_device("haswell") as device:
            yield lambda bundle, feeds: [o["y"] for o in device.run(Job(bundle, feeds)).outputs]
        return
    folder = tmp_path_factory.mktemp("machine")
    try:
        machine = haswell.masked(folder)
    except FixtureMissing as absent:
        pytest.skip(str(absent))

    def run(bundle: pathlib.Path, feeds: Sequence[Feeds]) -> list[np.ndarray]:
        given, outputs = folder / "feeds.npz", folder / "outputs.npz"
        np.savez(given, **{f"{i} x": sample["x"] for i, sample in enumerate(feeds)})
        machine.run([str(_RUNNER), str(given), str(outputs), "0", str(bundle)], timeout_s=600)
        with np.load(outputs) as archive:
            return [archive[f"0 {i} y"] for i in range(len(feeds))]

    yield run


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_only_the_protected_sums_survive_a_cpu_without_vnni(
    name: str, run_there: Run, tmp_path: pathlib.Path
) -> None:
    x64, avx2 = load_target("x86-64"), load_target("x86-64-avx2")
    bare = replace(x64, session=replace(x64.session, without={}))
    native, there = _noise_db(name, (x64, avx2, bare), run_there, tmp_path)
    # saturation costs 10 dB and more; kernels that differ in rounding alone 0.1
    assert there[0] > native[0] - 1.0
    assert there[1] > native[1] - 1.0
    assert there[2] < native[2] - 10.0


def _noise_db(
    name: str, targets: Sequence[Target], run_there: Run, folder: pathlib.Path
) -> tuple[list[float], list[float]]:
    """SQNR against float32 of the model's bundle for each target, here and there."""
    text, shapes, shape, recipe = MODELS[name]
    weights = {k: _weight(*s, seed=i) for i, (k, s) in enumerate(shapes.items())}
    model = graphs.graph(text, weights)
    rng = np.random.default_rng(5)
    samples = [{"x": np.abs(rng.standard_normal(shape, np.float32))} for _ in range(12)]
    ir.save(model, folder / "model.onnx")
    expected = np.stack([graphs.run(model, **feeds)[0] for feeds in samples[:4]])
    found: tuple[list[float], list[float]] = ([], [])
    for place, target in enumerate(targets):
        bundle = folder / f"{place}.edgec"
        edgec.build(
            folder / "model.onnx",
            target=target,
            output=bundle,
            recipe=recipe,
            calibration=lambda: iter(samples[4:]),
            evaluation=lambda: iter(samples[:4]),
            verify=False,
        )
        here = edgec_runtime.load(bundle, threads=1)
        outputs = ([here(**feeds)["y"] for feeds in samples[:4]], run_there(bundle, samples[:4]))
        for noise, actual in zip(found, outputs, strict=True):
            noise.append(sqnr_db(expected, np.stack(actual)))
    return found
