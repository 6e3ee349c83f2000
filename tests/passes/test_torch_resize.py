"""Resize and pooling of the twin against ONNX Runtime, where it differs from the specification."""

import itertools

import graphs
import numpy as np
import pytest
import torch

from edgec.passes.execution import open_session, run_feeds
from edgec.passes.torch_graph import to_torch

_MODES = ("align_corners", "asymmetric", "half_pixel", "pytorch_half_pixel", "tf_crop_and_resize")
_NEAREST = tuple(
    f'nearest", nearest_mode = "{rounding}'
    for rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
)
_SCALES = ((2, 1.5), (0.6, 0.6), (1.4, 1.3), (0.3, 0.45), (1, 2.7), (3, 1.1))
_TOLERANCE = 1e-5  # float32 sums in another order; values are near 1


def _apart(text, feed, **constants):
    """The largest difference between the twin and ONNX Runtime; shapes are the same."""
    model = graphs.graph(text, constants)
    expected = run_feeds(open_session(model), {"x": feed})[0]
    with torch.no_grad():
        actual = to_torch(model)({"x": torch.from_numpy(feed)})["y"].numpy()
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max())


@pytest.mark.parametrize(
    ("kind", "places"), itertools.product(("linear", "cubic", *_NEAREST), _MODES)
)
def test_sizes_that_are_no_multiples_are_those_of_onnx_runtime(kind, places):
    shrinks = ("", ", antialias = 1") if kind in ("linear", "cubic") else ("",)
    for scales, shrink in itertools.product(_SCALES, shrinks):
        text = f"""g (float[1,2,4,5] x) => (float y) {{
            y = Resize <mode = "{kind}", coordinate_transformation_mode = "{places}"{shrink}>
                (x, roi, scales)
        }}"""
        apart = _apart(
            text,
            graphs.feed(1, 2, 4, 5),
            roi=np.array([0, 0, 0.1, 0.2, 1, 1, 0.8, 0.9], np.float32),
            scales=np.array([1, 1, *scales], np.float32),
        )
        assert apart < _TOLERANCE, (scales, shrink)


@pytest.mark.parametrize("pool", ["AveragePool", "MaxPool"])
@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER"])
def test_same_pads_of_a_dilated_pool_are_those_of_onnx_runtime(pool, auto):
    for dilation, stride in itertools.product((1, 2, 3), (1, 2)):
        text = f"""g (float[1,2,9] x) => (float y) {{
            y = {pool} <kernel_shape = [3], dilations = [{dilation}], strides = [{stride}],
                auto_pad = "{auto}"> (x)
        }}"""
        assert _apart(text, graphs.feed(1, 2, 9)) < _TOLERANCE
