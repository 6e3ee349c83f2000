"""The cubic schedule: much at first, while there is plenty to spare, then ever less.

    s_t = s_f - s_f (1 - t / n)^3

Zhu and Gupta 2017 (arXiv:1710.01878, section 3, equation 1, with s_i = 0): sparsity climbs to
its final share s_f over n steps. Shares of pruning rise so from round to round
(`edgec.rounds`), and the bits that a weight has too many fall so (`recover`).

Left out: an initial share, and other exponents.
"""

from __future__ import annotations

from edgec.passes.contract import PassError


def still_ahead(done: float) -> float:
    """(1 - done)^3: what is left of the way, 1 at the start and 0 from the end on.

    done: share of the steps, 0 or more.
    """
    return (1.0 - min(done, 1.0)) ** 3


def share_of_round(final: float, number: int, rounds: int) -> float:
    """The share after a round, rising to ``final``. number: 1 for the first of ``rounds``."""
    return final - final * still_ahead(number / rounds)


def check_rounds(name: str, rounds: int) -> None:
    """Raise PassError for a number of rounds that a pass cannot be carried out in."""
    if rounds < 1:
        raise PassError(f"{name}: rounds is {rounds}, expected 1 or more")
