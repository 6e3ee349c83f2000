"""The errors of edgec, one tree for the runtime and the compiler.

    EdgecError                    what a user can cause and mend; printed as one line, exit code 1
    ├── BundleError               the file: missing, truncated, altered, of an unknown format
    ├── TargetMismatchError       the bundle was built for another device
    ├── InputError                a feed: its name, dtype or shape
    └── AdapterError              an adapter: missing, damaged, or of another model

The compiler adds its own branches in ``edgec.errors``. Every message says what is wrong,
where, what was expected and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgecError(Exception):
    """Anything that a user of edgec can cause and mend."""


class BundleError(EdgecError):
    """The bundle file is missing, damaged or of a format that this runtime cannot read."""


class TargetMismatchError(EdgecError):
    """The bundle was built for another instruction set or operating system."""


class InputError(EdgecError):
    """An array given to a model has the wrong name, dtype or shape."""


class AdapterError(EdgecError):
    """An adapter is missing or damaged, or was made for another model."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the known word nearest to ``word``, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean '{near[0]}'?" if near else ""
