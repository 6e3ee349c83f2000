"""Calibration and evaluation data: feeds for the model, one at a time, never all in memory.

DATA is a directory of ``.npz`` files (one feed each, keyed by input name), one ``.npz``
whose arrays have a leading sample dimension, an ``.npy`` for a model with one input, or a
function that yields feeds. Keys that are no inputs of the model are labels. For a language model
``input_ids`` are enough (``edgec.decoder``), for one with an encoder what the encoder reads and
``decoder_input_ids``, and a ``.txt`` is cut into windows of tokens
(``edgec.token_windows``).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np

from edgec.decoder import DECODER_IDS, IDS, MASK, PAST, completed, encoder_inputs, is_decoder
from edgec.entrypoint import describe_failure, load_function, repeatable_items
from edgec.errors import DataError
from edgec.rows import open_rows
from edgec.token_windows import SUFFIX, Encode, token_windows

Array = np.ndarray[Any, Any]
T = TypeVar("T")

LABEL = "label"  # the key of labels that is never taken for an input


@dataclass(frozen=True)
class InputSpec:
    """An input of the model: dims are integers, or None where any size fits."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | None, ...]


@dataclass(frozen=True)
class Sample:
    """One run of the model: its feeds, the labels that came with them, and where it is from."""

    feeds: Mapping[str, Array]
    labels: Mapping[str, Array]
    where: str = ""

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
        last = max(self.keep, default=-1)
        for index, sample in enumerate(self.read()):
            if index in wanted:
                yield sample
            if index >= last:
                return

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        """Yield the feeds of the samples in order (the ``Samples`` of a pass)."""
        for sample in self.samples():
            yield sample.feeds

    def has_label(self) -> bool:
        """True if the first sample has an array named ``label``."""
        return any(LABEL in sample.labels for sample in itertools.islice(self.samples(), 1))

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
            self.kept_digests(), key=lambda d: hashlib.sha256(f"{seed}{d}".encode()).digest()
        )
        second = set(ranked[: int(len(ranked) * share)])
        return (
            self.without(second),
            Dataset(
                self.where,
                self.read,
                self.digests,
                tuple(i for i in self.keep if self.digests[i] in second),
            ),
        )


@dataclass(frozen=True)
class Labels:
    """What came with each sample of a data set besides the inputs (``Samples`` of a pass)."""

    data: Dataset

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.data)

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        """Yield the labels of the samples in order; empty where a sample has none."""
        for sample in self.data.samples():
            yield sample.labels


def labels_of(data: Dataset | None) -> Labels | None:
    """The labels of a data set; None where there is none."""
    return None if data is None else Labels(data)


def open_data(
    given: Any, inputs: tuple[InputSpec, ...], what: str, encode: Encode | None = None
) -> Dataset:
    """The checked data set that DATA stands for.

    what: "calibration" or "evaluation", for messages. encode: of a language model's tokenizer,
    for text files. Every sample is read once and checked: names, dtypes, shapes, no NaN or
    infinity, at least one sample.
    Raises DataError with file or sample index.
    """
    where = given if isinstance(given, str) else getattr(given, "__name__", str(given))
    where = f"{what} data {where}"
    read = _reader(given, inputs, where, encode)

    def checked() -> Iterator[Sample]:
        for sample in read():
            yield _check(sample, inputs)

    digests = tuple(sample.digest for sample in checked())
    if not digests:
        raise DataError(f"{where}: it holds no samples; at least one is needed")
    return Dataset(where, checked, digests, tuple(range(len(digests))))


def _reader(
    given: Any, inputs: tuple[InputSpec, ...], where: str, encode: Encode | None
) -> Callable[[], Iterable[Sample]]:
    if callable(given):
        return lambda: _from_function(given, inputs, where)
    if not isinstance(given, (str, pathlib.Path)):
        raise DataError(
            f"{where}: a {type(given).__name__}, expected a path or a function that yields "
            "feeds; for a list, give lambda: the_list"
        )
    text = str(given)
    path = pathlib.Path(text)
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise DataError(
                f"{where}: the directory holds no .npz files; save each sample as one, with "
                "numpy.savez(FILE, INPUT_NAME=array)"
            )
        return lambda: (_sort_out(_feed_in(f, where), inputs, f"{where}/{f.name}") for f in files)
    if path.suffix in {".npz", ".npy"}:
        if not path.is_file():
            raise DataError(f"{where}: no such file")
        return lambda: _slices(path, inputs, where)
    if path.suffix == SUFFIX:
        windows = functools.partial(token_windows, path, encode, where)
        return lambda: (
            _sort_out(item, inputs, f"{where}, window {i}") for i, item in enumerate(windows())
        )
    if ":" in text:
        function = load_function(text, DataError)
        return lambda: _from_function(function, inputs, where)
    reason = "no such file or directory" if not path.exists() else "not understood"
    raise DataError(
        f"{where}: {reason}; expected a directory of .npz files, a .npz, a .npy or file.py:function"
    )


def _feed_in(path: pathlib.Path, where: str) -> dict[str, Array]:
    """The arrays of one feed, whole."""
    with _readable(path, where), np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


