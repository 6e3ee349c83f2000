"""Noise, blur and contrast: what they do to an image, and that its values stay valid."""

from __future__ import annotations

import numpy as np
import pytest

from edgec.corruptions import KINDS, SEVERITIES, Kind, corrupt

IMAGE = np.random.default_rng(0).uniform(0.2, 0.8, (1, 3, 32, 32)).astype(np.float32)


def corrupted(kind: Kind, severity: int, image: np.ndarray = IMAGE, seed: int = 0) -> np.ndarray:
    axes = (2, 3)
    return corrupt(image, kind, severity, axes=axes, random=np.random.default_rng(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_every_severity_changes_more_and_stays_valid(kind: Kind) -> None:
    changes = []
    for severity in SEVERITIES:
        made = corrupted(kind, severity)
        assert made.shape == IMAGE.shape and made.dtype == np.float32
        assert made.min() >= 0.0 and made.max() <= 1.0
        changes.append(float(np.abs(made - IMAGE).mean()))
    assert changes == sorted(changes) and changes[0] > 0.005


def test_noise_has_the_stated_deviation_and_follows_the_seed() -> None:
    grey = np.full((1, 3, 32, 32), 0.5, np.float32)
    made = corrupted("noise", 5, grey)
    assert float((made - grey).std()) == pytest.approx(0.10, rel=0.05)
    np.testing.assert_array_equal(made, corrupted("noise", 5, grey))
    assert not np.array_equal(made, corrupted("noise", 5, grey, seed=1))


def test_blur_is_that_of_scipy() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    expected = ndimage.gaussian_filter(IMAGE.astype(np.float64), (0, 0, 1.0, 1.0), mode="nearest")
    np.testing.assert_allclose(corrupted("blur", 5), expected, atol=1e-6)  # float32 rounding


def test_contrast_leaves_the_mean_of_each_channel() -> None:
    made = corrupted("contrast", 2)
    mean = IMAGE.mean(axis=(2, 3), keepdims=True)
    np.testing.assert_allclose(made, (IMAGE - mean) * 0.5 + mean, atol=1e-6)


def test_large_images_are_corrupted_more() -> None:
    large = np.random.default_rng(0).uniform(0.2, 0.8, (1, 3, 64, 80)).astype(np.float32)
    grey = np.full_like(large, 0.5)
    assert float(np.std(corrupted("noise", 1, grey) - grey)) == pytest.approx(0.08, rel=0.05)
    assert corrupted("contrast", 1, large).std() < 0.5 * large.std()
