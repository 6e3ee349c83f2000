"""Sizes of axes as expressions of atoms: what structural pruning can cut, and where.

An axis of 384 that a Reshape takes for 12 heads of 32 is the product of two atoms; one that a
Concat joined is a sum. Operators tie axes: tied expressions become one, and an atom is refined
into a product or a sum as soon as an operator looks inside it. An atom that is left is a
dimension that can be cut by itself: its indices are the units, and every expression that
contains the atom says which positions of its axis go with a unit.

This is the grouping of DepGraph (Fang et al. 2023, arXiv:2301.12900, section 3) on ONNX, with
expressions in the place of its index mappings: heads, the width of a head and the channels of
both sides of a Concat stay apart, and no alternative has to be chosen while following them.

Left out: cuts inside a repeated pattern (every second position of a strided Slice).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.passes.contract import Skip

Labels = np.ndarray[Any, np.dtype[np.int64]]


class Form(enum.Enum):
    """What an expression is so far."""

    ATOM = 0
    PRODUCT = 1  # of parts, row-major: the last varies fastest
    SUM = 2  # of parts, one behind the other
    TIED = 3  # equal to its only part


class Dim:
    """The length of an axis: an atom, or an expression of others. Refined in place.

    size: positions of the axis; None where it is known at run time only.
    """

    def __init__(self, size: int | None, frozen: Skip | None = None) -> None:
        """An atom; ``frozen`` says why it must not be cut."""
        self.size = size
        self.form = Form.ATOM
        self.parts: tuple[Dim, ...] = ()
        self.frozen = frozen
        self.mixed: Skip | None = None  # an operator that takes all its units together
        self.heads = False  # one matrix product for each unit
        self.least = 1  # units that have to stay

    def become(self, form: Form, parts: tuple[Dim, ...]) -> None:
        """Turn this atom into an expression; what was known of it holds for its atoms."""
        self.form, self.parts = form, parts
        for atom in atoms(self):
            atom.frozen = atom.frozen or self.frozen
            atom.mixed = atom.mixed or self.mixed
            atom.heads = atom.heads or self.heads
            atom.least = max(atom.least, self.least)


@dataclass(frozen=True)
class Clash(Exception):
    """Two expressions of one axis that have no common refinement."""

    reason: str


def find(dim: Dim) -> Dim:
    """The expression that stands for this one."""
    while dim.form is Form.TIED:
        [dim] = dim.parts
    return dim


def atoms(dim: Dim) -> Iterator[Dim]:
    """The atoms of an expression, in order; one that occurs twice is given twice."""
    dim = find(dim)
    if dim.form is Form.ATOM:
        yield dim
    for part in dim.parts:
        yield from atoms(part)


def product(dims: Sequence[Dim]) -> Dim:
    """The dimension that runs through all dims, the last fastest."""
    if len(dims) == 1:
        return find(dims[0])
    factors = [factor for dim in dims for factor in _factors(dim)]
    if len(factors) == 1:
        return factors[0]
    sizes = [factor.size for factor in factors]
    made = Dim(None if None in sizes else math.prod(s for s in sizes if s is not None))
    if factors:
        made.become(Form.PRODUCT, tuple(factors))
    return made


def total(dims: Sequence[Dim]) -> Dim:
    """The dimension that runs through one after the other."""
    terms = [term for dim in dims for term in _terms(dim)]
    if len(terms) == 1:
        return terms[0]
    sizes = [term.size for term in terms]
    made = Dim(None if None in sizes else sum(s for s in sizes if s is not None))
    if terms:
        made.become(Form.SUM, tuple(terms))
    return made


def freeze(dim: Dim, why: Skip) -> None:
    """Nothing of this dimension may be cut; the first reason is kept."""
    for atom in atoms(dim):
        atom.frozen = atom.frozen or why


def tie(first: Dim, second: Dim) -> None:
    """Make two dimensions one. Raises Clash where they cannot be."""
    first, second = find(first), find(second)
    if first is second:
        return
    if first.size != second.size:
        raise Clash(f"its length {_shown(first)} meets {_shown(second)}")
    if Form.ATOM in (first.form, second.form):
        atom, other = (first, second) if first.form is Form.ATOM else (second, first)
        atom.become(Form.TIED, (other,))
    elif Form.SUM in (first.form, second.form):
        _tie_sum(*((first, second) if first.form is Form.SUM else (second, first)))
    else:
        _tie_products(first, second)


def split(dim: Dim, offset: int) -> tuple[Dim, Dim]:
    """The first ``offset`` positions and the rest. Raises Clash where atoms are in the way."""
    dim = find(dim)
    if dim.size is None or not 0 <= offset <= dim.size:
        raise Clash(f"it is cut at {offset}, its length is {_shown(dim)}")
    if offset == 0:
        return Dim(0), dim
    if offset == dim.size:
        return dim, Dim(0)
    if dim.form is Form.ATOM:
        dim.become(Form.SUM, (Dim(offset), Dim(dim.size - offset)))
        return dim.parts[0], dim.parts[1]
    if dim.form is Form.PRODUCT:
        outer, *inner = dim.parts
        width = product(inner).size
        assert width is not None  # the product's size is known
        if offset % width:
            raise Clash(f"its cut at {offset} runs through blocks of {width}")
        left, right = split(outer, offset // width)
        return product([left, *inner]), product([right, *inner])
    before: list[Dim] = []
    for index, part in enumerate(dim.parts):
        size = part.size
        assert size is not None
        if offset < size:
            left, right = split(part, offset)
            return total([*before, left]), total([right, *dim.parts[index + 1 :]])
        before.append(part)
        offset -= size
    raise AssertionError("offset lies within the sum")


def labels(dim: Dim, atom: Dim) -> Labels:
    """For every position of the axis the unit of the atom that it goes with, or -1.

    The axis has a known size, and the atom occurs at most once in a product.
    """
    dim = find(dim)
    if dim is atom:
        return np.arange(atom.size or 0)
    if dim.form is Form.ATOM:
        return np.full(dim.size or 0, -1)
    if dim.form is Form.SUM:
        return np.concatenate([labels(part, atom) for part in dim.parts])
    found = np.full([part.size or 0 for part in dim.parts], -1)
    for axis, part in enumerate(dim.parts):
        inner = labels(part, atom)
        shape = [-1 if i == axis else 1 for i in range(len(dim.parts))]
        found = np.maximum(found, inner.reshape(shape))
    return found.reshape(-1)


def squared(dim: Dim) -> Iterator[Dim]:
    """Atoms that occur in two factors of one product: they have no units there."""
    dim = find(dim)
    if dim.form is Form.PRODUCT:
        seen: set[Dim] = set()
        for part in dim.parts:
            inside = set(atoms(part))
            yield from (atom for atom in atoms(part) if atom in seen)
            seen |= inside
    for part in dim.parts:
        yield from squared(part)


def _factors(dim: Dim) -> list[Dim]:
    dim = find(dim)
    if dim.form is Form.PRODUCT:
        return [factor for part in dim.parts for factor in _factors(part)]
    return [] if dim.size == 1 else [dim]


def _terms(dim: Dim) -> list[Dim]:
    dim = find(dim)
    if dim.form is Form.SUM:
        return [term for part in dim.parts for term in _terms(part)]
    return [] if dim.size == 0 else [dim]


def _tie_sum(first: Dim, second: Dim) -> None:
    """first is a sum: cut the second where the parts of the first end."""
    *parts, last = first.parts
    for part in parts:
        if part.size is None:
            raise Clash("the size of a part is known at run time only")
        left, second = split(second, part.size)
        tie(part, left)
    tie(last, second)


def _tie_products(first: Dim, second: Dim) -> None:
    """Refine the factors of both, from the outermost on, until they agree."""
    left, right = [first], [second]
    while left and right:
        left, right = (_factors(d[0]) + d[1:] for d in (left, right))
        if not (left and right):
            break
        a, b = left[0], right[0]
        if a.size == b.size:
            tie(a, b)
            left, right = left[1:], right[1:]
        elif a.size is None or b.size is None:
            raise Clash("its factors are known at run time only")
        elif a.size % b.size == 0:
            _divide(a, b.size)
        elif b.size % a.size == 0:
            _divide(b, a.size)
        else:
            raise Clash(f"blocks of {a.size} meet blocks of {b.size}")
    if any(dim.size != 1 for dim in (*left, *right)):
        raise Clash("their factors do not match")


def _divide(dim: Dim, outer: int) -> None:
    if dim.form is not Form.ATOM or dim.size is None:
        raise Clash(f"a joined length of {_shown(dim)} meets blocks of {outer}")
    dim.become(Form.PRODUCT, (Dim(outer), Dim(dim.size // outer)))


def _shown(dim: Dim) -> str:
    return "an open number" if dim.size is None else str(dim.size)
