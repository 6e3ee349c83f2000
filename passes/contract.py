"""The contract of a pass: a model and a context in, a model and an account out.

A pass is a frozen dataclass of its parameters. It owns the model it is handed and may
change it in place, but never the bytes of a tensor: clones share them. What it looked at
and left alone goes into ``Result.skipped``; what it decided by measurement goes into
``Result.decisions``, from which ``Context.lock`` replays it exactly.
"""

from __future__ import annotations

import enum
import pathlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import onnx_ir as ir

from edgec.targets import Target
from edgec_runtime.errors import EdgecError

if TYPE_CHECKING:
    from edgec.passes.workers import Workers

Feeds = Mapping[str, np.ndarray[Any, Any]]
Progress = Callable[[str, int, int], None]  # what, done, total


class PassError(EdgecError):
    """A pass cannot do what it was asked to; the message names the node."""


class Stage(enum.IntEnum):
    """When a pass runs. A recipe whose stages go backwards is an error.

    TRAIN may stand before or after QUANTIZE; PRUNE and TRAIN may take turns before it.
    """

    CLEAN = 0
    PRUNE = 1
    TRAIN = 2
    QUANTIZE = 3
    LOWER = 4


class Samples(Protocol):
    """Feeds that can be iterated over any number of times, one at a time."""

    def __iter__(self) -> Iterator[Feeds]:
        """Yield the feeds of one run after the other, in a fixed order."""
        ...

    def __len__(self) -> int:
        """Return the number of runs."""
        ...


@dataclass(frozen=True)
class Skip:
    """A node that a pass looked at and left alone."""

    node: str
    reason: str


@dataclass(frozen=True)
class Result:
    """What a pass returns.

    changed: exact count of the places changed; 0 means that the model is byte-equal.
    touched: names of the values whose numbers a lossy pass altered (SQNR is taken there).
    decisions: JSON data that replays this run exactly when given back as ``Context.lock``.
    findings: facts that the user should see in the report.
    sensitivity: SQNR in dB of each quantized node's own error at its float output, by node
    name: what the node by itself costs. The lowest gain most when they stay float.
    """

    model: ir.Model
    changed: int
    skipped: tuple[Skip, ...] = ()
    touched: tuple[str, ...] = ()
    decisions: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[str, ...] = ()
    sensitivity: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What a pass may consult. Read only.

    calibration, validation: disjoint; None where the user gave no data.
    calibration_labels, validation_labels: what came with each of their samples besides the
    inputs, in the same order; None where nothing did.
    lock: decisions of an earlier run of this step; empty where nothing is to be replayed.
    unquantized: the model before the first lossy pass of stage QUANTIZE; None before that.
    work: folder for what a killed build goes on from, and for large intermediate data; it
    need not exist, and is removed in the end. None: nothing is kept.
    cache: folder for what other builds may use, too; it need not exist. None: nothing is kept.
    workers: the processes that trainings are shared with; None if there are no others.
    context_length: tokens that a language model reads at most; None if it is none, or not known.
    """

    target: Target
    reference: ir.Model
    calibration: Samples | None = None
    validation: Samples | None = None
    calibration_labels: Samples | None = None
    validation_labels: Samples | None = None
    lock: Mapping[str, Any] = field(default_factory=dict)
    unquantized: ir.Model | None = None
    work: pathlib.Path | None = None
    cache: pathlib.Path | None = None
    workers: Workers | None = None
    context_length: int | None = None
    seed: int = 0
    progress: Progress = lambda what, done, total: None


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass whose fields are its parameters."""

    name: ClassVar[str]
    stage: ClassVar[Stage]
    lossless: ClassVar[bool]
    version: ClassVar[int]

    def run(self, model: ir.Model, context: Context) -> Result:
        """Return the changed model and the account of what was done."""
        ...
