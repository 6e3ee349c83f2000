"""What a model may be called with, and how a wrong array is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgec_runtime.errors import InputError
from edgec_runtime.feeds import check_feeds
from edgec_runtime.manifest import Value

INPUTS = (
    Value("pixels", "float32", ("batch", 2, None)),
    Value("mask", "int64", ("batch",)),
)
PIXELS = np.zeros((3, 2, 5), np.float32)
MASK = np.zeros(3, np.int64)


def refusal(*arrays: Any, **feeds: Any) -> str:
    with pytest.raises(InputError) as caught:
        check_feeds(INPUTS, arrays, feeds)
    return str(caught.value)


def test_by_position_and_by_name() -> None:
    for feeds in (
        check_feeds(INPUTS, (PIXELS, MASK), {}),
        check_feeds(INPUTS, (PIXELS,), {"mask": MASK}),
        check_feeds(INPUTS, (), {"mask": MASK, "pixels": PIXELS}),
    ):
        assert feeds["pixels"] is PIXELS and feeds["mask"] is MASK


def test_names() -> None:
    assert "no input 'pixel', did you mean 'pixels'?; it has 2 inputs" in refusal(pixel=PIXELS)
    assert "input 'mask' is missing" in refusal(PIXELS)
    assert "'pixels' is given by position and by name" in refusal(PIXELS, pixels=PIXELS)
    assert "3 arrays were given, the model has 2 inputs: 'pixels', 'mask'" in refusal(1, 2, 3)


def test_dtypes() -> None:
    text = refusal(PIXELS.astype(np.float64), MASK)
    assert text == "input 'pixels' is float64, expected float32; convert it with .astype('float32')"
    assert "is int64, expected float32" in refusal([[[1]]], MASK)
    assert "'pixels' is not an array" in refusal([[1.0], [1.0, 2.0]], MASK)


def test_another_byte_order_is_refused() -> None:
    swapped = PIXELS.astype(PIXELS.dtype.newbyteorder())
    assert "byte order of another machine" in refusal(swapped, MASK)
    assert ".astype('float32')" in refusal(swapped, MASK)


def test_ranks_and_sizes() -> None:
    assert "has 2 dimensions [2, 5], expected 3: [batch, 2, ?]" in refusal(PIXELS[0], MASK)
    text = refusal(np.zeros((3, 4, 5), np.float32), MASK)
    assert "'pixels' has size 4 in dimension 1, expected [batch, 2, ?], got [3, 4, 5]" in text


def test_a_dynamic_dimension_has_one_size() -> None:
    text = refusal(PIXELS, np.zeros(4, np.int64))
    assert text == "input 'mask' has batch = 4, input 'pixels' has batch = 3; they must be equal"


def test_exact_lists_scalars_and_strided_arrays_are_taken() -> None:
    feeds = check_feeds(INPUTS, (PIXELS[::-1].transpose(0, 1, 2)[:, :, ::2], [1, 2, 3]), {})
    assert feeds["pixels"].flags.c_contiguous and feeds["pixels"].shape == (3, 2, 3)
    assert feeds["mask"].tolist() == [1, 2, 3]
    scalar = check_feeds((Value("s", "int64", ()),), (np.array(5),), {})
    assert scalar["s"].shape == ()


def test_strings() -> None:
    text = (Value("text", "string", ("n",)),)
    assert check_feeds(text, (["a", "bc"],), {})["text"].tolist() == ["a", "bc"]
    with pytest.raises(InputError, match="is int64, expected strings"):
        check_feeds(text, ([1],), {})
