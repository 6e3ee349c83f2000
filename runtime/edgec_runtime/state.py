"""What a bundle says about a model with state: the manifest's optional section ``state``.

Some outputs of such a model are inputs of its next call: h and c of an LSTM, the hidden state of
a GRU, the ``state`` of silero-vad. The section lists these pairs; ``edgec_runtime.stream`` carries
them from call to call. Field names are JSON keys; every key is stated. dtype and shape are those
of the input of the graph ``main``, so that a host in another language needs this section alone.

A state has at most one dimension of open size, that of the batch: each of its rows is a stream of
its own.

Left out on purpose: state that grows (a key-value cache is the section ``generation``), and
initial values other than zeros (``Model.stream`` starts from any).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgec_runtime.errors import BundleError

if TYPE_CHECKING:
    from edgec_runtime.manifest import Graph, Value

_MOST_BYTES = 1 << 30  # of one row of a state; a file may state any size


@dataclass(frozen=True)
class StatePair:
    """An input that takes the state, and the output that is its next value."""

    input: str
    output: str
    dtype: str
    shape: tuple[int | str | None, ...]
    initial: Literal["zeros"] = "zeros"

    @property
    def batch_axis(self) -> int | None:
        """The dimension of open size; None if the batch is fixed."""
        return next((i for i, size in enumerate(self.shape) if not isinstance(size, int)), None)


def check_state(pairs: Sequence[StatePair], graphs: Mapping[str, Graph], *, cached: bool) -> None:
    """Raise BundleError unless the section fits the signature of the graph ``main``.

    cached: the model is a language model, which keeps a cache instead.
    """
    if cached:
        raise _wrong("a language model has the section generation instead")
    if "main" not in graphs:
        raise _wrong("there is no graph 'main'")
    graph = graphs["main"]
    if not pairs:
        raise _wrong("it is empty; expected pairs of an input and an output, or no section")
    inputs = {value.name: value for value in graph.inputs}
    outputs = {value.name: value for value in graph.outputs}
    taken, given = [pair.input for pair in pairs], [pair.output for pair in pairs]
    for side, named, known in (("input", taken, inputs), ("output", given, outputs)):
        for name in named:
            if name not in known:
                raise _wrong(f"it names the {side} '{name}', which the graph main lacks")
        if len(set(named)) != len(named):
            raise _wrong(f"it names an {side} twice")
    for pair in pairs:
        before = inputs[pair.input]
        if (pair.dtype, pair.shape) != (before.dtype, before.shape):
            raise _wrong(
                f"it says that the input '{pair.input}' is {pair.dtype} {list(pair.shape)}, the "
                f"graph main has {before.dtype} {list(before.shape)}"
            )
        reason = misfit(before, outputs[pair.output])
        if reason:
            raise _wrong(reason)


def misfit(before: Value, after: Value) -> str:
    """Why an output cannot be the next value of an input, in words; empty if it can.

    before: the input; after: the output. Where the shape of the output is unknown, its dtype
    decides.
    """
    if before.dtype == "string":
        return f"the input '{before.name}' holds text, expected numbers"
    if before.dtype != after.dtype or not _fits(before.shape, after.shape):
        return (
            f"the output '{after.name}' is {after.dtype} {list(after.shape)}, the input "
            f"'{before.name}' {before.dtype} {list(before.shape)}; expected the same"
        )
    if sum(not isinstance(size, int) for size in before.shape) > 1:
        return (
            f"the input '{before.name}' has the shape {list(before.shape)}; only one dimension of "
            "a state may have an open size, that of the batch"
        )
    fixed = (size for size in before.shape if isinstance(size, int))
    if math.prod(fixed) * np.dtype(before.dtype).itemsize > _MOST_BYTES:
        return f"the input '{before.name}' has the shape {list(before.shape)}, which is over 1 GiB"
    return ""


def _fits(before: tuple[int | str | None, ...], after: tuple[int | str | None, ...]) -> bool:
    if not after:
        return True  # a file may state no shape of an output
    return len(before) == len(after) and not any(
        isinstance(b, int) and isinstance(a, int) and a != b
        for b, a in zip(before, after, strict=True)
    )


def _wrong(what: str) -> BundleError:
    return BundleError(f"manifest.json: state: {what}")