@contextlib.contextmanager
def _readable(path: pathlib.Path, where: str) -> Iterator[None]:
    """Errors of numpy, zip and the file system become one DataError."""
    try:
        yield
    except (
        OSError,
        ValueError,
        TypeError,
        EOFError,
        KeyError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        SyntaxError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{where}: {path.name} cannot be read as numpy data: {reason}") from error


def _from_function(
    function: Callable[[], Iterable[Any]], inputs: tuple[InputSpec, ...], where: str
) -> Iterator[Sample]:
    try:
        for index, item in enumerate(repeatable_items(function)):
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
    except (Exception, SystemExit) as error:
        raise DataError(f"{where}: {describe_failure(function, error)}") from error


def _sort_out(item: Mapping[str, Any], inputs: tuple[InputSpec, ...], where: str) -> Sample:
    names = [i.name for i in inputs]
    item = _named(item, _essential(names))
    if is_decoder(names):
        item = completed(item, inputs)
    missing = [n for n in names if n not in item]
    if missing:
        raise DataError(
            f"{where}: no array for input '{missing[0]}'; it has "
            f"{', '.join(sorted(map(str, item))) or 'nothing'}"
        )
    return Sample(
        {n: np.asarray(item[n]) for n in names},
        {k: np.asarray(v) for k, v in item.items() if k not in names},
        where,
    )


def _essential(names: Sequence[str]) -> Sequence[str]:
    """The inputs that data must have: of a language model the rest follows from the ids."""
    if not is_decoder(names):
        return names
    read = [name for name in encoder_inputs(names) if name != MASK]
    return [*read, DECODER_IDS] if read else [IDS]


def _named(item: Mapping[str, T], names: Sequence[str]) -> Mapping[str, T]:
    """``item``, in which the single array of a model with one input may have any key."""
    if len(names) == 1 and names[0] not in item:
        others = [key for key in item if key != LABEL]
        if len(others) == 1:
            return {(names[0] if key == others[0] else key): v for key, v in item.items()}
    return item


def _slices(path: pathlib.Path, inputs: tuple[InputSpec, ...], where: str) -> Iterator[Sample]:
    """Samples of arrays whose first axis counts samples (or rows of a batch)."""
    specs = {i.name: i for i in inputs}
    with _readable(path, where):
        arrays = _named(open_rows(path), _essential(list(specs)))
    for name, array in arrays.items():
        if not array.shape:
            raise DataError(f"{where}: array '{name}' has no leading sample dimension")
    counts = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{k} {v}" for k, v in sorted(counts.items()))
        raise DataError(f"{where}: the arrays differ in their number of samples: {listed}")
    total = next(iter(counts.values()))
    whole = {n for n, a in arrays.items() if n in specs and len(a.shape) == len(specs[n].dims) + 1}
    rows = 1  # rows of the arrays that make one sample: the model's fixed batch size
    for name, spec in specs.items():
        if name in arrays and len(arrays[name].shape) == len(spec.dims) > 0:
            rows = max(rows, spec.dims[0] or 1)
    if 0 < total < rows:
        raise DataError(f"{where}: {total} rows, but the model takes {rows} at a time")
    streams = {name: array.rows() for name, array in arrays.items()}
    for index in range(total // rows):
        item = {}
        for name, stream in streams.items():
            with _readable(path, where):
                taken = list(itertools.islice(stream, rows))
            item[name] = taken[0] if name in whole else np.stack(taken)
        yield _sort_out(item, inputs, f"{where}, sample {index}")


def _check(sample: Sample, inputs: tuple[InputSpec, ...]) -> Sample:
    feeds, where = {}, sample.where
    for spec in inputs:
        array = sample.feeds[spec.name]
        if array.dtype != spec.dtype:
            kinds = {array.dtype.kind, spec.dtype.kind}
            if kinds != {"f"} and not kinds <= {"i", "u"}:
                raise DataError(
                    f"{where}: '{spec.name}' is {array.dtype}, the model expects {spec.dtype}; "
                    f"save it as .astype('{spec.dtype}') after the model's own preprocessing"
                )
            array = _same_values(array, spec.dtype, f"{where}: '{spec.name}'")
        fits = array.ndim == len(spec.dims) and all(
            d is None or d == n for d, n in zip(spec.dims, array.shape, strict=True)
        )
        if not fits:
            expected = ", ".join("any" if d is None else str(d) for d in spec.dims)
            raise DataError(
                f"{where}: '{spec.name}' has shape {list(array.shape)}, the model expects "
                f"[{expected}]; prepare it as the app will, or export the model with an open "
                "dimension where sizes differ"
            )
        if array.size == 0 and not spec.name.startswith(PAST):
            raise DataError(f"{where}: '{spec.name}' is empty")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(
                f"{where}: '{spec.name}' has a NaN or an infinity; every number must be finite: "
                "leave the sample out, or mend what makes it"
            )
        feeds[spec.name] = array
    return Sample(feeds, sample.labels, where)


def _same_values(array: Array, dtype: np.dtype[Any], where: str) -> Array:
    """``array`` as ``dtype``: floats are rounded, integers must fit."""
    with np.errstate(over="ignore"):
        cast_array = array.astype(dtype)
    if dtype.kind != "f" and not np.array_equal(cast_array, array):
        raise DataError(f"{where} has values that do not fit into {dtype}")
    return cast(Array, cast_array)
