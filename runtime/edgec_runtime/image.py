"""Photographs to model inputs, as the bundle's ``Image`` says; numpy only.

Crop, antialiased resize, normalisation, layout. The resize is Pillow's ``Image.resize`` with
a box: separable, the filter widened by the reduction so that every source pixel counts, and
bytes after each of the two passes (pillow, src/libImaging/Resample.c), since that is what
most models were trained on. It differs from Pillow by one level in about one value of a hundred.

Left out on purpose: decoding of files, EXIF orientation, padding.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgec_runtime.errors import InputError
from edgec_runtime.manifest import Image

Array = np.ndarray[Any, Any]

_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}  # half width of the filter, in source pixels
_CUBIC = -0.5  # Keys' parameter, as in Pillow


def prepare_image(pixels: Array, spec: Image) -> Array:
    """The input for one photograph: [1, 3, h, w] or [1, h, w, 3] of the spec's dtype.

    pixels: uint8 [height, width, 3], RGB. Raises InputError for another array.
    """
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 3:
        shown = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, np.ndarray) else "none"
        raise InputError(f"an image must be a uint8 array [height, width, 3], got {shown}")
    if pixels.shape[2] != 3 or 0 in pixels.shape:
        raise InputError(
            f"an image must be [height, width, 3], got {list(pixels.shape)}; "
            "convert it to RGB, without alpha"
        )
    result = resize(pixels, spec.size, box=crop_box(pixels.shape[:2], spec), filter=spec.resize)
    if spec.channels == "BGR":
        result = result[:, :, ::-1]
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    result = (result - mean) / std
    if spec.dtype == "uint8":
        result = np.clip(np.rint(result), 0, 255)
    if spec.layout == "NCHW":
        result = result.transpose(2, 0, 1)
    return np.ascontiguousarray(result[np.newaxis], dtype=spec.dtype)


def crop_box(shape: tuple[int, ...], spec: Image) -> tuple[float, float, float, float]:
    """The centred (left, top, right, bottom), in pixels, that is resized to ``spec.size``.

    It has the aspect ratio of ``spec.size`` and covers ``spec.crop`` of the largest such box.
    """
    height, width = shape
    ratio = spec.size[1] / spec.size[0]
    box_width = min(width, height * ratio) * spec.crop
    box_height = box_width / ratio
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height


def resize(
    pixels: Array,
    size: tuple[int, int],
    *,
    box: tuple[float, float, float, float],
    filter: str = "bicubic",
) -> Array:
    """``box`` of an image resized to ``size`` = (height, width), as float32 [h, w, 3].

    The values are whole numbers in 0..255. pixels: [height, width, 3].
    filter: "bilinear" or "bicubic".
    """
    rows, first_row = _weights(box[1], box[3], pixels.shape[0], size[0], filter)
    columns, first_column = _weights(box[0], box[2], pixels.shape[1], size[1], filter)
    # only the part that the filters see becomes float
    part = pixels[
        first_row : first_row + rows.shape[1], first_column : first_column + columns.shape[1]
    ].astype(np.float32)
    part = _rounded(columns @ part)  # [rows seen, w, 3]
    height, width, channels = part.shape
    part = rows @ part.reshape(height, width * channels)
    return _rounded(part.reshape(size[0], width, channels))


def _rounded(values: Array) -> Array:
    """To whole numbers in 0..255, halves up; Pillow does so after each pass."""
    return np.clip(np.floor(values + np.float32(0.5)), 0.0, 255.0)


def _weights(start: float, end: float, length: int, size: int, filter: str) -> tuple[Array, int]:
    """float32 [size, n]: row i weighs the n source positions for output i; and their first."""
    scale = (end - start) / size
    widening = max(scale, 1.0)
    support = _SUPPORT[filter] * widening
    centre = start + (np.arange(size) + 0.5) * scale
    first = max(int(centre[0] - support + 0.5), 0)
    last = min(int(centre[-1] + support + 0.5), length)
    distance = np.abs(np.arange(first, last) + 0.5 - centre[:, np.newaxis]) / widening
    weights = _bilinear(distance) if filter == "bilinear" else _bicubic(distance)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights.astype(np.float32), first


def _bilinear(x: Array) -> Array:
    return np.maximum(1.0 - x, 0.0)


def _bicubic(x: Array) -> Array:
    """Keys 1981, IEEE TASSP 29(6), equation 15, for x >= 0."""
    near = ((_CUBIC + 2.0) * x - (_CUBIC + 3.0)) * x * x + 1.0
    far = _CUBIC * (((x - 5.0) * x + 8.0) * x - 4.0)
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
