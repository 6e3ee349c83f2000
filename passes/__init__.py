"""The passes: one a file, listed here in the order of their stages."""

from edgec.passes.contract import (
    Context,
    Feeds,
    Pass,
    PassError,
    Progress,
    Result,
    Samples,
    Skip,
    Stage,
)

__all__ = [
    "Context",
    "Feeds",
    "Pass",
    "PassError",
    "Progress",
    "Result",
    "Samples",
    "Skip",
    "Stage",
]
