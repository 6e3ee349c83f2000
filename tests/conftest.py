"""Tests do not run bundles on emulated devices, unless they lie in tests/devices.

This runs again in every worker of pytest-xdist, which inherits what it set in the first process.
"""

from __future__ import annotations

import os
import tempfile

_GIVEN = os.environ.get("EDGEC_DEVICES")
_EMPTY = tempfile.gettempdir() + "/edgec-no-devices"

if _GIVEN != _EMPTY:  # not in a worker
    os.environ["EDGEC_DEVICES"] = _EMPTY
    if _GIVEN is not None:
        os.environ["EDGEC_TEST_DEVICES"] = _GIVEN  # for tests/devices
