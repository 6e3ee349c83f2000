"""Handwritten digits from two cameras, the second rare and brighter, and a CNN trained on both.

The first camera's images reach 15 % of the brightness. Of 1,200 images to learn from the
second camera took 60, of 597 to judge by another 60; of those to calibrate with, none or a few.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import digits_cnn
import numpy as np
import onnx_ir as ir

_DIM = 0.15
_RARE = 60


@dataclass(frozen=True)
class TwoCameras:
    """The float graph, images [n, 1, 8, 8] in 0..1, classes, and the camera of each image.

    calibration: 64 images by the first camera. mixed: 16 of them are by the second.
    """

    model: ir.Model
    calibration: np.ndarray
    mixed: np.ndarray
    test: np.ndarray
    labels: np.ndarray
    camera: np.ndarray


@functools.cache
def two_cameras() -> TwoCameras:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images[:, None] / 16).astype(np.float32)
    random = np.random.default_rng(0)
    order = np.random.RandomState(0).permutation(len(images))
    learned, held_out = order[:1200], order[1200:]
    bright = np.zeros(len(images), bool)
    for part in (learned, held_out):
        bright[random.permutation(part)[:_RARE]] = True
    images[~bright] *= np.float32(_DIM)
    common, rare = learned[~bright[learned]], learned[bright[learned]]
    return TwoCameras(
        digits_cnn.trained(images[learned], data.target[learned]),
        images[common[:64]],
        images[np.concatenate([common[:48], rare[:16]])],
        images[held_out],
        data.target[held_out],
        np.where(bright[held_out], "second", "first"),
    )
