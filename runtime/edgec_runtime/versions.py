"""Ranges of versions, as a bundle states for onnxruntime: ``>=1.27,<2``."""

from __future__ import annotations

import re

from edgec_runtime.errors import BundleError

_RANGE_TERM = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*(\d+(?:\.\d+)*)\s*")


def version_matches(version: str, wanted: str) -> bool:
    """Whether ``version`` lies in a range such as ``>=1.27,<2``.

    Only the numbers count: 1.32.0.dev1 is 1.32.0. Raises BundleError for another range.
    """
    installed = _numbers(re.match(r"\d+(?:\.\d+)*", version).group())  # type: ignore[union-attr]
    for term in wanted.split(","):
        match = _RANGE_TERM.fullmatch(term)
        if match is None:
            raise BundleError(f"'{wanted}' is not a version range; expected e.g. '>=1.27,<2'")
        operator, limit = match[1], _numbers(match[2])
        holds = {
            ">=": installed >= limit,
            "<=": installed <= limit,
            "==": installed == limit,
            "!=": installed != limit,
            ">": installed > limit,
            "<": installed < limit,
        }
        if not holds[operator]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    numbers = [int(number) for number in version.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
