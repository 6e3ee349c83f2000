"""What a training changed in a model's initializers, as text for a lock, and back.

A difference is taken byte by byte, modulo 256: where few integers moved by one step it is
mostly zeros, which zlib packs to a fraction of a bit each.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import PassError


def differences(before: ir.Model, after: ir.Model) -> dict[str, str]:
    """Initializer name -> what turns its bytes into those it has after; only those that moved.

    Both models have the same initializers in the same types and shapes.
    """
    found = {}
    for name, value in after.graph.initializers.items():
        old = _bytes(before.graph.initializers[name])
        new = _bytes(value)
        if not np.array_equal(old, new):
            packed = zlib.compress((new - old).tobytes(), 9)
            found[name] = base64.b64encode(packed).decode("ascii")
    return found


def apply_differences(model: ir.Model, changes: Mapping[str, str]) -> int:
    """Give the initializers the numbers that they had after; how many there were.

    Raises PassError if the changes were recorded for another model.
    """
    for name, text in changes.items():
        value = model.graph.initializers.get(name)
        tensor = None if value is None else value.const_value
        try:
            change = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
        except (binascii.Error, zlib.error) as error:
            raise PassError(f"the lock's change of '{name}' is damaged: {error}") from error
        if value is None or tensor is None or len(change) != _bytes(value).size:
            raise PassError(
                f"the lock changes '{name}', which this model does not have in that size: it was "
                "made for another model or target; build without it"
            )
        before = _plain(value)
        array = (_bytes(value) + change).view(before.dtype).reshape(before.shape)
        array = array.astype(tensor.dtype.numpy())
        value.const_value = ir.tensor(array, dtype=tensor.dtype, name=name)
    return len(changes)


def _bytes(value: ir.Value) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(_plain(value).tobytes(), np.uint8)


def _plain(value: ir.Value) -> np.ndarray[Any, Any]:
    """The numbers of an initializer; those of 4 bits, packed in the file, as bytes."""
    assert value.const_value is not None  # an initializer has data
    array = value.const_value.numpy()
    wide = {ir.DataType.INT4: np.int8, ir.DataType.UINT4: np.uint8}.get(value.const_value.dtype)
    return array if wide is None else array.astype(wide)
