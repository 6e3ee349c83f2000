"""Calibration and evaluation data: feeds for the model, one at a time, never all in memory.

DATA is a directory of ``.npz`` files (one feed each, keyed by input name), one ``.npz``
whose arrays have a leading sample dimension, an ``.npy`` for a model with one input, or a
function that yields feeds. Keys that are no inputs of the model are labels.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from edgec.entrypoint import describe_failure, load_function
from edgec.errors import DataError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class InputSpec:
    """An input of the model: dims are integers, or None where any size fits."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | None, ...]


@dataclass(frozen=True)
class Sample:
    """One run of the model: its feeds, and the labels that came with them."""

    feeds: Mapping[str, Array]
    labels: Mapping[str, Array]

    @property
    def digest(self) -> str:
        """sha256 of names, dtypes, shapes and bytes of the feeds."""
        digest = hashlib.sha256()
        for name in sorted(self.feeds):
            array = np.ascontiguousarray(self.feeds[name])
            digest.update(f"{name}{array.dtype}{array.shape}".encode())
            digest.update(array.view(np.uint8).data if array.size else b"")
        return digest.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """Checked samples that can be iterated over again and again.

    digests: one per sample, in order; taken in the single pass that checks the data.
    keep: indices of the samples that belong to this set.
    """

    where: str
    read: Callable[[], Iterable[Sample]]
    digests: tuple[str, ...]
    keep: tuple[int, ...]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.keep)

    def samples(self) -> Iterator[Sample]:
        """Yield the samples in order."""
        wanted = set(self.keep)
        for index, sample in enumerate(self.read()):
            if index in wanted:
                yield sample

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        """Yield the feeds of the samples in order (the ``Samples`` of a pass)."""
        for sample in self.samples():
            yield sample.feeds

    def without(self, digests: Iterable[str]) -> Dataset:
        """This set without the samples of those digests."""
        gone = set(digests)
        return Dataset(
            self.where,
            self.read,
            self.digests,
            tuple(i for i in self.keep if self.digests[i] not in gone),
        )

    def kept_digests(self) -> set[str]:
        """The digests of the samples in this set."""
        return {self.digests[i] for i in self.keep}

    def split(self, share: float, seed: int) -> tuple[Dataset, Dataset]:
        """Two disjoint sets, the second with ``share`` of the samples, drawn by seed.

        Samples are ordered by a hash of seed and content, so the draw does not depend on
        the order of files and equal samples fall on one side.
        """
        ranked = sorted(
            self.keep, key=lambda i: hashlib.sha256(f"{seed}{self.digests[i]}".encode()).digest()
        )
        cut = int(len(ranked) * share)
        second = {self.digests[i] for i in ranked[:cut]}
        return (
            self.without(second),
            Dataset(
                self.where,
                self.read,
                self.digests,
                tuple(i for i in self.keep if self.digests[i] in second),
            ),
        )


def open_data(given: Any, inputs: tuple[InputSpec, ...], what: str) -> Dataset:
    """The checked data set that DATA stands for.

    what: "calibration" or "evaluation", for messages. Every sample is read once and
    checked: names, dtypes, shapes, no NaN or infinity, at least one sample.
    Raises DataError with file or sample index.
    """
    where = given if isinstance(given, str) else getattr(given, "__name__", str(given))
    where = f"{what} data {where}"
    read = _reader(given, inputs, where)

    def checked() -> Iterator[Sample]:
        for index, sample in enumerate(read()):
            yield _check(sample, inputs, f"{where}, sample {index}")

    digests = tuple(sample.digest for sample in checked())
    if not digests:
        raise DataError(f"{where}: no samples; at least one is needed")
    return Dataset(where, checked, digests, tuple(range(len(digests))))


def _reader(
    given: Any, inputs: tuple[InputSpec, ...], where: str
) -> Callable[[], Iterable[Sample]]:
    if callable(given):
        return lambda: _from_function(given, inputs, where)
    text = str(given)
    path = pathlib.Path(text)
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise DataError(f"{where}: the directory holds no .npz files")
        return lambda: (_sort_out(_load(f, where), inputs, f"{where}/{f.name}") for f in files)
    if path.suffix in {".npz", ".npy"}:
        if not path.is_file():
            raise DataError(f"{where}: no such file")
        return lambda: _slices(_load(path, where), inputs, where)
    if ":" in text:
        function = load_function(text, DataError)
        return lambda: _from_function(function, inputs, where)
    reason = "no such file or directory" if not path.exists() else "not understood"
    raise DataError(
        f"{where}: {reason}; expected a directory of .npz files, a .npz, a .npy or file.py:function"
    )


