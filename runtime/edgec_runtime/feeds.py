"""Checks the arrays that a model is called with, before ONNX Runtime sees them.

ONNX Runtime reads a big-endian array as garbage and reports shapes late, in words of its
own. Here every feed is checked against the manifest: names, dtypes, ranks, fixed sizes,
and that a dynamic dimension has one size across all inputs. Nothing is converted.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgec_runtime.errors import InputError, suggestion
from edgec_runtime.manifest import Value

Array = np.ndarray[Any, Any]


def check_feeds(
    inputs: Sequence[Value], arrays: Sequence[Any], feeds: Mapping[str, Any]
) -> dict[str, Array]:
    """The feeds by input name, as C-contiguous arrays.

    arrays: given by position, in the order of ``inputs``; feeds: given by name.
    Raises InputError that names the input, what it was given and what it expects.
    """
    known = {value.name: value for value in inputs}
    if len(arrays) > len(inputs):
        raise InputError(f"{len(arrays)} arrays were given, the model has {_listed(inputs)}")
    given = dict(zip(known, arrays, strict=False))
    for name, item in feeds.items():
        if name not in known:
            raise InputError(
                f"the model has no input '{name}'{suggestion(name, known)}; "
                f"it has {_listed(inputs)}"
            )
        if name in given:
            raise InputError(f"input '{name}' is given by position and by name")
        given[name] = item
    sizes: dict[str, tuple[int, str]] = {}
    result = {}
    for name, value in known.items():
        if name not in given:
            raise InputError(f"input '{name}' is missing; the model has {_listed(inputs)}")
        array = _checked_dtype(value, given[name])
        _check_shape(value, array.shape, sizes)
        result[name] = array
    return result


def _checked_dtype(value: Value, item: Any) -> Array:
    try:
        array = np.asarray(item, order="C")
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"input '{value.name}' is not an array: {error}") from error
    if value.dtype == "string":
        if array.dtype.kind not in "UO":
            raise InputError(f"input '{value.name}' is {array.dtype}, expected strings")
        return array
    if array.dtype == _native(value.dtype):
        return array
    if not array.dtype.isnative:
        raise InputError(
            f"input '{value.name}' has the byte order of another machine ({array.dtype.str}); "
            f"convert it with .astype('{value.dtype}')"
        )
    raise InputError(
        f"input '{value.name}' is {array.dtype.name}, expected {value.dtype}; "
        f"convert it with .astype('{value.dtype}')"
    )


@functools.cache
def _native(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype)  # in this machine's byte order


def _check_shape(value: Value, shape: tuple[int, ...], sizes: dict[str, tuple[int, str]]) -> None:
    if shape == value.shape:
        return
    if len(shape) != len(value.shape):
        raise InputError(
            f"input '{value.name}' has {len(shape)} dimensions {list(shape)}, "
            f"expected {len(value.shape)}: {_expected(value)}"
        )
    for axis, (size, wanted) in enumerate(zip(shape, value.shape, strict=True)):
        if isinstance(wanted, int) and size != wanted:
            raise InputError(
                f"input '{value.name}' has size {size} in dimension {axis}, "
                f"expected {_expected(value)}, got {list(shape)}"
            )
        if isinstance(wanted, str):
            first, where = sizes.setdefault(wanted, (size, value.name))
            if first != size:
                raise InputError(
                    f"input '{value.name}' has {wanted} = {size}, input '{where}' has "
                    f"{wanted} = {first}; they must be equal"
                )


def _expected(value: Value) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in value.shape) + "]"


def _listed(inputs: Sequence[Value]) -> str:
    count = len(inputs)
    shown = ", ".join(f"'{value.name}'" for value in inputs[:8]) + ", ..." * (count > 8)
    return f"{count} input{'s' * (count != 1)}: {shown}"
