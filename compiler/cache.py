"""The folder for what may be kept between builds, and be deleted at any time."""

from __future__ import annotations

import os
import pathlib
import sys


def user_cache() -> pathlib.Path:
    """$EDGEC_CACHE, or ``edgec`` in the user's cache folder; it need not exist."""
    given = os.environ.get("EDGEC_CACHE")
    if given:
        return pathlib.Path(given)
    if sys.platform == "win32":
        base = pathlib.Path(os.environ.get("LOCALAPPDATA") or pathlib.Path.home())
    elif sys.platform == "darwin":
        base = pathlib.Path.home() / "Library" / "Caches"
    else:
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return base / "edgec"
