"""Arrays in ``.npz`` and ``.npy`` files, read row by row.

numpy reads a whole array of an ``.npz`` at once; calibration sets can be larger than the
memory. Here a member of the zip is decompressed as far as the next row and no further.
Arrays in Fortran order, whose rows are scattered, are read whole; arrays of Python objects
are refused: reading them would run code.
"""

from __future__ import annotations

import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Rows:
    """An array in a file. rows(): ``array[0]``, ``array[1]``, ...; one in memory."""

    shape: tuple[int, ...]
    rows: Callable[[], Iterator[Array]]


def open_rows(path: pathlib.Path) -> Mapping[str, Rows]:
    """The arrays of an ``.npz`` by name, or that of an ``.npy`` under the name ``""``.

    Reads the headers alone. Raises OSError, ValueError or zipfile.BadZipFile, there or in
    ``rows()``, if the file is missing, damaged or holds Python objects.
    """
    if path.suffix == ".npy":
        array = np.load(path, mmap_mode="r")
        return {"": Rows(array.shape, lambda: iter(array))}
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".npy")]
        if not members:
            raise ValueError("it holds no arrays")
        return {name.removesuffix(".npy"): _member(path, archive, name) for name in members}


def _member(path: pathlib.Path, archive: zipfile.ZipFile, name: str) -> Rows:
    with archive.open(name) as stream:
        shape, fortran_order, dtype = _read_header(stream)

    def stream_rows() -> Iterator[Array]:
        size = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        with zipfile.ZipFile(path) as opened, opened.open(name) as stream:
            _read_header(stream)
            for _ in range(shape[0]):
                data = stream.read(size)
                if len(data) != size:
                    raise ValueError(f"array '{name}' ends too early")
                yield np.frombuffer(data, dtype).reshape(shape[1:])

    def whole() -> Iterator[Array]:
        with np.load(path) as opened:
            yield from opened[name.removesuffix(".npy")]

    return Rows(shape, whole if fortran_order and len(shape) > 1 else stream_rows)


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(stream)
    if version == (1, 0):
        shape, fortran_order, dtype = npy.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran_order, dtype = npy.read_array_header_2_0(stream)
    else:
        raise ValueError(f"unknown .npy version {version[0]}.{version[1]}")
    if dtype.hasobject:
        raise ValueError("it holds Python objects, expected numbers")
    return shape, fortran_order, dtype
