"""These tests may use the devices that are installed; each is skipped where its own is not."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _installed_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    given = os.environ.get("EDGEC_TEST_DEVICES")
    if given is None:
        monkeypatch.delenv("EDGEC_DEVICES")
    else:
        monkeypatch.setenv("EDGEC_DEVICES", given)
