"""Streams the bundle and its reference over the same steps, each with the state that it made.

Sample by sample both sides start from the same state, so what a state carries on does not show:
a little error in each step may die away, as in an LSTM whose gates forget, or add up without
end, as in a counter. Here both go their own way, and the ratio of signal to error is taken by
octaves of steps (1, 2, 3-4, 5-8, ...): it comes to rest if the error is bounded, and falls by
6 dB an octave if the error grows as the steps do.

The bundle runs in ``edgec_runtime``'s own stream, the reference in a loop here. Left out on
purpose: a limit that fails the build. How much drift an app bears, only its metric tells.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import edgec_runtime
from edgec.agreement import power
from edgec.errors import PassError
from edgec.evaluate import Run, as_db
from edgec.export import Exported
from edgec.inputs import Inputs
from edgec.passes import Feeds
from edgec.runners import reference_runner

STEPS = 64

_FALLS_DB = 2.0  # an octave; a random walk of errors loses 3
_HEARD_DB = 60.0  # above, it is the noise of float32
_EQUAL_DB = 200.0  # of no error at all

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Drift:
    """Ratio of signal to error by octaves of steps: step 1, 2, 3 to 4, 5 to 8, ...

    outputs_db: of the outputs that are no state, floats only; empty if there are none.
    state_db: of the state.
    """

    steps: int
    outputs_db: tuple[float, ...]
    state_db: tuple[float, ...]

    @property
    def grows(self) -> bool:
        """True if the state loses as much in each of the last two octaves as a random walk."""
        last = self.state_db[-3:]
        falls = [earlier - later for earlier, later in itertools.pairwise(last)]
        return len(falls) == 2 and min(falls) > _FALLS_DB and last[-1] < _HEARD_DB

    @property
    def findings(self) -> tuple[str, ...]:
        """The drift in words, and a warning if it has no end in sight."""
        streamed = (
            f"streamed over {self.steps} steps, reference and bundle each with its own state: "
        )
        if min(self.outputs_db + self.state_db) >= _EQUAL_DB:
            return (f"{streamed}equal in every number",)
        ends = [1 << octave for octave in range(len(self.state_db))]
        ends[-1] = self.steps
        by_step = ", ".join(map(str, ends))
        listed = [f"of the state {_listed(self.state_db)} dB"]
        if self.outputs_db:
            listed.insert(0, f"of the outputs {_listed(self.outputs_db)} dB")
        found = [f"{streamed}SQNR up to step {by_step}: {'; '.join(listed)}"]
        if self.grows:
            found.append(
                f"the error of the state GROWS from step to step, and still does at step "
                f"{self.steps}: judge whole streams, or leave the layers that make the state in "
                "float"
            )
        return tuple(found)

    @property
    def results(self) -> dict[str, Any]:
        """What the manifest says."""
        return {
            "steps": self.steps,
            "outputs_sqnr_db": list(self.outputs_db),
            "state_sqnr_db": list(self.state_db),
        }


def judge_stream(exported: Exported, bundle: pathlib.Path, inputs: Inputs) -> Drift | None:
    """The drift of a bundle file on the samples of the judgement; None if it has no state."""
    if not exported.state:
        return None
    model = edgec_runtime.load(bundle, any_target=True)
    feeds = (sample.feeds for sample in inputs.judged())
    return measure_drift(exported.state, reference_runner(exported.model), model, feeds)


def measure_drift(
    state: Mapping[str, str],
    reference: Run,
    bundle: edgec_runtime.Model,
    samples: Iterable[Feeds],
    steps: int = STEPS,
) -> Drift:
    """Run both from zeros over the samples in order, again from the first where they are few.

    state: input -> output. samples: whole feeds; their state only tells the batch, and those of
    another batch than the first's are left out.
    Raises PassError if a number of the bundle's state is not finite where the reference's is.
    """
    taken = list(itertools.islice(samples, steps))
    shapes = {name: taken[0][name].shape for name in state}
    taken = [f for f in taken if all(f[name].shape == shapes[name] for name in state)]
    kept: dict[str, Array] = {name: np.zeros_like(taken[0][name]) for name in state}
    stream = bundle.stream(state=kept)
    octaves = (steps - 1).bit_length() + 1
    sums = np.zeros((2, octaves, 2))  # [outputs or state, octave, signal or noise]
    floats = False
    for step, feeds in enumerate(itertools.islice(itertools.cycle(taken), steps)):
        given = {name: array for name, array in feeds.items() if name not in state}
        expected = dict(reference({**given, **kept}))
        kept = {name: expected.pop(output) for name, output in state.items()}
        actual = stream(**given)
        made = stream.snapshot()
        for name, array in kept.items():
            if (np.isfinite(array) & ~np.isfinite(made[name])).any():
                raise PassError(
                    f"streamed, the state '{name}' of the bundle is not finite after step "
                    f"{step + 1}, the reference's is; leave the layers that make it in float"
                )
        octave = step.bit_length()
        for name, array in expected.items():
            if array.dtype.kind == "f":
                floats = True
                sums[0, octave] += power(array, actual[name])
        for name, array in kept.items():
            sums[1, octave] += power(array, made[name])
    outputs_db, state_db = (
        tuple(round(as_db(signal, noise), 1) for signal, noise in part) for part in sums
    )
    return Drift(steps, outputs_db if floats else (), state_db)


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.0f}" for value in values)
