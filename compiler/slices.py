"""The metric of every slice of the evaluation data, and the worst of them.

A slice is the samples that share one value of a label column: a class, a camera, a group of
people. Compression takes from rare slices first while the mean stays (Hooker et al. 2019,
arXiv:1911.05248; 2020, arXiv:2010.03058), so the worst slice can be a promise.

Slices below a least number of samples are listed, but no promise is held against one of
them; all of them together are judged as one slice, if they are enough then.

Left out on purpose: finding slices that nobody named, and crossing several columns (write
one column with both values in it).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from edgec.answers import Score, standard_error
from edgec.data import Sample
from edgec.errors import DataError, suggestion
from edgec.report import Metric, Slice, Slices


@dataclass(frozen=True)
class SliceColumn:
    """The label column whose values are the slices.

    least: samples from which a slice is judged alone.
    """

    name: str
    least: int

    def value(self, sample: Sample) -> str:
        """The slice of a sample. Raises DataError if it has none, or several."""
        array = sample.labels.get(self.name)
        if array is None:
            has = ", ".join(sorted(sample.labels)) or "none"
            raise DataError(
                f"{sample.where}: no label column '{self.name}' to slice by"
                f"{suggestion(self.name, sample.labels)}; the arrays besides the inputs: {has}"
            )
        values = np.unique(array)
        if values.size != 1:
            raise DataError(
                f"{sample.where}: column '{self.name}' holds {values.size} values, expected one "
                "for the sample; give the samples one by one, with a batch of 1"
            )
        value = values[0]
        return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def check_slices(column: SliceColumn, samples: Iterable[Sample], where: str) -> None:
    """Refuse data whose worst slice could not be judged. Raises DataError."""
    counts = Counter(column.value(sample) for sample in samples)
    if len(counts) == 1:
        raise DataError(
            f"{where}: column '{column.name}' is {next(iter(counts))!r} in every sample, so there "
            "is one slice only; name a column that tells samples apart"
        )
    small = [n for n in counts.values() if n < column.least]
    if len(small) == len(counts) and sum(small) < column.least:
        raise DataError(
            f"{where}: the {len(counts)} slices of column '{column.name}' have "
            f"{sum(small)} samples together, below the least of {column.least} for a judgement; "
            "give more samples, or a smaller --slice-min-samples"
        )


def by_slice(column: SliceColumn, values: Sequence[str], score: Score) -> Slices:
    """The score of every slice, the worst first and those that are not judged last.

    values: the slice of each sample, in the order that ``score`` counts them in.
    Raises DataError naming the slice on which the metric fails.
    """
    positions: dict[str, list[int]] = {}
    for position, value in enumerate(values):
        positions.setdefault(value, []).append(position)
    small = {v: p for v, p in positions.items() if len(p) < column.least}
    rows = []
    for value, own in positions.items():
        if value not in small:
            rows.append(_judged(column, value, own, score))
    pool = sorted(position for own in small.values() for position in own)
    if len(small) > 1 and len(pool) >= column.least:
        rows.append(_judged(column, "", pool, score, pooled=len(small)))
    rows.sort(key=lambda row: (-row.drop, row.value))
    for value, own in sorted(small.items(), key=lambda item: (-len(item[1]), item[0])):
        rows.append(_listed(value, own, score))
    return Slices(
        column=column.name,
        metric=score(range(len(values))).name,
        least_samples=column.least,
        rows=tuple(rows),
    )


def _judged(
    column: SliceColumn, value: str, positions: list[int], score: Score, pooled: int = 0
) -> Slice:
    try:
        found = score(positions)
    except DataError as error:
        which = f"{column.name} = {value}" if not pooled else f"{pooled} small slices together"
        raise DataError(f"slice {which}, {len(positions)} samples: {error}") from error
    return _row(value, positions, found, standard_error(score, positions), True, pooled)


def _listed(value: str, positions: list[int], score: Score) -> Slice:
    try:
        found = score(positions)
    except DataError:  # so few samples may have no value, a correlation for example
        found = Metric("", math.nan, math.nan, math.nan)
    return _row(value, positions, found, standard_error(score, positions), False, 0)


def _row(
    value: str,
    positions: list[int],
    found: Metric,
    error: float | None,
    judged: bool,
    pooled: int,
) -> Slice:
    return Slice(
        value=value,
        samples=len(positions),
        reference=found.reference,
        bundle=found.bundle,
        drop=found.drop,
        error=error,
        judged=judged,
        pooled=pooled,
    )