def _load(path: pathlib.Path, where: str) -> dict[str, Array]:
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy raises a dozen kinds for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{where}: {path.name} cannot be read as numpy data: {reason}") from error


def _from_function(
    function: Callable[[], Iterable[Any]], inputs: tuple[InputSpec, ...], where: str
) -> Iterator[Sample]:
    try:
        for index, item in enumerate(function()):
            place = f"{where}, sample {index}"
            if isinstance(item, Mapping):
                yield _sort_out(item, inputs, place)
            elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], Mapping):
                feeds, label = item
                labels = label if isinstance(label, Mapping) else {"label": label}
                yield _sort_out({**feeds, **labels}, inputs, place)
            else:
                raise DataError(
                    f"{place}: a {type(item).__name__}, expected a dict of arrays by input name"
                )
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where}: {describe_failure(function, error)}") from error


def _sort_out(item: Mapping[str, Any], inputs: tuple[InputSpec, ...], where: str) -> Sample:
    names = [i.name for i in inputs]
    if len(names) == 1 and names[0] not in item and len(item) == 1:
        item = {names[0]: next(iter(item.values()))}  # one input, one array: any key
    missing = [n for n in names if n not in item]
    if missing:
        raise DataError(
            f"{where}: no array for input '{missing[0]}'; the file has "
            f"{', '.join(sorted(item)) or 'nothing'}"
        )
    return Sample(
        {n: np.asarray(item[n]) for n in names},
        {k: np.asarray(v) for k, v in item.items() if k not in names},
    )


def _slices(
    arrays: dict[str, Array], inputs: tuple[InputSpec, ...], where: str
) -> Iterator[Sample]:
    """Samples of arrays whose first axis counts samples (or rows of a batch)."""
    names = {i.name: i for i in inputs}
    if len(inputs) == 1 and inputs[0].name not in arrays:
        others = [k for k in arrays if k != "label"]
        if len(others) == 1:
            arrays = {(inputs[0].name if k == others[0] else k): v for k, v in arrays.items()}
    for name, array in arrays.items():
        if array.ndim == 0:
            raise DataError(f"{where}: array '{name}' has no leading sample dimension")
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{k} {v}" for k, v in sorted(counts.items()))
        raise DataError(f"{where}: the arrays differ in their number of samples: {listed}")
    total = next(iter(counts.values()), 0)
    rows = 1  # rows of the arrays that make one sample: the model's fixed batch size
    for name, spec in names.items():
        if name in arrays and arrays[name].ndim == len(spec.dims) and spec.dims:
            rows = max(rows, spec.dims[0] or 1)
    for start in range(0, total - rows + 1, rows):
        item = {}
        for name, array in arrays.items():
            whole_sample = name in names and array.ndim == len(names[name].dims) + 1
            item[name] = array[start] if whole_sample else array[start : start + rows]
        yield _sort_out(item, inputs, where)


def _check(sample: Sample, inputs: tuple[InputSpec, ...], where: str) -> Sample:
    feeds = {}
    for spec in inputs:
        array = sample.feeds[spec.name]
        if array.dtype != spec.dtype:
            if not (array.dtype.kind == spec.dtype.kind and array.dtype.kind in "iuf"):
                raise DataError(
                    f"{where}: '{spec.name}' is {array.dtype}, the model expects {spec.dtype}"
                )
            array = _same_values(array, spec.dtype, f"{where}: '{spec.name}'")
        fits = array.ndim == len(spec.dims) and all(
            d is None or d == n for d, n in zip(spec.dims, array.shape, strict=True)
        )
        if not fits:
            expected = ", ".join("any" if d is None else str(d) for d in spec.dims)
            raise DataError(
                f"{where}: '{spec.name}' has shape {list(array.shape)}, the model expects "
                f"[{expected}]"
            )
        if array.size == 0:
            raise DataError(f"{where}: '{spec.name}' is empty")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(f"{where}: '{spec.name}' has a NaN or an infinity")
        feeds[spec.name] = array
    return Sample(feeds, sample.labels)


def _same_values(array: Array, dtype: np.dtype[Any], where: str) -> Array:
    """``array`` as ``dtype``: floats are rounded, integers must fit."""
    with np.errstate(over="ignore"):
        cast_array = array.astype(dtype)
    if dtype.kind != "f" and not np.array_equal(cast_array, array):
        raise DataError(f"{where} has values that do not fit into {dtype}")
    return cast(Array, cast_array)
