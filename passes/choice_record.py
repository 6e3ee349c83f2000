"""Records chosen integers compactly, and reads them back to the same bytes.

Of a matrix: its scales, its zero points, and how far each integer is from the one nearest
to the float weight, which is mostly 0 and compresses well. Plain rounding to extremes
("rtn") follows from the weights alone, by arithmetic that is the same everywhere, and records
nothing but its name.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgec.passes.contract import PassError
from edgec.passes.grids import Grid
from edgec.passes.weight_choices import METHODS, Choice, Matrix, Method, Scaling, scaled_rows
from edgec.passes.weights import Array


def recorded(
    method: Method,
    matrices: Sequence[Matrix],
    choices: Mapping[str, Choice],
    scaling: Scaling | None,
) -> dict[str, Any]:
    """The decisions of a run as JSON data."""
    table: dict[str, Any] = {"method": method}
    if scaling is not None:
        table["channels"] = {k: _text(v.astype("<f4")) for k, v in scaling.channels.items()}
    if method == "rtn":
        return table
    table["matrices"] = {}
    for matrix in matrices:
        choice = choices[matrix.name]
        nearest = choice.grid.nearest(scaled_rows(matrix, scaling))
        change = choice.values.astype(np.int16) - nearest
        entry = {"scale": _text(choice.grid.scale.astype("<f4"))}
        if not matrix.scheme.symmetric:
            entry["zero_point"] = _text(choice.grid.zero_point.astype(np.uint8))
        if change.any():
            entry["change"] = _text(change.astype(np.int8))
        table["matrices"][matrix.name] = entry
    return table


def replayed_method(decisions: Mapping[str, Any]) -> Method:
    """The method of an earlier run. Raises PassError if there is none in the decisions."""
    method = decisions.get("method")
    if method not in METHODS:
        raise PassError("the lock names no method of quantize-weights: build without it")
    return method  # type: ignore[no-any-return]


def replayed_scaling(decisions: Mapping[str, Any]) -> Scaling | None:
    """AWQ's scales of an earlier run, None if it used another method."""
    table = decisions.get("channels")
    if table is None:
        return None
    return Scaling({k: _array(text, "<f4", -1) for k, text in table.items()}, {}, {})


def replayed(
    decisions: Mapping[str, Any], matrices: Sequence[Matrix], scaling: Scaling | None
) -> dict[str, Choice]:
    """The choices of an earlier run. Raises PassError if it was made for another model."""
    found = {}
    table = decisions.get("matrices", {})
    for matrix in matrices:
        entry = table.get(matrix.name)
        if entry is None:
            raise PassError(
                f"the lock knows nothing about weight '{matrix.name}': it was made for another "
                "model or target; build without it"
            )
        rows, scheme = scaled_rows(matrix, scaling), matrix.scheme
        shape = (rows.shape[0], -(-rows.shape[1] // scheme.block_size))
        scale = _array(entry["scale"], "<f4", shape)
        zero_point = np.zeros(shape, np.float32)
        if not scheme.symmetric:
            zero_point = _array(entry["zero_point"], "u1", shape).astype(np.float32)
        grid = Grid(scheme, scale, zero_point)
        values = grid.nearest(rows)
        if "change" in entry:
            change = _array(entry["change"], "i1", rows.shape)
            # 8-bit arithmetic wraps around as it did when the change was recorded
            values = grid.stored((values.view(np.int8) + change).view(values.dtype))
        found[matrix.name] = Choice(grid, values)
    return found


def _text(array: Array) -> str:
    # bytes of equal weight side by side: exponents repeat, mantissas do not
    planes = array.reshape(-1, 1).view(np.uint8).T
    return base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode("ascii")


def _array(text: str, dtype: str, shape: tuple[int, ...] | int) -> Array:
    size = np.dtype(dtype).itemsize
    try:
        planes = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
        array = np.ascontiguousarray(planes.reshape(size, -1).T).view(dtype)
        return array.reshape(shape).astype(np.dtype(dtype).newbyteorder("="))
    except (binascii.Error, zlib.error, ValueError, TypeError) as error:
        raise PassError(
            f"the lock's weights do not fit the model ({error}): it was made for another model "
            "or target; build without it"
        ) from error
