"""Small torch models with fixed weights, and data for them, for the compiler's tests."""

from __future__ import annotations

import pathlib

import numpy as np
import torch
from torch import nn


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


class Block(nn.Module):
    """One pre-norm transformer block over token ids, then logits at each position."""

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


class Scaled(nn.Module):
    """Two inputs that are given by name; one is an integer, one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (self.embed(ids) * scale).sum(1) + scale


def images(count: int = 8, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, 3, 12, 12)).astype(np.float32) for _ in range(count)]


def save_feeds(folder: pathlib.Path, count: int = 8, seed: int = 1) -> str:
    """A directory of .npz files with an array ``image`` each."""
    folder.mkdir(exist_ok=True)
    for i, array in enumerate(images(count, seed)):
        np.savez(folder / f"{i:03}.npz", image=array)
    return str(folder)
