"""Image preprocessing against Pillow, an independent implementation."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
from bundle_samples import write_sample

import edgec_runtime
from edgec_runtime.errors import InputError
from edgec_runtime.image import crop_box, prepare_image, resize
from edgec_runtime.manifest import Image

pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

FILTERS = {"bilinear": pillow.Resampling.BILINEAR, "bicubic": pillow.Resampling.BICUBIC}


def photograph(height: int, width: int) -> Any:
    """Smooth waves with noise and hard edges."""
    y, x = np.mgrid[0:height, 0:width]
    rng = np.random.default_rng(0)
    waves = 127 + 100 * np.sin(x[..., None] / [9, 13, 5]) * np.cos(y[..., None] / [7, 11, 3])
    noisy = waves + rng.normal(0, 20, (height, width, 3)) + 80 * (x + y > width)[..., None]
    return np.clip(noisy, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(24, 24), (64, 48), (200, 300), (1, 1)])
@pytest.mark.parametrize("box", [(0, 0, 130, 97), (10.3, 5.5, 120.9, 90.25), (0.25, 0.5, 9, 11)])
def test_resize_equals_pillow(name: str, size: tuple[int, int], box: tuple[float, ...]) -> None:
    pixels = photograph(97, 130)
    ours = resize(pixels, size, box=box, filter=name)  # type: ignore[arg-type]
    theirs = np.asarray(pillow.fromarray(pixels).resize(size[::-1], FILTERS[name], box=box))
    difference = np.abs(ours - theirs)
    # Pillow's weights are fixed-point numbers: a few values round to the other neighbour
    assert difference.max() <= 1 and np.mean(difference > 0) < 0.03


def test_crop_is_centred_with_the_ratio_of_the_size() -> None:
    spec = Image("x", (224, 224), crop=0.875)
    assert crop_box((256, 256), spec) == (16.0, 16.0, 240.0, 240.0)
    assert crop_box((256, 512), spec) == (144.0, 16.0, 368.0, 240.0)
    assert crop_box((100, 100), Image("x", (48, 96))) == (0.0, 25.0, 100.0, 75.0)


def test_a_large_photograph_equals_the_usual_recipe() -> None:
    """Resize the short side to 256, cut 224: the same picture as one resize of the crop."""
    pixels = photograph(768, 768)
    usual = np.asarray(pillow.fromarray(pixels).resize((256, 256), FILTERS["bicubic"]))
    ours = prepare_image(pixels, Image("x", (224, 224), crop=0.875, std=(1.0, 1.0, 1.0)))
    assert np.abs(ours[0].transpose(1, 2, 0) - usual[16:240, 16:240]).max() <= 1


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_normalisation_channels_and_layout(layout: str, channels: str, dtype: str) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8) + np.array([10, 20, 30], np.uint8)
    spec = Image(
        "x", (4, 4), mean=(1.0, 2.0, 3.0), std=(2.0, 4.0, 8.0),
        channels=channels, layout=layout, dtype=dtype,  # type: ignore[arg-type]
    )  # fmt: skip
    result = prepare_image(pixels, spec)
    planes = result if layout == "NCHW" else result.transpose(0, 3, 1, 2)
    assert result.dtype == dtype and planes.shape == (1, 3, 4, 4) and result.flags.c_contiguous
    order = [10, 20, 30] if channels == "RGB" else [30, 20, 10]
    expected = [(order[0] - 1) / 2, (order[1] - 2) / 4, (order[2] - 3) / 8]
    np.testing.assert_allclose(planes[0, :, 0, 0], expected, rtol=1e-3)  # float16 has 11 bits


def test_bytes_are_rounded() -> None:
    pixels = photograph(30, 30)
    result = prepare_image(pixels, Image("x", (20, 20), std=(1.0, 1.0, 1.0), dtype="uint8"))
    theirs = np.asarray(pillow.fromarray(pixels).resize((20, 20), FILTERS["bicubic"]))
    assert result.dtype == np.uint8
    assert np.abs(result[0].transpose(1, 2, 0).astype(int) - theirs).max() <= 2


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        [[1]],
    ],
)
def test_what_is_no_image_is_refused(pixels: Any) -> None:
    with pytest.raises(InputError, match="an image must be "):
        prepare_image(pixels, Image("x", (2, 2)))


def test_the_model_prepares_its_input(tmp_path: pathlib.Path) -> None:
    pixels = photograph(20, 20)
    model = edgec_runtime.load(write_sample(tmp_path / "a", image=Image("x", (4, 4))))
    assert model.prepare_image(pixels)["x"].shape == (1, 3, 4, 4)
    with pytest.raises(InputError, match="does not say how to prepare images"):
        edgec_runtime.load(write_sample(tmp_path / "b")).prepare_image(pixels)
