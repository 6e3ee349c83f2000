"""Small torch models with fixed weights, for the compiler's tests."""

from __future__ import annotations

import pathlib

import numpy as np
import torch
from torch import nn

FILE = """
import numpy as np
import small_models
import edgec


def cnn():
    return small_models.cnn(), (small_models.image(),)


def calibration():
    rng = np.random.default_rng(1)
    for _ in range(12):
        yield {"image": rng.standard_normal((1, 3, 12, 12)).astype(np.float32)}


def source():
    return edgec.Source(
        module=small_models.cnn(),
        example_inputs=(small_models.image(),),
        input_names=("image",),
        output_names=("logits",),
        calibration=calibration,
    )
"""


def image(batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def cnn(classes: int = 10) -> nn.Module:
    """Convolutions with BatchNorm, a depthwise one, pooling, a classifier."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.ReLU6(),
        nn.Conv2d(16, 32, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, classes),
    )
    for layer in module:
        if isinstance(layer, nn.BatchNorm2d):  # statistics as after training
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.5, 1.5)
    return module.eval()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()


class Block(nn.Module):
    """One pre-norm transformer block over token ids, with a classifier of each position."""

    def __init__(self, width: int = 48, heads: int = 4, words: int = 100) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = heads
        self.embed = nn.Embedding(words, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, words)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return self.head(x)


class Recurrent(nn.Module):
    """An LSTM that returns every step and, as a second output, the last state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(24, 32, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        steps, (last, _) = self.lstm(x)
        return self.head(steps), last


def save_feeds(folder: pathlib.Path, count: int = 8, seed: int = 1, **labels: object) -> str:
    """A directory of .npz files for ``cnn`` with the input name ``image``."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        feed = {"image": rng.standard_normal((1, 3, 12, 12)).astype(np.float32)}
        np.savez(folder / f"{i:03}.npz", **feed)
    return str(folder)


def export_cnn(path: pathlib.Path, *, batch: bool = False) -> pathlib.Path:
    """``cnn`` as .onnx: image -> logits; the batch dimension open if asked for."""
    torch.onnx.export(
        cnn(),
        (image(2 if batch else 1),),
        path,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},) if batch else None,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    return path
