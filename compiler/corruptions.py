"""Common corruptions of images: noise, blur and contrast, each in five severities.

Kinds and strengths are those of ImageNet-C and CIFAR-10-C (Hendrycks & Dietterich 2019,
arXiv:1903.12261, appendix B): gaussian noise, gaussian blur and contrast; the small strengths
for images whose shorter side is below 64 pixels. Everything happens on values 0..1, from
black to white, and stays there.

Left out on purpose: weather, compression and the other kinds; they need images of frost or
codecs, and these three are the benchmark's cheapest of each of its families.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]
Kind = Literal["noise", "blur", "contrast"]

KINDS: tuple[Kind, ...] = ("noise", "blur", "contrast")
SEVERITIES = (1, 2, 3, 4, 5)
_SMALL_SIDE = 64  # pixels
_STRENGTHS: dict[Kind, tuple[tuple[float, ...], tuple[float, ...]]] = {  # (small, large) images
    "noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),  # deviation
    "blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1.0, 2.0, 3.0, 4.0, 6.0)),  # deviation in pixels
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),  # what is left
}
_TRUNCATE = 4.0  # deviations at which the blur's kernel ends


def corrupt(
    image: Array, kind: Kind, severity: int, *, axes: tuple[int, int], random: np.random.Generator
) -> Array:
    """The image, values 0..1, with one corruption; float32 of the same shape, values 0..1.

    axes: those of height and width. severity: 1..5.
    """
    side = min(image.shape[axis] for axis in axes)
    strength = _STRENGTHS[kind][side >= _SMALL_SIDE][severity - 1]
    values = image.astype(np.float64)
    if kind == "noise":
        values = values + random.normal(0.0, strength, values.shape)
    elif kind == "blur":
        for axis in axes:
            values = _blurred(values, strength, axis)
    else:
        mean = values.mean(axis=axes, keepdims=True)
        values = (values - mean) * strength + mean
    clipped: Array = np.clip(values, 0.0, 1.0).astype(np.float32)
    return clipped


def _blurred(values: Array, deviation: float, axis: int) -> Array:
    """Convolution with a gaussian along one axis; the border's value goes on outside."""
    radius = math.ceil(_TRUNCATE * deviation)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / deviation) ** 2)
    kernel /= kernel.sum()
    pads = [(radius, radius) if i == axis else (0, 0) for i in range(values.ndim)]
    padded = np.pad(values, pads, mode="edge")
    size = values.shape[axis]
    result = np.zeros_like(values)
    for offset, weight in enumerate(kernel):
        result += weight * np.take(padded, np.arange(offset, offset + size), axis=axis)
    return result
