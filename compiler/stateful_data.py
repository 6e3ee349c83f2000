"""Data of a model with state: samples may leave the state out, and it follows from the others.

The samples are then the steps of a recording, in order. The first starts from zeros, and so does
every sample with a true ``restart`` (the first chunk of another recording) and every one of
another batch; all others start from the state that the model gave for the sample before. So one
step on real data is judged and calibrated on a real state. Where the samples bring their state
themselves, it is taken as it is.

Each pass over the data runs the model once per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from edgec.data import Dataset, InputSpec, Sample, open_data
from edgec.evaluate import Run
from edgec.token_windows import Encode

RESTART = "restart"

Array = np.ndarray[Any, Any]


def open_stateful_data(
    given: Any,
    inputs: tuple[InputSpec, ...],
    what: str,
    state: Mapping[str, str],
    model: Callable[[], Run],
    encode: Encode | None = None,
) -> Dataset:
    """As ``open_data``, with the state filled in where the samples leave it out.

    state: input -> output; nothing is filled in where it is empty. model: opens what runs the
    samples; called only if there is a state to be filled in.
    """
    if not state:
        return open_data(given, inputs, what, encode)
    rest = tuple(spec for spec in inputs if spec.name not in state)
    data = open_data(given, rest, what, encode)
    first = next(iter(data.samples()))
    if any(name in first.labels for name in state):
        return open_data(given, inputs, what, encode)
    run = model()

    def read() -> Iterator[Sample]:
        kept: dict[str, Array] = {}
        for sample in data.read():
            labels = {name: array for name, array in sample.labels.items() if name != RESTART}
            fresh = _zeros(inputs, state, sample)
            again = bool(np.any(sample.labels.get(RESTART, False)))
            if again or any(kept.get(n, a).shape != a.shape for n, a in fresh.items()) or not kept:
                kept = fresh
            whole = {**sample.feeds, **kept}
            feeds = {spec.name: whole[spec.name] for spec in inputs}
            yield replace(sample, feeds=feeds, labels=labels)
            outputs = run(feeds)
            kept = {name: outputs[output] for name, output in state.items()}

    return replace(data, read=read)


def _zeros(
    inputs: tuple[InputSpec, ...], state: Mapping[str, str], sample: Sample
) -> dict[str, Array]:
    """The state before a first sample; the first open dimension of its feeds is the batch."""
    sizes = (
        size
        for spec in inputs
        if spec.name not in state
        for size, wanted in zip(sample.feeds[spec.name].shape, spec.dims, strict=True)
        if wanted is None
    )
    batch = next(sizes, 1)
    return {
        spec.name: np.zeros([batch if size is None else size for size in spec.dims], spec.dtype)
        for spec in inputs
        if spec.name in state
    }
