"""Samples of ``graphs.cnn`` with class labels that a few steps learn, and their context."""

from __future__ import annotations

import graphs
import numpy as np
import onnx_ir as ir

from edgec.passes import Context


def context(
    model: ir.Model, count: int = 64, classes: int = 4, seed: int = 0, **rest: object
) -> Context:
    """The context of a training on ``count`` samples, 16 others to choose the best state by."""
    feeds, labels = separable(count, classes, seed)
    held, held_labels = separable(16, classes, seed + 1)
    return graphs.context(
        model,
        calibration=feeds,
        calibration_labels=labels,
        validation=held,
        validation_labels=held_labels,
        **rest,
    )


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
