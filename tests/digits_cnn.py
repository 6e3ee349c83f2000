"""A small CNN trained on scikit-learn's handwritten digits, as a graph: real weights in seconds.

Depthwise separable convolutions with BatchNorm, as MobileNet has them: folding BatchNorm
leaves neighbouring channels with very different weight ranges, which is what tools for
quantization are about. Trained with one thread and a fixed seed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import graphs
import numpy as np
import onnx_ir as ir
import torch
from torch import nn

_TEXT = """digits (float[n, 1, 8, 8] x) => (float[n, 10] y) {
    [stem] c0 = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
    r0 = Relu (c0)
    [depthwise1] c1 = Conv <group = 24, pads = [1, 1, 1, 1]> (r0, w1, b1)
    r1 = Relu (c1)
    [pointwise1] c2 = Conv (r1, w2, b2)
    r2 = Relu (c2)
    [depthwise2] c3 = Conv <group = 32, pads = [1, 1, 1, 1], strides = [2, 2]> (r2, w3, b3)
    r3 = Relu (c3)
    [pointwise2] c4 = Conv (r3, w4, b4)
    r4 = Relu (c4)
    p = GlobalAveragePool (r4)
    f = Flatten (p)
    [fc] y = Gemm <transB = 1> (f, w5, b5)
}"""


@dataclass(frozen=True)
class Digits:
    """The float graph, images to calibrate with, and images with labels to judge by."""

    model: ir.Model
    calibration: tuple[dict[str, np.ndarray], ...]
    validation: tuple[dict[str, np.ndarray], ...]
    test: np.ndarray
    labels: np.ndarray

    def logits(self, model: ir.Model) -> np.ndarray:
        return graphs.run(model, x=self.test)[0]


@functools.cache
def digits() -> Digits:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images[:, None] / 16).astype(np.float32)
    order = np.random.RandomState(0).permutation(len(images))
    learned, held_out = order[:1200], order[1200:]
    model = trained(images[learned], data.target[learned])

    def one_by_one(chosen: np.ndarray) -> tuple[dict[str, np.ndarray], ...]:
        return tuple({"x": images[i : i + 1]} for i in chosen)

    return Digits(
        model,
        one_by_one(learned[:48]),
        one_by_one(learned[48:64]),
        images[held_out],
        data.target[held_out],
    )


def trained(images: np.ndarray, labels: np.ndarray) -> ir.Model:
    """The float graph trained on images float32 [n, 1, 8, 8] and their classes int64 [n]."""
    return graphs.graph(_TEXT, _weights(images, labels))


def _weights(images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Weights and biases w0, b0, ... with BatchNorm folded in."""
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on the number of threads
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = nn.Sequential(
                *_convolution(1, 24, 3),
                *_convolution(24, 24, 3, groups=24),
                *_convolution(24, 32, 1),
                *_convolution(32, 32, 3, groups=32, stride=2),
                *_convolution(32, 64, 1),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(64, 10),
            )
            epochs, batch = 5, 64
            steps = epochs * (len(x) // batch)
            optimizer = torch.optim.Adam(module.parameters())
            rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
            for step in range(steps):
                if step % (steps // epochs) == 0:
                    order = torch.randperm(len(x))
                chosen = order[(step % (steps // epochs)) * batch :][:batch]
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(x[chosen]), y[chosen]).backward()
                optimizer.step()
                rate.step()
    finally:
        torch.set_num_threads(threads)
    return _folded(module.eval())


def _convolution(i: int, o: int, size: int, groups: int = 1, stride: int = 1) -> list[nn.Module]:
    padding = size // 2
    layer = nn.Conv2d(i, o, size, stride, padding, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(o), nn.ReLU()]


def _folded(module: nn.Sequential) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    layers = [m for m in module if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    for index, layer in enumerate(layers[:-1:2]):
        norm = layers[2 * index + 1]
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        weight = layer.weight * factor.reshape(-1, 1, 1, 1)
        arrays[f"w{index}"] = weight.detach().numpy()
        arrays[f"b{index}"] = (norm.bias - norm.running_mean * factor).detach().numpy()
    last = layers[-1]
    index = len(layers) // 2
    return arrays | {
        f"w{index}": last.weight.detach().numpy(),
        f"b{index}": last.bias.detach().numpy(),
    }
