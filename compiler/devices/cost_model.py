"""From executed instructions to milliseconds, for a device that somebody has measured.

    milliseconds = sum over classes of  number of instructions x cost,   every cost >= 0

The costs are those of the least squares of the relative errors over the recorded models. The
classes are told apart as far as the records allow: of three ways to group them, the one is
taken whose estimates of left-out models are best. That error is told with every estimate:

    total       one cost for every instruction
    kinds       loads and stores, SIMD, the rest
    classes     every class of its own, the multiplications of each type among them

Left out on purpose: caches, branches and the number of cores. A model much larger than the
recorded ones is estimated too low, since it leaves the caches; record one of its size.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.errors import DataError

Array = np.ndarray[Any, Any]
Counts = Mapping[str, int]

# parts of a total that do not overlap; "rest" is what none of them counts
_GROUPS = ("load_store", "simd", "sve", "sme")
_PRODUCTS = ("fma_fp32", "fma_fp16", "widening", "dot", "i8mm", "bf16")  # parts of simd
CLASSES = ("total", *_GROUPS, *_PRODUCTS)  # what a counter counts
_WAYS = {
    "total": ("total",),
    "kinds": (*_GROUPS, "rest"),
    "classes": (*_GROUPS, *_PRODUCTS, "rest"),
}
_ENOUGH = 3  # models from which leaving one out says something
_UNSEEN = 0.01  # share of instructions of classes without a record that is still estimated


@dataclass(frozen=True)
class Measured:
    """A model whose instructions were counted and whose latency was measured."""

    counts: Counts
    milliseconds: float


@dataclass(frozen=True)
class CostModel:
    """Milliseconds per instruction of each class.

    way: how the classes are grouped. error: mean relative error on a model that was left out,
    None where there are too few to leave one out. models: number of records.
    """

    way: str
    costs: Mapping[str, float]
    seen: frozenset[str]  # classes that the records execute
    error: float | None
    models: int

    def milliseconds(self, counts: Counts) -> float:
        """The estimate for one model.

        Raises DataError if it executes what no record does.
        """
        parts = _parts(counts)
        unseen = {name: n for name, n in parts.items() if n and name not in self.seen}
        if sum(unseen.values()) > _UNSEEN * counts["total"]:
            raise DataError(
                f"no recorded model executes instructions of the class {', '.join(unseen)}, "
                "so their cost is not known; record one that does (edgec bench --record)"
            )
        return _estimate(self.costs, counts, self.way)


def fit(measured: Sequence[Measured]) -> CostModel:
    """The cost model of a device. Raises DataError without a record."""
    if not measured:
        raise DataError(
            "no recorded model has both a latency and counts; record one on the device and on "
            "an emulated CPU of its kind: edgec bench BUNDLE --on native --on PROFILE --record FILE"
        )
    way = next(iter(_WAYS))
    error: float | None = None
    if len(measured) >= _ENOUGH:
        errors = {way: _left_out_error(measured, way) for way in _WAYS}
        way = min(errors, key=errors.__getitem__)
        error = errors[way]
    seen = {name for one in measured for name, number in _parts(one.counts).items() if number}
    return CostModel(way, _costs(measured, way), frozenset(seen), error, len(measured))


def _left_out_error(measured: Sequence[Measured], way: str) -> float:
    """Mean relative error of each model's estimate from the other ones."""
    errors = []
    for number, one in enumerate(measured):
        others = [*measured[:number], *measured[number + 1 :]]
        estimate = _estimate(_costs(others, way), one.counts, way)
        errors.append(abs(estimate / one.milliseconds - 1.0))
    return statistics.fmean(errors)


def _estimate(costs: Mapping[str, float], counts: Counts, way: str) -> float:
    grouped = _grouped(counts, way)
    return sum(cost * grouped[name] for name, cost in costs.items())


def _costs(measured: Sequence[Measured], way: str) -> dict[str, float]:
    """Costs >= 0 with the least squares of relative errors, by trying every support.

    The best non-negative solution is the unbounded one of the classes that it uses.
    """
    names = [n for n in _WAYS[way] if any(_grouped(one.counts, way)[n] for one in measured)]
    table = np.array(
        [[_grouped(one.counts, way)[n] / one.milliseconds for n in names] for one in measured]
    )  # [model, class], in units of the latency
    scale = table.max(axis=0)
    ones = np.ones(len(measured))
    best, least = np.zeros(len(names)), float(len(measured))
    for size in range(1, min(len(names), len(measured)) + 1):
        for support in map(list, itertools.combinations(range(len(names)), size)):
            found, *_ = np.linalg.lstsq(table[:, support] / scale[support], ones, rcond=None)
            if found.min() < 0:
                continue
            error = float(np.sum((table[:, support] / scale[support] @ found - ones) ** 2))
            if error < least * (1.0 - 1e-9):
                least, best = error, np.zeros(len(names))
                best[support] = found / scale[support]
    return dict(zip(names, best.tolist(), strict=True))


def _grouped(counts: Counts, way: str) -> dict[str, int]:
    parts = _parts(counts)
    if way == "total":
        return {"total": counts["total"]}
    if way == "kinds":
        simd = parts["simd"] + sum(parts[name] for name in _PRODUCTS)
        return {**{name: parts[name] for name in (*_GROUPS, "rest")}, "simd": simd}
    return parts


def _parts(counts: Counts) -> dict[str, int]:
    """Classes that add up to the total: simd without the products, and the rest."""
    parts = {name: counts[name] for name in (*_GROUPS, *_PRODUCTS)}
    parts["simd"] -= sum(counts[name] for name in _PRODUCTS)
    return {**parts, "rest": counts["total"] - sum(counts[name] for name in _GROUPS)}
