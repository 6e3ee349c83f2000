"""What is judged besides the mean, as the user asked: slices and robustness.

The settings are checked against promises and data before the passes run: what cannot be
judged is an error then, and not a promise that nobody looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import onnx_ir as ir

from edgec.data import InputSpec, Sample
from edgec.errors import DataError, EdgecError, suggestion
from edgec.evaluate import Run
from edgec.metrics import TaskMetric
from edgec.promise import Limits
from edgec.robustness import RobustnessPlan, plan_robustness
from edgec.slices import SliceColumn, check_slices
from edgec.source import ImageSpec
from edgec_runtime.manifest import Image


@dataclass(frozen=True)
class Scrutiny:
    """What to judge besides the mean; by default nothing.

    slice: the label column whose values are the slices. slice_min_samples: samples from which
    a slice is judged alone. robustness_epsilon: the largest change of a value by an attack, as
    a share of the valid range of the input (8 of 255 grey levels: 0.0314).
    robustness_samples: at most so many samples, evenly spaced, are disturbed.
    """

    slice: str | None = None
    slice_min_samples: int = 30
    robustness_epsilon: float | None = None
    robustness_samples: int = 500

    def __post_init__(self) -> None:
        """Refuse what cannot be judged with any data."""
        epsilon = self.robustness_epsilon
        if epsilon is not None and not (math.isfinite(epsilon) and 0 < epsilon <= 1):
            raise EdgecError(
                f"robustness_epsilon is {epsilon!r}, expected a share of the valid range above 0 "
                "and up to 1; 8 of 255 grey levels are 0.0314"
            )
        for name, least in (("slice_min_samples", 1), ("robustness_samples", 2)):
            if getattr(self, name) < least:
                raise EdgecError(f"{name} is {getattr(self, name)!r}, expected {least} or more")


SETTINGS = tuple(field.name for field in fields(Scrutiny))


@dataclass(frozen=True)
class Examination:
    """What will be judged besides the mean, found possible on the data."""

    slices: SliceColumn | None = None
    robustness: RobustnessPlan | None = None


def with_options(scrutiny: Scrutiny, options: Mapping[str, Any]) -> Scrutiny:
    """The settings with those of the command line in their place; None stands for not given."""
    return replace(scrutiny, **{n: options[n] for n in SETTINGS if options[n] is not None})


def check_asked(scrutiny: Scrutiny, limits: Limits) -> None:
    """Refuse a promise that lacks its setting. Raises EdgecError."""
    if limits.max_slice_drop is not None and scrutiny.slice is None:
        raise EdgecError(
            "promise max_slice_drop needs to know the slices; give --slice COLUMN, a label column "
            "of the evaluation data"
        )
    if limits.max_robustness_drop is not None and scrutiny.robustness_epsilon is None:
        raise EdgecError(
            "promise max_robustness_drop needs the strength of the attacks; give "
            "--robustness-epsilon, a share of the input's valid range"
        )


def examine(
    scrutiny: Scrutiny,
    samples: Callable[[], Iterable[Sample]],
    *,
    count: int,
    where: str,
    metric: TaskMetric | None,
    classifier: str | None,
    reference: Callable[[], tuple[ir.Model, Run]],
    inputs: Sequence[InputSpec],
    image: ImageSpec | Image | None,
) -> Examination:
    """Settle what is judged on these samples. Raises EdgecError with what is missing.

    count: of the samples; 0 if there is no data but made-up inputs. where: they are from.
    reference: the graph and how it runs; called only if robustness is judged.
    """
    wanted = [scrutiny.slice and "--slice", scrutiny.robustness_epsilon and "--robustness-epsilon"]
    asked = [str(option) for option in wanted if option]
    if asked and not count:
        raise DataError(f"{' and '.join(asked)} need labelled data to judge on; give --evaluation")
    slices = plan = None
    if scrutiny.slice is not None:
        slices = SliceColumn(scrutiny.slice, scrutiny.slice_min_samples)
        check_slices(slices, samples(), where)
    if scrutiny.robustness_epsilon is not None:
        graph, run = reference()
        plan = plan_robustness(
            scrutiny.robustness_epsilon,
            samples(),
            count=count,
            most=scrutiny.robustness_samples,
            reference=graph,
            run_reference=run,
            output=classifier,
            inputs=inputs,
            image=image,
            metric=metric,
            besides=scrutiny.slice,
        )
    return Examination(slices, plan)


def scrutiny_from(table: Mapping[str, Any], where: str) -> Scrutiny:
    """The settings of a TOML table; an unknown key or a wrong type is an EdgecError."""
    kinds = {
        "slice": str,
        "slice_min_samples": int,
        "robustness_epsilon": float,
        "robustness_samples": int,
    }
    for key, value in table.items():
        if key not in kinds:
            raise EdgecError(
                f"{where}: unknown key '{key}'{suggestion(key, kinds)}; "
                f"the keys are {', '.join(kinds)}"
            )
        fitting = (int, float) if kinds[key] is float else kinds[key]
        if isinstance(value, bool) or not isinstance(value, fitting):
            expected = {str: "text", int: "a whole number", float: "a number"}[kinds[key]]
            raise EdgecError(f"{where}: {key} is {value!r}, expected {expected}")
    return Scrutiny(**table)
