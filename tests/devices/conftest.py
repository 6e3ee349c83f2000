"""These tests may use the devices that are installed; each is skipped where its own is not."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _installed_devices() -> Iterator[None]:
    given = os.environ.get("EDGEC_TEST_DEVICES")
    with pytest.MonkeyPatch.context() as patch:
        if given is None:
            patch.delenv("EDGEC_DEVICES")
        else:
            patch.setenv("EDGEC_DEVICES", given)
        yield
