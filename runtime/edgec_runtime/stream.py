"""Runs a model with state through time: each call starts from what the call before it left.

    stream = edgec_runtime.load("vad.x86-64.edgec").stream()
    for chunk in chunks:
        [probability] = stream(chunk).values()

``open_stream`` is the method ``Model.stream``. A stream takes the inputs that are no state and
gives the outputs that are none; the manifest's section ``state`` says which are. A model has as
many streams as are asked for, in as many threads: they share its session and nothing else.

Left out on purpose: a context manager, for there is nothing to close; waiting for another
thread's call, since two threads that feed one stream have no order.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgec_runtime.errors import InputError
from edgec_runtime.feeds import Array, check_feeds
from edgec_runtime.manifest import Value
from edgec_runtime.state import StatePair

if TYPE_CHECKING:
    from edgec_runtime.session import Model


def open_stream(
    model: Model, batch: int | None = None, state: Mapping[str, Array] | None = None
) -> Stream:
    """Start a stream, from zeros or from what ``Stream.snapshot`` returned.

    batch: rows of every call, each a stream of its own; by default those of ``state``, else 1.
    Raises InputError if the bundle states no state, for a batch that the model does not take,
    and for a wrong name, dtype or shape in ``state``.
    """
    pairs = model.manifest.state
    if pairs is None:
        raise InputError(
            f"model {model.path}: its bundle states no state to keep; build it with "
            "--state INPUT=OUTPUT, or call the model itself"
        )
    if batch is not None and (type(batch) is not int or batch < 1):
        raise InputError(f"batch is {batch!r}, expected a whole number from 1 up")
    first = _zeros(pairs, batch or 1) if state is None else _restored(pairs, state)
    stream = Stream(model, pairs, first)
    if batch is not None and stream.batch is None:
        raise InputError(
            f"batch is {batch}, but the model's batch has a fixed size; leave batch out"
        )
    if batch is not None and stream.batch != batch:
        raise InputError(f"batch is {batch}, but state has {stream.batch} rows; leave batch out")
    return stream


class Stream:
    """A run of a model through time; ``Model.stream`` makes one. It takes one call at a time."""

    def __init__(self, model: Model, pairs: tuple[StatePair, ...], state: dict[str, Array]) -> None:
        """Take over the state, arrays by input name, from which the first call starts."""
        self._model = model
        self._pairs = pairs
        self._state = state
        self._turn = threading.Lock()
        taken, given = {pair.input for pair in pairs}, {pair.output for pair in pairs}
        self._inputs = tuple(value for value in model.inputs if value.name not in taken)
        self._outputs = tuple(value for value in model.outputs if value.name not in given)

    def __call__(self, /, *arrays: Any, **feeds: Any) -> dict[str, Array]:
        """Run one step; arrays by position or by name, as for the model but without the state.

        Returns the outputs that are no state, by name. Raises InputError for a wrong name, dtype
        or shape; the state is then what it was before.
        """
        for name in self._state:
            if name in feeds:
                raise InputError(
                    f"input '{name}' is state, which the stream keeps; leave it out, or start "
                    "from it with model.stream(state=...)"
                )
        given = check_feeds(self._inputs, arrays, feeds)
        self._check_batch(given)
        with self._alone():
            outputs = self._model.run({**given, **self._state})
            state = {pair.input: outputs.pop(pair.output) for pair in self._pairs}
            for pair in self._pairs:
                before, after = self._state[pair.input].shape, state[pair.input].shape
                if before != after:
                    raise InputError(
                        f"the state '{pair.output}' came back with the shape {list(after)}, the "
                        f"stream keeps {list(before)}; give every call the same batch, stated by "
                        "model.stream(batch=...)"
                    )
            self._state = state
        return outputs

    def reset(self, *rows: int) -> None:
        """Begin anew with zeros; with numbers of rows, in these rows of the batch alone.

        Raises InputError for a row that there is not, and where the batch is fixed.
        """
        with self._alone():
            if not rows:
                self._state = {name: np.zeros_like(array) for name, array in self._state.items()}
                return
            state = self.snapshot()
            for pair in self._pairs:
                if self.batch is None or pair.batch_axis is None:
                    raise InputError(
                        f"the state '{pair.input}' has the fixed shape {list(pair.shape)}, in "
                        "which no dimension is known to be the batch; reset the whole stream"
                    )
                by_row = np.moveaxis(state[pair.input], pair.batch_axis, 0)
                for row in rows:
                    if type(row) is not int or not 0 <= row < self.batch:
                        raise InputError(f"row {row!r}: the stream has rows 0 to {self.batch - 1}")
                    by_row[row] = 0
            self._state = state

    def snapshot(self) -> dict[str, Array]:
        """A copy of the state by input name, from which ``Model.stream`` can go on."""
        return {name: array.copy() for name, array in self._state.items()}

    @property
    def inputs(self) -> tuple[Value, ...]:
        """Names, dtypes and shapes of what a call takes."""
        return self._inputs

    @property
    def outputs(self) -> tuple[Value, ...]:
        """Names, dtypes and shapes of what a call returns."""
        return self._outputs

    @property
    def batch(self) -> int | None:
        """Rows of every call; None if the model's batch is fixed."""
        for pair in self._pairs:
            if pair.batch_axis is not None:
                return int(self._state[pair.input].shape[pair.batch_axis])
        return None

    def _check_batch(self, given: Mapping[str, Array]) -> None:
        """Refuse another number of rows, where the dimension has the name of the state's."""
        names = {pair.shape[pair.batch_axis] for pair in self._pairs if pair.batch_axis is not None}
        for value in self._inputs:
            for size, wanted in zip(given[value.name].shape, value.shape, strict=True):
                if isinstance(wanted, str) and wanted in names and size != self.batch:
                    raise InputError(
                        f"input '{value.name}' has {wanted} = {size}, the stream has "
                        f"{self.batch}; start it with model.stream(batch={size})"
                    )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._turn.acquire(blocking=False):
            raise InputError(
                "the stream is in a call of another thread; make one stream for each, with "
                "model.stream()"
            )
        try:
            yield
        finally:
            self._turn.release()

    def __repr__(self) -> str:
        """The model, the batch and the state's names."""
        rows = "" if self.batch is None else f" of {self.batch} rows"
        return f"<Stream{rows} of {self._model.manifest.name}, state {', '.join(self._state)}>"


def _zeros(pairs: tuple[StatePair, ...], batch: int) -> dict[str, Array]:
    shapes = {
        pair.input: [size if isinstance(size, int) else batch for size in pair.shape]
        for pair in pairs
    }
    try:
        return {pair.input: np.zeros(shapes[pair.input], pair.dtype) for pair in pairs}
    except (MemoryError, ValueError) as error:
        raise InputError(f"batch is {batch}, for which there is not enough memory") from error


def _restored(pairs: tuple[StatePair, ...], state: Mapping[str, Array]) -> dict[str, Array]:
    """A copy of the state that a stream is started from, checked like a feed."""
    values = [Value(pair.input, pair.dtype, pair.shape) for pair in pairs]
    if not isinstance(state, Mapping):
        raise InputError(f"state is a {type(state).__name__}, expected what Stream.snapshot gives")
    try:
        checked = check_feeds(values, (), state)
    except InputError as error:
        raise InputError(f"state: {error}") from error
    rows = {checked[p.input].shape[p.batch_axis] for p in pairs if p.batch_axis is not None}
    if len(rows) > 1:
        raise InputError(f"state: its arrays have {sorted(rows)} rows, expected one number")
    return {name: array.copy() for name, array in checked.items()}
