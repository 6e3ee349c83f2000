"""Samples of ``graphs.cnn`` with class labels that a few steps learn."""

from __future__ import annotations

import numpy as np


def separable(
    count: int, classes: int = 4, seed: int = 0
) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    """Feeds and labels: the class is the channel that is brightest."""
    random = np.random.default_rng(seed)
    feeds, labels = [], []
    for i in range(count):
        image = random.standard_normal((1, 4, 12, 12)).astype(np.float32) / 4
        image[:, (i % classes) % 4] += 1.0
        feeds.append({"x": image})
        labels.append({"label": np.array([i % classes])})
    return feeds, labels
